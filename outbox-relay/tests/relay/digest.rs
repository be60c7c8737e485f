//! Does a subscriber have what was published? Held against an inbox with known faults, and beside writers.

use std::{fs, time::Duration};

use sqlx::{AssertSqlSafe, Executor, PgPool};
use tokio_util::sync::CancellationToken;

use crate::stack::{DATABASE_PASSWORD, Stack, eventually, output, program};

/// A subscriber's database, and what it would apply.
struct Inbox {
    admin: PgPool,
    /// As a role that may read how far the inbox is, and no more.
    url: String,
}

impl Inbox {
    /// With all of its migrations.
    async fn new() -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations/inbox");
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        let migrations: Vec<_> = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        Self::with(&migrations.iter().map(String::as_str).collect::<Vec<_>>()).await
    }

    /// With some of its migrations.
    async fn with(migrations: &[&str]) -> Self {
        let url = devstack::testing::database("digest_inbox").await;
        let admin = PgPool::connect(&url).await.unwrap();
        let (_, place) = url.rsplit_once('@').unwrap();
        let (_, database) = url.rsplit_once('/').unwrap();
        admin.execute("CREATE SCHEMA inbox; CREATE TABLE inbox.migration (version bigint)").await.unwrap();
        for sql in migrations {
            admin.execute(AssertSqlSafe(*sql)).await.unwrap();
        }
        let role = format!(
            "CREATE ROLE {database}_reader LOGIN PASSWORD '{DATABASE_PASSWORD}';
             SELECT inbox.grant_reader('{database}_reader')"
        );
        admin.execute(AssertSqlSafe(role)).await.unwrap();
        Self { admin, url: format!("postgres://{database}_reader:{DATABASE_PASSWORD}@{place}") }
    }

    /// Applies what is there, but for `lost`.
    async fn follow(&self, stack: &Stack, source: &str, lost: &str) {
        let stored: Vec<(String, String, i64)> = sqlx::query_as(
            "SELECT aggregate_type, aggregate_id, max(version) FROM outbox.event
             WHERE position > (SELECT from_position FROM outbox.source) AND aggregate_id <> $1 GROUP BY 1, 2",
        )
        .bind(lost)
        .fetch_all(&stack.admin)
        .await
        .unwrap();
        for (type_, id, version) in stored {
            sqlx::query(
                "INSERT INTO inbox.aggregate AS a (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
                 VALUES ('copy', $1, $2, $3, $4, gen_random_uuid())
                 ON CONFLICT (consumer, source, aggregate_type, aggregate_id) DO UPDATE SET version = excluded.version",
            )
            .bind(source)
            .bind(type_)
            .bind(id)
            .bind(version)
            .execute(&self.admin)
            .await
            .unwrap();
        }
    }
}

/// The command's answer.
async fn said(stack: &Stack, inbox: &Inbox, arguments: &str) -> String {
    let mut program = stack.command("digest");
    let program = program.args(arguments.split_whitespace()).env("INBOX_DATABASE_URL", &inbox.url);
    format!("## digest {arguments}\n{}\n\n", output(program).await)
}

const COMPARE: &str = "--consumer copy --wait 0s";

