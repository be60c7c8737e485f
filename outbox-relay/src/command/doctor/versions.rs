//! `doctor`'s look at the chains of versions: what was skipped, given twice, or begun again.

use sqlx::{FromRow, PgConnection};

use super::Check;
use crate::command::many;

/// So many events, the last ones, are looked at.
const EVENTS: i64 = 10_000;
/// Of so many aggregates among them, the last ones, the event before those is looked at as well: by the partitions'
/// unique indexes, one row each.
const AGGREGATES: i64 = 1_000;
/// So many faults are named.
const NAMED: i64 = 3;

/// Each of the last `$1` events against the event before it of its aggregate, by position; for the first ones of `$2`
/// aggregates, against the highest version that is stored below. A baseline or a deletion with a version above what
/// was given before ends the trouble: receivers jump to it. What was published under an earlier incarnation is another
/// history. Where no history was retired, a chain begins with 1.
const CHAINS: &str = "\
WITH origin AS (SELECT from_position AS at, outbox.is_retired() AS retired FROM outbox.source),
latest AS (
    SELECT position, aggregate_type, aggregate_id, version,
           coalesce(headers @> '{\"baseline\": true}', false) OR type = aggregate_type || '.deleted' AS whole
    FROM outbox.event ORDER BY position DESC LIMIT $1),
steps AS (
    SELECT position, aggregate_type, aggregate_id, version,
           lag(version) OVER chain AS before, lag(position) OVER chain AS at, row_number() OVER chain AS n,
           max(version) FILTER (WHERE whole) OVER rest AS mended,
           max(version) OVER (PARTITION BY aggregate_type, aggregate_id) AS top
    FROM latest
    WINDOW chain AS (PARTITION BY aggregate_type, aggregate_id ORDER BY position),
           rest AS (PARTITION BY aggregate_type, aggregate_id ORDER BY position
                    ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)),
firsts AS (SELECT * FROM steps WHERE n = 1 ORDER BY position DESC LIMIT $2),
links AS (
    SELECT position, aggregate_type, aggregate_id, version, before, at, mended, top FROM steps WHERE n > 1
    UNION ALL
    SELECT f.position, f.aggregate_type, f.aggregate_id, f.version,
           coalesce(b.version, CASE WHEN NOT o.retired AND o.at = 0 THEN 0 END), coalesce(b.position, o.at + 1),
           f.mended, f.top
    FROM firsts f CROSS JOIN origin o
    CROSS JOIN (SELECT min(position) AS first FROM latest) w
    LEFT JOIN LATERAL (
        SELECT e.version, e.position FROM outbox.event e
        WHERE e.aggregate_type = f.aggregate_type AND e.aggregate_id = f.aggregate_id AND e.position < w.first
        ORDER BY e.version DESC LIMIT 1) b ON true),
broken AS (
    SELECT l.* FROM links l CROSS JOIN origin o
    WHERE l.version::numeric - 1 <> l.before AND coalesce(l.mended <= l.before, true)
      AND (l.at > o.at OR l.position <= o.at)),
looked AS (SELECT count(*) AS events, min(position) AS first FROM latest)
SELECT looked.events, looked.first, (SELECT count(*) FROM firsts) AS followed,
       (SELECT count(*) FROM steps WHERE n = 1) AS aggregates, (SELECT count(*) FROM broken) AS faults,
       b.position, b.aggregate_type, b.aggregate_id, b.before, b.version, greatest(b.top, b.before) AS highest
FROM looked LEFT JOIN LATERAL (SELECT * FROM broken ORDER BY position LIMIT $3) b ON true
ORDER BY b.position";

#[derive(Debug, sqlx::FromRow)]
struct Examined {
    events: i64,
    first: Option<i64>,
    followed: i64,
    aggregates: i64,
    faults: i64,
}

#[derive(Debug, sqlx::FromRow)]
struct BrokenLink {
    position: i64,
    aggregate_type: String,
    aggregate_id: String,
    before: i64,
    version: i64,
    highest: i64,
}

impl BrokenLink {
    fn aggregate(&self) -> String {
        format!("{}/{}", self.aggregate_type.escape_debug(), self.aggregate_id.escape_debug())
    }

    fn text(&self) -> String {
        let Self { position, before, version, .. } = self;
        let aggregate = self.aggregate();
        if *before == 0 {
            format!("{aggregate} begins with version {version}, at position {position}")
        } else if version == before {
            format!("{aggregate} has version {version} a second time, at position {position}")
        } else if *version == 1 {
            format!("{aggregate} begins again with version 1 after version {before}, at position {position}")
        } else if version < before {
            format!("{aggregate} goes back from version {before} to {version}, at position {position}")
        } else {
            format!("{aggregate} skips from version {before} to {version}, at position {position}")
        }
    }
}

pub(super) async fn check(conn: &mut PgConnection) -> Result<Check, sqlx::Error> {
    let rows = sqlx::query(CHAINS).bind(EVENTS).bind(AGGREGATES).bind(NAMED).fetch_all(conn).await?;
    let examined = rows.first().map(Examined::from_row).transpose()?;
    let Some(Examined { events, first: Some(first), followed, aggregates, faults }) = examined else {
        return Ok(Check::ok("versions", "there are no events"));
    };
    let whole = if followed == aggregates { "all".to_owned() } else { format!("{followed} of") };
    let looked = format!(
        "examined: the last {}, from position {first} on, and the version before them of {whole} their {}",
        many(events, "event"),
        many(aggregates, "aggregate")
    );
    if faults == 0 {
        return Ok(Check::ok("versions", format!("no version is skipped, repeated or restarted; {looked}")));
    }
    let named: Vec<BrokenLink> = rows.iter().map(BrokenLink::from_row).collect::<Result<_, _>>()?;
    let texts: Vec<String> = named.iter().map(BrokenLink::text).collect();
    let more = match faults - i64::try_from(named.len()).unwrap_or(i64::MAX) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let next = named.first().map_or_else(String::new, |fault| {
        let next = fault.highest.checked_add(1).map_or_else(|| "none".to_owned(), |next| next.to_string());
        format!(" (for {}: {next})", fault.aggregate())
    });
    Ok(Check::problem(
        "versions",
        format!("{}: {}{more}; {looked}", many(faults, "broken chain link"), texts.join("; ")),
        format!(
            "subscribers that follow versions wait for what is skipped, and take what is repeated for a duplicate. \
             First mend the producer: the version comes from the aggregate's row, under its lock, and goes up by 1 \
             with each event. Then append the whole state of each aggregate, with the header baseline: true and the \
             version after the highest{next}"
        ),
    ))
}
