//! The reading algorithm on real PostgreSQL, with writers that do everything writers do: several events
//! a transaction, rollbacks, savepoints, exceptions caught in PL/pgSQL, prepared transactions, slow and
//! asynchronous commits; next to an idle appender and unrelated long transactions in this and another
//! database; with a relay that restarts at random and, in one test, a server killed with SIGKILL.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use devstack::{
    folder::Folder,
    ports,
    postgres::Postgres,
    testing::{DEADLINE, Roles},
};
use outbox_relay::{
    event::Event,
    reader::{Budget, READ},
    session::{Begin, CandidateSession, LeaderSession, SessionError},
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection, postgres::PgConnectOptions};
use uuid::Uuid;

const AGGREGATES: i32 = 40;
const WRITERS: u64 = 12;

/// A database with the outbox, some aggregates, and a role that has a relay's rights and no more.
struct Server {
    admin: String,
    relay: PgConnectOptions,
}

async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap()
}

async fn prepare(admin: String) -> Server {
    let mut conn = connect(&admin).await;
    outbox::install(&mut conn, "test").await.unwrap();
    let relay: PgConnectOptions = Roles::make(&admin).await.url("outbox_relay").parse().unwrap();
    conn.execute(AssertSqlSafe(format!(
        "CREATE TABLE aggregate (id int PRIMARY KEY, version bigint NOT NULL DEFAULT 0);
         INSERT INTO aggregate SELECT generate_series(1, {AGGREGATES});

         -- Takes the aggregate's next version under its row lock, then appends.
         CREATE FUNCTION append(which int) RETURNS bigint LANGUAGE sql AS $$
             WITH changed AS (UPDATE aggregate SET version = version + 1 WHERE id = which RETURNING id, version)
             INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             SELECT 'test', id::text, version, 'test.changed', '{{}}' FROM changed RETURNING position
         $$;
         -- Appends, fails and carries on: the position is gone and nobody sees why.
         CREATE FUNCTION append_and_fail(which int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             PERFORM append(which);
             RAISE EXCEPTION 'on purpose';
         EXCEPTION WHEN raise_exception THEN NULL;
         END $$"
    )))
    .await
    .unwrap();
    Server { relay: relay.disable_statement_logging(), admin }
}

/// One transaction of a writer's. An error means that the server was killed meanwhile.
async fn write(conn: &mut PgConnection, rng: &mut SmallRng, serial: u64) -> Result<(), sqlx::Error> {
    let mut which: Vec<i32> =
        (0..rng.random_range(1..=3)).map(|_| rng.random_range(1..=AGGREGATES)).collect();
    which.sort_unstable(); // one order for all, or they deadlock
    let kind = rng.random_range(0..10);
    conn.execute("BEGIN").await?;
    if rng.random_bool(0.3) {
        conn.execute("SET LOCAL synchronous_commit = off").await?;
    }
    for aggregate in which {
        if kind == 0 {
            sqlx::query("SELECT append_and_fail($1)").bind(aggregate).execute(&mut *conn).await?;
        }
        if kind == 1 {
            conn.execute("SAVEPOINT s").await?;
            sqlx::query("SELECT append($1)").bind(aggregate).execute(&mut *conn).await?;
            conn.execute("ROLLBACK TO SAVEPOINT s").await?;
        }
        sqlx::query("SELECT append($1)").bind(aggregate).execute(&mut *conn).await?;
        if kind == 2 {
            sqlx::query("SELECT append($1)").bind(aggregate).execute(&mut *conn).await?;
        }
    }
    match kind {
        3 | 4 => conn.execute("ROLLBACK").await?,
        5 => {
            conn.execute(AssertSqlSafe(format!("PREPARE TRANSACTION 'p{serial}'"))).await?;
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..60))).await;
            let end = if rng.random_bool(0.7) { "COMMIT" } else { "ROLLBACK" };
            conn.execute(AssertSqlSafe(format!("{end} PREPARED 'p{serial}'"))).await?
        }
        6 => {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..80))).await;
            conn.execute("COMMIT").await?
        }
        _ => conn.execute("COMMIT").await?,
    };
    Ok(())
}

/// Writes until told to stop; a killed server is waited for.
async fn writer(url: String, seed: u64, stop: Arc<AtomicBool>) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut serial = seed << 32;
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut conn) = PgConnection::connect(&url).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            serial += 1;
            if write(&mut conn, &mut rng, serial).await.is_err() {
                break;
            }
        }
    }
}

/// The relay's side: reads and settles in any order, stores now and then, and forgets everything at
/// random, as a crash would make it.
#[derive(Default)]
struct Relay {
    leader: Option<LeaderSession>,
    in_flight: Vec<i64>,
    delivered: Vec<Event>,
    most_gaps: usize,
    restarts: usize,
}

