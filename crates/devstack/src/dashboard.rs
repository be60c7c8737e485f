//! The Grafana dashboard `deploy/observability/dashboard.json`: which panels it has, and what each asks Prometheus.
//! `devstack dashboard` prints it; a test asks a real Prometheus each of its queries.

use serde_json::{Value, json};

/// Panels under one heading.
type Row = (&'static str, &'static [Panel]);

/// One picture.
struct Panel {
    title: &'static str,
    /// What an operator reads from it.
    help: &'static str,
    unit: &'static str,
    kind: Kind,
    /// Each with its legend.
    queries: &'static [(&'static str, &'static str)],
}

/// How a panel shows its series.
#[derive(Clone, Copy)]
enum Kind {
    /// Over time.
    Lines,
    /// The present values, red from this one on.
    Low(f64),
    /// The present values, red below 1.
    High,
    /// A row for each.
    Table,
}

use Kind::{High, Lines, Low, Table};

/// Grafana puts a time in its place.
const INTERVAL: &str = "$__rate_interval";
/// How wide Grafana's page is, and how wide and high a panel.
const PAGE: u64 = 24;
const PANEL: (u64, u64) = (6, 7);

const OUTBOX: &str = "{{source}} {{relay}}";
const CONSUMER: &str = "{{consumer}}";

const fn panel(
    title: &'static str,
    help: &'static str,
    unit: &'static str,
    kind: Kind,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, help, unit, kind, queries }
}

