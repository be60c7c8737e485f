//! Between the spans and the exporter: a bound on what waits, and one line in the log for what is lost.

use std::{
    error::Error,
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use opentelemetry::Context;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{Span, SpanData, SpanExporter, SpanProcessor},
};

/// How often the log says that spans are lost.
const REPEAT: Duration = Duration::from_mins(1);

/// What is waiting, and what was lost.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// Spans that ended and are neither exported nor lost.
    waiting: AtomicUsize,
    /// Spans that the log has not named as lost yet.
    lost: AtomicUsize,
    said: Mutex<Said>,
    /// Why the last request did not reach the endpoint: the exporter does not say.
    reason: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct Said {
    /// When the log last said that spans are lost.
    at: Option<Instant>,
    /// It has not said since that exports succeed.
    failing: bool,
}

impl Backlog {
    fn lose(&self, spans: usize) {
        self.lost.fetch_add(spans, Ordering::Relaxed);
    }

    fn succeeded(&self) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut said.failing) {
            let lost = self.lost.swap(0, Ordering::Relaxed);
            tracing::info!(lost, "traces are exported again");
        } else if self.lost.load(Ordering::Relaxed) > 0 {
            self.say(&mut said, "more spans ended than the endpoint takes");
        }
    }

    fn failed(&self, error: &OTelSdkError) {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = reason.unwrap_or_else(|| error.to_string());
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if self.say(&mut said, &reason) {
            said.failing = true;
        }
    }

    /// The first time, and then at most once a minute, whatever the endpoint does in between.
    fn say(&self, said: &mut Said, reason: &str) -> bool {
        let is_due = said.at.is_none_or(|at| at.elapsed() >= REPEAT);
        if is_due {
            said.at = Some(Instant::now());
            let lost = self.lost.swap(0, Ordering::Relaxed);
            tracing::warn!(lost, reason, "traces could not be exported");
        }
        is_due
    }

    /// At the end of the program.
    pub(super) fn end(&self) {
        let lost = self.lost.swap(0, Ordering::Relaxed) + self.waiting.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!(lost, reason = "the program ends", "traces could not be exported");
        }
    }
}

/// Lets at most so many spans wait: the others are lost, and cost nothing.
#[derive(Debug)]
pub(super) struct Bounded<P> {
    pub(super) inner: P,
    pub(super) backlog: Arc<Backlog>,
    pub(super) limit: usize,
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.backlog.waiting.fetch_add(1, Ordering::Relaxed) < self.limit {
            self.inner.on_end(span);
        } else {
            self.backlog.waiting.fetch_sub(1, Ordering::Relaxed);
            self.backlog.lose(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Counts and logs what the exporter could not send.
#[derive(Debug)]
pub(super) struct Counted<E> {
    pub(super) inner: E,
    pub(super) backlog: Arc<Backlog>,
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let exported = self.inner.export(batch).await;
        self.backlog.waiting.fetch_sub(spans, Ordering::Relaxed);
        match &exported {
            Ok(()) => self.backlog.succeeded(),
            Err(error) => {
                self.backlog.lose(spans);
                self.backlog.failed(error);
            }
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// The HTTP client. It follows no redirect, which would send the headers elsewhere, and remembers why a request failed.
pub(super) struct Client {
    http: reqwest::blocking::Client,
    backlog: Arc<Backlog>,
}

impl Client {
    /// Blocks for a moment: not for a thread of the runtime.
    pub(super) fn new(timeout: Duration, backlog: Arc<Backlog>) -> reqwest::Result<Self> {
        let http = reqwest::blocking::Client::builder()
            .timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self { http, backlog })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

type Sent<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl HttpClient for Client {
    fn send_bytes<'client, 'sent>(&'client self, request: Request<Bytes>) -> Sent<'sent>
    where
        'client: 'sent,
        Self: 'sent,
    {
        Box::pin(async move {
            let response = self.http.send_bytes(request).await;
            let reason = response.as_ref().err().map(|error| describe(&**error));
            *self.backlog.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason;
            response
        })
    }
}

/// Why a request failed, without its URL, which may have a key.
fn describe(error: &(dyn Error + Send + Sync + 'static)) -> String {
    let mut causes = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    if let Some(io) = causes.find_map(|cause| cause.downcast_ref::<io::Error>()) {
        return io.kind().to_string();
    }
    match error.downcast_ref::<reqwest::Error>() {
        Some(error) if error.is_timeout() => "no response in time".to_owned(),
        Some(error) if error.is_connect() => "no connection".to_owned(),
        Some(_) => "the response is not HTTP".to_owned(),
        None => "the response is too large".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{Span as _, Tracer, TracerProvider};
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;

    /// An exporter that is stuck: it counts what reaches it.
    #[derive(Debug)]
    struct Stuck(Arc<AtomicUsize>);

    impl SpanProcessor for Stuck {
        fn on_start(&self, _: &mut Span, _: &Context) {}
        fn on_end(&self, _: SpanData) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }
        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }

    #[derive(Debug)]
    struct Fails;

    impl SpanExporter for Fails {
        async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
            Err(OTelSdkError::InternalFailure("HTTP export failed with status code: 500".to_owned()))
        }
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_what_is_lost_is_counted() {
        let (backlog, reached) = (Arc::new(Backlog::default()), Arc::new(AtomicUsize::new(0)));
        let processor = Bounded { inner: Stuck(reached.clone()), backlog: backlog.clone(), limit: 3 };
        let provider = SdkTracerProvider::builder().with_span_processor(processor).build();
        let tracer = provider.tracer("test");
        let end_some = |spans: usize| (0..spans).for_each(|_| tracer.start("span").end());
        let counted = || {
            let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
            (count(&reached), count(&backlog.waiting), count(&backlog.lost))
        };
        end_some(5);
        assert_eq!(counted(), (3, 3, 2));
        // A failed export makes room, and loses what it had. The line in the log says how many were lost so far.
        let exporter = Counted { inner: Fails, backlog: backlog.clone() };
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keeper = SdkTracerProvider::builder().with_span_processor(Keeper(kept.clone())).build();
        keeper.tracer("test").start("span").end();
        let span = kept.lock().unwrap().pop().unwrap();
        assert!(exporter.export(vec![span.clone(), span.clone()]).await.is_err());
        assert_eq!(counted(), (3, 1, 0));
        // Within the minute there is no second line, so that the count goes on.
        assert!(exporter.export(vec![span]).await.is_err());
        assert_eq!(counted(), (3, 0, 1));
        end_some(4);
        assert_eq!(counted(), (6, 3, 2));
    }

    /// Keeps the spans.
    #[derive(Debug)]
    struct Keeper(Arc<Mutex<Vec<SpanData>>>);

    impl SpanProcessor for Keeper {
        fn on_start(&self, _: &mut Span, _: &Context) {}
        fn on_end(&self, span: SpanData) {
            self.0.lock().unwrap().push(span);
        }
        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }
        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }
}
