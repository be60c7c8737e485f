//! The operations: from the request to the answer. Each is declared and documented where it is handled.

use std::time::Duration;

use poem::{Request, Route};
use poem_openapi::OpenApi;
use service::{
    documentation::{self, Answer, Failure, Sent},
    front::{Gate, HungUp},
    problem::OVERLOADED,
};
use sqlx::PgPool;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    answer::{self, Score},
    describe::Tag,
    problems::{ReadScore, UNKNOWN_PERSON},
    read_model,
    request::{self, After, Held, PathCpf, Wait},
    token::Token,
    waiters::{Missed, Waiters},
};

/// What the documentation begins with.
const ABOUT: &str = include_str!("api/about.md");

/// What answering takes.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) pool: PgPool,
    /// For reads that do not wait for a write: those that do are as many as there are places for them.
    pub(crate) gate: Gate,
    pub(crate) waiters: Waiters,
    /// How long a reader may wait.
    pub(crate) max_wait: Duration,
}

/// The operations, and their documentation.
pub(crate) fn routes(api: Api) -> Route {
    documentation::routes(api, "score-api", ABOUT)
}

#[OpenApi(tag = "Tag::Scores")]
impl Api {
    /// Read a person's score
    ///
    /// Of the newest life of the cpf. Answers HEAD, too.
    #[oai(path = "/:cpf/score", method = "get")]
    async fn score(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        after: Sent<Token>,
        wait: Sent<Wait>,
        #[oai(name = "If-None-Match")] _held: Sent<Held>,
    ) -> Result<Answer<Score>, Failure<ReadScore>> {
        let (cpf, after) = request::score(request, cpf, (after, wait), self.max_wait)?;
        let _place = self.begin(request, after).await?;
        let score = read_model::newest_life(&self.pool, cpf).await?.ok_or(&UNKNOWN_PERSON)?;
        Ok(answer::score(request, &score)?)
    }
}

impl Api {
    /// Waits until the read model contains what the reader asks for. Only then, in a snapshot of its own,
    /// the answer is read: it may contain more by then, and never less.
    ///
    /// A read that waits for nothing has a place among those that need the database instead.
    async fn begin(
        &self,
        request: &Request,
        after: Option<After>,
    ) -> Result<Option<OwnedSemaphorePermit>, Failure<ReadScore>> {
        let Some(After { token, wait }) = after else {
            return Ok(Some(self.gate.enter().ok_or(&OVERLOADED)?));
        };
        let contained = tokio::select! {
            contained = self.waiters.until_contained(token, wait) => contained,
            () = hung_up(request) => Err(Missed::HungUp),
        };
        contained?;
        Ok(None)
    }
}

async fn hung_up(request: &Request) {
    match HungUp::of(request) {
        Some(client) => client.happened().await,
        None => std::future::pending().await,
    }
}
