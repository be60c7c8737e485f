//! The person database goes back in time, for real: a backup is restored, also twice, an old primary wakes up, and a standby
//! is promoted that lacked the last commits, all of it also while clients write; and the broker loses its data. After the
//! procedure as the page prints it, every score is what the person tables say, computed here by SQL, and both sides have the
//! same persons.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use std::path::{Path, PathBuf};

use devstack::{
    binary::find,
    ports,
    postgres::Postgres,
    stack::{Addresses, Stack},
    testing::{DEADLINE, eventually},
    users,
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use support::{Apis, stack};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

/// What the person tables say: every person's score, by the id.
const EXPECTED: &str = "
    SELECT p.id::text,
           coalesce((SELECT sum(floor(value / 20)) FROM person.asset WHERE person_id = p.id), 0)::bigint
         + coalesce((SELECT sum(floor(value / 50)) FROM person.income WHERE person_id = p.id), 0)::bigint
         - coalesce((SELECT sum(floor(value / 20)) FROM person.debt WHERE person_id = p.id), 0)::bigint
    FROM person.person p ORDER BY 1";
/// What the read model says.
const SCORES: &str = "SELECT id::text, total::bigint FROM score.person ORDER BY 1";

struct System {
    stack: Stack,
    addresses: Addresses,
    apis: Apis,
    restored: usize,
}

impl System {
    async fn new() -> Self {
        let stack = stack().await;
        let addresses = stack.addresses();
        Self { apis: Apis::of(&addresses), addresses, stack, restored: 0 }
    }

    async fn person(&self, cpf: u64) {
        let body = format!(r#"{{"cpf":{cpf},"name":"a","date_of_birth":"1990-01-01T00:00:00Z"}}"#);
        self.write("POST", "/person", body).await;
    }

    async fn income(&self, cpf: u64, value: u64) {
        self.write("POST", &format!("/person/{cpf}/income"), format!(r#"{{"type":"x","value":{value}}}"#))
            .await;
    }

    async fn delete(&self, cpf: u64) {
        self.write("DELETE", &format!("/person/{cpf}"), String::new()).await;
    }

    /// While the database is being replaced, the answer is a 503: the client tries again with the same key.
    async fn write(&self, method: &str, path: &str, body: String) {
        let key = uuid::Uuid::new_v4().to_string();
        eventually(&format!("{method} {path} is taken"), async || {
            let answer = self.apis.send(method, path, &key, body.clone()).await;
            if answer.status < 300 { Ok(()) } else { Err(answer.shown()) }
        })
        .await;
    }

    async fn rows(&self, url: &str, sql: &str) -> Vec<(String, i64)> {
        let mut conn = PgConnection::connect(url).await.unwrap();
        sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_all(&mut conn).await.unwrap()
    }

    /// What is in the read model is what the person tables say, and nothing else.
    async fn agrees(&self) -> Result<(), String> {
        let expected = self.rows(&self.addresses.person_database_url, EXPECTED).await;
        let scores = self.rows(&self.addresses.score_database_url, SCORES).await;
        if expected == scores { Ok(()) } else { Err(format!("{expected:?} and {scores:?}")) }
    }

    async fn count(&self, sql: &str) -> i64 {
        let mut conn = PgConnection::connect(&self.addresses.score_database_url).await.unwrap();
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut conn).await.unwrap()
    }

    async fn backup(&self) -> PathBuf {
        let file = self.stack.folder().path().join("person.dump");
        let args = ["-Fc", "-f", file.to_str().unwrap(), "person"];
        self.stack.servers.postgres.tool("pg_dump", &args).await.unwrap();
        file
    }

    /// Puts the backup in the place of the database, which is kept as `lost1`, `lost2`, ….
    async fn restore(&mut self, backup: &Path) {
        self.restored += 1;
        let server = self.stack.servers.postgres.url();
        let mut conn = PgConnection::connect(&format!("{server}/postgres")).await.unwrap();
        conn.execute("CREATE DATABASE restored").await.unwrap();
        let args = ["-d", "restored", backup.to_str().unwrap()];
        self.stack.servers.postgres.tool("pg_restore", &args).await.unwrap();
        for sql in [
            "ALTER DATABASE person ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'person'",
        ] {
            conn.execute(sql).await.unwrap();
        }
        let renamed = format!("ALTER DATABASE person RENAME TO lost{}", self.restored);
        eventually("nobody is connected any more", async || {
            conn.execute(AssertSqlSafe(renamed.clone())).await.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
        conn.execute("ALTER DATABASE restored RENAME TO person").await.unwrap();
    }

    /// Runs a line as the page prints it; how it ended, and what it said.
    async fn run(&self, line: &str) -> (Option<i32>, String) {
        support::run(&self.addresses, line).await
    }

    /// The programs go on at another server.
    async fn moves_to(&mut self, server: Postgres) {
        let old = format!(":{}/", self.stack.servers.postgres.port());
        let new = format!(":{}/", server.port());
        self.stack.servers.postgres = server;
        let (person, score) =
            (&mut self.addresses.person_database_url, &mut self.addresses.score_database_url);
        (*person, *score) = (person.replace(&old, &new), score.replace(&old, &new));
        for program in self.stack.programs() {
            let url = program.variable("DATABASE_URL").unwrap().replace(&old, &new);
            program.set_env("DATABASE_URL", &url);
            program.stop(&CancellationToken::new()).await;
            program.start().await.unwrap();
            program.ready(DEADLINE).await.unwrap();
        }
    }

    /// The procedure while clients write: what is committed meanwhile is still on its way when it ends.
    async fn recovered_under(&self, _load: &Load) {
        self.steps().await;
        eventually("digest agrees", async || {
            let (code, said) = self.run("outbox-relay digest --consumer score").await;
            if code == Some(0) { Ok(()) } else { Err(said) }
        })
        .await;
    }

    /// The procedure of the page at rest, up to its final check. Returns what the steps said.
    async fn recovered(&self) -> String {
        let said = self.steps().await;
        for line in
            ["outbox-relay digest --consumer score", "score-projector verify", "score-projector held list"]
        {
            let (code, said) = self.run(line).await;
            assert_eq!(code, Some(0), "{line}: {said}");
        }
        self.agrees().await.unwrap();
        said
    }

    async fn steps(&self) -> String {
        let (code, mut said) = self.run("outbox-relay recover").await;
        assert!(code == Some(3) && said.contains("--yes"), "{said}");
        let (_, begun) = self.run("outbox-relay recover --consumer score --yes").await;
        said += &begun;
        said + &self.republished().await
    }

    /// From the baselines on.
    async fn republished(&self) -> String {
        let mut said = String::new();
        let (code, republished) = self.run("person-api republish --all").await;
        assert_eq!(code, Some(0), "{republished}");
        let (mut code, mut found) = self.run("outbox-relay recover --consumer score").await;
        if let Some(at) = found.find("outbox-relay recover --consumer score --lost") {
            let line = found[at..].lines().next().unwrap().to_owned();
            // Nothing is green before the end.
            for check in ["outbox-relay digest --consumer score", "score-projector verify"] {
                let (code, said) = self.run(check).await;
                assert_eq!(code, Some(3), "{check}: {said}");
            }
            said += &found;
            let (_, ended) = self.run(&line).await;
            said += &ended;
            (code, found) = self.run("outbox-relay recover --consumer score").await;
        }
        assert_eq!(code, Some(0), "{said}{found}");
        self.run("score-projector rejected drop --reason fork --yes").await;
        said + &found
    }
}

#[tokio::test]
async fn a_backup_is_restored() {
    let mut system = System::new().await;
    lost_time(&mut system).await;
    unsettled(&mut system).await;
    quick_failover(&mut system).await;
    nothing_lost_by_mistake(&mut system).await;
    the_same_backup_twice(&mut system).await;
    an_old_primary_wakes_up(&mut system).await;
    for program in system.stack.programs() {
        program.ready(DEADLINE).await.unwrap();
    }
    system.stack.stop(&CancellationToken::new()).await;
}

/// The whole server fails over, so the subscriber's database lacks commits as well. Clients write on.
#[tokio::test]
async fn a_standby_is_promoted_that_lacked_commits() {
    let mut system = System::new().await;
    for cpf in 1..=20 {
        system.person(cpf).await;
        system.income(cpf, 1_000).await;
    }
    arrives(&system).await;
    let hurry = CancellationToken::new();
    let mut standby =
        system.stack.servers.postgres.standby(system.stack.folder(), ports::free()).await.unwrap();
    standby.start().await.unwrap();
    standby.stop(&hurry).await;
    for cpf in 1..=5 {
        system.delete(cpf).await;
        system.person(cpf).await;
        system.income(cpf, 7_000).await;
        system.income(cpf + 10, 7_000).await;
        system.person(cpf + 100).await;
    }
    arrives(&system).await;
    system.stack.servers.postgres.kill().await;
    standby.start().await.unwrap();
    let mut conn = PgConnection::connect(&format!("{}/postgres", standby.url())).await.unwrap();
    conn.execute("SELECT pg_promote()").await.unwrap();
    system.moves_to(standby).await;
    let load = Load::start(&system, 11..=20);
    system.recovered_under(&load).await;
    load.stop().await;
    arrives(&system).await;
    let (code, said) = system.run("outbox-relay recover --consumer score").await;
    assert_eq!(code, Some(0), "{said}");
    the_score_service_begins_anew(&system).await;
    system.stack.stop(&hurry).await;
}

/// What the broker had confirmed is gone, with its users, its exchange and the queues.
#[tokio::test]
async fn the_broker_loses_its_data() {
    let mut system = System::new().await;
    let hurry = CancellationToken::new();
    for cpf in 1..=20 {
        system.person(cpf).await;
        system.income(cpf, 1_000).await;
    }
    arrives(&system).await;
    system.stack.score_projector.stop(&hurry).await;
    for cpf in 1..=5 {
        system.delete(cpf).await;
        system.person(cpf).await;
        system.income(cpf + 10, 7_000).await;
    }
    eventually("the broker has taken everything", async || {
        let (code, said) = system.run("outbox-relay status --json").await;
        let status: Value = serde_json::from_str(&said).unwrap_or_default();
        let done = code == Some(0) && status["relays"][0]["backlog"]["events"] == 0;
        if done { Ok(()) } else { Err(said) }
    })
    .await;
    system.stack.servers.rabbitmq.kill().await;
    system.stack.servers.rabbitmq.forget().unwrap();
    system.stack.servers.rabbitmq.start().await.unwrap();
    users::make_all(&system.stack.servers.rabbitmq, "%2f").await.unwrap();
    system.stack.score_projector.start().await.unwrap();
    for program in [&mut system.stack.person_relay, &mut system.stack.score_projector] {
        program.ready(DEADLINE).await.unwrap();
    }
    assert!(system.agrees().await.is_err(), "the lost events do not come by themselves");

    let (code, said) = system.run("outbox-relay digest --consumer score").await;
    assert_eq!(code, Some(3), "{said}");
    let (code, said) = system.run("outbox-relay replay --all --to-queue score --yes").await;
    assert_eq!(code, Some(0), "{said}");
    arrives(&system).await;
    for program in system.stack.programs() {
        program.stop(&hurry).await;
        program.start().await.unwrap();
    }
    for program in system.stack.programs() {
        program.ready(DEADLINE).await.unwrap();
    }
    for line in ["outbox-relay digest --consumer score", "score-projector verify"] {
        let (code, said) = system.run(line).await;
        assert_eq!(code, Some(0), "{line}: {said}");
    }
    system.agrees().await.unwrap();
    system.stack.stop(&hurry).await;
}

/// The score database went back as well, and with it what it had published.
async fn the_score_service_begins_anew(system: &System) {
    // Each says what the model says.
    let published = "SELECT count(*) FROM outbox.event e JOIN score.person p ON p.id::text = e.aggregate_id
                     WHERE e.type = 'score.baseline' AND e.headers @> '{\"baseline\": true}'
                       AND e.position > (SELECT from_position FROM outbox.source)
                       AND (e.payload ->> 'total')::numeric = p.total
                       AND json_array_length(e.payload -> 'entries')
                           = (SELECT count(*) FROM score.entry WHERE person_id = p.id)";
    let of_scores = async |line: &str| {
        let mut words = line.split_whitespace();
        let program = find(words.next().unwrap()).unwrap();
        let url = &system.addresses.score_database_url;
        let output = Command::new(program)
            .args(words)
            .env("DATABASE_URL", url)
            .env("LOG", "off")
            .output()
            .await
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (code, said) = of_scores("outbox-relay recover --yes").await;
    assert!(code == Some(3) && said.contains("next  baselines"), "{said}");
    let (code, said) = of_scores("score-projector republish --all").await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = of_scores("outbox-relay recover").await;
    // No subscriber of the scores keeps an inbox here.
    assert!(code == Some(3) && said.contains("next  subscribers: not looked at"), "{said}");
    let chains = system
        .count("SELECT count(*) FROM outbox.aggregate c JOIN score.person p ON p.id::text = c.aggregate_id")
        .await;
    assert_eq!(system.count(published).await, chains);
}

/// The same with a backup, while clients write.
#[tokio::test]
async fn a_backup_is_restored_under_writes() {
    let mut system = System::new().await;
    for cpf in 1..=20 {
        system.person(cpf).await;
    }
    let load = Load::start(&system, 1..=20);
    let backup = system.backup().await;
    for cpf in 101..=110 {
        system.person(cpf).await;
    }
    eventually("the last of them arrives", async || {
        let persons = system.count("SELECT count(*) FROM score.person WHERE cpf > 100").await;
        if persons == 10 { Ok(()) } else { Err(persons.to_string()) }
    })
    .await;
    system.restore(&backup).await;
    system.recovered_under(&load).await;
    load.stop().await;
    arrives(&system).await;
    let (code, said) = system.run("outbox-relay recover --consumer score").await;
    assert_eq!(code, Some(0), "{said}");
    system.stack.stop(&CancellationToken::new()).await;
}

/// Clients that give incomes to persons in turn, until they are told to stop. What is not answered is not tried again.
struct Load {
    enough: CancellationToken,
    task: tokio::task::JoinHandle<u64>,
}

impl Load {
    fn start(system: &System, cpfs: std::ops::RangeInclusive<u64>) -> Self {
        let enough = CancellationToken::new();
        let (apis, until) = (system.apis.clone(), enough.clone());
        let task = tokio::spawn(async move {
            let mut taken = 0;
            for cpf in cpfs.cycle() {
                if until.is_cancelled() {
                    break;
                }
                let key = uuid::Uuid::new_v4().to_string();
                let body = r#"{"type":"x","value":100}"#.to_owned();
                taken += u64::from(
                    apis.send("POST", &format!("/person/{cpf}/income"), &key, body).await.status == 201,
                );
                // A client's pace: a load is requests over time, and nothing waits for it to end.
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            taken
        });
        Self { enough, task }
    }

    async fn stop(self) {
        self.enough.cancel();
        let taken = self.task.await.unwrap();
        assert!(taken > 10, "there was a load: {taken}");
    }
}

async fn arrives(system: &System) {
    eventually("the read model has everything", async || system.agrees().await).await;
}

/// Persons of the lost time, and one that was made again in it under the same cpf.
async fn lost_time(system: &mut System) {
    system.person(5).await;
    system.income(5, 1_000).await;
    arrives(system).await;
    let backup = system.backup().await;
    system.delete(5).await;
    system.person(5).await;
    system.income(5, 777_000).await;
    system.person(7).await;
    system.income(7, 7_000).await;
    arrives(system).await;
    system.restore(&backup).await;
    eventually("the relay says that the database is elsewhere", async || {
        let (_, said) = system.run("outbox-relay doctor").await;
        if said.contains("place: the database is on another server") { Ok(()) } else { Err(said) }
    })
    .await;
    let said = system.recovered().await;
    assert!(said.contains("has 2 aggregates that this database does not know"), "{said}");
}

/// The restored outbox has events that were not published when the backup was taken, and were afterwards.
async fn unsettled(system: &mut System) {
    let (code, said) = system.run("outbox-relay pause").await;
    assert_eq!(code, Some(0), "{said}");
    for cpf in 100..125 {
        system.person(cpf).await;
    }
    let backup = system.backup().await;
    system.run("outbox-relay resume").await;
    for cpf in 100..105 {
        system.income(cpf, 5_000).await;
    }
    arrives(system).await;
    system.restore(&backup).await;
    let (code, said) = system.run("outbox-relay resume").await;
    assert_eq!(code, Some(0), "{said}");
    system.income(110, 100).await;
    system.recovered().await;
}

/// What an operator says is not believed: a database that lost commits after all is not green.
async fn nothing_lost_by_mistake(system: &mut System) {
    let backup = system.backup().await;
    system.person(50).await;
    system.income(40, 20_000).await;
    arrives(system).await;
    system.restore(&backup).await;
    let (code, said) = system.run("outbox-relay recover --nothing-lost").await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = system.run("outbox-relay recover --consumer score --wait 2s").await;
    assert!(code == Some(3) && said.contains("differs from"), "{said}");
    let (code, said) = system.run("outbox-relay new-incarnation --yes").await;
    assert_eq!(code, Some(0), "{said}");
    let said = system.republished().await;
    assert!(said.contains("has 1 aggregate that this database does not know"), "{said}");
    system.agrees().await.unwrap();
}

/// Versions that were lost are given again within seconds, to other events: nobody takes them for duplicates.
async fn quick_failover(system: &mut System) {
    system.person(40).await;
    system.income(40, 1_000).await;
    arrives(system).await;
    let backup = system.backup().await;
    system.income(40, 50).await;
    system.income(40, 100).await;
    arrives(system).await;
    system.restore(&backup).await;
    system.income(40, 100_000).await;
    eventually("the two histories are noticed", async || {
        let forks = system.count("SELECT count(*) FROM inbox.rejected WHERE reason = 'fork'").await;
        if forks > 0 { Ok(()) } else { Err("no fork".to_owned()) }
    })
    .await;
    system.recovered().await;
}

/// The second incarnation follows the first one's, which this database does not know any more.
async fn the_same_backup_twice(system: &mut System) {
    let backup = system.backup().await;
    for cpf in [61, 62] {
        system.person(cpf).await;
        arrives(system).await;
        system.restore(&backup).await;
        system.recovered().await;
        system.income(40, cpf).await;
    }
    arrives(system).await;
}

/// A relay on the lost database publishes what is written there. It changes nothing, and is told.
async fn an_old_primary_wakes_up(system: &mut System) {
    let lost = format!("lost{}", system.restored);
    let mut conn =
        PgConnection::connect(&format!("{}/postgres", system.stack.servers.postgres.url())).await.unwrap();
    conn.execute(AssertSqlSafe(format!("ALTER DATABASE {lost} ALLOW_CONNECTIONS true"))).await.unwrap();
    let old = format!("{}/{lost}", system.stack.servers.postgres.url());
    let relay = system.addresses.person_database_url.replace("/person", &format!("/{lost}"));
    system.stack.person_relay.set_env("DATABASE_URL", &relay);
    system.stack.person_relay.stop(&CancellationToken::new()).await;
    system.stack.person_relay.start().await.unwrap();
    let woken = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 SELECT 'person', p.id::text, p.version + 1, 'person.deleted', json_build_object('id', p.id)
                 FROM person.person p ORDER BY p.id LIMIT 3";
    PgConnection::connect(&old).await.unwrap().execute(woken).await.unwrap();
    eventually("they are refused", async || {
        let refused = system.count("SELECT count(*) FROM inbox.rejected WHERE reason = 'superseded'").await;
        if refused >= 3 { Ok(()) } else { Err(refused.to_string()) }
    })
    .await;
    system.agrees().await.unwrap();
    let (code, said) = system.run("score-projector rejected list").await;
    assert!(code == Some(3) && said.contains("superseded"), "{said}");
    system.stack.person_relay.set_env("DATABASE_URL", &system.addresses.person_database_url);
    system.stack.person_relay.stop(&CancellationToken::new()).await;
    system.stack.person_relay.start().await.unwrap();
    let (code, said) = system.run("score-projector rejected drop --reason superseded --yes").await;
    assert_eq!(code, Some(0), "{said}");
    system.income(40, 7).await;
    arrives(system).await;
}
