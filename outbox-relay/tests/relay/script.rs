//! `migrate --print`: the schema by another tool.

use std::collections::HashSet;

use sqlx::{Connection, PgConnection};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::stack::{Relay, Stack, output, program};

/// Everything that the schemas have, and who may use it: as `pg_dump` writes it, and the record of the migrations.
async fn objects(database: &str) -> String {
    let mut dump = Command::from(devstack::release::client("pg_dump").unwrap());
    dump.args(["--schema-only", "--schema=outbox", "--schema=outbox_capture", "--dbname", database]);
    let output = dump.output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let dump = String::from_utf8(output.stdout).unwrap();
    // Newer ones begin and end with a random word.
    let mut lines: Vec<&str> = dump.lines().filter(|line| !line.starts_with('\\')).collect();
    let mut conn = PgConnection::connect(database).await.unwrap();
    let sql = "SELECT concat_ws(' ', version, description, success, checksum) FROM outbox.migration ORDER BY version";
    let record: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut conn).await.unwrap();
    conn.close().await.unwrap();
    lines.extend(record.iter().map(String::as_str));
    lines.join("\n")
}

/// Names the lines that differ, and no others.
#[track_caller]
fn assert_same(now: &str, expected: &str) {
    let only = |of: &str, other: &str| -> Vec<String> {
        let other: HashSet<&str> = other.lines().collect();
        of.lines().filter(|line| !other.contains(line)).map(str::to_owned).collect()
    };
    assert!(
        now == expected,
        "only now: {:#?}\nonly expected: {:#?}",
        only(now, expected),
        only(expected, now)
    );
}

