//! Items of a person. The three kinds differ in their paths, tables and events; what is done with them is the same.

use events::Kind;
use poem::{Body, Request, Response, handler, web::Data};
use web::{conditional::Conditional, problem::Problem};

use super::Api;
use crate::{
    answer,
    request::{self, Item, JSON, Page},
    store::{Change, Refused, idempotency::Added},
};

/// `POST /person/{cpf}/<kind>`
#[handler]
pub(super) async fn add(
    request: &Request,
    body: Body,
    Data(api): Data<&Api>,
    Data(&kind): Data<&Kind>,
) -> Result<Response, Problem> {
    let body = request::body(request, body, JSON).await?;
    let (whose, new, key) = Item::parse_new(request, kind, &body)?;
    let place = format!("{}/{kind}", answer::location(whose.0));
    let keyed = key.map(|key| key.of(request, place.clone(), &body));
    let location = place.clone();
    let added = api.write(move |store| {
        let (whose, new, place, keyed) = (whose.clone(), new.clone(), place.clone(), keyed.clone());
        async move { store.add_item(kind, whose, new, place, keyed).await }
    });
    match added.await?? {
        Added::Stored(written) => Ok(answer::created(&written, format!("{location}/{}", written.id))),
        Added::Before(answer) => Ok(answer::again(answer)),
        Added::Refused(refused) => Err(refused.into()),
    }
}

/// `GET /person/{cpf}/<kind>`
#[handler]
pub(super) async fn list(
    request: &Request,
    Data(api): Data<&Api>,
    Data(&kind): Data<&Kind>,
) -> Result<Response, Problem> {
    let ((cpf, page), conditional) = (Page::parse(request)?, Conditional::of(request));
    if let Some(same) = api.without_body(&conditional, cpf).await? {
        return Ok(same);
    }
    let listed = api.store.items(kind, cpf, page).await?.ok_or(Refused::UnknownPerson)?;
    answer::list(&conditional, cpf, kind, page, listed)
}

/// `GET /person/{cpf}/<kind>/{id}`
#[handler]
pub(super) async fn read(
    request: &Request,
    Data(api): Data<&Api>,
    Data(&kind): Data<&Kind>,
) -> Result<Response, Problem> {
    let (cpf, id) = request::item(request)?;
    answer::found(&Conditional::of(request), api.store.item(kind, cpf, id).await??)
}

/// `PUT /person/{cpf}/<kind>/{id}`
#[handler]
pub(super) async fn change(
    request: &Request,
    body: Body,
    Data(api): Data<&Api>,
    Data(&kind): Data<&Kind>,
) -> Result<Response, Problem> {
    let body = request::body(request, body, JSON).await?;
    let (place, states, item) = Item::parse(request, kind, &body)?;
    let change = api.write(move |store| {
        let (states, item) = (states.clone(), item.clone());
        async move { store.change_item(kind, place, states, item).await }
    });
    Ok(answer::changed(&change.await???))
}

/// `DELETE /person/{cpf}/<kind>/{id}`
#[handler]
pub(super) async fn delete(
    request: &Request,
    Data(api): Data<&Api>,
    Data(&kind): Data<&Kind>,
) -> Result<Response, Problem> {
    let (place, states) = request::item_in_state(request)?;
    let deleted = api.write(move |store| {
        let states = states.clone();
        async move { store.delete_item(kind, place, states).await }
    });
    let (Change::Changed(written) | Change::Unchanged(written)) = deleted.await???;
    Ok(answer::deleted(&written))
}
