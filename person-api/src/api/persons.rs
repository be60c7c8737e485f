//! Persons.

use poem_openapi::OpenApi;
use service::documentation::{Answer, Failure, Sent};

use super::Api;
use crate::{
    answer::{self, Created, Person},
    describe::NewPersonBody,
    problems::{AddPerson, CPF_EXISTS, Read, UNKNOWN_PERSON},
    request::{Body, NewPerson, PathCpf},
};

/// The operations on persons.
#[derive(Clone, Debug)]
pub(super) struct Persons(pub(super) Api);

#[OpenApi]
impl Persons {
    /// Create a person
    ///
    /// Event: `person.new`.
    #[oai(path = "/person", method = "post")]
    async fn add(&self, body: Body<NewPersonBody>) -> Result<Answer<Created>, Failure<AddPerson>> {
        let new = NewPerson::parse(&body.0)?;
        let (cpf, store) = (new.cpf, self.0.store.clone());
        let written = self.0.write(async move { store.add_person(new).await }).await??;
        let written = written.ok_or(&CPF_EXISTS)?;
        Ok(answer::created(&written, format!("/person/{}", cpf.get())))
    }

    /// Read a person with their items
    ///
    /// At most 1,000 of each kind; `truncated` names the lists that have more.
    #[oai(path = "/person/:cpf", method = "get")]
    async fn read(&self, cpf: Sent<PathCpf>) -> Result<Answer<Person>, Failure<Read>> {
        let found = match cpf.one()? {
            Some(PathCpf(cpf)) => self.0.store.person(cpf).await?,
            None => None,
        };
        Ok(answer::person(found.ok_or(&UNKNOWN_PERSON)?))
    }
}