#[tokio::test]
async fn both_sides_sum_up_to_the_same() {
    let (stack, inbox) = (Stack::new("digest_print").await, Inbox::new().await);
    let mut shown = said(&stack, &inbox, "").await;
    stack.append(0..100, 10, &["thing.new"]).await;
    let other = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload) VALUES
                     ('other', 'é/😀', 1, 'other.new', '{}'), ('other', 'a/1', 1, 'other.new', '{}'),
                     ('other', 'a/1', 2, 'other.changed', '{\"erased\": true}')";
    stack.writer.execute(other).await.unwrap();
    inbox.follow(&stack, "person", "").await;
    // Neither of these is an aggregate that the subscriber has of this source.
    inbox
        .admin
        .execute(
            "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id) VALUES
                 ('copy', 'person', 'thing', 'held', 0, NULL), ('copy', 'shop', 'thing', 'b', 1, gen_random_uuid()),
                 ('another', 'person', 'thing', 'b', 1, gen_random_uuid())",
        )
        .await
        .unwrap();
    let sums = async |pool: &PgPool, digest: &str| -> Vec<String> {
        let sql = format!("SELECT row_to_json(d)::text FROM {digest} d ORDER BY 1");
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(pool).await.unwrap()
    };
    let ours = sums(&stack.admin, "outbox.digest(3)").await;
    assert_eq!(ours, sums(&inbox.admin, "inbox.digest('copy', 'person', 3)").await);
    assert_eq!(ours.len(), 5);
    for arguments in ["", "--buckets 2", "--json --aggregate-type other", COMPARE] {
        shown += &said(&stack, &inbox, arguments).await;
    }
    insta::assert_snapshot!(shown);
}

/// Writers may use any version up to 2^63 - 2, and what is erased may have the last one.
#[tokio::test]
async fn sums_of_the_largest_versions_agree() {
    const OLD: &str = include_str!("../../../migrations/inbox/0005_digest.sql");
    const SUMS: &str = include_str!("../../../migrations/inbox/0007_kept.sql");
    let inbox = [
        include_str!("../../../migrations/inbox/0001_inbox.sql"),
        include_str!("../../../migrations/inbox/0002_lookup.sql"),
    ];
    let stack = Stack::new("digest_extreme").await;
    let old = Inbox::with(&[inbox[0], inbox[1], OLD]).await;
    let inbox = Inbox::with(&[inbox[0], inbox[1], OLD, SUMS]).await;
    let extreme = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers, previous_id)
                   SELECT t, t || n, v, 'any.new', '{}', h::jsonb, gen_random_uuid()
                   FROM (VALUES ('two', 1, 9223372036854775806, NULL), ('two', 2, 2, NULL),
                                ('three', 1, 9223372036854775806, NULL), ('three', 2, 9223372036854775806, NULL),
                                ('three', 3, 9223372036854775806, NULL),
                                ('last', 1, 9223372036854775807, '{\"erased\": true}'), ('last', 2, 1, NULL),
                                ('fits', 1, 9223372036854775806, NULL), ('fits', 2, 1, NULL)) AS e (t, n, v, h)";
    stack.admin.execute(extreme).await.unwrap();
    let ends =
        "INSERT INTO outbox.aggregate (aggregate_type, aggregate_id, version, last_event_id, last_position)
                SELECT aggregate_type, aggregate_id, version, id, position FROM outbox.event";
    stack.admin.execute(ends).await.unwrap();
    inbox.follow(&stack, "person", "").await;
    old.follow(&stack, "person", "").await;
    let sums = async |pool: &PgPool, digest: &str| -> Vec<String> {
        let sql = format!("SELECT row_to_json(d)::text FROM {digest} d ORDER BY 1");
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(pool).await.unwrap()
    };
    for buckets in [1, 2, 1024] {
        assert_eq!(
            sums(&stack.admin, &format!("outbox.digest({buckets})")).await,
            sums(&inbox.admin, &format!("inbox.digest('copy', 'person', {buckets})")).await
        );
    }
    // An older inbox whose digest cannot add up is compared all the same.
    let mut shown = said(&stack, &inbox, "").await;
    for arguments in ["--buckets 1", "--buckets 1024", "--json --buckets 1"] {
        shown += &said(&stack, &inbox, &format!("{COMPARE} {arguments}")).await;
    }
    shown += "# An inbox of before the sum had its limit\n";
    shown += &said(&stack, &old, &format!("{COMPARE} --buckets 1")).await;
    // As is an outbox of before its sum was like the inbox's.
    let before = include_str!("../../../migrations/outbox/0008_rows.sql");
    let at = before.find("CREATE OR REPLACE FUNCTION outbox.digest(").unwrap();
    let end = at + before[at..].find("\n$$;").unwrap() + 4;
    stack.admin.execute(&before[at..end]).await.unwrap();
    shown += "# An outbox of before that\n";
    shown += &said(&stack, &inbox, &format!("{COMPARE} --json --buckets 1")).await;
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn what_differs_is_named() {
    let (stack, inbox) = (Stack::new("digest_differs").await, Inbox::new().await);
    stack.append(0..100, 20, &["thing.new"]).await;
    stack
        .writer
        .execute("INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload) VALUES ('other', 'x', 1, 'other.new', '{}')")
        .await
        .unwrap();
    inbox.follow(&stack, "person", "x").await;
    let mut shown = said(&stack, &inbox, COMPARE).await;
    // As many aggregates, with as many versions: only the hash differs.
    let shift =
        "UPDATE inbox.aggregate SET version = version + CASE aggregate_id WHEN 'a1' THEN -1 ELSE 1 END
                 WHERE aggregate_id IN ('a1', 'a3')";
    inbox.admin.execute(shift).await.unwrap();
    shown += &said(&stack, &inbox, "--consumer copy --wait 0s --buckets 1").await;
    for sql in [
        "UPDATE inbox.aggregate SET version = 1 WHERE aggregate_id = 'a2'",
        "UPDATE inbox.aggregate SET version = 9 WHERE aggregate_id = 'a3'",
        "UPDATE inbox.aggregate SET version = 0, last_event_id = NULL WHERE aggregate_id = 'a4'",
        "DELETE FROM inbox.aggregate WHERE aggregate_id = 'a5'",
        "UPDATE inbox.aggregate SET aggregate_id = 'elsewhere' WHERE aggregate_id = 'a6'",
    ] {
        inbox.admin.execute(sql).await.unwrap();
    }
    for arguments in [
        COMPARE,
        "--consumer copy --wait 0s --json --limit 2 --buckets 1",
        "--consumer copy --wait 0s --aggregate-type other",
        "--consumer nobody",
        "--consumer copy --buckets 0",
    ] {
        shown += &said(&stack, &inbox, arguments).await;
    }
    let mut program = program();
    program.args(["digest", "--consumer", "copy"]).env("DATABASE_URL", &stack.database_url);
    shown += "## without an inbox's URL\n";
    shown += &output(&mut program).await;
    program.env("INBOX_DATABASE_URL", &stack.database_url);
    shown += "\n\n## a database without an inbox\n";
    shown += &output(&mut program).await;
    insta::assert_snapshot!(shown);
}

