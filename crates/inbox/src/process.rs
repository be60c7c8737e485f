//! The span in which a handler gets events, by OpenTelemetry's conventions for messaging: `process`, and the consumer's name.

#[cfg(feature = "opentelemetry")]
pub(crate) use traced::Process;
#[cfg(not(feature = "opentelemetry"))]
pub(crate) use untraced::Process;

#[cfg(feature = "opentelemetry")]
mod traced {
    use opentelemetry::{
        Context, InstrumentationScope, KeyValue,
        context::FutureExt,
        global,
        trace::{Link, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
    };

    use crate::{Event, HandlerError};

    /// The call of a handler.
    pub(crate) struct Process(Context);

    impl Process {
        /// One event continues its trace. Several are in a span of their own that is linked to the trace of each, and so
        /// is an event that an operator had published again: its trace has ended long ago.
        pub(crate) fn begin(consumer: &str, events: &[Event]) -> Self {
            let mut links = events.iter().filter_map(|event| Some((event, creation(event)?))).peekable();
            let (parent, id) = match events {
                [event] => {
                    let parent = links.peek().filter(|_| !event.is_replayed()).map(|(_, link)| link.clone());
                    (parent, Some(event.id))
                }
                _ => (None, None),
            };
            let parent = parent.map_or_else(Context::new, |p| Context::new().with_remote_span_context(p));
            let links = links.map(|(event, link)| {
                // The span of one event has its id itself.
                let id = id.is_none().then(|| KeyValue::new(MESSAGE_ID, event.id.to_string()));
                Link::new(link, id.into_iter().collect(), 0)
            });
            let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
                .with_version(env!("CARGO_PKG_VERSION"))
                .with_schema_url("https://opentelemetry.io/schemas/1.38.0")
                .build();
            let tracer = global::tracer_provider().tracer_with_scope(scope);
            let builder = tracer
                .span_builder(format!("process {consumer}"))
                .with_kind(SpanKind::Consumer)
                .with_links(links.collect());
            let context = parent.with_span(tracer.build_with_context(builder, &parent));
            let span = context.span();
            if span.is_recording() {
                span.set_attributes([
                    KeyValue::new("messaging.system", "rabbitmq"),
                    KeyValue::new("messaging.operation.name", "process"),
                    KeyValue::new("messaging.operation.type", "process"),
                    KeyValue::new("messaging.consumer.group.name", consumer.to_owned()),
                ]);
                match events {
                    [event] => span.set_attributes([
                        KeyValue::new(MESSAGE_ID, event.id.to_string()),
                        KeyValue::new("messaging.rabbitmq.destination.routing_key", event.type_.clone()),
                    ]),
                    events => span.set_attribute(KeyValue::new(
                        "messaging.batch.message_count",
                        i64::try_from(events.len()).unwrap_or(i64::MAX),
                    )),
                }
            }
            Self(context)
        }

        /// Makes the call as a part of it.
        pub(crate) async fn within(
            self,
            call: impl Future<Output = Result<(), HandlerError>>,
        ) -> Result<(), HandlerError> {
            let handled = call.with_context(self.0.clone()).await;
            let span = self.0.span();
            if let Err(error) = &handled {
                let type_ = match error {
                    HandlerError::Poison(_) => "poison",
                    HandlerError::Transient(_) => "transient",
                    HandlerError::Conflict(_) => "conflict",
                    HandlerError::TooLong(_) => "too_long",
                };
                span.set_attribute(KeyValue::new("error.type", type_));
                span.set_status(Status::error(""));
            }
            span.end();
            handled
        }
    }

    const MESSAGE_ID: &str = "messaging.message.id";

    /// The span in which the event was created.
    fn creation(event: &Event) -> Option<SpanContext> {
        outbox::trace::remote(event.traceparent()?)
    }
}

#[cfg(not(feature = "opentelemetry"))]
mod untraced {
    use crate::{Event, HandlerError};

    /// Nothing: without the feature `opentelemetry` there are no spans.
    pub(crate) struct Process;

    impl Process {
        pub(crate) fn begin(_: &str, _: &[Event]) -> Self {
            Self
        }

        #[expect(clippy::unused_self, reason = "as with the feature")]
        pub(crate) async fn within(
            self,
            call: impl Future<Output = Result<(), HandlerError>>,
        ) -> Result<(), HandlerError> {
            call.await
        }
    }
}
