//! What the work costs where it can be counted: statements, rows read, WAL and dead rows. Counts are the
//! same on every machine, so a change that costs more is seen here, and not in a noisy time.
//!
//! The servers count for the programs that are under way ([`Meter`]). What a program asks because time has
//! passed is taken out by name; everything else stands in the snapshots, whatever it is.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use devstack::{
    folder::Folder,
    program::Program,
    servers::Setup,
    stack::Stack,
    testing::{DEADLINE, eventually},
};
use sqlx::{Connection, PgConnection};
use support::{Apis, payload};
use tokio_util::sync::CancellationToken;

const SETUP: Setup = Setup {
    settings: &[
        "shared_preload_libraries=pg_stat_statements",
        "pg_stat_statements.track_planning=on",
        // So that what is dead stays to be counted.
        "autovacuum=off",
        // The log says which processes are started.
        "log_min_messages=debug1",
    ],
    ..Setup::QUIET
};
/// Whom the writes are about, in turn: more than a batch of the projector's, so that none has two events of
/// the same person, and a batch's size changes nothing.
const PERSONS: u64 = 200;
/// What is written: an income and an asset of each.
const EVENTS: i64 = 400;
/// Connections that a program has at most, each of which plans for itself.
const SESSIONS: i64 = 10;
/// How often a program looks which session it has, to find a pooler: 13 times at its start, and a relay as often when it
/// connects to lead.
const LOOKS: i64 = 26;
/// The relay stores its progress at most four times a second (`SAVE_INTERVAL`).
const SAVE_INTERVAL: Duration = Duration::from_millis(250);

// Of rows and index entries, without the commits' own; the server writes no images of pages here, which
// depend on when there was a checkpoint. More is a new index, a wider row, or a row that is written twice.
// The numbers leave a few bytes for pages that split and for times that end in zeros or do not.
/// WAL bytes of an income: a version of the person, a row with two index entries, an event with two, and a version of its
/// chain's end.
const WAL_OF_A_WRITE: i64 = 1_480;
/// The same, and the answer that is kept for a retry, with the digest of its key.
const WAL_OF_A_KEYED_WRITE: i64 = 2_200;
/// Of applying an event: versions of the person, of the inbox's aggregate and of the score's chain in the outbox, an
/// entry, and an event that is published, with the id of the one before it.
const WAL_OF_APPLYING: i64 = 1_850;

#[tokio::test]
async fn an_event_costs_what_it_did() {
    let mut stack = Stack::prepare(Folder::temporary().unwrap(), SETUP).await.unwrap();
    let mut meter = Meter::new(&stack).await;
    let apis = Apis::of(&stack.addresses());
    persons(&mut stack, &apis).await;
    let counted = [
        write(&mut meter, &apis).await,
        write_with_a_key(&mut meter, &apis).await,
        relay(&mut stack, &mut meter).await,
        project(&mut stack, &mut meter).await,
        read(&mut stack, &mut meter, &apis).await,
    ];
    insta::assert_snapshot!(counted.join("\n"));
    dead_rows(&stack).await;
    no_workers(&stack);
    stack.stop(&CancellationToken::new()).await;
}

/// Persons who are known on both sides, so that what is counted are items alone. Then the projector is away,
/// and the relay is paused.
async fn persons(stack: &mut Stack, apis: &Apis) {
    for program in [&mut stack.person_api, &mut stack.person_relay, &mut stack.score_projector] {
        run(program).await;
    }
    let mut person: serde_json::Value = serde_json::from_str(&payload("person")).unwrap();
    for cpf in 1..=PERSONS {
        person["cpf"] = cpf.into();
        assert_eq!(apis.post("/person", person.to_string()).await.status, 201);
    }
    until_applied(stack, i64::try_from(PERSONS).unwrap()).await;
    stop(&mut stack.score_projector).await;
    pause(stack, true).await;
    // As autovacuum does: now the server knows that there is next to nothing, so that to read all of it seems best.
    for database in ["person", "score"] {
        sqlx::raw_sql("ANALYZE").execute(&mut connect(stack, database).await).await.unwrap();
    }
}

