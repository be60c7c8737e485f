//! What traces cost the relay: the same drain with every event sampled, with none, and without an endpoint.

use anyhow::ensure;

use super::{
    events::Traced,
    figure::{Figure, Row},
    goal::Goal,
    relay::Drain,
    statistics::number,
    testbed::Testbed,
};
use devstack::otlp::{Collector, Manner};

/// See [`Row`].
#[derive(Debug)]
pub struct Traces {
    collector: Collector,
    sampled: Drain,
    unsampled: Drain,
    without: Drain,
    /// Events that were sampled, and spans that came.
    counted: (i64, usize),
}

const CEILING: Option<&str> = Some("itself without an endpoint");

impl Figure for Traces {
    const ROWS: &'static [Row] = &[
        Row {
            name: "traces, sampled",
            system: "drains as above, and exports a span for each event",
            ceiling: CEILING,
            unit: "events/s",
            goal: Goal::RatioAtLeast(0.95),
        },
        Row {
            name: "traces, unsampled",
            system: "drains as above, with an endpoint and no sampled event",
            ceiling: CEILING,
            unit: "events/s",
            goal: Goal::RatioAtLeast(0.98),
        },
    ];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let collector = Collector::start().await?;
        // What another machine would do with the spans costs this one nothing.
        collector.behave(Manner::Keeps);
        let drain = async |database, vhost, traced| {
            anyhow::Ok(Drain::prepare(testbed, database, vhost).await?.traced(traced))
        };
        let mut sampled = drain("bench_sampled", "sampled", Traced::Sampled).await?;
        let mut unsampled = drain("bench_unsampled", "unsampled", Traced::Unsampled).await?;
        let without = drain("bench_without", "without", Traced::Sampled).await?;
        for drain in [&mut sampled, &mut unsampled] {
            drain.relay.set_env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url());
        }
        Ok(Self { collector, sampled, unsampled, without, counted: (0, 0) })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let count = testbed.size.events;
        let sampled = self.sampled.round(testbed, count).await?;
        self.counted.0 += count;
        self.counted.1 += self.collector.take_count();
        Ok(vec![sampled, self.unsampled.round(testbed, count).await?])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        let without = self.without.round(testbed, testbed.size.events).await?;
        Ok(vec![without, without])
    }

    async fn finish(mut self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        self.sampled.relay.stop(&tokio_util::sync::CancellationToken::new()).await;
        let (events, mut spans) = self.counted;
        spans += self.collector.take_count();
        ensure!(spans > 0, "no span came");
        let spent = [&self.sampled, &self.unsampled, &self.without].map(Drain::spent);
        let [sampled, unsampled, without] = spent;
        #[expect(clippy::cast_precision_loss, reason = "a part of some hundred thousands")]
        let part = spans as f64 / events as f64 * 100.0;
        let notes = vec![
            format!("traces: {} % of the spans of {events} events came", number(part)),
            format!(
                "traces: µs of processor time an event, sampled: {sampled}; unsampled: {unsampled}; without an \
                 endpoint: {without}"
            ),
        ];
        self.sampled.end(testbed, "sampled").await?;
        self.unsampled.end(testbed, "unsampled").await?;
        self.without.end(testbed, "without").await?;
        Ok(notes)
    }
}
