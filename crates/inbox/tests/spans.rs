//! The spans of the events that are applied: one continues its event's trace, one of several is linked to all of them.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    fmt::Write,
    sync::{Arc, Mutex},
};

use inbox::{Envelope, Event, Handler, HandlerError, Sequencer};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use opentelemetry::{KeyValue, trace::SpanId};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use sqlx::{PgPool, Postgres, Transaction};
use uuid::Uuid;

/// Keeps the spans.
#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

/// Publishes an event for each that it applies, and refuses `bad`.
struct Publisher;

impl Handler for Publisher {
    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        if event.type_ == "order.bad" {
            return Err(HandlerError::poison("bad"));
        }
        let caused = outbox::Event::new("stock.changed", "stock", &event.aggregate_id, &());
        outbox::publish(tx, caused).await.map_err(|error| HandlerError::poison(error.to_string()))?;
        Ok(())
    }
}

/// The first event of an order.
fn message(order: u32, type_: &str, traceparent: Option<&str>, replayed: bool) -> Envelope {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut headers = FieldTable::default();
    headers.insert("aggregate_type".into(), text("order"));
    headers.insert("aggregate_id".into(), text(&order.to_string()));
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(1));
    if let Some(traceparent) = traceparent {
        headers.insert("traceparent".into(), text(traceparent));
    }
    if replayed {
        headers.insert("replayed".into(), AMQPValue::Boolean(true));
    }
    let properties = BasicProperties::default()
        .with_message_id(Uuid::now_v7().to_string().as_str().into())
        .with_type(type_.into())
        .with_app_id("shop".into())
        .with_headers(headers);
    Envelope { routing_key: type_.to_owned(), properties, body: b"{}".to_vec() }
}

/// Numbered so that a snapshot can name it.
fn traceparent(trace: u32, flags: &str) -> String {
    format!("00-0af7651916cd43dd8448eb21{trace:08x}-b7ad6b71{trace:08x}-{flags}")
}

/// The traces of the test by their numbers; others are new.
fn named(text: &str) -> String {
    match text.strip_prefix("0af7651916cd43dd8448eb21") {
        Some(number) => format!("trace {}", u32::from_str_radix(number, 16).unwrap()),
        None => "a new trace".to_owned(),
    }
}

#[tokio::test]
async fn an_event_continues_its_trace_and_a_batch_is_linked_to_those_of_its_events() {
    let url = devstack::testing::database("inbox_spans").await;
    let pool = PgPool::connect(&url).await.unwrap();
    inbox::migrator().run(&pool).await.unwrap();
    outbox::install(&mut pool.acquire().await.unwrap(), "stock").await.unwrap();
    let sequencer = Sequencer::new("stock", pool.clone(), Publisher);

    let mut orders = 1..;
    let mut one = |type_: &str, traceparent: Option<&str>, replayed: bool| {
        message(orders.next().unwrap(), type_, traceparent, replayed)
    };
    let new = "order.new";
    let cases = [
        ("sampled", vec![one(new, Some(&traceparent(1, "01")), false)]),
        ("unsampled", vec![one(new, Some(&traceparent(2, "00")), false)]),
        ("without a trace", vec![one(new, None, false)]),
        ("malformed", vec![one(new, Some("00-1-2-03"), false)]),
        ("replayed", vec![one(new, Some(&traceparent(3, "01")), true)]),
        ("refused", vec![one("order.bad", Some(&traceparent(4, "01")), false)]),
        (
            "several",
            vec![
                one(new, Some(&traceparent(5, "01")), false),
                one(new, Some(&traceparent(6, "00")), false),
                one(new, None, false),
                one(new, Some("malformed"), false),
            ],
        ),
    ];
    // Without a provider of spans, what is published continues the trace of its cause all the same.
    let before = one(new, Some(&traceparent(9, "01")), false);
    sequencer.apply(&[before]).await.unwrap();

    let kept = Kept::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
    opentelemetry::global::set_tracer_provider(provider);
    let mut shown = format!("no provider\n{}", published(&pool).await);
    for (case, messages) in cases {
        sequencer.apply(&messages).await.unwrap();
        writeln!(shown, "{case}\n{}{}", spans(&kept), published(&pool).await).unwrap();
    }
    insta::assert_snapshot!(shown);
}

/// The spans since the last call.
fn spans(kept: &Kept) -> String {
    let mut shown = String::new();
    for span in kept.0.lock().unwrap().drain(..) {
        let parent = match span.parent_span_id {
            SpanId::INVALID => "a root".to_owned(),
            id => format!("under {id}"),
        };
        let trace = named(&span.span_context.trace_id().to_string());
        writeln!(shown, "    {} ({:?}): {parent} of {trace}", span.name, span.span_kind).unwrap();
        let attributes = |attributes: &[KeyValue]| {
            let own =
                |a: &KeyValue| !["messaging.system", "messaging.operation.type"].contains(&a.key.as_str());
            let show = |a: &KeyValue| match a.key.as_str() {
                id @ "messaging.message.id" => format!("{id}=<id>"),
                name => format!("{name}={}", a.value),
            };
            attributes.iter().filter(|a| own(a)).map(show).collect::<Vec<_>>().join(" ")
        };
        writeln!(shown, "        {}", attributes(&span.attributes)).unwrap();
        if span.status != opentelemetry::trace::Status::Unset {
            writeln!(shown, "        {:?}", span.status).unwrap();
        }
        for link in span.links.iter() {
            let (trace, span) = (link.span_context.trace_id(), link.span_context.span_id());
            let attributes = attributes(&link.attributes);
            writeln!(shown, "        linked to {span} of {} {attributes}", named(&trace.to_string()))
                .unwrap();
        }
    }
    shown
}

/// The traces of the events that were published since the last call.
async fn published(pool: &PgPool) -> String {
    let sql = "WITH gone AS (DELETE FROM outbox.event RETURNING position, headers)
               SELECT headers ->> 'traceparent' FROM gone ORDER BY position";
    let headers: Vec<Option<String>> = sqlx::query_scalar(sql).fetch_all(pool).await.unwrap();
    let mut shown = String::new();
    for header in headers {
        let header = header.map(|text| {
            let known = if text.contains("b7ad6b71") { "its own span" } else { "another span" };
            format!("{}, {known}, {}", named(&text[3..35]), &text[53..])
        });
        writeln!(shown, "    published in {}", header.as_deref().unwrap_or("no trace")).unwrap();
    }
    shown
}
