//! `doctor`'s look at the sequence, the partitions and the outbox lock. Each check reads the catalog, or one row of each
//! partition by its primary key.

use sqlx::PgConnection;

use super::Check;
use crate::command::{many, state, were};

/// A transaction that holds the outbox lock for more seconds is worth a look.
const LONG: f64 = 60.0;
/// Below so many positions left, the next partition is due.
const POSITIONS_LEFT: i64 = 100_000;

/// A sequence that stands higher was set by hand: at a million positions a second this is 250,000 years.
const MOST: i64 = 8_000_000_000_000_000_000;

/// The sequence must not be behind what was read, stored or published.
pub(super) async fn sequence(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    // In one statement: what was used is of its snapshot, and the sequence is read after that, and only goes on.
    let sql = "SELECT used_position, last_position FROM outbox.overview";
    let (used, mark): (i64, i64) = sqlx::query_as(sql).fetch_one(&mut *conn).await?;
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
        return Ok(Check::ok("sequence", format!("it stands at {mark}, and no higher position is in use")));
    }
    Ok(Check::problem(
        "sequence",
        format!(
            "outbox.position stands at {mark}, behind {used}, which is stored or published already. {}",
            written_meanwhile(conn).await
        ),
        "writers fail at each position that is taken, and no relay begins to lead. As the owner of the schema, run: \
         outbox-relay recover --sequence --yes",
    ))
}

/// How many events no relay publishes because the sequence is behind. To count them is one pass over the events.
async fn written_meanwhile(conn: &mut PgConnection) -> String {
    let sql =
        "SELECT count(*) FROM (SELECT FROM outbox.reissued_event(1) WHERE is_latest LIMIT 10001) AS counted";
    match sqlx::query_scalar::<_, i64>(sql).fetch_one(conn).await {
        Ok(0) => "No event was written meanwhile".to_owned(),
        Ok(count @ ..=10_000) => {
            format!("At most {} written meanwhile, and no relay publishes what lies there", were(count))
        }
        Ok(_) => {
            "More than 10000 events were written meanwhile, and no relay publishes what lies there".to_owned()
        }
        // The finding itself stands.
        Err(_) => "How many events were written meanwhile could not be counted".to_owned(),
    }
}

pub(super) async fn cache(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
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
                "outbox.position has CACHE {cache}: sessions reserve positions, and use them out of order"
            ),
            "run: ALTER SEQUENCE outbox.position CACHE 1, and let the writers connect anew",
        )
    })
}

/// Rows in the default partition are published, but a partition was not made in time.
pub(super) async fn default_partition(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let name = "default partition";
    let sql = "SELECT first_position FROM outbox.partition_status WHERE is_default";
    let first: Option<i64> = sqlx::query_scalar(sql).fetch_optional(conn).await?.flatten();
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

/// How many positions there are until the default partition takes the events.
pub(super) async fn next_partition(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let name = "next partition";
    let sql = "SELECT last_position, partitions_end FROM outbox.overview";
    let (mark, end): (i64, Option<i64>) = sqlx::query_as(sql).fetch_one(conn).await?;
    let next = mark.saturating_add(1);
    let advice = "a relay that runs makes partitions by itself; its log says what keeps it from that. By hand: \
                  SELECT outbox.add_partition(1000000)";
    Ok(match end {
        Some(end) if end <= next => Check::problem(
            name,
            format!("none for position {next}, which goes to outbox.event_default"),
            advice,
        ),
        Some(end) if end - next < POSITIONS_LEFT => {
            let left = many(end - next, "position");
            Check::warning(name, format!("{left} left before outbox.event_default takes the events"), advice)
        }
        Some(end) => Check::ok(name, format!("partitions reach up to position {}", end - 1)),
        None => Check::ok(name, "partitions reach up to the last position there is"),
    })
}

/// A transaction that appends and stays open holds the low-water mark back.
pub(super) async fn lock(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let holders = state::lock_holders(conn).await?;
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
        format!("a transaction that appends stays open: {}{more}", first.text()),
        format!(
            "its events are not published, and its positions hold the low-water mark back. Find out what it \
        does; {end}"
        ),
    ))
}
