//! What `doctor` asks the database. Each check reads catalogs, or a bounded number of rows by the
//! primary key, whatever the size of the outbox.

use anyhow::Context;
use chrono::{DateTime, Utc};
use daemon::config::database::SchemaError;
use sqlx::PgConnection;

use super::{Check, settings, versions};
use crate::{
    command::{
        many, span,
        state::{self, NotTaken, RelayRow, WaitingGroup},
        status::{holder_text, time},
    },
    session::schema,
};

/// Who holds the outbox lock for longer is worth a look.
const LONG: f64 = 60.0;
/// Clocks that differ by more make ages and certificates doubtful.
const CLOCKS: f64 = 5.0;
/// Below so many positions left, the next partition is due.
const ROOM: i64 = 100_000;

/// A sequence that stands higher was set by hand: at a million positions a second this is 250,000 years.
const MOST: i64 = 8_000_000_000_000_000_000;

/// The checks that need the schema.
const NEED_SCHEMA: [&str; 11] = [
    "permissions",
    "source",
    "sequence",
    "sequence cache",
    "default partition",
    "partition bounds",
    "next partition",
    "row security",
    "outbox lock",
    "versions",
    "relays",
];

/// What a relay needs and no more. Asked by OID, because a name cannot be looked up without the right to
/// use the schema. What does not exist is the business of another check.
const PERMISSIONS: &str = "\
SELECT n.nspname || '.' || c.relname || ': ' || string_agg(p, ', ' ORDER BY o)
FROM (VALUES ('source', '{SELECT}'::text[]), ('migration', '{SELECT}'), ('event', '{SELECT}'),
             ('position', '{SELECT}'), ('partition', '{SELECT}'), ('event_default', '{SELECT}'), ('relay', '{SELECT,INSERT,UPDATE}'),
             ('parked', '{SELECT,INSERT,UPDATE,DELETE}'), ('replay', '{SELECT,INSERT,UPDATE,DELETE}'))
     AS needs (name, privileges)
JOIN pg_namespace n ON n.nspname = 'outbox'
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = needs.name
CROSS JOIN LATERAL unnest(needs.privileges) WITH ORDINALITY AS u (p, o)
WHERE NOT has_table_privilege(c.oid, p)
GROUP BY n.nspname, c.relname
UNION ALL
SELECT 'schema ' || nspname || ': USAGE' FROM pg_namespace
WHERE nspname = 'outbox' AND NOT has_schema_privilege(oid, 'USAGE')
UNION ALL
SELECT 'outbox.' || p.proname || ': EXECUTE' FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'outbox' AND p.proname IN ('add_partition', 'why_kept', 'retire_partition', 'drop_partition')
  AND NOT has_function_privilege(p.oid, 'EXECUTE')
ORDER BY 1";

/// Stretches of positions that no partition but the default one covers, each with its first stored
/// event: by the primary key, and only of the default partition.
const UNCOVERED: &str = "\
WITH covered AS (
    SELECT range_agg(int8range(lower, upper)) AS ranges FROM outbox.partition WHERE NOT is_default)
SELECT coalesce(lower(u.range), '-9223372036854775808'::bigint), upper(u.range) - 1, e.position
FROM covered
CROSS JOIN LATERAL unnest('{(,)}'::int8multirange - coalesce(covered.ranges, '{}')) AS u (range)
LEFT JOIN LATERAL (SELECT position FROM outbox.event
                   WHERE position >= coalesce(lower(u.range), '-9223372036854775808'::bigint)
                     AND position <= coalesce(upper(u.range) - 1, '9223372036854775807'::bigint)
                   ORDER BY position LIMIT 1) e ON true
ORDER BY 1";

/// The last position handed out.
const MARK: &str = "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM outbox.position";

