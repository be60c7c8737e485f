//! `migrate --print`: the schema by another tool.

use std::collections::HashSet;

use sqlx::{Connection, PgConnection, PgPool};
use tokio::process::Command;

use crate::stack::{Relay, Stack, output, program};

/// Everything that the schema has, and who may use it.
const OBJECTS: &str = "
SELECT string_agg(object, E'\\n' ORDER BY object COLLATE \"C\") FROM (
    SELECT pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '') FROM pg_proc p
    WHERE p.pronamespace = 'outbox'::regnamespace AND p.prokind IN ('f', 'p')
    UNION ALL
    SELECT concat_ws(' ', c.relkind, c.relname, c.relpersistence, c.reloptions, c.relacl,
                     pg_get_expr(c.relpartbound, c.oid)) FROM pg_class c
    WHERE c.relnamespace = 'outbox'::regnamespace
    UNION ALL
    SELECT concat_ws(' ', c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                     a.attacl, a.attcollation, a.attstorage, pg_get_expr(d.adbin, d.adrelid))
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    WHERE c.relnamespace = 'outbox'::regnamespace
    UNION ALL
    SELECT concat_ws(' ', k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid)) FROM pg_constraint k
    WHERE k.connamespace = 'outbox'::regnamespace
    UNION ALL
    SELECT concat_ws(' ', pg_get_indexdef(i.indexrelid), i.indisvalid) FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'outbox'::regnamespace
    UNION ALL
    SELECT pg_get_triggerdef(t.oid) || t.tgenabled::text FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    WHERE c.relnamespace = 'outbox'::regnamespace AND NOT t.tgisinternal
    UNION ALL
    SELECT concat_ws(' ', v.viewname, v.definition) FROM pg_views v WHERE v.schemaname = 'outbox'
    UNION ALL
    SELECT concat_ws(' ', s.sequencename, s.data_type, s.start_value, s.increment_by, s.cache_size)
    FROM pg_sequences s WHERE s.schemaname = 'outbox'
    UNION ALL
    SELECT n.nspacl::text FROM pg_namespace n WHERE n.nspname = 'outbox'
    UNION ALL
    SELECT concat_ws(' ', m.version, m.description, m.success, m.checksum) FROM outbox.migration m) AS o (object)";

async fn objects(pool: &PgPool) -> String {
    sqlx::query_scalar(OBJECTS).fetch_one(pool).await.unwrap()
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
    let expected = objects(&stack.admin).await;
    let database = url(&stack);
    let drop = "DROP SCHEMA outbox CASCADE";
    sqlx::raw_sql(drop).execute(&stack.admin).await.unwrap();
    // What roles.sql had granted went with it.
    outbox::install(&mut stack.admin.acquire().await.unwrap(), "person").await.unwrap();
    let bare = objects(&stack.admin).await;
    assert_ne!(expected, bare);
    sqlx::raw_sql(drop).execute(&stack.admin).await.unwrap();

    // What follows in the transaction finds the settings as they were.
    let settings = "SELECT concat_ws(' ', current_setting('search_path'), current_setting('lock_timeout'))";
    let whole = script(&[]).await;
    assert_eq!(psql(&database, &whole, settings).await.unwrap(), "\"$user\", public 0");
    assert_same(&objects(&stack.admin).await, &bare);
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
    assert_same(&objects(&stack.admin).await, &bare);

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

#[tokio::test]
async fn it_brings_an_older_outbox_up_to_date() {
    let stack = Stack::new("script_update").await;
    let database = url(&stack);
    let reset = "DROP SCHEMA outbox CASCADE";
    sqlx::raw_sql(reset).execute(&stack.admin).await.unwrap();
    outbox::install(&mut stack.admin.acquire().await.unwrap(), "person").await.unwrap();
    let expected = objects(&stack.admin).await;
    sqlx::raw_sql(reset).execute(&stack.admin).await.unwrap();

    // As an earlier release left it, with an event.
    let mut old = outbox::migrator();
    old.migrations.to_mut().retain(|migration| migration.version <= 9);
    old.run(&stack.admin).await.unwrap();
    let named = "INSERT INTO outbox.source (name) VALUES ('person');
                 INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 VALUES ('person', 'a', 1, 'person.new', '{}')";
    sqlx::raw_sql(named).execute(&stack.admin).await.unwrap();

    let other = psql(&database, &script(&["--after", "8"]).await, "").await.unwrap_err();
    assert!(other.contains("the newest migration of this outbox is 9, and this script follows 8"), "{other}");
    let foreign = script(&["--after", "10"]).await.replace("'person'", "'score'");
    let foreign = psql(&database, &foreign, "").await.unwrap_err();
    assert!(foreign.contains("this database already publishes under another name than"), "{foreign}");
    psql(&database, &script(&["--after", "9"]).await, "").await.unwrap();
    assert_same(&objects(&stack.admin).await, &expected);
    migrate(&database).await;
    let stored: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox.event").fetch_one(&stack.admin).await.unwrap();
    assert_eq!(stored, 1);
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
