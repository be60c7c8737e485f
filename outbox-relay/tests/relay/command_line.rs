//! The command line: what it says, and what it refuses to start with.

use std::path::PathBuf;

use sqlx::Executor;
use uuid::Uuid;

use crate::stack::{BROKER_PASSWORD, DATABASE_PASSWORD, Relay, Stack, output, program};

#[tokio::test]
async fn help() {
    for command in [
        "",
        "run",
        "migrate",
        "status",
        "doctor",
        "trace",
        "digest",
        "parked",
        "parked drop",
        "replay",
        "backfill",
        "pause",
        "resume",
        "recover",
        "new-incarnation",
        "prune",
        "forget",
        "health",
    ] {
        let mut program = program();
        program.env("COLUMNS", "100").args(command.split_whitespace()).arg("--help");
        insta::assert_snapshot!(format!("help {command}").trim_end(), output(&mut program).await);
    }
}

#[tokio::test]
async fn settings_that_it_does_not_start_with() {
    let (database, amqp) = (
        format!("postgres://relay:{DATABASE_PASSWORD}@127.0.0.1:1/person"),
        format!("amqp://relay:{BROKER_PASSWORD}@127.0.0.1:1/%2f"),
    );
    let mut said = Vec::new();
    for (case, variables) in [
        ("no settings", vec![]),
        ("no broker", vec![("DATABASE_URL", &*database)]),
        ("an empty database", vec![("DATABASE_URL", ""), ("AMQP_URL", &*amqp)]),
        ("both forms", vec![("DATABASE_URL", &*database), ("DATABASE_URL_FILE", "/dev/null")]),
        ("no such file", vec![("DATABASE_URL_FILE", "/nowhere/url")]),
        (
            "a database without a scheme",
            vec![("DATABASE_URL", "relay:dbs3cretdbs3cret@here"), ("AMQP_URL", &*amqp)],
        ),
        (
            "a malformed database",
            vec![("DATABASE_URL", "postgres://a:dbs3cretdbs3cret@b:port/c"), ("AMQP_URL", &*amqp)],
        ),
        ("another scheme", vec![("DATABASE_URL", &*database), ("AMQP_URL", "http://a:mqs3cretmqs3cret@b/")]),
        (
            "a malformed broker",
            vec![("DATABASE_URL", &*database), ("AMQP_URL", "amqp://a:mqs3cretmqs3cret@b:port/")],
        ),
        (
            "a malformed second node",
            vec![("DATABASE_URL", &*database), ("AMQP_URL", "amqp://a:b@c/,a:mqs3cretmqs3cret@b/")],
        ),
        (
            "an unknown parameter of the broker",
            vec![("DATABASE_URL", &*database), ("AMQP_URL", "amqps://a:b@c/?verify=verify_none")],
        ),
        (
            "an authority without TLS",
            vec![("DATABASE_URL", &*database), ("AMQP_URL", "amqp://a:b@c/?cacertfile=Cargo.toml")],
        ),
        (
            "no certificate in the authority's file",
            vec![("DATABASE_URL", &*database), ("AMQP_URL", "amqps://a:b@c/?cacertfile=Cargo.toml")],
        ),
        (
            "a certificate without a key",
            vec![("DATABASE_URL", &*database), ("AMQP_URL", "amqps://a:b@c/?certfile=/nowhere/a.pem")],
        ),
        (
            "no such authority of the database",
            vec![("DATABASE_URL", "postgres://a:b@c/d?sslmode=verify-full&sslrootcert=/nowhere/a.pem")],
        ),
        ("a bad name", vec![("RELAY_NAME", "Default Relay")]),
        ("a bad rule", vec![("UNROUTABLE", "hold,order.*=wait")]),
        ("dropping everything in passing", vec![("UNROUTABLE", "drop")]),
        ("a lease that is too short", vec![("LEASE", "100ms")]),
        ("no lanes", vec![("LANES", "0")]),
        ("a bad address", vec![("LISTEN", "here")]),
        ("a bad beginning", vec![("BEGIN", "middle")]),
        ("a bad exchange", vec![("EXCHANGE", "")]),
        ("a bad flag", vec![("DECLARE_EXCHANGE", "perhaps")]),
        ("a bad duration", vec![("DRAIN_TIMEOUT", "10")]),
        ("a bad log", vec![("DATABASE_URL", &*database), ("AMQP_URL", &*amqp), ("LOG", "outbox_relay=loud")]),
    ] {
        let mut program = program();
        program.arg("run").env("LISTEN", "127.0.0.1:0").envs(variables);
        said.push(format!("## {case}\n{}", output(&mut program).await));
    }
    insta::assert_snapshot!(said.join("\n\n"));
}