/// Goes through all that the database can tell.
pub(super) async fn database(
    conn: &mut PgConnection,
    second: &mut PgConnection,
    name: Option<&str>,
) -> anyhow::Result<Vec<Check>> {
    let mut checks = vec![
        // Before any statement is prepared: behind a pooler those fail.
        found("session", settings::session(conn, second).await)?,
        found("server", recovery(conn).await)?,
        found("writes", settings::writes(conn).await)?,
        found("clock", clock(conn).await)?,
    ];
    let (schema, usable) = schema_check(conn).await?;
    checks.push(schema);
    checks.push(found("statistics", statistics(conn).await)?);
    if !usable {
        let why = "the schema is not there, or not the one expected";
        checks.extend(NEED_SCHEMA.map(|name| Check::skipped(name, why)));
        return Ok(checks);
    }
    checks.push(found("permissions", permissions(conn).await)?);
    checks.push(source(conn).await?);
    checks.push(found("sequence", sequence(conn).await)?);
    checks.push(found("sequence cache", cache(conn).await)?);
    checks.push(found("default partition", default_partition(conn).await)?);
    checks.push(found("partition bounds", settings::bounds(conn).await)?);
    checks.push(found("next partition", next_partition(conn).await)?);
    checks.push(found("row security", settings::row_security(conn).await)?);
    checks.push(found("outbox lock", lock(conn).await)?);
    checks.push(found("versions", versions::check(conn).await)?);
    match relays(conn, name).await {
        Ok(relays) if !relays.is_empty() => checks.extend(relays),
        Ok(_) => {
            // A wrong name is an error; that no relay has run at all is a finding.
            if let Some(name) = name
                && !state::relays(conn, None).await?.is_empty()
            {
                state::known(conn, name).await?;
            }
            checks.push(Check::problem(
                "relays",
                "none has run on this database yet",
                "start outbox-relay run",
            ));
        }
        Err(error) => checks.push(failed("relays", error)?),
    }
    Ok(checks)
}

/// A check that the server refuses is a finding too; without an answer of the server there is none.
fn found(name: &str, checked: Result<Check, sqlx::Error>) -> anyhow::Result<Check> {
    checked.or_else(|error| failed(name, error))
}

fn failed(name: &str, error: sqlx::Error) -> anyhow::Result<Check> {
    let Some(said) = error.as_database_error() else {
        return Err(error).context("the database went away during the examination");
    };
    Ok(match said.code().as_deref() {
        // insufficient_privilege
        Some("42501") => Check::skipped(name, format!("this role may not ask: {}", said.message())),
        _ => Check::warning(
            name,
            format!("it could not be found out: {}", said.message()),
            "try again; the server's log may tell more",
        ),
    })
}

async fn recovery(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let ask =
        "SELECT pg_is_in_recovery(), current_setting('server_version'), current_setting('server_encoding')";
    let (recovers, version, encoding): (bool, String, String) = sqlx::query_as(ask).fetch_one(conn).await?;
    Ok(if encoding != "UTF8" {
        Check::problem(
            "server",
            format!("the database has the encoding {encoding}; no relay runs on it, since events are UTF-8"),
            "create the database anew with ENCODING 'UTF8' TEMPLATE template0, and move its contents there",
        )
    } else if recovers {
        Check::problem(
            "server",
            "it is in recovery: a standby, or still starting; no relay leads on it",
            "connect to the primary",
        )
    } else {
        Check::ok(
            "server",
            format!("PostgreSQL {}, a primary", version.split(' ').next().unwrap_or_default()),
        )
    })
}

async fn clock(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let before = Utc::now();
    let server: DateTime<Utc> = sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(conn).await?;
    let took = Utc::now() - before;
    let differs = (server - (before + took / 2)).as_seconds_f64().abs();
    Ok(if differs > CLOCKS {
        Check::warning(
            "clock",
            format!("this machine's clock and the server's differ by {}", span(differs)),
            "let both be set by NTP; the relay itself does not depend on it, but what it measures does",
        )
    } else {
        Check::ok("clock", format!("this machine's and the server's differ by less than {CLOCKS} s"))
    })
}

/// Also whether it can be worked with: what may not be read is asked all the same, to tell each.
async fn schema_check(conn: &mut PgConnection) -> anyhow::Result<(Check, bool)> {
    let name = "schema";
    let migrate = "run: outbox-relay migrate --source NAME";
    Ok(match schema().check(conn).await {
        Ok(()) => (Check::ok(name, "current"), true),
        Err(SchemaError::NotCurrent { schema, state, .. }) => {
            (Check::problem(name, format!("{schema} is {state} in this database"), migrate), false)
        }
        Err(error @ SchemaError::Different { .. }) => {
            let advice = "run the version of outbox-relay that migrated this database, or a later one";
            (Check::problem(name, error.to_string(), advice), false)
        }
        Err(SchemaError::Forbidden { schema, .. }) => {
            (Check::skipped(name, format!("this role may not read {schema}.migration")), true)
        }
        Err(SchemaError::Unmet(why)) => (Check::problem(name, why, migrate), false),
        Err(SchemaError::Database(error)) => (failed(name, error)?, false),
    })
}

async fn permissions(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let missing: Vec<String> = sqlx::query_scalar(PERMISSIONS).fetch_all(&mut *conn).await?;
    if missing.is_empty() {
        return Ok(Check::ok("permissions", "this role may do what a relay does"));
    }
    Ok(Check::problem(
        "permissions",
        format!("this role lacks {}", missing.join("; ")),
        "run: outbox-relay migrate --source NAME --grant-relay ROLE",
    ))
}

