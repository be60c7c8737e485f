//! What `doctor` and the relay print as a repair is run as it stands, on an outbox that was used, and cures what it is
//! printed for.

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use crate::stack::{Relay, Stack, eventually, output};

/// An outbox that was used, the superuser's URL of it, and the role that its relay has.
struct Used {
    stack: Stack,
    owner: String,
    role: String,
}

impl Used {
    /// Events were published and set aside, a partition was retired, and a second name is not used any more.
    async fn new(name: &str) -> Self {
        let stack = Stack::new(name).await;
        let mut subscriber = stack.subscribe("thing.*").await;
        let mut relay = Relay::ready(&mut stack.command("run")).await;
        stack.append(0..10, 10, &["thing.new"]).await;
        subscriber.complete(10).await;
        eventually("partitions are made ahead", async || {
            let ahead = "SELECT max(upper) >= 2000001 FROM outbox.partition";
            sqlx::query_scalar::<_, bool>(ahead).fetch_one(&stack.admin).await.unwrap().then_some(())
        })
        .await;
        stack.admin.execute("SELECT setval('outbox.position', 1000000)").await.unwrap();
        stack.append(10..20, 10, &["thing.changed"]).await;
        subscriber.complete(20).await;
        let nobodys = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                       VALUES ('bill', '1', 1, 'bill.new', '{}')";
        stack.writer.execute(nobodys).await.unwrap();
        stack.append(20..30, 10, &["thing.changed"]).await;
        subscriber.complete(30).await;
        stack.settled("default", 1_000_021).await;
        assert!(relay.terminate().await.success());
        let (_, database) = stack.database_url.rsplit_once('/').unwrap();
        let admin = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
        let used = Self { owner: format!("{admin}/{database}"), role: format!("{database}_relay"), stack };
        // As long ago as it takes.
        used.run("SELECT outbox.why_kept(name, '-infinity', true) FROM outbox.partition").await;
        used.run("UPDATE outbox.partition_age SET full_since = now() - interval '2 days'").await;
        let pruned =
            output(used.stack.command("prune").args(["--keep", "1d", "--without-baseline", "--yes"])).await;
        assert!(pruned.contains("event_1: retired"), "{pruned}");
        used
    }

