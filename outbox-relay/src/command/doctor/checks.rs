//! What `doctor` asks the database. Each check reads catalogs, or a bounded number of rows by the
//! primary key, whatever the size of the outbox.

use anyhow::Context;
use chrono::{DateTime, Utc};
use daemon::config::database::SchemaError;
use outbox::database::Failure;
use sqlx::PgConnection;

use super::{Check, captures, positions, relays, settings, versions};
use crate::{
    command::{span, state},
    lead::ELSEWHERE,
    session::schema,
};

/// Clocks that differ by more seconds make ages and certificates doubtful.
const CLOCKS: f64 = 5.0;

/// The checks that need the schema.
const NEED_SCHEMA: [&str; 13] = [
    "permissions",
    "source",
    "place",
    "sequence",
    "sequence cache",
    "default partition",
    "partition bounds",
    "next partition",
    "row security",
    "outbox lock",
    "versions",
    "captures",
    "relays",
];

/// What a relay needs and no more. Asked by OID, because a name cannot be looked up without the right to
/// use the schema. What does not exist is the business of another check.
const PERMISSIONS: &str = "\
SELECT n.nspname || '.' || c.relname || ': ' || string_agg(p, ', ' ORDER BY o)
FROM (VALUES ('source', '{SELECT}'::text[]), ('migration', '{SELECT}'), ('event', '{SELECT}'),
             ('position', '{SELECT}'), ('partition', '{SELECT}'), ('event_default', '{SELECT}'), ('relay', '{SELECT,INSERT,UPDATE}'),
             ('parked', '{SELECT,INSERT,UPDATE,DELETE}'), ('replay', '{SELECT,INSERT,UPDATE,DELETE}'),
             ('overview', '{SELECT}'), ('relay_status', '{SELECT}'), ('leader_session', '{SELECT}'), ('lock_holder', '{SELECT}'),
             ('event_progress', '{SELECT}'), ('parked_event', '{SELECT}'), ('parked_group', '{SELECT}'),
             ('waiting_group', '{SELECT}'), ('partition_status', '{SELECT}'), ('partition_in_use', '{SELECT}'), ('captured', '{SELECT}'),
             ('capture_problem', '{SELECT}'))
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
WHERE n.nspname = 'outbox' AND p.proname IN ('add_partition', 'begin_next_partition', 'why_kept', 'what_keeps', 'retire_partition',
                                             'drop_partition', 'retention_blocker', 'leader_pid')
  AND NOT has_function_privilege(p.oid, 'EXECUTE')
ORDER BY 1";

/// Goes through all that the database can tell.
pub(super) async fn database(
    conn: &mut PgConnection,
    second: &mut PgConnection,
    name: Option<&str>,
) -> anyhow::Result<Vec<Check>> {
    let mut checks = vec![
        // Before any statement is prepared: behind a pooler those fail.
        finding("session", settings::session(conn, second).await)?,
        finding("server", recovery(conn).await)?,
        finding("writes", settings::writes(conn).await)?,
        finding("connect", settings::connect(conn).await)?,
        finding("clock", clock(conn).await)?,
    ];
    let (schema, usable) = schema_check(conn).await?;
    checks.push(schema);
    checks.push(finding("statistics", statistics(conn).await)?);
    if !usable {
        let why = "the schema is not there, or not the one expected";
        checks.extend(NEED_SCHEMA.map(|name| Check::skipped(name, why)));
        return Ok(checks);
    }
    checks.push(finding("permissions", permissions(conn).await)?);
    checks.push(source(conn).await?);
    checks.push(finding("place", place(conn).await)?);
    checks.push(finding("sequence", positions::sequence(conn).await)?);
    checks.push(finding("sequence cache", positions::cache(conn).await)?);
    checks.push(finding("default partition", positions::default_partition(conn).await)?);
    checks.push(finding("partition bounds", settings::bounds(conn).await)?);
    checks.push(finding("next partition", positions::next_partition(conn).await)?);
    checks.push(finding("row security", settings::row_security(conn).await)?);
    checks.push(finding("outbox lock", positions::lock(conn).await)?);
    checks.push(finding("versions", versions::check(conn).await)?);
    checks.push(finding("captures", captures::check(conn).await)?);
    match relays::relays(conn, name).await {
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
fn finding(name: &str, checked: Result<Check, sqlx::Error>) -> anyhow::Result<Check> {
    checked.or_else(|error| failed(name, error))
}

fn failed(name: &str, error: sqlx::Error) -> anyhow::Result<Check> {
    let Some(said) = error.as_database_error() else {
        return Err(error).context("the database went away during the examination");
    };
    Ok(match Failure::of(&error) {
        Failure::Forbidden => Check::skipped(name, format!("this role may not check it: {}", said.message())),
        _ => Check::warning(
            name,
            format!("the check failed: {}", said.message()),
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
        Err(SchemaError::SharedSessions(shared)) => (failed(name, shared.into())?, false),
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
    let asked = "SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'), quote_ident(current_user)";
    let (may, role): (bool, String) = sqlx::query_as(asked).fetch_one(conn).await?;
    Ok(if may {
        Check::ok("statistics", "this role sees which transactions are idle")
    } else {
        Check::warning(
            "statistics",
            "this role does not see which transactions are idle, so the relay takes each of them for a possible \
            writer of every missing position",
            format!("let a superuser run: GRANT pg_read_all_stats TO {role}"),
        )
    })
}

/// A restore or a failover may have lost commits, which no check of the database itself can see.
async fn place(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let elsewhere: Option<bool> =
        sqlx::query_scalar("SELECT is_elsewhere FROM outbox.overview").fetch_one(conn).await?;
    Ok(match elsewhere {
        None => Check::skipped("place", "it is not known where the database was: run outbox-relay migrate"),
        Some(false) => {
            Check::ok("place", "the database is where it was when it last was known to have lost nothing")
        }
        Some(true) => Check::warning(
            "place",
            "the database is on another server, on another timeline of it, or is another database there",
            ELSEWHERE,
        ),
    })
}

async fn source(conn: &mut PgConnection) -> anyhow::Result<Check> {
    Ok(match outbox::source(conn).await {
        Ok(source) => Check::ok("source", format!("it publishes as {source}")),
        Err(outbox::SourceError::Database(error)) => failed("source", error)?,
        Err(_) => Check::problem(
            "source",
            "the database has no source name to publish under",
            "run: outbox-relay migrate --source NAME",
        ),
    })
}