/// `POST /person/{cpf}/income`, one after the other.
async fn write(meter: &mut Meter, apis: &Apis) -> String {
    meter.reset().await;
    for cpf in 1..=PERSONS {
        let answer = apis.post(&format!("/person/{cpf}/income"), payload("income")).await;
        assert_eq!(answer.status, 201, "{}", answer.shown());
    }
    written(meter, "write", WAL_OF_A_WRITE).await
}

/// `POST /person/{cpf}/asset` with an `Idempotency-Key`.
async fn write_with_a_key(meter: &mut Meter, apis: &Apis) -> String {
    meter.reset().await;
    for cpf in 1..=PERSONS {
        let answer = apis.post_once(&format!("/person/{cpf}/asset"), payload("asset"), "key").await;
        assert_eq!(answer.status, 201, "{}", answer.shown());
    }
    written(meter, "write with an Idempotency-Key", WAL_OF_A_KEYED_WRITE).await
}

async fn written(meter: &mut Meter, title: &str, wal: i64) -> String {
    let writes = i64::try_from(PERSONS).unwrap();
    let mut work = meter.work("person", "person_api").await;
    // What each new connection sets: no more of them than there may be connections.
    within(&format!("connections, {title}"), work.take(&["SELECT set_config("]).calls, SESSIONS);
    // The readiness, and the removal of old answers and of what is left of deleted persons.
    work.take(&[
        "person.migration",
        "outbox.migration",
        "DELETE FROM person.idempotency",
        "SELECT FROM person.person WHERE cpf IS NULL",
        "SELECT id FROM person.person WHERE cpf IS NULL",
    ]);
    // The sweep of old keys may come in between, in a transaction of its own. A write is one statement, without.
    let is_bracket = |statement: &Statement| ["BEGIN", "COMMIT"].contains(&&*statement.query);
    for bracket in work.0.iter().filter(|statement| is_bracket(statement)) {
        within("transactions beside the writes", bracket.calls, 2);
    }
    work.0.retain(|statement| !is_bracket(statement));
    let notices = work.take(&["NOTIFY "]);
    within("notices", notices.calls, writes);
    within(&format!("WAL bytes, {title}"), work.wal_bytes() / writes, wal);
    format!("{title}: {writes} of them\n{}", work.shown())
}

/// A relay that runs has all of them before it at once.
async fn relay(stack: &mut Stack, meter: &mut Meter) -> String {
    stop(&mut stack.person_api).await;
    meter.reset().await;
    let begin = Instant::now();
    pause(stack, false).await;
    until_settled(stack).await;
    let elapsed = begin.elapsed();
    let mut work = meter.work("person", "outbox_relay").await;
    stop(&mut stack.person_relay).await;

    // However often it looks, it reads each event once, and that writes nothing.
    let reads = work.take(&["FROM outbox.readable WHERE position > $3"]);
    assert_eq!((reads.rows, reads.wal_bytes), (EVENTS, 0), "rows read, and WAL of reading them");
    // The progress: so often in a time, however many events.
    let saves = work.take(&["SET low_water = $3"]);
    let most = i64::try_from(elapsed.as_millis() / SAVE_INTERVAL.as_millis()).unwrap() + 3;
    within("progress stored", saves.calls, most);
    // What makes durable what was read before its writer's WAL was on disk: once for each read of something, which finds
    // fewer events where the broker takes them more slowly.
    let durable = work.take(&["pg_logical_emit_message"]).calls;
    within("times made sure that events are durable", durable, EVENTS / 10);
    assert!(durable > 0, "nothing was made durable");
    // Where the sequence stands, at each poll; whether there are partitions, and something to erase.
    work.take(&[
        "statement_timestamp()",
        "outbox.partition",
        "event_default",
        "outbox.erasure",
        "keep_no_samples",
    ]);
    assert_eq!(work.wal_bytes(), 0, "WAL of relaying, but for the progress: {}", work.shown());
    format!("relay: {EVENTS} events\n{}", work.shown())
}