/// Whoever knows a consumer by the name that it began with finds it, and one that nobody knows is told of the right one.
#[tokio::test]
async fn a_consumer_that_was_replaced() {
    let (stack, inbox) = (Stack::new("digest_replaced").await, Inbox::new().await);
    stack.append(0..20, 4, &["thing.new"]).await;
    inbox.follow(&stack, "person", "").await;
    // The rows of the one before stay for a while.
    let old =
        "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id)
               VALUES ('first', 'person', 'thing', 'a1', 1, gen_random_uuid())";
    inbox.admin.execute(old).await.unwrap();
    let stranger = said(&stack, &inbox, "--consumer stranger --wait 0s").await;
    assert!(
        stranger.contains("exit code: 1") && stranger.contains("ask for --consumer copy; "),
        "{stranger}"
    );
    let replaced = "INSERT INTO inbox.successor (consumer, replaced_by) VALUES ('first', 'second'), ('second', 'copy'),
                                                                            ('ring', 'around'), ('around', 'ring')";
    inbox.admin.execute(replaced).await.unwrap();
    for (consumer, expected) in [
        ("first", "exit code: 0\ncopy, which has replaced first, has what person published"),
        ("second", "exit code: 0\ncopy, which has replaced second, has what person published"),
        ("copy", "exit code: 0\ncopy has what person published"),
        ("first --json", "\"consumer\": \"copy\""),
        // Somebody's hand: it ends all the same.
        ("ring", "exit code: 1\noutbox-relay: the consumer ring has received nothing of person"),
    ] {
        let shown = said(&stack, &inbox, &format!("--wait 0s --consumer {consumer}")).await;
        assert!(shown.contains(expected), "{consumer}: {shown}");
    }
}

