//! The operations: from the request to the response. `openapi.yaml` describes them.

use std::time::Duration;

use poem::{EndpointExt, Request, Response, Route, endpoint::BoxEndpoint, get, handler, web::Data};
use sqlx::PgPool;
use tokio::sync::OwnedSemaphorePermit;
use web::{
    conditional::Conditional,
    documentation,
    front::ConcurrencyLimit,
    methods::only,
    problem::{OVERLOADED, Problem},
};

use crate::{
    problems::UNKNOWN_PERSON,
    read_model::{entries, scores::Scores},
    request::{self, After},
    response,
    waiters::Waiters,
};

/// The document of the API.
pub(crate) const OPENAPI: &str = include_str!("../openapi.yaml");

/// What the operations share.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) scores: Scores,
    pub(crate) pool: PgPool,
    /// The limit of concurrent reads that wait for no write. `waiters` limits the others.
    pub(crate) limit: ConcurrencyLimit,
    pub(crate) waiters: Waiters,
    /// The longest wait for a write.
    pub(crate) max_wait: Duration,
}

/// Each path with its operations.
fn paths() -> [(&'static str, BoxEndpoint<'static, Response>); 2] {
    [
        ("/:cpf/score", only("GET, HEAD", get(read_score))),
        ("/:cpf/score/entries", only("GET, HEAD", get(read_entries))),
    ]
}

/// The operations, and their document beside them.
pub(crate) fn routes(api: &Api) -> Route {
    let routes = paths()
        .into_iter()
        .fold(Route::new(), |routes, (path, operations)| routes.at(path, operations.data(api.clone())));
    documentation::add_to(routes, "score-api", OPENAPI)
}

/// `GET /{cpf}/score`
#[handler]
async fn read_score(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let (cpf, after) = request::score(request, api.max_wait)?;
    let _slot = api.begin(after).await?;
    let score = api.scores.newest_person(cpf).await?.ok_or(&UNKNOWN_PERSON)?;
    response::score(&Conditional::of(request), &score)
}

/// `GET /{cpf}/score/entries`
#[handler]
async fn read_entries(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let (cpf, page, after) = request::entries(request, api.max_wait)?;
    let _slot = api.begin(after).await?;
    let conditional = Conditional::of(request);
    if conditional.may_need_no_body() {
        // One row, whatever the page has: it is read only when the state is a new one.
        let score = api.scores.newest_person(cpf).await?.ok_or(&UNKNOWN_PERSON)?;
        if let Some(same) = conditional.without_body(response::tag(&score)) {
            return Ok(same);
        }
    }
    let found = entries::entries(&api.pool, cpf, page).await?.ok_or(&UNKNOWN_PERSON)?;
    response::entries(&conditional, cpf, page, found)
}

impl Api {
    /// Waits until the read model contains the version in `after`. The score is read after that, in its own snapshot, so it
    /// may contain more, and never less.
    ///
    /// A read without `after` takes a slot of the limit instead.
    async fn begin(&self, after: Option<After>) -> Result<Option<OwnedSemaphorePermit>, Problem> {
        let Some(After { token, wait }) = after else {
            return Ok(Some(self.limit.try_acquire().ok_or(&OVERLOADED)?));
        };
        self.waiters.until_contained(token, wait).await?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use devstack::testing::Document;
    use poem::{
        Endpoint,
        http::{Method, StatusCode},
    };

    use super::*;

    #[tokio::test]
    async fn the_document_has_the_paths_and_methods_of_the_program_and_no_others() {
        let mut program = BTreeMap::new();
        for (path, operations) in paths() {
            // Without an `Api` an operation ends with an error; another method with a response.
            assert!(operations.call(Request::default()).await.is_err(), "{path}");
            let post = Request::builder().method(Method::POST).finish();
            let response = operations.call(post).await.unwrap();
            assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
            program.insert(path.to_owned(), response.header("allow").unwrap().to_owned());
        }
        assert_eq!(Document::new(documentation::json(OPENAPI).as_bytes()).operations(), program);
    }
}
