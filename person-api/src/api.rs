//! The operations: parse, store, answer. Each is declared and documented where it is handled.

mod items;
mod persons;

use outbox::Waker;
use poem::Route;
use service::{documentation, problem::Problem};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use self::{
    items::{Items, OfKind},
    persons::Persons,
};
use crate::{
    kind::{Asset, Debt, Income},
    request::CpfCheck,
    store::{Store, StoreError},
};

/// What the documentation begins with.
const ABOUT: &str = include_str!("api/about.md");

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct Api {
    store: Store,
    waker: Waker,
    writes: TaskTracker,
    cpf_check: CpfCheck,
}

impl Api {
    /// Wakes the relay through `waker` after each write.
    pub fn new(store: Store, waker: Waker) -> Self {
        Self { store, waker, writes: TaskTracker::new(), cpf_check: CpfCheck::Off }
    }

    /// Looks at a new person's cpf as told.
    #[must_use]
    pub fn checking(self, cpf_check: CpfCheck) -> Self {
        Self { cpf_check, ..self }
    }

    /// The API's own routes, and their documentation.
    pub fn routes(&self) -> Route {
        let items = (
            OfKind(Items::<Income>::new(self.clone())),
            OfKind(Items::<Asset>::new(self.clone())),
            OfKind(Items::<Debt>::new(self.clone())),
        );
        documentation::routes((Persons(self.clone()), items), "person-api", ABOUT)
    }

    /// Waits for the writes that are under way. Call when no request is answered any more.
    pub async fn finish(&self) {
        self.writes.close();
        self.writes.wait().await;
    }

    /// Runs a write to its end, on a task of its own: a client that hangs up drops its handler, and must
    /// not leave a connection in the middle of a statement.
    async fn write<T: Send + 'static>(
        &self,
        write: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<Result<T, StoreError>, Problem> {
        let waker = self.waker.clone();
        // What it logs says of which request.
        let write = write.in_current_span();
        let write = self.writes.spawn(async move {
            let written = write.await;
            // Also when nothing was written: that is rare, and costs a look.
            if written.is_ok() {
                waker.wake();
            }
            written
        });
        write.await.map_err(|error| {
            tracing::error!(panicked = error.is_panic(), "a write did not end");
            Problem::internal()
        })
    }
}
