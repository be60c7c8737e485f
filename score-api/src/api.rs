//! `GET /{cpf}/score`: from the request to the answer.

use std::time::Duration;

use poem::{EndpointExt, Request, Response, Route, get, handler, web::Data};
use service::{problem::Problem, shutdown::HungUp};
use sqlx::PgPool;

use crate::{
    answer::{self, RETRY_AFTER},
    read_model::{self, ReadError},
    request::{self, After},
    waiters::{Missed, Waiters},
};

/// What answering takes.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) pool: PgPool,
    pub(crate) waiters: Waiters,
    /// How long a reader may wait.
    pub(crate) max_wait: Duration,
}

pub(crate) fn routes(api: Api) -> Route {
    Route::new().at("/:cpf/score", get(score).catch_error(answer::method_not_allowed).data(api))
}

#[handler]
async fn score(request: &Request, Data(api): Data<&Api>) -> Result<Response, Problem> {
    let asked = request::parse(request, api.max_wait)?;
    // First that the read model contains the write, and only then, in a snapshot of its own, the score:
    // it may contain more by then, and never less.
    if let Some(After { token, wait }) = asked.after {
        let contained = tokio::select! {
            contained = api.waiters.until_contained(token, wait) => contained,
            () = hung_up(request) => Err(Missed::HungUp),
        };
        if let Err(missed) = contained {
            return answer::missed(missed);
        }
    }
    match read_model::newest_life(&api.pool, asked.cpf).await {
        Ok(Some(score)) => answer::found(request, &score),
        Ok(None) => Err(answer::unknown_person()),
        Err(ReadError::Unavailable) => Err(Problem::unavailable(RETRY_AFTER)),
        Err(ReadError::Defect(error)) => {
            tracing::error!(%error, "the score could not be read");
            Err(Problem::internal())
        }
    }
}

async fn hung_up(request: &Request) {
    match HungUp::of(request) {
        Some(client) => client.happened().await,
        None => std::future::pending().await,
    }
}
