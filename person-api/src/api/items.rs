//! Items of a person. The three kinds differ in their paths, tables and events; what is done with them is the same.

use events::ItemKind;
use poem::{Body, Request, Response, handler, web::Data};
use web::{conditional::Conditional, problem::Problem};

use super::Api;
use crate::{
    request::{self, JSON},
    response,
    store::{AddOutcome, ChangeOutcome, Refusal},
};

/// `POST /person/{cpf}/<kind>`
#[handler]
pub(super) async fn add(
    request: &Request,
    body: Body,
    Data(api): Data<&Api>,
    Data(&kind): Data<&ItemKind>,
) -> Result<Response, Problem> {
    let body = request::body(request, body, JSON).await?;
    let (cpf, precondition, item, key) = request::new_item(request, kind, &body)?;
    let collection = format!("{}/{kind}", response::location(cpf));
    let idempotent = key.map(|key| key.of(request, collection.clone(), &body));
    let location = collection.clone();
    let added = api.write(move |store| {
        let (precondition, item) = (precondition.clone(), item.clone());
        let (collection, idempotent) = (collection.clone(), idempotent.clone());
        async move { store.add_item(kind, cpf, precondition, item, collection, idempotent).await }
    });
    match added.await?? {
        AddOutcome::Added(written) => Ok(response::created(&written, format!("{location}/{}", written.id))),
        AddOutcome::Repeated(stored) => Ok(response::repeated(stored)),
        AddOutcome::Refused(refusal) => Err(refusal.into()),
    }
}

/// `GET /person/{cpf}/<kind>`
#[handler]
pub(super) async fn list(
    request: &Request,
    Data(api): Data<&Api>,
    Data(&kind): Data<&ItemKind>,
) -> Result<Response, Problem> {
    let ((cpf, page), conditional) = (request::page(request)?, Conditional::of(request));
    if let Some(same) = api.without_body(&conditional, cpf).await? {
        return Ok(same);
    }
    let items = api.store.items(kind, cpf, page).await?.ok_or(Refusal::UnknownPerson)?;
    response::list(&conditional, cpf, kind, page, items)
}

/// `GET /person/{cpf}/<kind>/{id}`
#[handler]
pub(super) async fn read(
    request: &Request,
    Data(api): Data<&Api>,
    Data(&kind): Data<&ItemKind>,
) -> Result<Response, Problem> {
    let (cpf, id) = request::item(request)?;
    response::representation(&Conditional::of(request), api.store.item(kind, cpf, id).await??)
}

/// `PUT /person/{cpf}/<kind>/{id}`
#[handler]
pub(super) async fn change(
    request: &Request,
    body: Body,
    Data(api): Data<&Api>,
    Data(&kind): Data<&ItemKind>,
) -> Result<Response, Problem> {
    let body = request::body(request, body, JSON).await?;
    let (path, precondition, item) = request::changed_item(request, kind, &body)?;
    let change = api.write(move |store| {
        let (precondition, item) = (precondition.clone(), item.clone());
        async move { store.change_item(kind, path, precondition, item).await }
    });
    Ok(response::changed(&change.await???))
}

/// `DELETE /person/{cpf}/<kind>/{id}`
#[handler]
pub(super) async fn delete(
    request: &Request,
    Data(api): Data<&Api>,
    Data(&kind): Data<&ItemKind>,
) -> Result<Response, Problem> {
    let (path, precondition) = request::deleted_item(request)?;
    let deleted = api.write(move |store| {
        let precondition = precondition.clone();
        async move { store.delete_item(kind, path, precondition).await }
    });
    let (ChangeOutcome::Changed(written) | ChangeOutcome::Unchanged(written)) = deleted.await???;
    Ok(response::deleted(&written))
}
