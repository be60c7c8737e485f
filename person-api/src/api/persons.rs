//! Persons.

use poem::{Body, Request, Response, handler, web::Data};
use web::{conditional::Conditional, problem::Problem};

use super::Api;
use crate::{
    answer,
    request::{self, JSON, MERGE_PATCH, NewPerson},
    store::{Refused, idempotency::Added},
};

/// `POST /person`
#[handler]
pub(super) async fn add(request: &Request, body: Body, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let body = request::body(request, body, JSON).await?;
    let (new, key) = NewPerson::parse(request, api.cpf_check, &body)?;
    let location = answer::location(new.cpf);
    let keyed = key.map(|key| key.of(request, "/person".to_owned(), &body));
    let added = api.write(move |store| {
        let (new, keyed) = (new.clone(), keyed.clone());
        async move { store.add_person(new, keyed).await }
    });
    match added.await?? {
        Added::Stored(written) => Ok(answer::created(&written, location)),
        Added::Before(answer) => Ok(answer::again(answer)),
        Added::Refused(refused) => Err(refused.into()),
    }
}

/// `GET /person/{cpf}`
#[handler]
pub(super) async fn read(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let (cpf, conditional) = (request::person(request)?, Conditional::of(request));
    if let Some(same) = api.without_body(&conditional, cpf).await? {
        return Ok(same);
    }
    let found = api.store.person(cpf).await?.ok_or(Refused::UnknownPerson)?;
    answer::found(&conditional, found)
}

/// `PATCH /person/{cpf}`
#[handler]
pub(super) async fn change(
    request: &Request,
    body: Body,
    Data(api): Data<&Api>,
) -> Result<Response, Problem> {
    let body = request::body(request, body, MERGE_PATCH).await?;
    let (cpf, states, patch) = request::patch(request, &body)?;
    let change = api.write(move |store| {
        let (states, patch) = (states.clone(), patch.clone());
        async move { store.change_person(cpf, states, patch).await }
    });
    Ok(answer::changed(&change.await???))
}

/// `DELETE /person/{cpf}`
#[handler]
pub(super) async fn delete(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let (cpf, states) = request::person_in_state(request)?;
    let written = api.write(move |store| {
        let states = states.clone();
        async move { store.delete_person(cpf, states).await }
    });
    Ok(answer::deleted(&written.await???))
}
