//! The metrics of the front.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Describes them, and begins those that have no labels of a request.
pub(super) fn begin() {
    describe_counter!("http_requests_total", Unit::Count, "Requests, by method, route pattern and status.");
    describe_histogram!(
        "http_request_duration_seconds",
        Unit::Seconds,
        "From a request's head to its response, by method and route pattern."
    );
    describe_gauge!("http_connections", Unit::Count, "Open connections.");
    describe_counter!("http_connections_cut_total", Unit::Count, "Connections that a timeout ended.");
    describe_counter!(
        "http_overloaded_total",
        Unit::Count,
        "Requests that got 503 because a limit was reached."
    );
    describe_gauge!("api_keys", Unit::Count, "Keys of clients; 0 where there are none.");
    describe_gauge!(
        "api_keys_stale",
        Unit::Count,
        "1 while the file of keys is wrong and the old keys stay."
    );
    metrics::gauge!("http_connections").increment(0.0);
    metrics::counter!("http_connections_cut_total", "reason" => "slow").increment(0);
    metrics::counter!("http_overloaded_total").increment(0);
    metrics::gauge!("api_keys").increment(0.0);
    metrics::gauge!("api_keys_stale").increment(0.0);
}