/// The script, which needs no database.
async fn script(arguments: &[&str]) -> String {
    let output =
        program().args(["migrate", "--print", "--source", "person"]).args(arguments).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// As an operator, or a tool that calls psql, applies it.
async fn psql(database: &str, script: &str, then: &str) -> Result<String, String> {
    let folder = std::env::temp_dir().join(format!("outbox-script-{}", uuid::Uuid::now_v7()));
    std::fs::write(&folder, script).unwrap();
    let mut psql = Command::new("psql");
    psql.args(["-X", "-q", "-t", "-A", "-1", "-v", "ON_ERROR_STOP=1", "-d", database, "-f"]).arg(&folder);
    let output = psql.args(["-c", then]).output().await.unwrap();
    std::fs::remove_file(&folder).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim().to_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

async fn migrate(database: &str) {
    let mut migrate = program();
    let said = output(migrate.args(["migrate", "--source", "person"]).env("DATABASE_URL", database)).await;
    assert!(said.starts_with("exit code: 0"), "{said}");
}

/// The stack's database, as a superuser.
fn url(stack: &Stack) -> String {
    let server = std::env::var(devstack::testing::POSTGRES_URL).unwrap();
    format!("{server}/{}", stack.database_url.rsplit_once('/').unwrap().1)
}

#[tokio::test]
async fn it_makes_what_migrate_makes() {
    let stack = Stack::new("script_psql").await;
    let database = url(&stack);
    let expected = objects(&database).await;
    let drop = "DROP SCHEMA outbox CASCADE";
    sqlx::raw_sql(drop).execute(&stack.admin).await.unwrap();
    // What roles.sql had granted went with it.
    outbox::install(&mut stack.admin.acquire().await.unwrap(), "person").await.unwrap();
    let bare = objects(&database).await;
    assert_ne!(expected, bare);
    sqlx::raw_sql(drop).execute(&stack.admin).await.unwrap();

    // What follows in the transaction finds the settings as they were.
    let settings = "SELECT concat_ws(' ', current_setting('search_path'), current_setting('lock_timeout'))";
    let whole = script(&[]).await;
    assert_eq!(psql(&database, &whole, settings).await.unwrap(), "\"$user\", public 0");
    assert_same(&objects(&database).await, &bare);
    // Not upon another one, not even in part.
    let again = psql(&database, &whole, settings).await.unwrap_err();
    assert!(again.contains("this database has an outbox already"), "{again}");

    // In one message, as many drivers send it; under a search path and a quoting of a tool's own.
    sqlx::raw_sql(drop).execute(&stack.admin).await.unwrap();
    let mut conn = PgConnection::connect(&database).await.unwrap();
    let odd = "CREATE SCHEMA odd; CREATE FUNCTION odd.now() RETURNS text LANGUAGE sql AS 'SELECT 1';
               SET search_path = odd, pg_catalog; SET standard_conforming_strings = off";
    sqlx::raw_sql(odd).execute(&mut conn).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(whole)).execute(&mut conn).await.unwrap();
    conn.close().await.unwrap();
    assert_same(&objects(&database).await, &bare);

    // Migrate has nothing to do, and an event goes through.
    sqlx::raw_sql(drop).execute(&stack.admin).await.unwrap();
    let name = database.rsplit_once('/').unwrap().1;
    let (writer, relay) = (format!("{name}_writer"), format!("{name}_relay"));
    let granting = script(&["--grant-writer", &writer, "--grant-relay", &relay]).await;
    psql(&database, &granting, "").await.unwrap();
    let recorded = async || -> Vec<(i64, String, i64)> {
        let sql = "SELECT version, installed_on::text, execution_time FROM outbox.migration ORDER BY version";
        sqlx::query_as(sql).fetch_all(&stack.admin).await.unwrap()
    };
    let before = recorded().await;
    migrate(&database).await;
    assert_eq!(recorded().await, before);
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..10, 1, &["person.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(10).await;
}

/// As an earlier release left it, in use: with so many events, and so many that are set aside, that indexes are not made in a
/// transaction.
async fn older(stack: &Stack) {
    sqlx::raw_sql("DROP SCHEMA outbox CASCADE").execute(&stack.admin).await.unwrap();
    let mut old = outbox::migrator();
    old.migrations.to_mut().retain(|migration| migration.version <= 9);
    old.run(&stack.admin).await.unwrap();
    let used = "INSERT INTO outbox.source (name) VALUES ('person');
                INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                SELECT 'person', n, 1, 'person.new', '{}' FROM generate_series(1, 10001) n;
                INSERT INTO outbox.relay (name) VALUES ('default');
                INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                           created_at, reason, detail, state)
                SELECT 'default', n, gen_random_uuid(), 'person', n, 1, 'person.new', '{}', now(), 'unroutable', '', 'parked'
                FROM generate_series(1, 100001) n";
    sqlx::raw_sql(used).execute(&stack.admin).await.unwrap();
}

#[tokio::test]
async fn it_brings_an_older_outbox_up_to_date() {
    let stack = Stack::new("script_update").await;
    let database = url(&stack);
    older(&stack).await;
    migrate(&database).await;
    let expected = objects(&database).await;

    older(&stack).await;
    let other = psql(&database, &script(&["--after", "8"]).await, "").await.unwrap_err();
    assert!(other.contains("the newest migration of this outbox is 9, and this script follows 8"), "{other}");
    let foreign = script(&["--after", "10"]).await.replace("'person'", "'score'");
    let foreign = psql(&database, &foreign, "").await.unwrap_err();
    assert!(foreign.contains("this database already publishes under another name than"), "{foreign}");

    // Beside a writer.
    let stop = CancellationToken::new();
    let writer = tokio::spawn({
        let (pool, stop) = (stack.admin.clone(), stop.clone());
        async move {
            let mut version = 0;
            while !stop.is_cancelled() {
                version += 1;
                let sql = "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                           VALUES ('person', 'written', $1, 'person.changed', '{}')";
                sqlx::query(sql).bind(version).execute(&pool).await.unwrap();
            }
            version
        }
    });
    psql(&database, &script(&["--after", "9"]).await, "").await.unwrap();
    // What takes no part in a transaction, as the end of the script says.
    assert_eq!(psql(&database, "", "SELECT count(*) FROM outbox.missing_index").await.unwrap(), "2");
    assert!(objects(&database).await != expected);
    execute_each(&database, "SELECT statement FROM outbox.missing_index").await;
    stop.cancel();
    let written: i64 = writer.await.unwrap();
    assert_same(&objects(&database).await, &expected);
    let stored = "SELECT count(*) FROM outbox.event";
    let stored: i64 = sqlx::query_scalar(stored).fetch_one(&stack.admin).await.unwrap();
    assert_eq!(stored, 10_001 + written);

    // An index that was interrupted is made anew, by the same statements and by migrate.
    let interrupted = "UPDATE pg_index SET indisvalid = false WHERE indexrelid IN
                       (SELECT oid FROM pg_class WHERE relname IN ('parked_id', 'event_default_whole_state'))";
    let left = "SELECT count(*) FROM outbox.missing_index";
    for by_migrate in [false, true] {
        sqlx::raw_sql(interrupted).execute(&stack.admin).await.unwrap();
        let steps: i64 = sqlx::query_scalar(left).fetch_one(&stack.admin).await.unwrap();
        assert_eq!(steps, 4);
        if by_migrate {
            migrate(&database).await;
        } else {
            execute_each(&database, "SELECT statement FROM outbox.missing_index").await;
        }
        let steps: i64 = sqlx::query_scalar(left).fetch_one(&stack.admin).await.unwrap();
        assert_eq!(steps, 0);
        assert_same(&objects(&database).await, &expected);
    }
}

/// As the end of the script says: psql runs what a query returns.
async fn execute_each(database: &str, query: &str) {
    let file = std::env::temp_dir().join(format!("outbox-script-{}", uuid::Uuid::now_v7()));
    std::fs::write(&file, format!("{query} \\gexec\n")).unwrap();
    let mut psql = Command::new("psql");
    psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, "-f"]).arg(&file);
    let output = psql.output().await.unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A name that could become SQL does not.
#[tokio::test]
async fn names_are_quoted() {
    let said = output(program().args(["migrate", "--print", "--source", "x'); DROP TABLE y; --"])).await;
    assert!(said.starts_with("exit code: 1") && said.contains("is no source name"), "{said}");
    let script = script(&["--grant-writer", "o'brien"]).await;
    assert!(script.contains("SELECT outbox.grant_writer('o''brien'::regrole);"));
    // Flyway takes these for its own.
    assert!(!script.contains("${"));
    let alone = output(program().args(["migrate", "--source", "person", "--after", "3"])).await;
    assert!(alone.contains("--print"), "{alone}");
}
