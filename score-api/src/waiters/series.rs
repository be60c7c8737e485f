//! The metrics of waiting.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// How a wait ends.
const OUTCOMES: [&str; 7] =
    ["contained", "not_there_yet", "unavailable", "hung_up", "too_many", "ending", "defect"];

/// Describes and begins them.
pub(super) fn begin() {
    describe_gauge!("score_api_waiters", Unit::Count, "Reads that wait for a write.");
    describe_counter!(
        "score_api_waits_total",
        Unit::Count,
        "Reads that have waited for a write, by outcome."
    );
    describe_histogram!("score_api_wait_seconds", Unit::Seconds, "How long a read has waited for a write.");
    describe_counter!("score_api_looks_total", Unit::Count, "Queries for reads that wait.");
    metrics::gauge!("score_api_waiters").set(0);
    for outcome in OUTCOMES {
        metrics::counter!("score_api_waits_total", "outcome" => outcome).increment(0);
    }
    metrics::counter!("score_api_looks_total").increment(0);
}