async fn statistics(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let may = sqlx::query_scalar("SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')");
    Ok(if may.fetch_one(conn).await? {
        Check::ok("statistics", "this role sees which transactions sleep")
    } else {
        Check::warning(
            "statistics",
            "this role does not see that a transaction sleeps, so that the relay takes an idle one for a \
             possible writer of every position it misses",
            "let a superuser run: GRANT pg_read_all_stats TO ROLE",
        )
    })
}

async fn source(conn: &mut PgConnection) -> anyhow::Result<Check> {
    Ok(match outbox::source(conn).await {
        Ok(source) => Check::ok("source", format!("it publishes as {source}")),
        Err(outbox::SourceError::Database(error)) => failed("source", error)?,
        Err(_) => Check::problem(
            "source",
            "nobody said under which name this database publishes",
            "run: outbox-relay migrate --source NAME",
        ),
    })
}

/// The sequence must not be behind what was read, stored or published.
async fn sequence(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    // What was used comes first: the sequence only goes on meanwhile. `max` reads one row by the index.
    let used = "SELECT greatest(coalesce((SELECT max(position) FROM outbox.event), 0),
                                coalesce((SELECT max(greatest(low_water, high)) FROM outbox.relay), 0))";
    let used: i64 = sqlx::query_scalar(used).fetch_one(&mut *conn).await?;
    let mark: i64 = sqlx::query_scalar(MARK).fetch_one(&mut *conn).await?;
    if mark > MOST {
        return Ok(Check::problem(
            "sequence",
            format!("outbox.position stands at {mark}, near its end, where writers get no position any more"),
            format!(
                "it was set there by hand. If no event has a position up there ({used} is the highest in use), \
                 run: SELECT setval('outbox.position', {used})"
            ),
        ));
    }
    if mark >= used {
        return Ok(Check::ok("sequence", format!("it stands at {mark}, not behind what was used")));
    }
    Ok(Check::problem(
        "sequence",
        format!("outbox.position stands at {mark}, behind {used}, which is stored or published already"),
        format!(
            "no relay leads meanwhile. If no published event was lost, run: SELECT setval('outbox.position', \
             {used}); otherwise begin a new incarnation"
        ),
    ))
}

async fn cache(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let cache: i64 = sqlx::query_scalar(
        "SELECT s.seqcache FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid
         JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = 'outbox' AND c.relname = 'position'",
    )
    .fetch_one(conn)
    .await?;
    Ok(if cache == 1 {
        Check::ok("sequence cache", "1")
    } else {
        Check::problem(
            "sequence cache",
            format!(
                "outbox.position has CACHE {cache}: sessions keep positions back, and use them out of order"
            ),
            "run: ALTER SEQUENCE outbox.position CACHE 1, and let the writers connect anew",
        )
    })
}

/// A stretch without a partition: from, to (none when it has no end), its first event.
type Uncovered = (i64, Option<i64>, Option<i64>);

async fn uncovered(conn: &mut PgConnection) -> Result<Vec<Uncovered>, sqlx::Error> {
    sqlx::query_as(UNCOVERED).fetch_all(conn).await
}

async fn default_partition(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let name = "default partition";
    let first = uncovered(conn).await?.into_iter().find_map(|(.., first)| first);
    Ok(match first {
        None => Check::ok(name, "empty"),
        Some(first) => Check::problem(
            name,
            format!("outbox.event_default has events, from position {first} on"),
            "nothing is lost, and they are published. Was no relay running, or is PARTITIONS_AHEAD too small? \
             outbox-relay prune retires them like others",
        ),
    })
}

async fn next_partition(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let name = "next partition";
    let uncovered = uncovered(&mut *conn).await?;
    let mark: i64 = sqlx::query_scalar(MARK).fetch_one(conn).await?;
    let next = mark.saturating_add(1);
    let advice = "a relay that runs makes partitions by itself; its log says what keeps it from that. By hand: \
                  SELECT outbox.add_partition(1000000)";
    let without = uncovered.iter().find(|(_, to, _)| to.is_none_or(|to| to >= next));
    Ok(match without {
        Some((from, ..)) if *from <= next => Check::problem(
            name,
            format!("none for position {next}, which goes to outbox.event_default"),
            advice,
        ),
        Some((from, ..)) if from - next < ROOM => {
            let left = many(from - next, "position");
            Check::warning(name, format!("{left} left before outbox.event_default takes the events"), advice)
        }
        Some((from, ..)) => Check::ok(name, format!("partitions reach up to position {}", from - 1)),
        None => Check::ok(name, "partitions reach up to the last position there is"),
    })
}