/// All of them are in the queue when the projector starts.
async fn project(stack: &mut Stack, meter: &mut Meter) -> String {
    let mut visited = HashMap::new();
    for table in ["inbox.aggregate", "score.person", "outbox.aggregate", "score.entry"] {
        visited.insert(table, meter.visited(stack, table).await);
    }
    meter.reset().await;
    let begin = Instant::now();
    run(&mut stack.score_projector).await;
    until_applied(stack, i64::try_from(PERSONS).unwrap() + EVENTS).await;
    let mut work = meter.work("score", "score_projector").await;
    stop(&mut stack.score_projector).await;
    // A join, or a plan that was made when there was next to nothing in the tables, might read all that there is,
    // batch by batch. A row is visited where it is made or found, where it is
    // locked, where it is written, and a person where an entry refers to them.
    for (table, most) in
        [("inbox.aggregate", 3), ("score.person", 3), ("outbox.aggregate", 2), ("score.entry", 1)]
    {
        let visited = meter.visited(stack, table).await - visited[table];
        within(&format!("rows of {table} visited"), visited, most * EVENTS);
    }

    // The start, and what is asked now and then: whether the database is there, which models there are, what
    // is held and rejected, and whether something of it is to be erased.
    work.take(&[
        "_catalog.pg_type",
        ".migration",
        "queue, since FROM score.model",
        "SELECT count(*)",
        "erase_step",
    ]);
    let there = work.0.extract_if(.., |statement| statement.query == "SELECT $1").map(|one| one.calls).sum();
    within(
        "asked whether the database is there",
        there,
        2 + i64::try_from(begin.elapsed().as_secs()).unwrap(),
    );
    let transactions =
        work.0.iter().find(|statement| statement.query.starts_with("BEGIN ISOLATION")).map_or(0, |b| b.calls);
    // The look for a pooler at the start, and whether the database takes writes.
    work.take(&["pg_backend_pid", "SELECT coalesce(current_setting(", "SELECT pg_is_in_recovery()"]);
    let set = work.take(&["set_config("]);
    within("settings of new connections, and of the look for a pooler", set.calls, SESSIONS);
    // The start hands the versions of former releases over to the outbox, in a transaction of its own.
    work.take(&["hand_over_chains", "SET LOCAL statement_timeout"]);
    if let Some(commit) = work.0.iter_mut().find(|statement| statement.query == "COMMIT") {
        commit.calls -= 1;
    }
    work.0.retain(|statement| !["BEGIN", "ROLLBACK"].contains(&&*statement.query));
    let notices = work.take(&["NOTIFY "]);
    within("notices, to the relay and to the readers", notices.calls, 2 * transactions);
    // A message that came alone.
    work.take(&["SAVEPOINT", "SET CONSTRAINTS"]);
    within("WAL bytes of applying an event", work.wal_bytes() / EVENTS, WAL_OF_APPLYING);
    let uneven: Vec<&str> =
        work.0.iter().filter(|s| s.calls != transactions).map(|statement| &*statement.query).collect();
    assert!(uneven.is_empty(), "not once in each of {transactions} transactions: {uneven:#?}");
    let once: Vec<String> = work.0.iter().map(Statement::start).collect();
    format!("project: each once in a transaction, however many events it has\n  {}\n", once.join("\n  "))
}

/// `GET /{cpf}/score`, one after the other.
async fn read(stack: &mut Stack, meter: &mut Meter, apis: &Apis) -> String {
    run(&mut stack.score_api).await;
    meter.reset().await;
    for cpf in 1..=PERSONS {
        let answer = apis.score(cpf).await;
        assert_eq!(answer.status, 200, "{}", answer.shown());
    }
    let mut work = meter.work("score", "score_api").await;
    stop(&mut stack.score_api).await;
    // The readiness.
    work.take(&[".migration"]);
    format!("read: {PERSONS} scores\n{}", work.shown())
}

