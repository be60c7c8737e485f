//! The task that looks for the expected subscribers of an outbox, as long as its relay runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use amqp::Backoff;
use daemon::health::{Health, Part};
use metrics::{Gauge, Unit};
use tokio_util::sync::CancellationToken;

use super::{Looked, Subscribers, passive::Passive};
use crate::series::{Series, number};

/// How often: at random, from this to twice as long, half a minute on the average.
const USUAL: Duration = Duration::from_secs(20);
/// As often while something is missing: who mends it waits for the good news.
const MISSING: Duration = Duration::from_secs(5);
/// A broker that cannot be asked is asked less and less often, up to this.
const LONGEST: Duration = Duration::from_mins(1);
/// One look takes no longer.
const TIMEOUT: Duration = Duration::from_mins(2);
/// So many faults are named at `/ready`; `doctor` names all.
const NAMED: usize = 3;

/// The series of an expected queue.
struct QueueSeries {
    ok: Gauge,
    consumers: Gauge,
    messages: Gauge,
}

/// Looks until `stop`.
pub(crate) async fn watch(
    subscribers: Subscribers,
    series: Arc<OnceLock<Series>>,
    (health, part): (Health, Part),
    name: String,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // The relay has connected, so the source is known.
    let labels = series.get().map(Series::labels).unwrap_or_default();
    let of_queue = |queue: &str| {
        let labels = [labels.clone(), vec![metrics::Label::new("queue", queue.to_owned())]].concat();
        let names: Vec<(&str, &str)> = labels.iter().map(|label| (label.key(), label.value())).collect();
        health.is_back(&names);
        (queue.to_owned(), QueueSeries::new(&labels))
    };
    let shown: BTreeMap<String, QueueSeries> = subscribers.queues().into_iter().map(of_queue).collect();
    let mut passive = Passive::new(format!("{name} subscribers"));
    let mut unreachable = Backoff::new(USUAL, LONGEST);
    while !stop.is_cancelled() {
        let look = tokio::time::timeout(TIMEOUT, subscribers.look(&mut passive));
        let Some(looked) = stop.run_until_cancelled(look).await else { break };
        let pause = match looked {
            Ok(Ok(looked)) => {
                show(&looked, &shown);
                unreachable.reset();
                let is_well = say(&looked, &part);
                let first = if is_well { USUAL } else { MISSING };
                Backoff::new(first, first).step()
            }
            // What the broker does not do, the relay's part `broker` says.
            Ok(Err(why)) => {
                tracing::debug!(why, "expected subscribers cannot be looked for");
                part.ready();
                unreachable.step()
            }
            Err(_) => {
                passive = Passive::new(format!("{name} subscribers"));
                part.ready();
                unreachable.step()
            }
        };
        stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
    passive.close().await;
    // Another list of queues may come after this one.
    for queue in shown.keys() {
        let names = labels.iter().map(|label| (label.key(), label.value()));
        health.is_gone(&names.chain([("queue", queue.as_str())]).collect::<Vec<_>>());
    }
    Ok(())
}

/// Says at `/ready` what is wrong. Returns whether nothing is.
fn say(looked: &Looked, part: &Part) -> bool {
    let faults: Vec<String> = looked.faults().map(super::Fault::text).collect();
    if faults.is_empty() {
        part.ready();
        return true;
    }
    let more = match faults.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(". {more} more: outbox-relay doctor"),
    };
    let named: Vec<&str> = faults.iter().take(NAMED).map(String::as_str).collect();
    part.attention(format!("{}{more}", named.join(". Also: ")));
    false
}

fn show(looked: &Looked, shown: &BTreeMap<String, QueueSeries>) {
    for found in &looked.found {
        let Some(series) = shown.get(&found.queue) else { continue };
        series.ok.set(if found.faults.is_empty() { 1.0 } else { 0.0 });
        let shown = |gauge: &Gauge, count: Option<u64>| {
            if let Some(count) = count {
                gauge.set(number(i64::try_from(count).unwrap_or(i64::MAX)));
            }
        };
        shown(&series.consumers, found.consumers);
        shown(&series.messages, found.messages);
    }
}

impl QueueSeries {
    fn new(labels: &[metrics::Label]) -> Self {
        let gauge = |name: &'static str, help: &'static str| {
            metrics::describe_gauge!(name, Unit::Count, help);
            let gauge = metrics::gauge!(name, labels.to_vec());
            gauge.increment(0.0);
            gauge
        };
        Self {
            ok: gauge(
                "outbox_relay_expected_subscribers",
                "1 while this queue is as expected, as far as is known; 0 while something is missing, and before the \
                 first look.",
            ),
            consumers: gauge(
                "outbox_relay_expected_subscriber_consumers",
                "Consumers of this expected queue, as of the last look.",
            ),
            messages: gauge(
                "outbox_relay_expected_subscriber_messages",
                "Messages in this expected queue, as of the last look.",
            ),
        }
    }
}
