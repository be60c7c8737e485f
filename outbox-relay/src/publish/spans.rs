//! The span `send` of each event whose trace is sampled, by OpenTelemetry's conventions for messaging.

use std::{sync::Arc, time::SystemTime};

use daemon::traces;
use opentelemetry::{
    Context, KeyValue, StringValue, Value,
    trace::{Link, Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer},
};
use opentelemetry_sdk::trace::SdkTracer;

use super::Fate;
use crate::event::Event;

/// The attempt to publish a window. The spans are made when it is known what became of each event, so that an unsampled
/// event costs one look at its header, and a window without a sampled one nothing more.
pub(super) struct Spans {
    tracer: &'static SdkTracer,
    /// The events, by their numbers, with the spans in which they were created.
    sampled: Vec<(usize, SpanContext)>,
    began: SystemTime,
}

impl Spans {
    /// None where there is nothing to export.
    pub(super) fn begin(window: &[&Event]) -> Option<Self> {
        let tracer = traces::tracer()?;
        let creation =
            |event: &Event| outbox::trace::sampled(event.headers.as_ref()?.get("traceparent")?.as_str()?);
        let sampled = window.iter().enumerate().filter_map(|(n, event)| Some((n, creation(event)?)));
        let sampled: Vec<_> = sampled.collect();
        (!sampled.is_empty()).then(|| Self { tracer, sampled, began: SystemTime::now() })
    }

    /// Ends them: each continues the trace of its event, and is linked to the event's creation.
    pub(super) fn end(self, exchange: &str, window: &[&Event], fates: &[Option<Fate>]) {
        let Self { tracer, sampled, began } = self;
        let ended = SystemTime::now();
        let name = format!("send {exchange}");
        let exchange = StringValue::from(Arc::<str>::from(exchange));
        for (n, creation) in sampled {
            let Some(event) = window.get(n) else { continue };
            let attributes = vec![
                KeyValue::new("messaging.system", "rabbitmq"),
                KeyValue::new("messaging.operation.name", "send"),
                KeyValue::new("messaging.operation.type", "send"),
                KeyValue::new("messaging.destination.name", Value::String(exchange.clone())),
                KeyValue::new("messaging.rabbitmq.destination.routing_key", event.type_.clone()),
                KeyValue::new("messaging.message.id", event.id.to_string()),
                KeyValue::new(
                    "messaging.message.body.size",
                    i64::try_from(event.payload.len()).unwrap_or(i64::MAX),
                ),
            ];
            let builder = tracer
                .span_builder(name.clone())
                .with_kind(SpanKind::Producer)
                .with_start_time(began)
                .with_attributes(attributes)
                .with_links(vec![Link::with_context(creation.clone())]);
            let parent = Context::new().with_remote_span_context(creation);
            let mut span = tracer.build_with_context(builder, &parent);
            if let Some(error) = error_type(fates.get(n).and_then(Option::as_ref)) {
                span.set_attribute(KeyValue::new("error.type", error));
                span.set_status(Status::error(""));
            }
            span.end_with_timestamp(ended);
        }
    }
}

fn error_type(fate: Option<&Fate>) -> Option<&'static str> {
    match fate {
        Some(Fate::Confirmed) => None,
        Some(Fate::Unroutable) => Some("unroutable"),
        Some(Fate::Nacked) => Some("nacked"),
        Some(Fate::Silent) => Some("silent"),
        Some(Fate::Refused { .. }) => Some("refused"),
        // The channel ended: the event is published again.
        None => Some("unknown"),
    }
}