/// Leadership, if it is to be had.
async fn lead(server: &Server) -> Result<Option<LeaderSession>, SessionError> {
    let lease = Duration::from_mins(1);
    let mut candidate =
        CandidateSession::connect(&server.relay.clone().into(), "default", Begin::Start, "test", lease)
            .await?;
    if candidate.ask().await? {
        return Ok(Some(candidate.lead().await?));
    }
    candidate.close().await;
    Ok(None)
}

impl Relay {
    async fn run_once(&mut self, server: &Server, rng: &mut SmallRng, restart: f64) {
        match self.try_once(server, rng).await {
            Ok(()) if rng.random_bool(restart) => self.crash(),
            Ok(()) => {}
            Err(error) if error.is_fatal() => panic!("{error}"),
            Err(_) => self.crash(),
        }
    }

    fn crash(&mut self) {
        self.restarts += usize::from(self.leader.take().is_some());
        self.in_flight.clear();
    }

    async fn try_once(&mut self, server: &Server, rng: &mut SmallRng) -> Result<(), SessionError> {
        let Some(leader) = &mut self.leader else {
            self.leader = lead(server).await?;
            if self.leader.is_none() {
                // The server has not noticed yet that the last one is gone.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            return Ok(());
        };
        let budget = Budget { events: rng.random_range(1..60), bytes: rng.random_range(600..40_000) };
        let batch = leader.read(budget).await?;
        assert!(batch.late.is_empty(), "given up too early: {:?}", batch.late);
        let quiet = batch.events.is_empty();
        self.most_gaps = self.most_gaps.max(leader.positions().gaps());
        self.in_flight.extend(batch.events.iter().map(|e| e.position));
        self.delivered.extend(batch.events);
        while !self.in_flight.is_empty() && (quiet || rng.random_bool(0.8)) {
            let n = rng.random_range(0..self.in_flight.len());
            leader.settle(self.in_flight.swap_remove(n));
        }
        if quiet || rng.random_bool(0.2) {
            leader.save("[]").await?;
        }
        if quiet {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Each aggregate's first deliveries are 1, 2, 3, … without a hole.
    fn assert_in_order(&self) {
        let mut last: HashMap<&str, i64> = HashMap::new();
        for event in &self.delivered {
            let last = last.entry(&event.aggregate_id).or_default();
            assert!(
                event.version <= *last + 1,
                "aggregate {} jumped from {last} to {}",
                event.aggregate_id,
                event.version
            );
            *last = event.version.max(*last);
        }
    }

    fn ids(&self) -> BTreeSet<Uuid> {
        self.delivered.iter().map(|e| e.id).collect()
    }

    /// Reads on until `done`, at most for [`DEADLINE`].
    async fn until(
        &mut self,
        server: &Server,
        rng: &mut SmallRng,
        what: &str,
        done: impl AsyncFn(&Self) -> bool,
    ) {
        let end = Instant::now() + DEADLINE;
        while !done(self).await {
            assert!(
                Instant::now() < end,
                "{what}: not within {DEADLINE:?}; open: {:?}",
                self.leader.as_ref().map(|l| l.positions().open(50))
            );
            for _ in 0..20 {
                self.run_once(server, rng, 0.0).await;
            }
        }
    }
}

async fn committed(url: &str) -> BTreeSet<Uuid> {
    let ids: Vec<Uuid> =
        sqlx::query_scalar("SELECT id FROM outbox.event").fetch_all(&mut connect(url).await).await.unwrap();
    ids.into_iter().collect()
}

fn seed() -> u64 {
    let seed =
        std::env::var("SEED").map_or_else(|_| rand::random::<u32>().into(), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    seed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_and_nothing_overtakes() {
    let seed = seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let server = prepare(devstack::testing::database("reading").await).await;
    let elsewhere = devstack::testing::database("elsewhere").await;

    // Long transactions that have nothing to do with the outbox, with a transaction id each.
    let mut unrelated = Vec::new();
    for url in [&server.admin, &elsewhere] {
        let mut conn = connect(url).await;
        conn.execute("BEGIN; SELECT txid_current(); CREATE TABLE unrelated (n int)").await.unwrap();
        unrelated.push(conn);
    }
    // One that appended and then does nothing for as long as the test goes on.
    let mut idle = connect(&server.admin).await;
    idle.execute(
        "BEGIN; INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                VALUES ('test', 'idle', 1, 'test.changed', '{}')",
    )
    .await
    .unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|n| tokio::spawn(writer(server.admin.clone(), seed + 1 + n, Arc::clone(&stop))))
        .collect();
    let mut relay = Relay::default();
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        relay.run_once(&server, &mut rng, 0.005).await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }

    // No stall: with all of the long ones still open, everything committed arrives.
    let all = committed(&server.admin).await;
    relay.until(&server, &mut rng, "everything committed is read", async |relay| relay.ids() == all).await;
    relay.assert_in_order();
    // Twelve writers have at most nine positions each in the making; what was open at a restart may
    // stay until the idle appender ends, since the new relay cannot know which of the two is older.
    println!("{} events, {} restarts, at most {} gaps", all.len(), relay.restarts, relay.most_gaps);
    assert!(relay.most_gaps < 110 * (1 + relay.restarts), "{} gaps were open at a time", relay.most_gaps);

    // The idle appender's own position held low_water back, nothing else. It ends; its event arrives.
    idle.execute("COMMIT").await.unwrap();
    let all = committed(&server.admin).await;
    relay.until(&server, &mut rng, "the idle one's event is read", async |relay| relay.ids() == all).await;
    relay
        .until(&server, &mut rng, "everything is settled", async |relay| {
            relay
                .leader
                .as_ref()
                .is_some_and(|l| l.positions().low_water() == l.positions().high() && !l.has_progress())
        })
        .await;
    relay.assert_in_order();
    drop(unrelated);
}

/// Without restarts an idle appender costs one gap, its own, however many roll back after it.
#[tokio::test]
async fn an_idle_appender_costs_one_gap() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let server = prepare(devstack::testing::database("idle").await).await;
    let mut relay = Relay::default();
    relay.run_once(&server, &mut rng, 0.0).await;
    let mut idle = connect(&server.admin).await;
    idle.execute("BEGIN; SELECT append(1)").await.unwrap();
    let mut busy = connect(&server.admin).await;
    busy.execute("SELECT append(3)").await.unwrap();
    for _ in 0..100 {
        relay.run_once(&server, &mut rng, 0.0).await;
        // The relay samples the sequence at most every 10 ms.
        tokio::time::sleep(Duration::from_millis(11)).await;
        busy.execute("BEGIN; SELECT append(2); ROLLBACK; SELECT append(3)").await.unwrap();
    }
    relay
        .until(&server, &mut rng, "only the idle one's gap is left", async |relay| {
            relay.leader.as_ref().is_some_and(|l| l.positions().open(9).1 == [(1, 1)] && !l.has_progress())
        })
        .await;
    assert!(relay.most_gaps <= 5, "{} gaps were open at a time", relay.most_gaps);
    let stored: (i64, String) =
        sqlx::query_as("SELECT low_water, open::text FROM outbox.relay").fetch_one(&mut busy).await.unwrap();
    assert_eq!(stored, (0, "{[1,2)}".to_owned()));
}

/// Memory is bounded: with too many positions missing the relay reads no further, says so, and goes on
/// once the transaction that may fill them has ended.
#[tokio::test]
async fn too_many_gaps_stop_the_reading_visibly_and_not_for_ever() {
    let server = prepare(devstack::testing::database("stalled").await).await;
    let mut holder = connect(&server.admin).await;
    holder.execute("BEGIN; SELECT pg_advisory_xact_lock_shared(1869968482, 1)").await.unwrap();
    let mut writer = connect(&server.admin).await;
    writer
        .execute(
            "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
             SELECT 2 * n, 'test', n::text, 1, 'test.changed', '{}' FROM generate_series(1, 12000) n;
             SELECT setval('outbox.position', 24000)",
        )
        .await
        .unwrap();
    let mut leader = lead(&server).await.unwrap().unwrap();
    let mut read = 0;
    let mut more = async |leader: &mut LeaderSession| {
        let batch = leader.read(Budget { events: 1_000, bytes: 10_000_000 }).await.unwrap();
        batch.events.iter().for_each(|e| leader.settle(e.position));
        read += batch.events.len();
        read
    };
    while !leader.is_stalled() {
        more(&mut leader).await;
    }
    let stalled_at = more(&mut leader).await;
    assert!((10_000..12_000).contains(&stalled_at), "{stalled_at}");
    assert_eq!(more(&mut leader).await, stalled_at, "it reads on");

    holder.execute("COMMIT").await.unwrap();
    let end = Instant::now() + DEADLINE;
    while more(&mut leader).await < 12_000 {
        assert!(Instant::now() < end, "the reading does not go on");
    }
    assert!(!leader.is_stalled());
}

/// The plan that every read runs by, on a table with a million rows: index scans only, each leg with
/// its own limit inside, and no partition touched that lies below.
#[tokio::test]
async fn a_read_is_two_short_index_scans() {
    let server = prepare(devstack::testing::database("plan").await).await;
    let mut conn = connect(&server.admin).await;
    conn.execute(
        "INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload, previous_id)
         SELECT n, 'test', (n % 1000)::text, n, 'test.changed', '{}', outbox.uuid7() FROM generate_series(1, 1100000) n
         WHERE n % 1000 <> 0;
         SELECT setval('outbox.position', 1100000);
         ANALYZE outbox.event;
         SET plan_cache_mode = force_generic_plan; SET jit = off; SET enable_seqscan = off;",
    )
    .await
    .unwrap();
    conn.execute(AssertSqlSafe(format!(
        "PREPARE read (bigint[], bigint[], bigint, bigint, bigint) AS {READ}"
    )))
    .await
    .unwrap();
    // Near the end of the first partition, with a few gaps behind.
    let explain = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF)
         EXECUTE read ('{498000,499000,500000}', '{498000,499000,500000}', 500000, 1000, 1000)";
    let plan: Vec<String> = sqlx::query_scalar(explain).fetch_all(&mut conn).await.unwrap();
    for line in plan.iter().filter(|line| line.contains("Scan")) {
        let few = ["Index Scan using", "Index Only Scan using", "Function Scan on gap"];
        assert!(few.iter().any(|scan| line.contains(scan)), "{line}");
    }
    // Releases word and shape plans differently; Debian 12's is reviewed line by line.
    let release: String = sqlx::query_scalar("SHOW server_version_num").fetch_one(&mut conn).await.unwrap();
    if release.starts_with("15") {
        insta::assert_snapshot!(plan.join("\n"));
    }
}

/// Prepared transactions outlive the server's death and keep their locks; somebody has to end them.
async fn commit_orphans(url: &str) {
    let mut conn = connect(url).await;
    let gids: Vec<String> =
        sqlx::query_scalar("SELECT gid FROM pg_prepared_xacts").fetch_all(&mut conn).await.unwrap();
    for gid in gids {
        // One that its writer is just ending itself is no orphan.
        let _ = conn.execute(AssertSqlSafe(format!("COMMIT PREPARED '{gid}'"))).await;
    }
}

/// A server that is killed takes back what was committed with `synchronous_commit=off` and not yet
/// written, and hands out the same positions again. Nothing of what it takes back was published, and
/// nothing that it puts at those positions later is skipped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_takes_nothing_back_that_was_published() {
    let seed = seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let folder = Folder::temporary().unwrap();
    let mut postgres = Postgres::new(&folder, ports::free(), false).await.unwrap();
    postgres.start().await.unwrap();
    let server = prepare(format!("{}/postgres", postgres.url())).await;
    // As late as it gets: the writer of the WAL wakes up every 10 s.
    let mut conn = connect(&server.admin).await;
    for setting in [
        "ALTER SYSTEM SET synchronous_commit = off",
        "ALTER SYSTEM SET wal_writer_delay = '10s'",
        "SELECT pg_reload_conf()",
    ] {
        conn.execute(setting).await.unwrap();
    }

