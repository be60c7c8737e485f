//! Traces to an OpenTelemetry collector (OTLP), by OpenTelemetry's own variables. Without an endpoint nothing is started
//! and nothing is paid.
//!
//! Spans are made with OpenTelemetry's interface, and not from the spans of `tracing`: the log's level does not switch
//! them off, their attributes stay out of the log, and a span of the past can be made when it is known what became of it.

mod export;
mod sampler;
mod settings;

use std::{
    borrow::Cow,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    context::FutureExt,
    global,
    trace::{SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_otlp::{RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider},
};
use tokio_util::sync::CancellationToken;

use self::{
    export::{Backlog, Bounded, Client, Counted},
    sampler::FollowLinks,
    settings::{Protocol, Settings, environment},
};
use crate::config::SettingError;

/// The semantic conventions that the spans follow.
pub const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.38.0";

static TRACER: OnceLock<SdkTracer> = OnceLock::new();
static IGNORES_CALLERS: AtomicBool = AtomicBool::new(false);

/// The tracer; none where traces are not exported.
pub fn tracer() -> Option<&'static SdkTracer> {
    TRACER.get()
}

/// The span that a `traceparent` of a caller names. None where callers are ignored (`OTEL_PROPAGATORS=none`).
pub fn caller(traceparent: &str) -> Option<SpanContext> {
    if IGNORES_CALLERS.load(Ordering::Relaxed) { None } else { outbox::trace::remote(traceparent) }
}

/// The trace and the span of the current context, as a log shows them.
pub fn current() -> Option<(String, String)> {
    Context::map_current(|context| shown(context.span().span_context()))
}

/// The trace and the span of a context, as a log shows them; none outside of a trace.
pub fn shown(span: &SpanContext) -> Option<(String, String)> {
    span.is_valid().then(|| (span.trace_id().to_string(), span.span_id().to_string()))
}

/// The export of traces, which has to be ended.
#[derive(Debug, Default)]
pub struct Traces(Option<Running>);

#[derive(Debug)]
struct Running {
    provider: SdkTracerProvider,
    backlog: Arc<Backlog>,
}

/// Checks the variables, and starts nothing.
pub fn check(program: &'static str) -> Result<(), SettingError> {
    Settings::read(program, &environment).map(drop)
}

/// Starts the export for the whole process, as the variables say; call once, within the runtime.
pub fn start(program: &'static str) -> anyhow::Result<Traces> {
    let Some(settings) = Settings::read(program, &environment)? else { return Ok(Traces::default()) };
    let backlog = Arc::new(Backlog::default());
    let exporter = Counted { inner: exporter(&settings, &backlog)?, backlog: backlog.clone() };
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(settings.queue)
        .with_max_export_batch_size(settings.batch)
        .with_scheduled_delay(settings.delay)
        .build();
    let processor = BatchSpanProcessor::new(exporter, config);
    let processor = Bounded { inner: processor, backlog: backlog.clone(), limit: settings.queue };
    let builder =
        SdkTracerProvider::builder().with_span_processor(processor).with_resource(resource(&settings));
    let builder = if settings.parent_based {
        builder.with_sampler(FollowLinks(settings.sampler.clone()))
    } else {
        builder.with_sampler(settings.sampler.clone())
    };
    let provider = builder.build();
    let scope = InstrumentationScope::builder(program)
        .with_version(env!("CARGO_PKG_VERSION"))
        .with_schema_url(SCHEMA_URL)
        .build();
    if TRACER.set(provider.tracer_with_scope(scope)).is_err() {
        return Err(anyhow!("traces were started already"));
    }
    IGNORES_CALLERS.store(!settings.propagate, Ordering::Relaxed);
    global::set_tracer_provider(provider.clone());
    let (endpoint, protocol) = (settings.address(), settings.protocol.to_string());
    let sampler = format!("{:?}", settings.sampler);
    tracing::info!(endpoint, protocol, sampler, service = settings.service, "traces are exported");
    Ok(Traces(Some(Running { provider, backlog })))
}

