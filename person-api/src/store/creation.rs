//! The creation of an event, as a trace shows it: its context goes into the event's headers, so that the trace goes on
//! wherever the event does.

use daemon::traces;
use opentelemetry::{
    Context, KeyValue,
    context::FutureExt,
    trace::{SpanKind, TraceContextExt, Tracer},
};
use serde_json::{Value, json};

/// The span `create`, from before the statement until it is known whether it wrote the event.
pub(super) struct Creation {
    context: Context,
    wrote: bool,
}

impl Creation {
    /// Outside of a sampled trace there is no span, and the context stays the caller's.
    pub(super) fn begin(type_: &'static str) -> Self {
        let parent = Context::current();
        let Some(tracer) = traces::tracer().filter(|_| parent.span().is_recording()) else {
            return Self { context: parent, wrote: false };
        };
        let attributes = [
            KeyValue::new("messaging.system", "rabbitmq"),
            KeyValue::new("messaging.operation.name", "create"),
            KeyValue::new("messaging.operation.type", "create"),
            KeyValue::new("messaging.rabbitmq.destination.routing_key", type_),
        ];
        let builder = tracer.span_builder(format!("create {type_}"));
        let builder = builder.with_kind(SpanKind::Producer).with_attributes(attributes);
        let context = parent.with_span(tracer.build_with_context(builder, &parent));
        Self { context, wrote: false }
    }

    /// The headers of the event; none outside of a trace.
    pub(super) fn headers(&self) -> Option<Value> {
        let traceparent = outbox::trace::header(self.context.span().span_context())?;
        Some(json!({"traceparent": traceparent}))
    }

    /// Does the work as a part of it.
    pub(super) async fn within<T>(&self, work: impl Future<Output = T>) -> T {
        work.with_context(self.context.clone()).await
    }

    /// Ends it. A statement that wrote nothing, such as one that a precondition refused, created no event.
    pub(super) fn end(mut self, wrote: bool) {
        self.wrote = wrote;
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        let span = self.context.span();
        // Where there is no span of its own, the context is the caller's, which is not recording.
        if span.is_recording() {
            if !self.wrote {
                span.set_attribute(KeyValue::new("error.type", "not_written"));
            }
            span.end();
        }
    }
}
