//! With the feature `opentelemetry` an event continues the trace of the span that publishes it:
//! `cargo test --workspace --features rabbit-outbox/opentelemetry --test trace`.

use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use outbox::{Event, install, publish};
use serde_json::{Value, json};
use sqlx::PgPool;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;

#[tokio::test]
async fn an_event_continues_the_trace_of_its_span() {
    let pool = PgPool::connect(&devstack::testing::database("trace").await).await.unwrap();
    install(&mut pool.acquire().await.unwrap(), "test").await.unwrap();
    let provider = SdkTracerProvider::builder().build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).unwrap();

    let event = || Event::new("order.changed", "order", "1", &json!({})).header("tenant", "north");
    let span = tracing::info_span!("pay");
    let mut tx = pool.begin().await.unwrap();
    publish(&mut tx, event()).await.unwrap();
    publish(&mut tx, event()).instrument(span.clone()).await.unwrap();
    publish(&mut tx, event().header("traceparent", "00-1-2-03")).instrument(span.clone()).await.unwrap();
    tx.commit().await.unwrap();

    let headers: Vec<Value> = sqlx::query_scalar("SELECT headers FROM outbox.event ORDER BY position")
        .fetch_all(&pool)
        .await
        .unwrap();
    let context = span.context();
    let context = context.span().span_context().clone();
    let traceparent = format!("00-{}-{}-01", context.trace_id(), context.span_id());
    assert_eq!(
        headers,
        [
            json!({"tenant": "north"}),
            json!({"tenant": "north", "traceparent": traceparent}),
            json!({"tenant": "north", "traceparent": "00-1-2-03"}),
        ]
    );
}