/// A flag goes before a variable, a variable before the file, and the file before what is built in.
#[tokio::test]
async fn configuration_file() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("configuration-{}", Uuid::new_v4()));
    std::fs::create_dir(&folder).unwrap();
    let url = folder.join("database-url");
    let postgres = format!("postgres://relay:{DATABASE_PASSWORD}@127.0.0.1:1/person?sslmode=require");
    std::fs::write(&url, postgres).unwrap();
    let good = format!(
        "# Of every command.\n\
         database-url-file = \"{}\"\nname = \"second\"\n\
         # Of run alone.\n\
         lanes = 8\nmax-events = 100\nkeep = \"30d\"\ndeclare-exchange = true\n\
         # Of migrate, where it is required.\nsource = \"person\"",
        url.display()
    );
    let amqp = format!("amqps://relay:{BROKER_PASSWORD}@mq1/%2f,amqps://relay:{BROKER_PASSWORD}@mq2:5671/v");
    let mut said = Vec::new();
    for (case, file, command) in [
        ("what counts", &*good, "run --check-config --max-events 7"),
        ("another command", &*good, "status --no-such-flag"),
        ("a required one is in the file", &*good, "migrate"),
        ("an unknown one", "lames = 8", "run --check-config"),
        ("a secret", "database-url = \"postgres://a:dbs3cretdbs3cret@b/c\"", "run --check-config"),
        ("a wrong value", "lanes = 100", "run --check-config"),
        ("a wrong type", "lanes = [2]", "run --check-config"),
        ("no TOML", "lanes = 2\namqp-url: mqs3cretmqs3cret", "run --check-config"),
        ("something missing", "name = \"a\"", "run --check-config"),
    ] {
        let path = folder.join("relay.toml");
        std::fs::write(&path, file).unwrap();
        let mut program = program();
        program.env("CONFIG_FILE", &path).env("AMQP_URL", &amqp).env("LANES", "3");
        if case == "a wrong value" {
            program.env_remove("LANES");
        }
        program.args(command.split(' '));
        said.push(format!("## {case}\n{}", output(&mut program).await));
    }
    let mut program = program();
    program.args(["--config", "/nowhere/relay.toml", "run"]);
    said.push(format!("## no such file\n{}", output(&mut program).await));
    let said = said.join("\n\n").replace(folder.to_str().unwrap(), "FOLDER");
    std::fs::remove_dir_all(folder).unwrap();
    insta::assert_snapshot!(said);
}

/// What time cannot heal ends the process, and says what to run.
#[tokio::test]
async fn databases_that_it_does_not_start_on() {
    let stack = Stack::new("relay_refuses").await;
    let run = async || {
        let mut program = stack.command("run");
        output(program.env("LISTEN", "127.0.0.1:0")).await
    };
    let mut said = Vec::new();
    for (case, sql) in [
        (
            "the sequence is behind",
            "INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
                 SELECT 'thing', 'a', n, 'thing.new', '{}' FROM generate_series(1, 10) n;
             SELECT setval('outbox.position', 4)",
        ),
        ("no source", "SELECT setval('outbox.position', 10); DELETE FROM outbox.source"),
        ("another build", "UPDATE outbox.migration SET checksum = '\\x00'"),
        ("not current", "DELETE FROM outbox.migration"),
        (
            "no right",
            "DO $$ BEGIN EXECUTE format('REVOKE ALL ON outbox.migration FROM %I',
                          current_database() || '_relay'); END $$",
        ),
        ("no outbox", "DROP SCHEMA outbox CASCADE"),
    ] {
        stack.admin.execute(sql).await.unwrap();
        said.push(format!("## {case}\n{}", run().await));
    }
    insta::assert_snapshot!(said.join("\n\n"));
}

#[tokio::test]
async fn an_address_that_is_taken() {
    let stack = Stack::new("relay_listens").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    let said = output(stack.command("run").env("LISTEN", relay.address())).await;
    insta::assert_snapshot!(said.replace(relay.address(), "ADDRESS"));
}

#[tokio::test]
async fn migrate() {
    let stack = Stack::new("relay_migrate").await;
    stack.admin.execute("DROP SCHEMA outbox, outbox_capture CASCADE").await.unwrap();
    // The owner of a database: it may create schemas, and is no superuser.
    let database: String =
        sqlx::query_scalar("SELECT current_database()").fetch_one(&stack.admin).await.unwrap();
    let owner = format!("{database}_owner");
    let setup = format!(
        "CREATE ROLE {owner} LOGIN PASSWORD '{DATABASE_PASSWORD}'; ALTER DATABASE {database} OWNER TO {owner}"
    );
    stack.admin.execute(sqlx::AssertSqlSafe(setup)).await.unwrap();
    let url = stack.database_url.replace(&format!("{database}_relay:"), &format!("{owner}:"));
    let migrate = async |arguments: &[&str]| {
        let mut program = program();
        output(program.arg("migrate").args(arguments).env("DATABASE_URL", &url)).await
    };
    let (writer, relay) = (format!("{database}_writer"), format!("{database}_relay"));
    let grants = ["--source", "person", "--grant-writer", &writer, "--grant-relay", &relay];
    let mut said = Vec::new();
    for (case, arguments) in [
        ("no source", &[][..]),
        ("a bad source", &["--source", "Person"][..]),
        ("the first time", &grants[..]),
        ("the second time", &grants[..]),
        ("another source", &["--source", "score"][..]),
        ("no such role", &["--source", "person", "--grant-writer", "nobody_of_this_name"][..]),
    ] {
        said.push(format!("## {case}\n{}", migrate(arguments).await));
    }
    insta::assert_snapshot!(said.join("\n\n"));

    // What was granted is enough to append and to relay.
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..10, 1, &["person.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    subscriber.complete(10).await;
}

/// As in `outbox-relay run --check-config | head -0`.
#[tokio::test]
async fn a_reader_who_has_seen_enough() {
    let mut program = program();
    program.args(["run", "--check-config"]).env("AMQP_URL", "amqp://relay:secret@127.0.0.1:1/%2f");
    program.env("DATABASE_URL", "postgres://relay:secret@127.0.0.1:1/person");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    program.stdout(writer).stderr(std::process::Stdio::piped());
    let ended = program.spawn().unwrap().wait_with_output().await.unwrap();
    assert_eq!((ended.status.code(), String::from_utf8(ended.stderr).unwrap().as_str()), (Some(0), ""));
}
