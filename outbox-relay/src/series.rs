//! The metrics of one outbox. All series exist, with 0, from the moment that its source is known: a counter that began with
//! its first failure would hide that one from `increase()`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use metrics::{Counter, Gauge, Histogram, Label, Unit};

use crate::evidence::PublishFailure;

/// Set aside, by reason.
const PARKED: &str = "outbox_relay_parked_total";

macro_rules! series {
    ($($kind:ident $field:ident = $name:literal, $unit:ident, $help:literal;)*) => {
        /// The series of one outbox, with the labels `source` and `relay`.
        #[derive(Clone)]
        pub struct Series {
            labels: Vec<Label>,
            /// Events that were set aside, by reason.
            parked_by: Arc<BTreeMap<&'static str, Counter>>,
            $(#[doc = $help] pub $field: $kind,)*
        }

        impl Series {
            /// Of the relay called `relay` that publishes for `source`. Those that are there already go on.
            pub fn new(source: &str, relay: &str) -> Self {
                let labels = vec![
                    Label::new("source", source.to_owned()),
                    Label::new("relay", relay.to_owned()),
                ];
                describe_parked();
                let parked = |reason: PublishFailure| {
                    let mut labels = labels.clone();
                    labels.push(Label::new("reason", reason.as_str()));
                    let counter = metrics::counter!(PARKED, labels);
                    counter.increment(0);
                    (reason.as_str(), counter)
                };
                let series = Self {
                    labels: labels.clone(),
                    parked_by: Arc::new(PublishFailure::ALL.map(parked).into()),
                    $($field: series!(@make $kind, $name, $unit, $help, labels),)*
                };
                $(series!(@begin $kind, series.$field);)*
                series
            }
        }
    };
    (@make Counter, $name:literal, $unit:ident, $help:literal, $labels:ident) => {{
        metrics::describe_counter!($name, Unit::$unit, $help);
        metrics::counter!($name, $labels.clone())
    }};
    (@make Gauge, $name:literal, $unit:ident, $help:literal, $labels:ident) => {{
        metrics::describe_gauge!($name, Unit::$unit, $help);
        metrics::gauge!($name, $labels.clone())
    }};
    (@make Histogram, $name:literal, $unit:ident, $help:literal, $labels:ident) => {{
        metrics::describe_histogram!($name, Unit::$unit, $help);
        metrics::histogram!($name, $labels.clone())
    }};
    (@begin Counter, $series:expr) => { $series.increment(0) };
    // A gauge of the position where a leader stopped stays where it was.
    (@begin Gauge, $series:expr) => { $series.increment(0.0) };
    (@begin Histogram, $series:expr) => {};
}

series! {
    Counter published = "outbox_relay_published_total", Count,
        "Events that the broker has confirmed.";
    Counter dropped = "outbox_relay_dropped_total", Count,
        "Events that a rule has let go, because no queue takes them.";
    Counter publish_failures = "outbox_relay_publish_failures_total", Count,
        "Windows of events whose publishing was broken off.";
    Counter late_events = "outbox_relay_late_events_total", Count,
        "Events at positions that were given up. They are published, out of order.";
    Counter erased_events = "outbox_relay_erased_events_total", Count,
        "Stored events of erased aggregates that were rewritten.";
    Counter leaderships = "outbox_relay_leaderships_total", Count,
        "How often this process has become the leader.";
    Gauge leader = "outbox_relay_leader", Count,
        "1 while this process leads, otherwise 0.";
    Gauge paused = "outbox_relay_paused", Count,
        "1 while an operator has paused the relay, whoever leads.";
    Gauge backlog = "outbox_relay_backlog_events", Count,
        "Stored events that are not settled, whoever leads. Above 10,000, their positions are counted.";
    Gauge backlog_age = "outbox_relay_backlog_age_seconds", Seconds,
        "Seconds since the creation of the first stored event that is not settled, whoever leads; 0 without one.";
    Gauge heartbeat_age = "outbox_relay_heartbeat_age_seconds", Seconds,
        "Seconds since the leader's last heartbeat, whoever leads.";
    Gauge last_publish = "outbox_relay_last_publish_timestamp_seconds", Seconds,
        "When the broker last confirmed an event to this process, in Unix time; 0 for never.";
    Gauge partitions_ahead = "outbox_relay_ahead_positions", Count,
        "Positions that have a partition and are not handed out yet.";
    Gauge held = "outbox_relay_held_events", Count,
        "Events that the broker does not take, and that wait, in memory or in the database.";
    Gauge waiting_rows = "outbox_relay_waiting_rows", Count,
        "Events that the broker does not take, and that wait in the database.";
    Gauge parked = "outbox_relay_parked_events", Count,
        "Events that are set aside now.";
    Gauge open_gaps = "outbox_relay_open_gaps", Count,
        "Stretches of missing positions that an open transaction may still fill.";
    Gauge low_water = "outbox_relay_low_water", Count,
        "Every position up to here is settled.";
    Gauge high = "outbox_relay_high", Count,
        "The last position that was read.";
    Gauge last_position = "outbox_relay_last_position", Count,
        "The last position that was handed out to a writer.";
    Gauge pending_erasures = "outbox_relay_pending_erasures", Count,
        "Erased aggregates whose stored events are not all rewritten.";
    Histogram delay = "outbox_relay_delay_seconds", Seconds,
        "From the creation of an event to its confirm.";
    Histogram window = "outbox_relay_window_seconds", Seconds,
        "From sending a window of events to the last of its confirms.";
}

fn describe_parked() {
    metrics::describe_counter!(PARKED, Unit::Count, "Events that were set aside, by reason.");
}

impl Series {
    /// `source` and `relay`.
    pub fn labels(&self) -> Vec<Label> {
        self.labels.clone()
    }

    /// So many events were set aside.
    pub fn set_aside(&self, reason: PublishFailure, events: u64) {
        if let Some(counter) = self.parked_by.get(reason.as_str()) {
            counter.increment(events);
        }
    }

    /// The broker has confirmed so many events.
    pub fn confirmed(&self, events: usize) {
        if events > 0 {
            self.published.increment(events as u64);
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            self.last_publish.set(now.map_or(0.0, |now: Duration| now.as_secs_f64()));
        }
    }
}

impl std::fmt::Debug for Series {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Series").finish_non_exhaustive()
    }
}

/// A number of events or positions as a gauge has it.
#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
pub fn number(number: i64) -> f64 {
    number as f64
}
