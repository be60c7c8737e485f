//! The operations: parse, store, respond. `openapi.yaml` describes them.

mod items;
mod persons;

use daemon::config::database::Failure;
use events::{Cpf, ItemKind};
use opentelemetry::context::FutureExt;
use outbox::{Waker, database::Attempts};
use poem::{EndpointExt, Response, Route, endpoint::BoxEndpoint, get, post};
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use web::{conditional::Conditional, documentation, methods::only, problem::Problem};

use crate::{
    request::CpfCheck,
    response,
    store::{Refusal, Store, StoreError, write_health::WriteHealth},
};

/// The document of the API.
pub const OPENAPI: &str = include_str!("../openapi.yaml");

/// Each path with what is done there.
fn paths() -> Vec<(String, BoxEndpoint<'static, Response>)> {
    let person = get(persons::read).patch(persons::change).delete(persons::delete);
    let mut paths = vec![
        ("/person".to_owned(), only("POST", post(persons::add))),
        ("/person/:cpf".to_owned(), only("DELETE, GET, HEAD, PATCH", person)),
    ];
    for kind in [ItemKind::Income, ItemKind::Asset, ItemKind::Debt] {
        let (all, one) = (format!("/person/:cpf/{kind}"), format!("/person/:cpf/{kind}/:id"));
        let items = get(items::list).post(items::add);
        let item = get(items::read).put(items::change).delete(items::delete);
        paths.push((all, only("GET, HEAD, POST", items.data(kind))));
        paths.push((one, only("DELETE, GET, HEAD, PUT", item.data(kind))));
    }
    paths
}

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct Api {
    store: Store,
    waker: Waker,
    writes: TaskTracker,
    cpf_check: CpfCheck,
    write_health: WriteHealth,
}

impl Api {
    /// Wakes the relay through `waker` after each write.
    pub fn new(store: Store, waker: Waker) -> Self {
        Self {
            store,
            waker,
            writes: TaskTracker::new(),
            cpf_check: CpfCheck::Off,
            write_health: WriteHealth::default(),
        }
    }

    /// Sets how strictly a new person's cpf is checked.
    #[must_use]
    pub fn checking(self, cpf_check: CpfCheck) -> Self {
        Self { cpf_check, ..self }
    }

    /// Whether the database stores its writes.
    pub(crate) fn write_health(&self) -> WriteHealth {
        self.write_health.clone()
    }

    /// The API's own routes, and its document beside them.
    pub fn routes(&self) -> Route {
        let routes = paths()
            .into_iter()
            .fold(Route::new(), |routes, (path, operations)| routes.at(path, operations.data(self.clone())));
        documentation::add_to(routes, "person-api", OPENAPI)
    }

    /// Waits for the writes that are under way. Call it after the last response.
    pub async fn finish(&self) {
        self.writes.close();
        self.writes.wait().await;
    }

    /// The response that needs no body, where the caller has the person's state already or asks for the headers
    /// alone. It costs one row, whatever the person has.
    async fn without_body(&self, conditional: &Conditional, cpf: Cpf) -> Result<Option<Response>, Problem> {
        if !conditional.may_need_no_body() {
            return Ok(None);
        }
        let (id, version) = self.store.state(cpf).await?.ok_or(Refusal::UnknownPerson)?;
        Ok(conditional.without_body(response::tag(id, version)))
    }

    /// Runs a write to its end, on a task of its own: a client that hangs up drops its handler, and must
    /// not leave a connection in the middle of a statement. What the server rolled back in favour of another
    /// transaction is tried again.
    async fn write<T: Send + 'static, W: Future<Output = Result<T, StoreError>> + Send + 'static>(
        &self,
        mut write: impl FnMut(Store) -> W + Send + 'static,
    ) -> Result<Result<T, StoreError>, Problem> {
        let (waker, health, store) = (self.waker.clone(), self.write_health.clone(), self.store.clone());
        let write = async move {
            let mut attempts = Attempts::default();
            loop {
                let written = write(store.clone()).await;
                let conflict = matches!(written, Err(StoreError::Unavailable(Failure::Conflict, _)));
                if !conflict || !attempts.again().await {
                    return written;
                }
            }
        };
        // What it logs says of which request, and its event belongs to the request's trace.
        let write = write.in_current_span().with_current_context();
        let write = self.writes.spawn(async move {
            let written = write.await;
            health.record(&written);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use devstack::testing::Document;
    use poem::{
        Endpoint, Request,
        http::{Method, StatusCode, header},
    };

    use super::*;

    #[tokio::test]
    async fn the_document_has_the_paths_and_methods_of_the_program_and_no_others() {
        let mut program = BTreeMap::new();
        for (path, operations) in paths() {
            let mut allowed = Vec::new();
            let mut said = None;
            for method in
                [Method::DELETE, Method::GET, Method::HEAD, Method::PATCH, Method::POST, Method::PUT]
            {
                let request = Request::builder().method(method.clone()).finish();
                // Without an `Api` an operation ends with an error of another kind.
                match operations.call(request).await {
                    Ok(response) if response.status() == StatusCode::METHOD_NOT_ALLOWED => {
                        said = response.headers().get(header::ALLOW).cloned();
                    }
                    _ => allowed.push(method.to_string()),
                }
            }
            let allowed = allowed.join(", ");
            assert_eq!(said.unwrap(), allowed, "{path}");
            program.insert(path, allowed);
        }
        assert_eq!(Document::new(documentation::json(OPENAPI).as_bytes()).operations(), program);
    }
}