    async fn run(&self, sql: &str) {
        let done = self.stack.admin.execute(AssertSqlSafe(sql.to_owned())).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// Whether the check is well, and else what to do.
    async fn advice(&self, check: &str) -> Option<String> {
        let said = output(self.stack.command("doctor").arg("--json").env_remove("AMQP_URL")).await;
        let report: Value = serde_json::from_str(said.split_once('\n').unwrap().1).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let found =
            checks.iter().find(|found| found["name"] == check).unwrap_or_else(|| panic!("{check}: {said}"));
        (found["state"] != "ok")
            .then(|| found["advice"].as_str().unwrap_or_else(|| panic!("{said}")).to_owned())
    }

    /// Makes the trouble; `doctor` finds it with its check and prints a repair that begins with `repair`, up to
    /// `end`. That is run, and `doctor` finds nothing any more.
    async fn cured(&self, trouble: &str, check: &str, repair: &str, end: &str) {
        assert_eq!(self.advice(check).await, None, "{check}, before: {trouble}");
        self.run(trouble).await;
        let advice = self.advice(check).await.unwrap_or_else(|| panic!("{check} is well after: {trouble}"));
        let at = advice.find(repair).unwrap_or_else(|| panic!("{repair} is not in: {advice}"));
        let printed = advice[at..].split(end).next().unwrap();
        // The placeholders that an operator fills in.
        let printed = printed.replace("NAME", "person").replace("ROLE", &self.role);
        if printed.starts_with("outbox-relay ") {
            let mut words = printed.split_whitespace().skip(1);
            let mut program = self.stack.command(words.next().unwrap());
            let said = output(program.args(words).env("DATABASE_URL", &self.owner)).await;
            assert!(said.starts_with("exit code: 0"), "{printed}: {said}");
        } else {
            self.run(&printed).await;
        }
        assert_eq!(self.advice(check).await, None, "{check}, after: {printed}");
    }

    /// It works: what is appended is published.
    async fn works(&self) {
        let type_ = format!("again_{}", uuid::Uuid::new_v4().simple());
        let mut subscriber = self.stack.subscribe(&type_).await;
        // Not ready at once: an event waits for a queue, until another one is published.
        let mut relay = Relay::start(&mut self.stack.command("run")).await;
        // A row on its way into the default partition is refused while a partition is made for its position.
        eventually("partitions are made ahead", async || {
            let ahead =
                "SELECT max(upper) > (SELECT last_value + 1000 FROM outbox.position) FROM outbox.partition";
            sqlx::query_scalar::<_, bool>(ahead).fetch_one(&self.stack.admin).await.unwrap().then_some(())
        })
        .await;
        let again = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                     SELECT $1, n, 1, $1, json_build_object('n', n - 1) FROM generate_series(1, 3) n";
        sqlx::query(again).bind(&type_).execute(&self.stack.writer).await.unwrap();
        subscriber.complete(3).await;
        // Positions that were left out before them are known to be unused only after another look.
        eventually("everything is settled", async || {
            let settled = "SELECT low_water >= (SELECT max(position) FROM outbox.event) FROM outbox.relay";
            sqlx::query_scalar::<_, bool>(settled).fetch_one(&self.stack.admin).await.unwrap().then_some(())
        })
        .await;
        assert!(relay.terminate().await.success());
    }
}

#[tokio::test]
async fn what_doctor_prints_cures() {
    let used = Used::new("repairs").await;
    let role = used.role.clone();
    used.cured(
        &format!("REVOKE pg_read_all_stats FROM {role}"),
        "statistics",
        "GRANT pg_read_all_stats",
        "\n",
    )
    .await;
    used.cured(
        &format!("REVOKE SELECT ON outbox.readable, outbox.event FROM {role}; REVOKE DELETE ON outbox.parked FROM {role}"),
        "permissions",
        "outbox-relay migrate",
        "\n",
    )
    .await;
    used.cured("ALTER SEQUENCE outbox.position CACHE 10", "sequence cache", "ALTER SEQUENCE", ", and").await;
    used.cured(
        "SELECT setval('outbox.position', 7)",
        "sequence",
        "outbox-relay recover --sequence --yes",
        "\n",
    )
    .await;
    used.cured("SELECT setval('outbox.position', 8999999999999999999)", "sequence", "SELECT setval", "\n")
        .await;
    used.cured("ALTER TABLE outbox.parked ENABLE ROW LEVEL SECURITY", "row security", "ALTER TABLE", ", or")
        .await;
    // The other way of the two: the relay's role sees everything.
    used.run("ALTER TABLE outbox.event ENABLE ROW LEVEL SECURITY").await;
    assert!(used.advice("row security").await.is_some_and(|advice| advice.contains("BYPASSRLS")));
    used.run(&format!("ALTER ROLE {role} BYPASSRLS")).await;
    assert_eq!(used.advice("row security").await, None);
    used.run(&format!("ALTER TABLE outbox.event DISABLE ROW LEVEL SECURITY; ALTER ROLE {role} NOBYPASSRLS"))
        .await;
    used.works().await;

    // No partition was made in time.
    used.cured(
        "SELECT setval('outbox.position', (SELECT max(upper) - 1 FROM outbox.partition))",
        "next partition",
        "SELECT outbox.add_partition",
        "\n",
    )
    .await;
    used.works().await;
    let beyond = "SELECT setval('outbox.position', (SELECT max(upper) + 10 FROM outbox.partition))";
    used.run(beyond).await;
    used.stack.append(30..40, 10, &["thing.changed"]).await;
    let advice = used.advice("default partition").await.unwrap();
    assert!(advice.contains("outbox-relay prune retires them like others"), "{advice}");
    used.works().await;
    let further = "SELECT setval('outbox.position', (SELECT max(upper) - 1 FROM outbox.partition))";
    used.run(further).await;
    used.works().await;
    used.run("SELECT outbox.why_kept(name, '-infinity', true) FROM outbox.partition").await;
    used.run("UPDATE outbox.partition_age SET full_since = now() - interval '2 days'").await;
    let pruned =
        output(used.stack.command("prune").args(["--keep", "1d", "--without-baseline", "--yes"])).await;
    assert_eq!(used.advice("default partition").await, None, "{pruned}");
    used.works().await;
}

/// The message of a relay that does not start, and the one of who makes a partition by hand.
#[tokio::test]
async fn what_the_programs_print_about_the_sequence_cures() {
    let used = Used::new("repairs_sequence").await;
    let printed = |said: &str, end: &str| {
        let at = said.find("SELECT setval").unwrap_or_else(|| panic!("no repair in: {said}"));
        said[at..].split(end).next().unwrap().to_owned()
    };
    used.run("SELECT setval('outbox.position', 7)").await;
    let refused = output(used.stack.command("run").env("LISTEN", "127.0.0.1:0")).await;
    assert!(refused.starts_with("exit code: 1"), "{refused}");
    assert!(refused.contains("see: outbox-relay recover --sequence"), "{refused}");
    let mut program = used.stack.command("recover");
    let said = output(program.arg("--sequence").env("DATABASE_URL", &used.owner)).await;
    assert!(said.starts_with("exit code: 3"), "{said}");
    let mut program = used.stack.command("recover");
    let said = output(program.args(["--sequence", "--yes"]).env("DATABASE_URL", &used.owner)).await;
    assert!(said.starts_with("exit code: 0"), "{said}");
    used.works().await;

    // Also when everything that was stored is retired: the highest position in use is a relay's then.
    for retired in [false, true] {
        if retired {
            used.run("TRUNCATE outbox.event, outbox.parked").await;
        }
        used.run("SELECT setval('outbox.position', 8999999999999999999)").await;
        // Nothing is made, and nothing said, while the server ends what a relay that has stopped was at.
        let said = eventually("no partition can be made", async || {
            let add = used.stack.admin.execute("SELECT outbox.add_partition(1000)").await.err()?;
            Some(add.as_database_error().unwrap().message().to_owned())
        })
        .await;
        used.run(&printed(&said, "\n")).await;
        used.run("SELECT outbox.add_partition(1000)").await;
        used.works().await;
    }
}

/// Who keeps the outbox lock for long, and a leader that is stopped, are ended as it is printed.
#[tokio::test]
async fn who_is_in_the_way_is_ended() {
    let used = Used::new("repairs_lock").await;
    // The event that waits for a queue would keep a relay that publishes nothing else from being ready.
    let _bills = used.stack.subscribe("bill.*").await;
    let append = |name: &str| {
        format!(
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
             VALUES ('held', '{name}', 1, 'held.new', '{{}}')"
        )
    };
    let mut prepared = PgConnection::connect(&used.owner).await.unwrap();
    // A name that somebody has quoted.
    let sql = format!("BEGIN; {}; PREPARE TRANSACTION 'it''s {}'", append("prepared"), used.role);
    prepared.execute(AssertSqlSafe(sql)).await.unwrap();
    let mut open = PgConnection::connect(&used.owner).await.unwrap();
    open.execute("SET idle_in_transaction_session_timeout = 0; BEGIN").await.unwrap();
    open.execute(AssertSqlSafe(append("open"))).await.unwrap();

    // The server would end the session of a leader that says nothing for its lease.
    let stopped = Relay::ready(used.stack.command("run").env("LEASE", "1m")).await;
    stopped.signal("STOP").await;
    let leader = eventually("the leader is silent for long", async || {
        // As if that time had passed.
        used.run("UPDATE outbox.relay SET heartbeat_at = heartbeat_at - interval '1 minute'").await;
        let advice = used.advice("relay default, leader").await?;
        advice.find("SELECT pg_terminate_backend").map(|at| advice[at..].to_owned())
    })
    .await;
    let mut subscriber = used.stack.subscribe("held.*").await;
    used.run(&leader).await;
    let next = Relay::ready(&mut used.stack.command("run")).await;
    used.run(&append("after")).await;
    subscriber.until(|messages| messages.len() == 1).await;
    next.is_ready().await;

    let lock = async || -> Option<String> {
        let advice = used.advice("outbox lock").await?;
        let at = advice.find("run: ")? + 5;
        Some(advice[at..].to_owned())
    };
    // They were begun a minute earlier than they were.
    used.run(
        "DO $$ BEGIN
             EXECUTE format('CREATE OR REPLACE VIEW outbox.lock_holder AS
                             SELECT virtual_transaction, pid, application_name, state, gid,
                                    since - interval ''1 minute'' AS since, idle_since FROM (%s) AS real',
                            rtrim(pg_get_viewdef('outbox.lock_holder'::regclass), ';'));
         END $$",
    )
    .await;
    let first = eventually("a transaction is open for long", lock).await;
    assert!(first.starts_with("ROLLBACK PREPARED"), "{first}");
    used.run(&first).await;
    let second = eventually("the other one is open for long", lock).await;
    assert!(second.starts_with("SELECT pg_terminate_backend("), "{second}");
    used.run(&second).await;
    eventually("nobody is in the way", async || used.advice("outbox lock").await.is_none().then_some(()))
        .await;
    drop(open);
}
