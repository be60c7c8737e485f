//! Persons.

use poem::Request;
use poem_openapi::OpenApi;
use service::documentation::{Answer, Failure, Held, Sent};

use super::Api;
use crate::{
    answer::{self, Changed, Created, Deleted, Person},
    describe::{NewPersonBody, PatchBody, Tag},
    problems::{AddPerson, ChangePerson, DeletePerson, ReadPerson},
    request::{self, Body, IdempotencyKey, IfMatch, NewPerson, PathCpf},
    store::{Refused, idempotency::Added},
};

/// The operations on persons.
#[derive(Clone, Debug)]
pub(super) struct Persons(pub(super) Api);

#[OpenApi(tag = "Tag::Persons")]
impl Persons {
    /// Create a person
    ///
    /// Event: `person.new`.
    #[oai(path = "/person", method = "post")]
    async fn add(
        &self,
        request: &Request,
        #[oai(name = "Idempotency-Key")] key: Sent<IdempotencyKey>,
        body: Body<NewPersonBody>,
    ) -> Result<Answer<Created>, Failure<AddPerson>> {
        let (new, key) = NewPerson::parse(request, self.0.cpf_check, key, &body.0)?;
        let location = answer::location(new.cpf);
        let keyed = key.map(|key| key.of(request, "/person".to_owned(), &body.0));
        let store = self.0.store.clone();
        match self.0.write(async move { store.add_person(new, keyed).await }).await?? {
            Added::Stored(written) => Ok(answer::created(&written, location)),
            Added::Before(answer) => Ok(answer::again(answer)),
            Added::Refused(refused) => Err(refused.into()),
        }
    }

    /// Read a person with their items
    ///
    /// At most 1,000 of each kind; `truncated` names the lists that have more, which are read page by page.
    #[oai(path = "/person/:cpf", method = "get")]
    async fn read(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        #[oai(name = "If-None-Match")] _held: Sent<Held>,
    ) -> Result<Answer<Person>, Failure<ReadPerson>> {
        let (cpf, _) = request::person(request, cpf, None)?;
        let found = self.0.store.person(cpf).await?.ok_or(Refused::UnknownPerson)?;
        Ok(answer::person(request, found)?)
    }

    /// Change a person
    ///
    /// A merge patch (RFC 7396): what is not given stays, `null` clears the address. Event: `person.changed`,
    /// unless everything was so already.
    #[oai(path = "/person/:cpf", method = "patch")]
    async fn change(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        #[oai(name = "If-Match")] if_match: Sent<IfMatch>,
        body: Body<PatchBody>,
    ) -> Result<Answer<Changed>, Failure<ChangePerson>> {
        let (cpf, states, patch) = request::patch(request, cpf, if_match, &body.0)?;
        let store = self.0.store.clone();
        let change = self.0.write(async move { store.change_person(cpf, states, patch).await }).await???;
        Ok(answer::changed(&change))
    }

    /// Delete a person
    ///
    /// And erase them: their items, kept answers, and the content of their events, published or not, go in the
    /// same transaction. Event: `person.deleted`, with the id alone, and none for each item. The cpf may be
    /// created again; that is another life, with another id.
    #[oai(path = "/person/:cpf", method = "delete")]
    async fn delete(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        #[oai(name = "If-Match")] if_match: Sent<IfMatch>,
    ) -> Result<Answer<Deleted>, Failure<DeletePerson>> {
        let (cpf, states) = request::person(request, cpf, Some(if_match))?;
        let store = self.0.store.clone();
        let written = self.0.write(async move { store.delete_person(cpf, states).await }).await???;
        Ok(answer::deleted(&written))
    }
}
