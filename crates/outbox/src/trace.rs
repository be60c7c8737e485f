//! The trace that an event continues.

/// The W3C `traceparent` of the current span, if it is part of a trace.
#[cfg(feature = "opentelemetry")]
pub(crate) fn parent() -> Option<String> {
    use opentelemetry::trace::TraceContextExt;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    let context = tracing::Span::current().context();
    let span = context.span();
    let span = span.span_context();
    let sampled = u8::from(span.is_sampled());
    span.is_valid().then(|| format!("00-{}-{}-{sampled:02x}", span.trace_id(), span.span_id()))
}

/// None: without the feature `opentelemetry` spans belong to no trace.
#[cfg(not(feature = "opentelemetry"))]
pub(crate) fn parent() -> Option<String> {
    None
}
