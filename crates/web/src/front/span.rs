//! The span of a request, by the conventions for HTTP servers. Without path, query, address and agent of the client: they
//! are personal.

use daemon::traces::{self, text};
use opentelemetry::{
    Context, KeyValue,
    trace::{SpanKind, Status, TraceContextExt, Tracer},
};
use poem::{Request, http::Version};

/// The context of a request: its span, or where traces are not exported, the client's.
pub(super) struct ServerSpan(Context);

impl ServerSpan {
    /// None where there is no trace at all.
    pub(super) fn start(method: &'static str, request: &Request) -> Option<Self> {
        let mut sent = request.headers().get_all("traceparent").iter();
        let caller = match (sent.next(), sent.next()) {
            (Some(sent), None) => sent.to_str().ok().and_then(traces::caller),
            _ => None,
        };
        let parent = || match caller.clone() {
            Some(caller) => Context::new().with_remote_span_context(caller),
            None => Context::new(),
        };
        let Some(tracer) = traces::tracer() else { return caller.is_some().then(|| Self(parent())) };
        let mut attributes =
            vec![KeyValue::new("http.request.method", known(method)), KeyValue::new("url.scheme", "http")];
        let version = match request.version() {
            Version::HTTP_10 => Some("1.0"),
            Version::HTTP_11 => Some("1.1"),
            Version::HTTP_2 => Some("2"),
            _ => None,
        };
        attributes.extend(version.map(|version| KeyValue::new("network.protocol.version", version)));
        let builder =
            tracer.span_builder(name(method)).with_kind(SpanKind::Server).with_attributes(attributes);
        let parent = parent();
        let span = tracer.build_with_context(builder, &parent);
        Some(Self(parent.with_span(span)))
    }

    pub(super) fn context(&self) -> &Context {
        &self.0
    }

    /// Ends it, and returns the trace and the span for the log.
    pub(super) fn end(
        self,
        method: &'static str,
        route: Option<&str>,
        status: u16,
    ) -> Option<(String, String)> {
        let span = self.0.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
            if let Some(route) = route {
                span.update_name(format!("{} {route}", name(method)));
                span.set_attribute(KeyValue::new("http.route", text(route.to_owned())));
            }
            if status >= 500 {
                span.set_attribute(KeyValue::new("error.type", text(status.to_string())));
                span.set_status(Status::error(""));
            }
            span.end();
        }
        traces::shown(span.span_context())
    }
}

/// The name of a span without a route.
fn name(method: &'static str) -> &'static str {
    if method == "other" { "HTTP" } else { method }
}

fn known(method: &'static str) -> &'static str {
    if method == "other" { "_OTHER" } else { method }
}