    // At the worst moment: killed between the read and anything else that would flush the commit.
    let mut relay = Relay::default();
    for version in 1..=3 {
        relay.run_once(&server, &mut rng, 0.0).await;
        connect(&server.admin).await.execute("SELECT append(1)").await.unwrap();
        let leader = relay.leader.as_mut().unwrap();
        let batch = leader.read(Budget { events: 10, bytes: 10_000 }).await.unwrap();
        assert_eq!(batch.events.last().unwrap().version, version);
        relay.delivered.extend(batch.events);
        postgres.kill().await;
        postgres.start().await.unwrap();
        relay.crash();
        assert_eq!(relay.ids(), committed(&server.admin).await, "a published event was taken back");
    }

    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> =
        (0..4).map(|n| tokio::spawn(writer(server.admin.clone(), seed + 1 + n, Arc::clone(&stop)))).collect();
    for _ in 0..5 {
        let end = Instant::now() + Duration::from_millis(rng.random_range(400..1_200));
        while Instant::now() < end {
            relay.run_once(&server, &mut rng, 0.0).await;
        }
        postgres.kill().await;
        postgres.start().await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    while writers.iter().any(|writer| !writer.is_finished()) {
        commit_orphans(&server.admin).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    commit_orphans(&server.admin).await;

    let all = committed(&server.admin).await;
    relay
        .until(&server, &mut rng, "everything that survived is read", async |relay| {
            relay.ids().is_superset(&all)
        })
        .await;
    relay.assert_in_order();
    let taken_back = relay.ids().difference(&all).count();
    println!("{} events survived, {} restarts", all.len(), relay.restarts);
    assert_eq!(taken_back, 0, "events were published that the server took back");
}