fn resource(settings: &Settings) -> Resource {
    let attributes =
        settings.attributes.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    Resource::builder()
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()))
        .with_attributes(attributes)
        .with_service_name(settings.service.clone())
        .build()
}

/// It does not retry: what waits meanwhile would be lost instead, and the next batch is the next try.
fn exporter(settings: &Settings, backlog: &Arc<Backlog>) -> anyhow::Result<SpanExporter> {
    let Settings { endpoint, timeout, .. } = settings;
    let built = match settings.protocol {
        Protocol::Grpc => {
            let mut builder = SpanExporter::builder()
                .with_tonic()
                .with_endpoint(endpoint.as_str())
                .with_timeout(*timeout)
                .with_retry_policy(RetryPolicy::disabled());
            if endpoint.scheme() == "https" {
                let tls = tonic::transport::ClientTlsConfig::new().with_native_roots();
                builder = builder.with_tls_config(tls);
            }
            builder.build()
        }
        Protocol::HttpProtobuf => {
            let (timeout, backlog) = (*timeout, backlog.clone());
            // The client has a runtime of its own, which cannot be made on a thread of ours.
            let client = std::thread::spawn(move || Client::new(timeout, backlog)).join();
            let client = client.map_err(|_| anyhow!("the client of the exporter could not be started"))?;
            SpanExporter::builder()
                .with_http()
                .with_http_client(client.context("the client of the exporter could not be started")?)
                .with_endpoint(endpoint.as_str())
                .with_timeout(timeout)
                .with_retry_policy(RetryPolicy::disabled())
                .build()
        }
    };
    // The settings were checked, so that it names none of them.
    Ok(built.map_err(|error| SettingError::new("OTEL_EXPORTER_OTLP_ENDPOINT", error))?)
}

impl Traces {
    /// Does the program's work, then exports what is left, within what the work has left of `drain` since the end was
    /// requested.
    pub async fn during<T>(
        self,
        requested: CancellationToken,
        drain: Duration,
        work: impl Future<Output = T>,
    ) -> T {
        let Some(Running { provider, backlog }) = self.0 else { return work.await };
        let since = tokio::spawn(async move {
            requested.cancelled().await;
            Instant::now()
        });
        let done = work.await;
        // A program that failed was not asked to end.
        let since = if since.is_finished() { since.await.ok() } else { None };
        let left = drain.saturating_sub(since.map_or(Duration::ZERO, |since| since.elapsed()));
        let ended = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(left));
        if ended.await.is_err() {
            tracing::debug!("the export of traces did not end");
        }
        backlog.end();
        done
    }
}

/// Runs a statement within a span of its own, as a child of the current one, by the conventions for database clients.
/// `failure` names the class of an error. A statement outside of a sampled trace has no span.
pub async fn statement<T, E>(
    operation: &'static str,
    table: &'static str,
    work: impl Future<Output = Result<T, E>>,
    failure: impl FnOnce(&E) -> Cow<'static, str>,
) -> Result<T, E> {
    let parent = Context::current();
    let Some(tracer) = tracer().filter(|_| parent.span().is_recording()) else { return work.await };
    let summary = format!("{operation} {table}");
    let attributes = [
        KeyValue::new("db.system.name", "postgresql"),
        KeyValue::new("db.operation.name", operation),
        KeyValue::new("db.collection.name", table),
        KeyValue::new("db.query.summary", summary.clone()),
    ];
    let builder = tracer.span_builder(summary).with_kind(SpanKind::Client).with_attributes(attributes);
    let context = parent.with_span(tracer.build_with_context(builder, &parent));
    let done = work.with_context(context.clone()).await;
    if let Err(error) = &done {
        let span = context.span();
        span.set_attribute(KeyValue::new("error.type", text(failure(error))));
        span.set_status(Status::error(""));
    }
    context.span().end();
    done
}

/// A text for an attribute.
pub fn text(text: impl Into<Cow<'static, str>>) -> opentelemetry::Value {
    opentelemetry::Value::String(text.into().into())
}