/// Tables whose rows are updated in place, each at most once for an event and for what `persons` did.
const UPDATED: [&str; 4] = ["person.person", "inbox.aggregate", "score.person", "outbox.aggregate"];

/// What a vacuum would have to remove after all of it: of the outbox nothing, nor of anything else to which
/// rows are only added.
async fn dead_rows(stack: &Stack) {
    let mut tables = 0;
    for (database, schemas) in [("person", "person|outbox"), ("score", "inbox|score|outbox")] {
        let mut conn = connect(stack, database).await;
        sqlx::raw_sql("CREATE EXTENSION pgstattuple").execute(&mut conn).await.unwrap();
        let dead: Vec<(String, i64, i64)> = sqlx::query_as(
            "SELECT n.nspname || '.' || c.relname, tuple_count, dead_tuple_count
             FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace, LATERAL pgstattuple(c.oid)
             WHERE relkind = 'r' AND n.nspname ~ ('^(' || $1 || ')$') AND relname <> 'migration' ORDER BY 1",
        )
        .bind(schemas)
        .fetch_all(&mut conn)
        .await
        .unwrap();
        for (table, rows, dead) in dead {
            tables += 1;
            let most = match &*table {
                // One row; what is dead on its page is reused.
                "outbox.relay" => 100,
                updated if UPDATED.contains(&updated) => rows + EVENTS,
                _ => 0,
            };
            within(&format!("dead rows in {table} of the database {database}"), dead, most);
        }
    }
    assert!(tables > 15, "only {tables} tables were looked at");
}

fn within(what: &str, count: i64, most: i64) {
    eprintln!("{what}: {count}, at most {most}");
    assert!(count <= most, "{what}: {count} is more than {most}");
}

async fn run(program: &mut Program) {
    program.start().await.unwrap();
    program.ready(DEADLINE).await.unwrap_or_else(|error| panic!("{error:#}"));
}

async fn stop(program: &mut Program) {
    assert!(program.stop(&CancellationToken::new()).await, "{} did not end in good order", program.name());
}

async fn connect(stack: &Stack, database: &str) -> PgConnection {
    let url = format!("{}/{database}", stack.servers.postgres.url());
    PgConnection::connect(&url).await.unwrap()
}

/// Pauses the relay, or lets it go on, as the command does; it learns of it with its next heartbeat.
async fn pause(stack: &Stack, paused: bool) {
    let mut conn = connect(stack, "person").await;
    sqlx::query("UPDATE outbox.relay SET paused_at = CASE WHEN $1 THEN now() END")
        .bind(paused)
        .execute(&mut conn)
        .await
        .unwrap();
    eventually("the relay knows whether it is paused", async || {
        let reason = stack.person_relay.not_ready().await;
        if reason.is_some() == paused { Ok(()) } else { Err(format!("not ready: {reason:?}")) }
    })
    .await;
}

async fn until_settled(stack: &Stack) {
    let mut conn = connect(stack, "person").await;
    eventually("the relay has settled all events", async || {
        let left: i64 = sqlx::query_scalar(
            "SELECT (SELECT last_value FROM outbox.position) - low_water FROM outbox.relay",
        )
        .fetch_one(&mut conn)
        .await
        .unwrap();
        if left == 0 { Ok(()) } else { Err(format!("{left} are left")) }
    })
    .await;
}

async fn until_applied(stack: &Stack, events: i64) {
    let mut conn = connect(stack, "score").await;
    eventually("the projector has applied all events", async || {
        let applied: i64 =
            sqlx::query_scalar("SELECT coalesce(sum(version), 0)::bigint FROM inbox.aggregate")
                .fetch_one(&mut conn)
                .await
                .unwrap();
        if applied == events { Ok(()) } else { Err(format!("{applied} are applied")) }
    })
    .await;
}

/// No statement was shared out to workers: to start one takes longer than any of them.
fn no_workers(stack: &Stack) {
    let log = std::fs::read_to_string(stack.folder().path().join("log/postgres.log")).unwrap();
    let started: Vec<&str> = log.lines().filter(|line| line.contains("starting background worker")).collect();
    assert!(!started.is_empty(), "the log says nothing of processes");
    let workers = started.iter().filter(|line| line.contains("parallel worker")).count();
    within("workers", i64::try_from(workers).unwrap(), 0);
}

