//! The operations: from the request to the answer. Each is declared and documented where it is handled.

use std::time::Duration;

use poem::{Request, Route};
use poem_openapi::OpenApi;
use service::{
    documentation::{self, Answer, Failure, Held, Sent},
    front::Gate,
    problem::OVERLOADED,
};
use sqlx::PgPool;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    answer::{self, Entries, Score},
    describe::Tag,
    problems::{ReadScore, UNKNOWN_PERSON},
    read_model::{entries, scores::Scores},
    request::{self, After, AfterEntry, Limit, PathCpf, Wait},
    token::Token,
    waiters::Waiters,
};

/// What the documentation begins with.
const ABOUT: &str = include_str!("api/about.md");

/// What answering takes.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) scores: Scores,
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
    /// Of the newest life of the cpf.
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
        let _place = self.begin(after).await?;
        let score = self.scores.newest_life(cpf).await?.ok_or(&UNKNOWN_PERSON)?;
        Ok(answer::score(request, &score)?)
    }

    /// Read how a score came about, page by page
    ///
    /// One entry for each of the person's items, in the order in which they came. The scores of all of them sum
    /// up to `score`, which is of the same state as the page. `next` leads from page to page; when another one
    /// has another `version`, the person has changed meanwhile, and whoever sums up begins again.
    #[oai(path = "/:cpf/score/entries", method = "get")]
    #[expect(clippy::too_many_arguments, reason = "one for each parameter that is documented")]
    async fn entries(
        &self,
        request: &Request,
        cpf: Sent<PathCpf>,
        limit: Sent<Limit>,
        after_entry: Sent<AfterEntry>,
        after: Sent<Token>,
        wait: Sent<Wait>,
        #[oai(name = "If-None-Match")] _held: Sent<Held>,
    ) -> Result<Answer<Entries>, Failure<ReadScore>> {
        let page = (limit, after_entry);
        let (cpf, page, after) = request::entries(request, cpf, page, (after, wait), self.max_wait)?;
        let _place = self.begin(after).await?;
        let found = entries::entries(&self.pool, cpf, page).await?.ok_or(&UNKNOWN_PERSON)?;
        Ok(answer::entries(request, cpf, page, found)?)
    }
}

impl Api {
    /// Waits until the read model contains what the reader asks for. Only then, in a snapshot of its own,
    /// the answer is read: it may contain more by then, and never less.
    ///
    /// A read that waits for nothing has a place among those that need the database instead.
    async fn begin(&self, after: Option<After>) -> Result<Option<OwnedSemaphorePermit>, Failure<ReadScore>> {
        let Some(After { token, wait }) = after else {
            return Ok(Some(self.gate.enter().ok_or(&OVERLOADED)?));
        };
        self.waiters.until_contained(token, wait).await?;
        Ok(None)
    }
}
