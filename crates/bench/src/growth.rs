//! Whether a long history slows the relay down: the same drain with a long and with a short one.

use sqlx::{AssertSqlSafe, Executor, PgConnection};

use super::{
    figure::{Figure, Row},
    goal::Goal,
    relay::Drain,
    testbed::Testbed,
};

/// Positions of a partition, as the relay makes them.
const PARTITION: i64 = 1_000_000;
/// Events of the short history.
const SHORT: i64 = 10_000;

/// See [`Row`].
#[derive(Debug)]
pub struct Growth {
    long: Drain,
    short: Drain,
}

impl Figure for Growth {
    const ROWS: &'static [Row] = &[Row {
        name: "growth",
        system: "drains as above, with 5,000,000 events of history",
        ceiling: Some("itself with 10,000"),
        unit: "events/s",
        goal: Goal::RatioAtLeast(0.9),
    }];

    async fn prepare(testbed: &Testbed) -> anyhow::Result<Self> {
        let mut long = Drain::prepare(testbed, "bench_long", "long").await?;
        let mut short = Drain::prepare(testbed, "bench_short", "short").await?;
        history(testbed, "bench_long", testbed.size.history).await?;
        history(testbed, "bench_short", SHORT).await?;
        for drain in [&mut long, &mut short] {
            settled(&mut drain.conn, "default", 0).await?;
            // Other persons than those of the history.
            drain.begin_with(testbed.size.history);
        }
        Ok(Self { long, short })
    }

    async fn system(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        Ok(vec![self.long.round(testbed, testbed.size.events / 2).await?])
    }

    async fn ceiling(&mut self, testbed: &Testbed) -> anyhow::Result<Vec<f64>> {
        Ok(vec![self.short.round(testbed, testbed.size.events / 2).await?])
    }

    async fn finish(self, testbed: &Testbed) -> anyhow::Result<Vec<String>> {
        self.long.end(testbed, "long").await?;
        self.short.end(testbed, "short").await?;
        Ok(Vec::new())
    }
}

/// Fills a database's outbox with `count` events that were published long ago, in partitions as the relay
/// makes them; by two sessions, each with every second partition. As a superuser it may give positions,
/// which saves taking each one.
pub(crate) async fn history(testbed: &Testbed, database: &str, count: i64) -> anyhow::Result<()> {
    let mut conn = testbed.connect(database).await?;
    let partitions = (count + PARTITION - 1) / PARTITION;
    for _ in 0..partitions {
        conn.execute("SELECT outbox.add_partition(1000000)").await?;
    }
    let fill = async |first: i64| {
        let mut conn = testbed.connect(database).await?;
        for n in (first..partitions).step_by(2) {
            let (from, to) = (n * PARTITION + 1, ((n + 1) * PARTITION).min(count));
            let sql = format!(
                r#"INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, previous_id)
                   SELECT n, uuid, 'person', uuid::text, 1, 'person.new', format(
                       '{{"id":"%s","cpf":%s,"name":"Maria da Silva Santos","address":"Rua das Laranjeiras 100, Rio de Janeiro","date_of_birth":"1980-05-17T00:00:00+00:00","created_at":"2026-03-01T09:00:00.123456+00:00"}}', uuid, n)::json,
                       '00000000-0000-0000-0000-000000000000'
                   FROM generate_series({from}, {to}) n,
                        LATERAL (SELECT (lpad(to_hex(1750000000000 + n), 12, '0') || '7000a' || lpad(n::text, 15, '0'))::uuid AS uuid OFFSET 0) u"#
            );
            conn.execute(AssertSqlSafe(sql)).await?;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(fill(0), fill(1))?;
    conn.execute(
        "INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position, state)
         SELECT aggregate_type, aggregate_id, version, id, position, 'live' FROM outbox.event
         ON CONFLICT DO NOTHING",
    )
    .await?;
    conn.execute(AssertSqlSafe(format!("SELECT setval('outbox.position', {count})"))).await?;
    // What the server would do by itself some time later, in the middle of a round.
    conn.execute("VACUUM (FREEZE, ANALYZE) outbox.event, outbox.aggregate").await?;
    Ok(())
}

/// Makes a relay name for which all but the last `waiting` events are settled.
pub(crate) async fn settled(conn: &mut PgConnection, name: &str, waiting: i64) -> anyhow::Result<()> {
    sqlx::query(
        "INSERT INTO outbox.relay (name, low_water, high)
         SELECT $1, last_value - $2, last_value - $2 FROM outbox.position",
    )
    .bind(name)
    .bind(waiting)
    .execute(conn)
    .await?;
    Ok(())
}