const ROWS: [Row; 6] = [
    (
        "Is it flowing?",
        &[
            panel(
                "Led",
                "1: a relay publishes this outbox.",
                "none",
                High,
                &[("max by (source, relay) (outbox_relay_leader)", OUTBOX)],
            ),
            panel(
                "Oldest event that waits",
                "How long the first event that is not settled has waited, whoever leads, also while the relay is paused.",
                "s",
                Low(60.0),
                &[("max by (source, relay) (outbox_relay_backlog_age_seconds)", OUTBOX)],
            ),
            panel(
                "Parts that wait",
                "Empty: every program can do its work. `/ready` of the program has the reason.",
                "none",
                Table,
                &[("min by (job, instance, source, relay, consumer, part) (health_ready) == 0", "")],
            ),
            panel(
                "Parts that need attention",
                "Their programs work. `attention` at `/ready` says what an operator should look at.",
                "none",
                Table,
                &[("max by (job, instance, source, relay, consumer, part) (health_attention) == 1", "")],
            ),
            panel(
                "Written and published",
                "Positions that writers took, and events that RabbitMQ confirmed, a second.",
                "cps",
                Lines,
                &[
                    (
                        "max by (source) (rate(outbox_relay_last_position[$__rate_interval]))",
                        "{{source}} written",
                    ),
                    (
                        "sum by (source, relay) (rate(outbox_relay_published_total[$__rate_interval]))",
                        "{{source}} {{relay}} published",
                    ),
                ],
            ),
            panel(
                "Events that wait",
                "Stored events that are not settled.",
                "short",
                Lines,
                &[("max by (source, relay) (outbox_relay_backlog_events)", OUTBOX)],
            ),
            panel(
                "Since the last publish",
                "Since RabbitMQ has confirmed an event. It grows also when nobody writes.",
                "s",
                Lines,
                &[(
                    "time() - max by (source, relay) (outbox_relay_last_publish_timestamp_seconds > 0)",
                    OUTBOX,
                )],
            ),
            panel(
                "Heartbeat of the leader",
                "Above a few seconds, nobody leads.",
                "s",
                Lines,
                &[("max by (source, relay) (outbox_relay_heartbeat_age_seconds)", OUTBOX)],
            ),
        ],
    ),
    (
        "How long does it take?",
        &[
            panel(
                "From the write to RabbitMQ",
                "Half, and 99 of 100 events, took at most this long from their creation to the confirm.",
                "s",
                Lines,
                &[
                    (
                        "histogram_quantile(0.5, sum by (source, relay, le) (rate(outbox_relay_delay_seconds_bucket[$__rate_interval])))",
                        "{{source}} {{relay}} half",
                    ),
                    (
                        "histogram_quantile(0.99, sum by (source, relay, le) (rate(outbox_relay_delay_seconds_bucket[$__rate_interval])))",
                        "{{source}} {{relay}} 99 of 100",
                    ),
                ],
            ),
            panel(
                "From the write to the subscriber",
                "The same, to the commit of the subscriber.",
                "s",
                Lines,
                &[
                    (
                        "histogram_quantile(0.5, sum by (consumer, le) (rate(inbox_lag_seconds_bucket[$__rate_interval])))",
                        "{{consumer}} half",
                    ),
                    (
                        "histogram_quantile(0.99, sum by (consumer, le) (rate(inbox_lag_seconds_bucket[$__rate_interval])))",
                        "{{consumer}} 99 of 100",
                    ),
                ],
            ),
            panel(
                "Answers of RabbitMQ",
                "From sending a window of events to its last confirm. Slow: a node or a queue of the broker.",
                "s",
                Lines,
                &[(
                    "histogram_quantile(0.99, sum by (source, relay, le) (rate(outbox_relay_window_seconds_bucket[$__rate_interval])))",
                    "{{source}} {{relay}} 99 of 100",
                )],
            ),
            panel(
                "Reads that wait for a write",
                "How they ended, a second.",
                "cps",
                Lines,
                &[("sum by (outcome) (rate(score_api_waits_total[$__rate_interval]))", "{{outcome}}")],
            ),
        ],
    ),
    (
        "Where do events wait?",
        &[
            panel(
                "Paused",
                "1: an operator has paused the relay.",
                "none",
                Low(1.0),
                &[("max by (source, relay) (outbox_relay_paused)", OUTBOX)],
            ),
            panel(
                "Set aside",
                "Events that reach no queue. The others go on. `outbox-relay parked list` shows them.",
                "short",
                Low(1.0),
                &[("max by (source, relay) (outbox_relay_parked_events)", OUTBOX)],
            ),
            panel(
                "Set aside, by reason",
                "Within ten minutes.",
                "short",
                Lines,
                &[(
                    "sum by (source, relay, reason) (increase(outbox_relay_parked_total[10m]))",
                    "{{source}} {{relay}} {{reason}}",
                )],
            ),
            panel(
                "Held by the relay",
                "Events that the broker does not take, and those behind them.",
                "short",
                Lines,
                &[
                    ("max by (source, relay) (outbox_relay_held_events)", OUTBOX),
                    (
                        "max by (source, relay) (outbox_relay_waiting_rows)",
                        "{{source}} {{relay}} in the database",
                    ),
                ],
            ),
            panel(
                "Open gaps",
                "Missing positions that an open transaction may still fill. They delay retention, and no event.",
                "short",
                Lines,
                &[("max by (source, relay) (outbox_relay_open_gaps)", OUTBOX)],
            ),
            panel(
                "Dropped, late, and broken off",
                "Events that a rule dropped, that came late, and windows that were published again, within ten minutes.",
                "short",
                Lines,
                &[
                    (
                        "sum by (source, relay) (increase(outbox_relay_dropped_total[10m]))",
                        "{{source}} dropped",
                    ),
                    (
                        "sum by (source, relay) (increase(outbox_relay_late_events_total[10m]))",
                        "{{source}} late",
                    ),
                    (
                        "sum by (source, relay) (increase(outbox_relay_publish_failures_total[10m]))",
                        "{{source}} broken off",
                    ),
                ],
            ),
        ],
    ),
    (
        "Subscribers",
        &[
            panel(
                "Oldest message that waits",
                "Its greatest possible age, in the queue of the subscriber.",
                "s",
                Low(60.0),
                &[("max by (consumer) (inbox_backlog_age_seconds)", CONSUMER)],
            ),
            panel(
                "Messages that wait",
                "In the queue, without those that were received.",
                "short",
                Lines,
                &[("max by (consumer) (inbox_backlog_messages)", CONSUMER)],
            ),
            panel(
                "Applied",
                "Events a second.",
                "cps",
                Lines,
                &[("sum by (consumer) (rate(inbox_applied_total[$__rate_interval]))", CONSUMER)],
            ),
            panel(
                "Stopped",
                "1: nothing is consumed, because the handler seems to be broken.",
                "none",
                Low(1.0),
                &[("max by (consumer) (inbox_breaker_open)", CONSUMER)],
            ),
            panel(
                "Held, by reason",
                "gap: a version is missing. poison: the handler refused it. behind: it follows such an event.",
                "short",
                Lines,
                &[("max by (consumer, reason) (inbox_held_events)", "{{consumer}} {{reason}}")],
            ),
            panel(
                "Rejected, by reason",
                "Messages that are kept, and not applied.",
                "short",
                Lines,
                &[("max by (consumer, reason) (inbox_rejected_messages)", "{{consumer}} {{reason}}")],
            ),
            panel(
                "Holes, forks and forgeries",
                "Aggregates with missing versions; events that contradict others, or of a wrong user, within ten minutes.",
                "short",
                Lines,
                &[
                    ("max by (consumer) (inbox_holes)", "{{consumer}} holes"),
                    ("sum by (consumer) (increase(inbox_forks_total[10m]))", "{{consumer}} forks"),
                    ("sum by (consumer) (increase(inbox_wrong_user_total[10m]))", "{{consumer}} wrong user"),
                ],
            ),
            panel(
                "Refused by the handler",
                "Within ten minutes.",
                "short",
                Lines,
                &[("sum by (consumer) (increase(inbox_poison_total[10m]))", CONSUMER)],
            ),
        ],
    ),
    (
        "APIs",
        &[
            panel(
                "Requests",
                "A second, by status.",
                "reqps",
                Lines,
                &[(
                    "sum by (job, status) (rate(http_requests_total[$__rate_interval]))",
                    "{{job}} {{status}}",
                )],
            ),
            panel(
                "Time of requests",
                "99 of 100 took at most this long.",
                "s",
                Lines,
                &[(
                    "histogram_quantile(0.99, sum by (job, method, route, le) (rate(http_request_duration_seconds_bucket[$__rate_interval])))",
                    "{{job}} {{method}} {{route}}",
                )],
            ),
            panel(
                "Connections",
                "Open now.",
                "short",
                Lines,
                &[("max by (job, instance) (http_connections)", "{{job}} {{instance}}")],
            ),
            panel(
                "Turned away",
                "Requests at a limit, and connections that were too slow, within ten minutes.",
                "short",
                Lines,
                &[
                    ("sum by (job) (increase(http_overloaded_total[10m]))", "{{job}} overloaded"),
                    ("sum by (job) (increase(http_connections_cut_total[10m]))", "{{job}} cut"),
                ],
            ),
        ],
    ),
    (
        "Programs and housekeeping",
        &[
            panel("Versions", "Which version of each program runs.", "none", Table, &[("build_info", "")]),
            panel(
                "Processor",
                "Of one core.",
                "percentunit",
                Lines,
                &[("rate(process_cpu_seconds_total[$__rate_interval])", "{{job}} {{instance}}")],
            ),
            panel(
                "Memory",
                "Resident.",
                "bytes",
                Lines,
                &[("process_resident_memory_bytes", "{{job}} {{instance}}")],
            ),
            panel(
                "Open files",
                "Of those that the process may have.",
                "percentunit",
                Lines,
                &[("process_open_fds / process_max_fds", "{{job}} {{instance}}")],
            ),
            panel(
                "Positions ahead",
                "Positions with a partition that are not handed out yet.",
                "short",
                Lines,
                &[("min by (source) (outbox_relay_ahead_positions)", "{{source}}")],
            ),
            panel(
                "Changes of the leader",
                "Within an hour.",
                "short",
                Lines,
                &[("sum by (source, relay) (increase(outbox_relay_leaderships_total[1h]))", OUTBOX)],
            ),
            panel(
                "Erasures",
                "Erased aggregates whose events are not all rewritten; events and rows that were, within ten minutes.",
                "short",
                Lines,
                &[
                    ("max by (source) (outbox_relay_pending_erasures)", "{{source}} pending"),
                    (
                        "sum by (source) (increase(outbox_relay_erased_events_total[10m]))",
                        "{{source}} events",
                    ),
                    ("sum by (consumer) (increase(inbox_erased_rows_total[10m]))", "{{consumer}} rows"),
                ],
            ),
        ],
    ),
];

