//! What the documents and the programs print as a repair is run as it stands, on a system that was used: afterwards both
//! sides agree again, and every program is well.
//!
//! What `outbox-relay doctor` prints is run by its own tests.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use devstack::{
    program::Program,
    stack::{Addresses, Stack},
    testing::{DEADLINE, client, eventually},
    users::{self, REPLAY, Rights, SOURCES},
};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use support::{Apis, payload, stack};
use tokio_util::sync::CancellationToken;

const CPF: u64 = 11111;
/// How far each income raises the score.
const INCOME: i64 = 20;

/// The system, and what its score should be.
struct Used {
    stack: Stack,
    addresses: Addresses,
    apis: Apis,
    score: i64,
}

impl Used {
    async fn new() -> Self {
        let stack = stack().await;
        let (addresses, apis) = (stack.addresses(), Apis::of(&stack.addresses()));
        assert_eq!(apis.post("/person", payload("person")).await.status, 201);
        let mut used = Self { stack, addresses, apis, score: 0 };
        used.income().await;
        used.arrives().await;
        used
    }

    async fn income(&mut self) {
        let answer = self.apis.post(&format!("/person/{CPF}/income"), payload("income")).await;
        assert_eq!(answer.status, 201, "{}", answer.shown());
        self.score += INCOME;
    }

    /// The read model has everything.
    async fn arrives(&self) {
        self.apis.until_score(CPF, self.score).await;
    }

    async fn on(&self, url: &str, sql: &str) {
        let mut conn = PgConnection::connect(url).await.unwrap();
        conn.execute(AssertSqlSafe(sql.to_owned())).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    async fn count(&self, url: &str, sql: &str) -> i64 {
        let mut conn = PgConnection::connect(url).await.unwrap();
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut conn).await.unwrap()
    }

    /// Runs a line as it is printed, and returns how it ended and what it said. Of which database it is, and as which
    /// user of the broker, an operator knows.
    async fn run(&self, line: &str) -> (Option<i32>, String) {
        support::run(&self.addresses, line).await
    }

    async fn done(&self, line: &str) -> String {
        let (code, said) = self.run(line).await;
        assert_eq!(code, Some(0), "{line}: {said}");
        said
    }

    /// The command that a list prints for what it shows, up to `end`.
    async fn printed(&self, list: &str, command: &str, end: &str) -> String {
        let (_, said) = self.run(list).await;
        let at = said.find(command).unwrap_or_else(|| panic!("{list} prints no {command}: {said}"));
        said[at..].split(end).next().unwrap().trim().to_owned()
    }

    /// Both sides agree, nothing waits, and every program is ready.
    async fn is_well(&mut self) {
        self.income().await;
        self.arrives().await;
        self.done("outbox-relay digest --consumer score").await;
        self.done("score-projector verify").await;
        self.done("score-projector held list").await;
        self.done("score-projector rejected list").await;
        for program in self.stack.programs() {
            program.ready(DEADLINE).await.unwrap();
        }
    }