/// Beside writers and a subscriber that is a little behind: it ends, it ends well, and a single lost event is
/// found all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_moving_system() {
    let (stack, inbox) = (Stack::new("digest_moving").await, Inbox::new().await);
    let (stop, lost) = (CancellationToken::new(), tokio::sync::watch::channel("").0);
    let writer = async {
        let mut n = 0;
        while !stop.is_cancelled() {
            stack.append(n..n + 50, 40, &["thing.changed"]).await;
            n += 50;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let subscriber = async {
        while !stop.is_cancelled() {
            let lost = *lost.borrow();
            inbox.follow(&stack, "person", lost).await;
        }
    };
    let looks = async {
        eventually("each aggregate has come", async || {
            let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM inbox.aggregate");
            (count.fetch_one(&inbox.admin).await.unwrap() == 40).then_some(())
        })
        .await;
        for _ in 0..3 {
            let right = said(&stack, &inbox, "--consumer copy --wait 50s").await;
            assert!(right.contains("exit code: 0"), "{right}");
        }
        lost.send_replace("a17");
        // Until the subscriber has been round once more, a17 may still come.
        let sql = "SELECT sum(version) >= 40 + (SELECT sum(version) FROM inbox.aggregate WHERE aggregate_id = 'a17')
                   FROM inbox.aggregate WHERE aggregate_id = 'a18'";
        eventually("the others have gone on", async || {
            sqlx::query_scalar::<_, bool>(sql).fetch_one(&inbox.admin).await.unwrap().then_some(())
        })
        .await;
        let wrong = said(&stack, &inbox, "--consumer copy --wait 15s --json").await;
        // What it says of its progress follows.
        let answer = wrong.split_once("exit code: 3\n").unwrap().1;
        let answer: serde_json::Value =
            serde_json::Deserializer::from_str(answer).into_iter().next().unwrap().unwrap();
        assert_eq!(
            (&answer["behind"], &answer["missing"], &answer["ahead"]),
            (&1.into(), &0.into(), &0.into()),
            "{wrong}"
        );
        assert_eq!(answer["named"][0]["aggregate"], "thing/a17");
        stop.cancel();
    };
    tokio::join!(writer, subscriber, looks);
}

/// What happens while it waits for a subscriber that is behind.
async fn while_it_waits(stack: &Stack, inbox: &Inbox, happens: impl Future<Output = ()>) -> String {
    let waits = async {
        eventually("it has looked at both, and waits", async || {
            // No look stays, so nothing is held back while it waits.
            let sql = "SELECT count(*) = 1 FROM pg_stat_activity
                       WHERE datname = current_database() AND application_name = 'outbox-relay digest'
                         AND state = 'idle' AND query LIKE '%aggregate_id = ANY%'";
            sqlx::query_scalar::<_, bool>(sql).fetch_one(&inbox.admin).await.unwrap().then_some(())
        })
        .await;
        happens.await;
    };
    tokio::join!(said(stack, inbox, "--consumer copy --wait 50s"), waits).0
}

#[tokio::test]
async fn a_subscriber_may_catch_up() {
    let (stack, inbox) = (Stack::new("digest_wait").await, Inbox::new().await);
    stack.append(0..40, 4, &["thing.new"]).await;
    inbox.follow(&stack, "person", "a2").await;
    let right = while_it_waits(&stack, &inbox, inbox.follow(&stack, "person", "")).await;
    assert!(right.contains("exit code: 0"), "{right}");
    inbox.admin.execute("UPDATE inbox.aggregate SET version = 1").await.unwrap();
    let anew = async {
        stack.admin.execute("UPDATE outbox.source SET incarnation = 2, from_position = 40").await.unwrap();
    };
    let anew = while_it_waits(&stack, &inbox, anew).await;
    assert!(anew.contains("exit code: 1\noutbox-relay: the source became person~2 meanwhile"), "{anew}");
}

/// Only what belongs to the incarnation's own chains counts.
#[tokio::test]
async fn after_a_new_incarnation() {
    let (stack, inbox) = (Stack::new("digest_incarnation").await, Inbox::new().await);
    stack.append(0..20, 4, &["thing.new"]).await;
    inbox.follow(&stack, "person", "").await;
    let known = "INSERT INTO inbox.source (consumer, name, incarnation) VALUES ('copy', 'person', 1)";
    inbox.admin.execute(known).await.unwrap();
    stack
        .admin
        .execute("INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 20, 20)")
        .await
        .unwrap();
    let admin = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    let (_, database) = stack.database_url.rsplit_once('/').unwrap();
    let mut anew = stack.command("new-incarnation");
    let anew = output(anew.arg("--yes").env("DATABASE_URL", format!("{admin}/{database}"))).await;
    assert!(anew.contains("the one that does next publishes as person~"), "{anew}");
    let new = outbox::source(&mut stack.admin.acquire().await.unwrap()).await.unwrap();
    let mut shown = said(&stack, &inbox, COMPARE).await;
    stack.append(20..22, 4, &["thing.baseline"]).await;
    shown += &said(&stack, &inbox, COMPARE).await;
    // What its transactions do when the chains begin anew.
    inbox.follow(&stack, &new.to_string(), "").await;
    let begun = sqlx::query(
        "WITH taken AS (UPDATE inbox.source SET incarnation = $1, earlier = '{1}')
         UPDATE inbox.aggregate a SET ended = true FROM inbox.aggregate n
         WHERE a.source = 'person' AND n.source <> 'person' AND n.aggregate_id = a.aggregate_id",
    );
    begun.bind(new.incarnation).execute(&inbox.admin).await.unwrap();
    shown += &said(&stack, &inbox, COMPARE).await;
    shown += &said(&stack, &inbox, &format!("{COMPARE} --json")).await;
    stack.append(22..24, 4, &["thing.baseline"]).await;
    shown += &said(&stack, &inbox, COMPARE).await;
    let number = new.incarnation.to_string();
    insta::with_settings!({filters => vec![(number.as_str(), "INCARNATION")]}, {
        insta::assert_snapshot!(shown);
    });
}

/// What was retired cannot be compared, and is no fault of the subscriber; the rest is compared as ever.
#[tokio::test]
async fn after_prune() {
    let (stack, inbox) = (Stack::new("digest_prune").await, Inbox::new().await);
    stack.append(0..8, 4, &["thing.new"]).await;
    let ends = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                VALUES ('thing', 'a0', 3, 'thing.deleted', '{}')";
    stack.writer.execute(ends).await.unwrap();
    inbox.follow(&stack, "person", "").await;
    stack
        .admin
        .execute(
            "SELECT outbox.add_partition(1000); SELECT setval('outbox.position', 1000000);
             INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 1000000, 1000000);
             INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
             SELECT 'thing', 'a' || n, 3, 'thing.baseline', '{}', '{\"baseline\": true}' FROM generate_series(1, 3) n;
             SELECT outbox.retire_partition('event_1', now() + interval '1 day', false)",
        )
        .await
        .unwrap();
    inbox.follow(&stack, "person", "a2").await;
    let mut shown = said(&stack, &inbox, COMPARE).await;
    inbox.follow(&stack, "person", "").await;
    shown += &said(&stack, &inbox, COMPARE).await;
    insta::assert_snapshot!(shown);
}