/// The dashboard as Grafana imports it.
pub fn dashboard() -> Value {
    let (mut panels, mut top) = (Vec::new(), 0);
    for (title, row) in &ROWS {
        panels.push(json!({
            "id": panels.len() + 1, "type": "row", "title": title, "collapsed": false, "panels": [],
            "gridPos": {"x": 0, "y": top, "w": PAGE, "h": 1},
        }));
        top += 1;
        let mut left = 0;
        for panel in *row {
            if left == PAGE {
                (left, top) = (0, top + PANEL.1);
            }
            panels.push(panel.json(panels.len() + 1, (left, top)));
            left += PANEL.0;
        }
        top += PANEL.1;
    }
    json!({
        "title": "Outboxes and their subscribers",
        "uid": "outbox-relay",
        "tags": ["outbox", "rabbitmq"],
        "schemaVersion": 39,
        "editable": true,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{
            "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {},
        }]},
        "panels": panels,
    })
}

/// Each query with the panel that asks it, for a Prometheus that looked for this long.
pub fn queries(interval: &str) -> Vec<(&'static str, String)> {
    let panels = ROWS.iter().flat_map(|(_, panels)| *panels);
    let queries = panels.flat_map(|panel| panel.queries.iter().map(|(query, _)| (panel.title, *query)));
    queries.map(|(title, query)| (title, query.replace(INTERVAL, interval))).collect()
}

