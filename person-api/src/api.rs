//! The routes and their handlers: parse, store, answer.

use std::{sync::Arc, time::Duration};

use events::{Cpf, Kind};
use outbox::Waker;
use poem::{
    Endpoint, EndpointExt, IntoEndpoint, Request, Response, Route, RouteMethod,
    endpoint::make,
    error::MethodNotAllowedError,
    http::{HeaderValue, StatusCode, header},
};
use service::problem::{FieldError, Problem};
use tokio_util::task::TaskTracker;

use crate::{
    answer,
    request::{NewItem, NewPerson},
    store::{Store, StoreError, Written},
};

/// The largest body that is read.
const BODY_MAX: usize = 64 * 1024;
/// How long a client may take to send it.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct Api {
    store: Store,
    waker: Waker,
    writes: TaskTracker,
}

impl Api {
    /// Wakes the relay through `waker` after each write.
    pub fn new(store: Store, waker: Waker) -> Self {
        Self { store, waker, writes: TaskTracker::new() }
    }

    /// The API's own routes.
    pub fn routes(&self) -> Route {
        let api = Arc::new(self.clone());
        let add_person = {
            let api = Arc::clone(&api);
            make(move |request| Arc::clone(&api).add_person(request))
        };
        let add_item = |kind| {
            let api = Arc::clone(&api);
            make(move |request| Arc::clone(&api).add_item(kind, request))
        };
        let person = {
            let api = Arc::clone(&api);
            make(move |request| Arc::clone(&api).person(request))
        };
        Route::new()
            .at("/person", only("POST", RouteMethod::new().post(add_person)))
            .at("/person/:cpf", only("GET, HEAD", RouteMethod::new().get(person)))
            .at("/person/:cpf/income", only("POST", RouteMethod::new().post(add_item(Kind::Income))))
            .at("/person/:cpf/asset", only("POST", RouteMethod::new().post(add_item(Kind::Asset))))
            .at("/person/:cpf/debt", only("POST", RouteMethod::new().post(add_item(Kind::Debt))))
    }

    /// Waits for the writes that are under way. Call when no request is answered any more.
    pub async fn finish(&self) {
        self.writes.close();
        self.writes.wait().await;
    }

    async fn add_person(self: Arc<Self>, mut request: Request) -> Result<Response, Problem> {
        let new = NewPerson::parse(&json_body(&mut request).await?)?;
        let cpf = new.cpf;
        let store = self.store.clone();
        let written = self.write(async move { store.add_person(new).await }).await?;
        let written = written.ok_or_else(answer::cpf_exists)?;
        Ok(answer::created(&written, answer::location(cpf)))
    }

    async fn add_item(self: Arc<Self>, kind: Kind, mut request: Request) -> Result<Response, Problem> {
        let body = json_body(&mut request).await?;
        let (cpf, new) = NewItem::parse(kind, path_cpf(&request), &body)?;
        let store = self.store.clone();
        let written = self.write(async move { store.add_item(cpf, new).await }).await?;
        let written = written.ok_or_else(answer::unknown_person)?;
        Ok(answer::created(&written, format!("{}/{kind}/{}", answer::location(cpf), written.id)))
    }

    async fn person(self: Arc<Self>, request: Request) -> Result<Response, Problem> {
        let cpf = path_cpf(&request).map_err(|error| Problem::invalid(vec![error]))?;
        let found = self.store.person(cpf).await?.ok_or_else(answer::unknown_person)?;
        Ok(answer::person(found))
    }

    /// Runs a write to its end, on a task of its own: a client that hangs up drops its handler, and must
    /// not leave a connection in the middle of a statement.
    async fn write(
        &self,
        write: impl Future<Output = Result<Option<Written>, StoreError>> + Send + 'static,
    ) -> Result<Option<Written>, Problem> {
        let waker = self.waker.clone();
        let write = self.writes.spawn(async move {
            let written = write.await;
            if matches!(written, Ok(Some(_))) {
                waker.wake();
            }
            written
        });
        match write.await {
            Ok(written) => Ok(written?),
            Err(error) => {
                tracing::error!(panicked = error.is_panic(), "a write did not end");
                Err(Problem::internal())
            }
        }
    }
}

/// Adds `Allow` to the answer to other methods, which poem leaves out.
fn only(
    allow: &'static str,
    methods: RouteMethod,
) -> impl IntoEndpoint<Endpoint: Endpoint<Output = Response>> {
    methods.catch_error(move |error: MethodNotAllowedError| async move {
        let mut response = Problem::from_error(error.into());
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
        response
    })
}

fn path_cpf(request: &Request) -> Result<Cpf, FieldError> {
    let text: Option<String> = request.path_params().ok();
    text.and_then(|text| text.parse().ok()).ok_or(FieldError {
        pointer: "path: cpf".into(),
        detail: "must be a positive integer of at most 11 digits".into(),
    })
}

/// The body, when it says that it is JSON. The limit holds for what is read, whatever the headers say.
async fn json_body(request: &mut Request) -> Result<Vec<u8>, Problem> {
    let media_type = request.content_type().and_then(|value| value.split(';').next()).unwrap_or_default();
    if !media_type.trim().eq_ignore_ascii_case("application/json") {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported-media-type",
            "Unsupported Media Type",
            "Send the body as `Content-Type: application/json`.",
        ));
    }
    let body = request.take_body().into_bytes_limit(BODY_MAX);
    match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.into()),
        Ok(Err(poem::error::ReadBodyError::PayloadTooLarge)) => Err(Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too-large",
            "Payload Too Large",
            "The request's body is larger than 64 KiB.",
        )),
        Ok(Err(_)) => Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "incomplete-body",
            "Incomplete body",
            "The request's body broke off.",
        )),
        Err(_) => Err(Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            "slow-body",
            "Request Timeout",
            "The request's body did not arrive in time.",
        )),
    }
}