async fn lock(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let holders = state::holders(conn).await?;
    let mut long = holders.iter().filter(|holder| holder.seconds.is_some_and(|seconds| seconds > LONG));
    let Some(first) = long.next() else {
        let unknown = holders.iter().filter(|holder| holder.seconds.is_none()).count();
        if unknown > 0 {
            let finding =
                format!("{unknown} of {} hold it for a time that this role may not see", holders.len());
            return Ok(Check::skipped("outbox lock", finding));
        }
        return Ok(Check::ok("outbox lock", "no transaction that appends is open for more than a minute"));
    };
    let more = match long.count() {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let end = match (&first.gid, first.pid) {
        (Some(gid), _) => {
            let gid = gid.replace('\'', "''");
            format!("commit it, or run: ROLLBACK PREPARED '{gid}'")
        }
        (None, pid) => format!(
            "let its program commit sooner; to end it, run: SELECT pg_terminate_backend({})",
            pid.unwrap_or_default()
        ),
    };
    Ok(Check::warning(
        "outbox lock",
        format!("a transaction that appends stays open: {}{more}", holder_text(first)),
        format!("its events wait, and what it took holds the progress back. Find out what it does; {end}"),
    ))
}

async fn relays(conn: &mut PgConnection, name: Option<&str>) -> Result<Vec<Check>, sqlx::Error> {
    let relays = state::relays(conn, name).await?;
    Ok(relays.iter().flat_map(|(row, not_taken)| relay(row, not_taken)).collect())
}

/// The checks of one relay name.
fn relay(row: &RelayRow, NotTaken { parked, waiting: events }: &NotTaken) -> Vec<Check> {
    let name = |what| format!("relay {}, {what}", row.name);
    let mut checks = vec![leader(name("leader"), row)];
    checks.push(match row.paused_at {
        None => Check::ok(name("paused"), "no"),
        Some(since) => {
            let by = row.paused_by.as_ref().map_or(String::new(), |by| format!(" by {by}"));
            let finding = format!("since {}{by}", time(Some(since)));
            Check::warning(name("paused"), finding, "it goes on with: outbox-relay resume")
        }
    });
    // The pause has its own check, and a leader that is gone waits for nothing.
    let waiting = row.waiting.iter().filter(|waiting| row.is_led() && waiting.part != "paused");
    let waiting: Vec<_> =
        waiting.map(|w| format!("{}: {} (for {} s)", w.part, w.reason, w.seconds)).collect();
    checks.push(if !row.is_led() {
        Check::skipped(name("waiting"), "none leads")
    } else if waiting.is_empty() {
        Check::ok(name("waiting"), "for nothing")
    } else {
        Check::problem(
            name("waiting"),
            waiting.join("; "),
            "do what the reason says; it goes on by itself then",
        )
    });
    checks.push(if parked.all() == 0 {
        Check::ok(name("parked"), "nothing is set aside")
    } else {
        let finding = format!("{} set aside: {}", many(parked.all(), "event"), parked.text());
        let advice = "outbox-relay parked list tells why. Unroutable ones are published by themselves once a queue \
                      takes them";
        Check::warning(name("parked"), finding, advice)
    });
    checks.push(if events.is_empty() {
        Check::ok(name("waiting events"), "none")
    } else {
        let groups: Vec<String> = events.groups.iter().map(WaitingGroup::text).collect();
        let mut advice: Vec<String> = events.groups.iter().map(WaitingGroup::advice).collect();
        advice.sort_unstable();
        advice.dedup();
        let advice = format!(
            "{}. They are published by themselves once they are taken; outbox-relay parked list tells more",
            advice.join("; ")
        );
        Check::warning(name("waiting events"), format!("{}: {}", events.text(), groups.join("; ")), advice)
    });
    checks
}

fn leader(name: String, row: &RelayRow) -> Check {
    let age = row.heartbeat_age.map(span);
    let who = row.leader.as_deref().unwrap_or("somebody");
    match (row.is_led(), row.pid, age) {
        (true, _, Some(age)) => Check::ok(name, format!("{who}, heartbeat {age} ago")),
        (_, Some(pid), Some(age)) => Check::problem(
            name,
            format!("{who} holds the leader's lock but its last heartbeat was {age} ago"),
            format!(
                "another relay that runs takes over by itself, if its role is the same; otherwise run: SELECT \
                 pg_terminate_backend({pid})"
            ),
        ),
        (_, _, Some(age)) => Check::problem(
            name,
            format!("none; the last was {who}, heartbeat {age} ago"),
            "start outbox-relay run with this name; if it runs, its /ready tells what it waits for",
        ),
        (_, _, None) => {
            Check::problem(name, "none, and there never was one", "start outbox-relay run with this name")
        }
    }
}
