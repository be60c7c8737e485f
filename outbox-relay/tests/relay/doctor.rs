//! `doctor`: what it finds, and that what it finds is an answer and not a failure.

use sqlx::Executor;

use crate::stack::{Relay, Stack, output, program};

async fn doctor(stack: &Stack, arguments: &[&str]) -> String {
    output(stack.command("doctor").args(arguments)).await
}

#[tokio::test]
async fn a_healthy_stack() {
    let stack = Stack::new("doctor_healthy").await;
    let _subscriber = stack.subscribe("#").await;
    stack.append(0..100, 10, &["thing.new"]).await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    stack.settled("default", 100).await;
    assert_told!("doctor of a healthy stack", doctor(&stack, &[]).await);
    assert_told!(
        "doctor without a broker",
        output(stack.command("doctor").env_remove("AMQP_URL").arg("--json")).await
    );
    assert_told!("doctor of an unknown relay", doctor(&stack, &["--name", "other"]).await);
}

#[tokio::test]
async fn a_stack_with_several_problems() {
    let stack = Stack::without_exchange("doctor_several").await;
    stack.append(0..10, 10, &["thing.new"]).await;
    let troubles = "
        ALTER SEQUENCE outbox.position CACHE 10;
        INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, previous_id)
            SELECT 'thing', 'person-17', n, 'thing.new', '{}', gen_random_uuid() FROM unnest(ARRAY[1, 2, 5, 6, 9]) n;
        INSERT INTO outbox.event (position, aggregate_type, aggregate_id, version, type, payload)
            VALUES (1000005, 'thing', 'b', 1, 'thing.new', '{}');
        INSERT INTO outbox.relay (name, low_water, high, leader, heartbeat_at, paused_at, paused_by)
            VALUES ('default', 5, 5, 'host:1', now() - interval '1 day', '2026-01-02 03:04:05Z', 'somebody'),
                   ('audit', 0, 0, NULL, NULL, NULL, NULL);
        INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                   headers, created_at, reason, detail)
            SELECT 'default', e.*, 'refused', 'said'
            FROM (SELECT position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at
                  FROM outbox.event WHERE position <= 5) e;
        DO $$ BEGIN EXECUTE format('REVOKE pg_read_all_stats FROM %I', current_database() || '_relay'); END $$";
    stack.admin.execute(troubles).await.unwrap();
    assert_told!("doctor of several problems", doctor(&stack, &[]).await);
    let mend = "DELETE FROM outbox.event WHERE position = 1000005; SELECT setval('outbox.position', 999990)";
    stack.admin.execute(mend).await.unwrap();
    assert_told!("doctor of fewer problems, as JSON", doctor(&stack, &["--name", "default", "--json"]).await);
}

/// What `roles.sql` takes from PUBLIC in a database of persons; a restore brings back the rights on functions alone.
#[tokio::test]
async fn a_restore_opens_the_database_to_every_role() {
    let stack = Stack::new("doctor_connect").await;
    let connect = async || {
        let said = doctor(&stack, &[]).await;
        let (_, said) = said.split_once(" connect: ").unwrap();
        said.split_once("\nok ").unwrap().0.to_owned()
    };
    let before = connect().await;
    assert!(before.contains("as by PostgreSQL's default"), "{before}");
    stack.admin.execute("REVOKE EXECUTE ON FUNCTION pg_advisory_lock(bigint) FROM PUBLIC").await.unwrap();
    let said = connect().await;
    assert_told!("doctor after a restore that opened the database", &said);
    let at = said.find("REVOKE CONNECT").unwrap();
    stack.admin.execute(sqlx::AssertSqlSafe(said[at..].to_owned())).await.unwrap();
    let after = connect().await;
    assert!(after.contains("only roles that were granted it may connect"), "{after}");
}

#[tokio::test]
async fn a_database_that_is_not_ready() {
    let stack = Stack::new("doctor_bare").await;
    assert_told!("doctor before the first run", doctor(&stack, &[]).await);
    let revoke = "DO $$ BEGIN EXECUTE format('REVOKE SELECT ON outbox.position, outbox.migration FROM %1$I;
                                              REVOKE DELETE ON outbox.parked FROM %1$I',
                                             current_database() || '_relay'); END $$";
    stack.admin.execute(revoke).await.unwrap();
    assert_told!("doctor without permissions", doctor(&stack, &[]).await);
    stack.admin.execute("DROP SCHEMA outbox CASCADE").await.unwrap();
    assert_told!("doctor without an outbox", doctor(&stack, &[]).await);
    let mut away = program();
    away.arg("doctor").env("DATABASE_URL", "postgres://relay@127.0.0.1:1/person");
    assert_told!("doctor without a database", output(&mut away).await);
    let mut away = stack.command("doctor");
    away.env("AMQP_URL", "amqp://relay:mqs3cretmqs3cret@127.0.0.1:1/%2f");
    assert!(output(&mut away).await.contains("problem  broker: no connection to RabbitMQ"));
}