    async fn restart(program: &mut Program) {
        program.stop(&CancellationToken::new()).await;
        program.start().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_printed_repairs_a_system_that_was_used() {
    let mut used = Used::new().await;
    used.is_well().await;
    lost_events(&mut used).await;
    used.is_well().await;
    refused_event(&mut used).await;
    used.is_well().await;
    unknown_user(&mut used).await;
    used.is_well().await;
    rewritten_history(&mut used).await;
    used.is_well().await;
    used.stack.stop(&CancellationToken::new()).await;
}

/// `versions are missing, and later ones wait for them`: the queue was purged.
async fn lost_events(used: &mut Used) {
    used.stack.score_projector.stop(&CancellationToken::new()).await;
    used.income().await;
    used.income().await;
    let management = used.stack.servers.rabbitmq.management_url();
    let queue = format!("{management}/api/queues/%2f/score");
    let client = client();
    eventually("both wait in the queue", async || {
        let found: serde_json::Value = client.get(&queue).send().await.unwrap().json().await.unwrap();
        if found["messages"].as_i64() == Some(2) { Ok(()) } else { Err(found["messages"].to_string()) }
    })
    .await;
    client.delete(format!("{queue}/contents")).send().await.unwrap().error_for_status().unwrap();
    used.stack.score_projector.start().await.unwrap();
    used.income().await;
    let held = "SELECT count(*) FROM inbox.held WHERE reason = 'gap'";
    let score = used.addresses.score_database_url.clone();
    eventually("the next one waits", async || {
        if used.count(&score, held).await == 1 { Ok(()) } else { Err("nothing is held".to_owned()) }
    })
    .await;
    let (code, said) = used.run("outbox-relay digest --consumer score --wait 0s").await;
    assert!(code == Some(3) && said.contains("replay --aggregate TYPE/ID --to-queue QUEUE"), "{said}");
    let replay = used.printed("score-projector held list", "outbox-relay replay", ", at the source").await;
    used.done(&format!("{} --yes", replay.replace("QUEUE", "score"))).await;
    used.arrives().await;
}

/// held, reason `poison`: what the projector stumbled over is put right, and the event is tried again.
async fn refused_event(used: &mut Used) {
    let score = used.addresses.score_database_url.clone();
    // A handler that is broken, for this database.
    let broken = "CREATE FUNCTION public.broken() RETURNS trigger LANGUAGE plpgsql AS $$
                  BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '22000'; END $$;
                  CREATE TRIGGER broken BEFORE INSERT ON score.entry FOR EACH ROW EXECUTE FUNCTION public.broken()";
    used.on(&score, broken).await;
    used.income().await;
    used.income().await;
    eventually("both are held", async || {
        let count = used.count(&score, "SELECT count(*) FROM inbox.held").await;
        if count == 2 { Ok(()) } else { Err(count.to_string()) }
    })
    .await;
    let redrive = used.printed("score-projector held list", "score-projector held redrive", "\n").await;
    let (code, said) = used.run(&redrive).await;
    assert_eq!(code, Some(3), "nothing is repaired yet: {said}");
    used.on(&score, "DROP FUNCTION public.broken CASCADE").await;
    used.done(&redrive).await;
    used.arrives().await;
}

/// rejected, reason `wrong-user`: the relay's user was renamed before the subscribers knew the new one.
async fn unknown_user(used: &mut Used) {
    let management = used.stack.servers.rabbitmq.management_url();
    let replay = &used.addresses.replay_amqp_url;
    let password = replay.split_once(&format!("{REPLAY}:")).unwrap().1.split_once('@').unwrap().0.to_owned();
    users::make(&management, "%2f", ("relay_new", &password), Rights::Relay).await.unwrap();
    let begun = now_of(used).await;
    used.stack.person_relay.set_env("AMQP_URL", &replay.replace(REPLAY, "relay_new"));
    Used::restart(&mut used.stack.person_relay).await;
    used.income().await;
    let said = eventually("the projector says so", async || {
        let said = used.stack.score_projector.not_ready().await;
        said.filter(|said| said.starts_with("sources: ")).ok_or_else(|| "ready".to_owned())
    })
    .await;
    assert!(said.contains("relay_new"), "{said}");
    // As the page about users has it.
    used.stack.score_projector.set_env("SOURCE", &format!("{SOURCES},person=relay_new"));
    Used::restart(&mut used.stack.score_projector).await;
    used.done(&format!("outbox-relay replay --since {begun} --to-queue score --yes")).await;
    used.arrives().await;
    used.done("score-projector rejected drop --reason wrong-user --yes").await;
}

/// A time as the database has it, in the form that the documents show.
async fn now_of(used: &Used) -> String {
    let mut conn = PgConnection::connect(&used.addresses.person_database_url).await.unwrap();
    let now = r#"SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"#;
    sqlx::query_scalar(now).fetch_one(&mut conn).await.unwrap()
}

/// `events contradict what was applied`: the person database was restored, and has lost what was published.
async fn rewritten_history(used: &mut Used) {
    let person = used.addresses.person_database_url.clone();
    used.stack.person_relay.stop(&CancellationToken::new()).await;
    // As it was two incomes ago.
    let restored = "WITH lost AS (DELETE FROM person.income WHERE id IN (
                        SELECT id FROM person.income ORDER BY created_at DESC LIMIT 2) RETURNING id)
                    SELECT count(*) FROM lost;
                    DELETE FROM outbox.event WHERE position IN (
                        SELECT position FROM outbox.event ORDER BY position DESC LIMIT 2);
                    UPDATE person.person SET version = version - 2;
                    UPDATE outbox.aggregate a
                    SET version = e.version, last_event_id = e.id, previous_event_id = e.previous_id,
                        last_position = e.position
                    FROM (SELECT * FROM outbox.event ORDER BY position DESC LIMIT 1) e
                    WHERE a.aggregate_id = e.aggregate_id";
    used.on(&person, restored).await;
    used.score -= 2 * INCOME;
    used.stack.person_relay.start().await.unwrap();
    used.income().await;
    used.income().await;
    let score = used.addresses.score_database_url.clone();
    eventually("the two histories are noticed", async || {
        let forks = used.count(&score, "SELECT count(*) FROM inbox.rejected WHERE reason = 'fork'").await;
        if forks == 2 { Ok(()) } else { Err(forks.to_string()) }
    })
    .await;
    // As the page has it. Rows that were put back by hand do not move the database, so only the operator knows.
    let said = used.done("outbox-relay recover").await;
    assert!(said.contains("outbox-relay new-incarnation --yes"), "{said}");
    used.done("outbox-relay new-incarnation --yes").await;
    used.done("person-api republish --all").await;
    used.done("outbox-relay recover --consumer score").await;
    used.done("score-projector rejected drop --reason fork --yes").await;
    used.arrives().await;
}