impl Panel {
    fn json(&self, id: usize, (left, top): (u64, u64)) -> Value {
        let datasource = json!({"type": "prometheus", "uid": "${datasource}"});
        let is_table = matches!(self.kind, Table);
        let target = |(n, (query, legend)): (usize, &(&str, &str))| {
            let mut target = json!({
                "refId": char::from(b'A' + u8::try_from(n).unwrap_or(0)).to_string(),
                "datasource": datasource, "expr": query, "legendFormat": legend,
            });
            if is_table {
                target["format"] = "table".into();
                target["instant"] = true.into();
            }
            target
        };
        let targets: Vec<Value> = self.queries.iter().enumerate().map(target).collect();
        let steps = match self.kind {
            Low(limit) => json!([{"color": "green", "value": null}, {"color": "red", "value": limit}]),
            High => json!([{"color": "red", "value": null}, {"color": "green", "value": 1}]),
            Lines | Table => json!([{"color": "green", "value": null}]),
        };
        let mut panel = json!({
            "id": id,
            "type": match self.kind { Lines => "timeseries", Low(_) | High => "stat", Table => "table" },
            "title": self.title,
            "description": self.help,
            "datasource": datasource,
            "gridPos": {"x": left, "y": top, "w": PANEL.0, "h": PANEL.1},
            "fieldConfig": {
                "defaults": {"unit": self.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}},
                "overrides": [],
            },
            "targets": targets,
        });
        if is_table {
            let hidden = json!({"excludeByName": {"Time": true, "Value": true, "__name__": true}});
            panel["transformations"] = json!([{"id": "organize", "options": hidden}]);
        }
        panel
    }
}