/// What the server counts of each statement, database and role.
struct Meter(PgConnection);

impl Meter {
    async fn new(stack: &Stack) -> Self {
        let mut conn = connect(stack, "postgres").await;
        sqlx::raw_sql("CREATE EXTENSION pg_stat_statements").execute(&mut conn).await.unwrap();
        Self(conn)
    }

    async fn reset(&mut self) {
        sqlx::raw_sql("SELECT pg_stat_statements_reset()").execute(&mut self.0).await.unwrap();
    }

    /// What a role has asked a database since the last reset, without comments. None of it was compiled, and all of it was planned
    /// once in a session.
    async fn work(&mut self, database: &str, role: &str) -> Work {
        let mut statements: Vec<Statement> = sqlx::query_as(
            "SELECT query, calls, rows, wal_bytes::bigint AS wal_bytes, plans, jit_functions AS compiled
             FROM pg_stat_statements s
             JOIN pg_database d ON d.oid = dbid JOIN pg_roles r ON r.oid = userid
             WHERE datname = $1 AND rolname = $2",
        )
        .bind(database)
        .bind(role)
        .fetch_all(&mut self.0)
        .await
        .unwrap();
        for Statement { query, .. } in &mut statements {
            let lines = query.lines().map(|line| line.split("--").next().unwrap_or_default());
            lines.collect::<Vec<_>>().join("\n").trim().clone_into(query);
        }
        statements.sort_by(|one, other| one.query.cmp(&other.query));
        for Statement { query, plans, compiled, .. } in &statements {
            within(&format!("functions compiled for {query}"), *compiled, 0);
            let most = if query.contains("pg_backend_pid") { LOOKS } else { SESSIONS };
            within(&format!("times planned, {query}"), *plans, most);
        }
        Work(statements)
    }

    /// How many rows of a table of the score's database have been visited, ever. Sessions tell when they end.
    /// Of `inbox.aggregate` by an index: all of it is read here again and again, to know when all is applied.
    async fn visited(&self, stack: &Stack, table: &str) -> i64 {
        let mut conn = connect(stack, "score").await;
        sqlx::query_scalar(
            "SELECT CASE relname WHEN 'aggregate' THEN 0 ELSE seq_tup_read END + coalesce(idx_tup_fetch, 0)
             FROM pg_stat_user_tables WHERE relid = $1::text::regclass",
        )
        .bind(table)
        .fetch_one(&mut conn)
        .await
        .unwrap()
    }
}

#[derive(Default, sqlx::FromRow)]
struct Statement {
    query: String,
    calls: i64,
    rows: i64,
    wal_bytes: i64,
    plans: i64,
    compiled: i64,
}

struct Work(Vec<Statement>);

impl Statement {
    /// Its beginning, in one line.
    fn start(&self) -> String {
        let words = self.query.split_whitespace().collect::<Vec<_>>().join(" ");
        words.chars().take(90).collect()
    }
}

impl Work {
    /// Takes out the statements with one of these texts in them; returns their sum.
    fn take(&mut self, texts: &[&str]) -> Statement {
        let is_one = |statement: &mut Statement| texts.iter().any(|text| statement.query.contains(text));
        self.0.extract_if(.., is_one).fold(Statement::default(), |sum, one| Statement {
            calls: sum.calls + one.calls,
            rows: sum.rows + one.rows,
            wal_bytes: sum.wal_bytes + one.wal_bytes,
            ..sum
        })
    }

    fn wal_bytes(&self) -> i64 {
        self.0.iter().map(|statement| statement.wal_bytes).sum()
    }

    fn shown(&self) -> String {
        let line = |one: &Statement| format!("  {} times, {} rows: {}", one.calls, one.rows, one.start());
        let lines: Vec<String> = self.0.iter().map(line).collect();
        lines.join("\n") + "\n"
    }
}
