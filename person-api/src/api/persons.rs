//! Persons.

use poem::{Body, Request, Response, handler, web::Data};
use web::{conditional::Conditional, problem::Problem};

use super::Api;
use crate::{
    request::{self, JSON, MERGE_PATCH},
    response,
    store::{AddOutcome, Refusal},
};

/// `POST /person`
#[handler]
pub(super) async fn add(request: &Request, body: Body, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let body = request::body(request, body, JSON).await?;
    let (new, key) = request::new_person(request, api.cpf_check, &body)?;
    let location = response::location(new.cpf);
    let idempotent = key.map(|key| key.of(request, "/person".to_owned(), &body));
    let added = api.write(move |store| {
        let (new, idempotent) = (new.clone(), idempotent.clone());
        async move { store.add_person(new, idempotent).await }
    });
    match added.await?? {
        AddOutcome::Added(written) => Ok(response::created(&written, location)),
        AddOutcome::Repeated(stored) => Ok(response::repeated(stored)),
        AddOutcome::Refused(refusal) => Err(refusal.into()),
    }
}

/// `GET /person/{cpf}`
#[handler]
pub(super) async fn read(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let (cpf, conditional) = (request::person(request)?, Conditional::of(request));
    if let Some(same) = api.without_body(&conditional, cpf).await? {
        return Ok(same);
    }
    let found = api.store.person(cpf).await?.ok_or(Refusal::UnknownPerson)?;
    response::representation(&conditional, found)
}

/// `PATCH /person/{cpf}`
#[handler]
pub(super) async fn change(
    request: &Request,
    body: Body,
    Data(api): Data<&Api>,
) -> Result<Response, Problem> {
    let body = request::body(request, body, MERGE_PATCH).await?;
    let (cpf, precondition, patch) = request::patch(request, &body)?;
    let change = api.write(move |store| {
        let (precondition, patch) = (precondition.clone(), patch.clone());
        async move { store.change_person(cpf, precondition, patch).await }
    });
    Ok(response::changed(&change.await???))
}

/// `DELETE /person/{cpf}`
#[handler]
pub(super) async fn delete(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let (cpf, precondition) = request::deleted_person(request)?;
    let written = api.write(move |store| {
        let precondition = precondition.clone();
        async move { store.delete_person(cpf, precondition).await }
    });
    Ok(response::deleted(&written.await???))
}
