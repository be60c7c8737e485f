//! One fault after the other, on one pair of servers.

use std::time::Duration;

use reqwest::Method;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    field::{Field, event_id, person_id, publish},
    stack::until,
};

/// How many messages the broker sends ahead.
const RECEIVED: u64 = 200;
/// How long the load goes on before and after a fault.
const WHILE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn the_projector() {
    let mut field = Field::new("faults_projector").await;
    for _ in 0..2 {
        field.add().await;
    }
    broker(&mut field).await;
    database(&mut field).await;
    replicas(&mut field).await;
    killed_at_every_step(&mut field).await;
    many_waiting(&mut field).await;
    an_event_that_kills(&mut field).await;
}

/// The connection, the channel, the queue, the whole broker.
async fn broker(field: &mut Field) {
    let fault = "connections closed by an operator";
    let load = field.load();
    for _ in 0..3 {
        sleep(WHILE).await;
        field.close_connections().await;
    }
    field.stop(load).await;
    field.whole(fault).await;

    let fault = "queue deleted: the broker cancels";
    let path = format!("queues/{}/score", field.vhost());
    until("the queue is empty", async || field.messages("score").await == Some(0)).await;
    field.manage(Method::DELETE, &path).await;
    until("the queue is declared anew", async || field.messages("score").await == Some(0)).await;
    field.publish(20).await;
    field.whole(fault).await;

    // The server looks each half second, at channels that are opened from now on. RabbitMQ 4.3 and later leave the
    // channel open, and give the queue's messages to no other consumer before this one has ended.
    let fault = "an acknowledgement is late: the broker closes the channel, or cancels the subscription";
    let patience = async |field: &Field, tick: u32, timeout: u32| {
        let set = format!(
            "application:set_env(rabbit, channel_tick_interval, {tick}), application:set_env(rabbit, \
             consumer_timeout, {timeout})."
        );
        field.servers.rabbitmq.control(&["eval", &set]).await.unwrap();
    };
    patience(field, 500, 1_000).await;
    field.close_connections().await;
    let mut blocker = field.stack.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE score.person IN SHARE MODE").execute(&mut *blocker).await.unwrap();
    field.publish(2).await;
    sleep(Duration::from_secs(4)).await;
    patience(field, 60_000, 1_800_000).await;
    blocker.rollback().await.unwrap();
    field.says(fault, "acknowledg").await;
    field.whole(fault).await;

    let fault = "RabbitMQ stopped and started";
    let load = field.load();
    sleep(WHILE).await;
    field.servers.rabbitmq.stop(&CancellationToken::new()).await;
    field.says(fault, "\"broker\"").await;
    field.servers.rabbitmq.start().await.unwrap();
    sleep(WHILE).await;
    field.stop(load).await;
    field.whole(fault).await;
}

/// PostgreSQL is away, and nothing is taken from the queue meanwhile.
async fn database(field: &mut Field) {
    let fault = "PostgreSQL away";
    let before = field.redelivered().await;
    let load = field.load();
    sleep(WHILE).await;
    field.servers.postgres.stop(&CancellationToken::new()).await;
    field.says(fault, "\"database\"").await;
    sleep(Duration::from_mins(1)).await;
    field.stop(load).await;
    field.says(fault, "\"consuming\"").await;
    field.servers.postgres.start().await.unwrap();
    field.whole(fault).await;
    assert_eq!(field.messages("score.dead").await, Some(0), "no deliveries were used up");
    // What was received when it went away, and not once more for each time that it was looked for.
    let redelivered = field.redelivered().await - before;
    assert!(redelivered <= 2 * RECEIVED, "{fault}: {redelivered} redelivered");
}

/// The active replica is killed, and the one that stands by goes on.
async fn replicas(field: &mut Field) {
    for _ in 0..2 {
        let fault = "the active replica killed";
        let load = field.load();
        sleep(WHILE).await;
        drop(field.programs.remove(0));
        sleep(WHILE).await;
        field.stop(load).await;
        field.whole(fault).await;
        field.add().await;
    }
}

/// More often than the broker delivers a message, without a life in which all goes well.
async fn killed_at_every_step(field: &mut Field) {
    field.programs.clear();
    for (fault, failpoint) in [
        ("killed between apply and commit 21 times", "apply=1*off->return"),
        ("killed between commit and acknowledgement 21 times", "commit=return"),
    ] {
        field.publish(40).await;
        for _ in 0..21 {
            field.publish(1).await;
            let mut program = field.start(failpoint);
            until(&format!("{fault}: it dies"), async || program.has_died()).await;
        }
        field.add().await;
        field.whole(fault).await;
        until("the dead letters are drained", async || field.messages("score.dead").await == Some(0)).await;
        field.programs.clear();
    }
}

/// A projector that was stopped for long.
async fn many_waiting(field: &mut Field) {
    let fault = "50,000 messages waiting";
    publish(&field.stack.amqp, (1_000..51_000).map(|n| (n, 1))).await;
    field.publish(1).await;
    field.add().await;
    field.whole(fault).await;
    until("all are applied", async || {
        sqlx::query_scalar::<_, i64>("SELECT count(*) FROM score.person WHERE cpf >= 1000")
            .fetch_one(&field.stack.pool)
            .await
            .unwrap()
            == 50_000
    })
    .await;
    field.programs.clear();
}

/// It is found, and everybody else goes on.
async fn an_event_that_kills(field: &mut Field) {
    let (n, version) = (100, 2);
    publish(&field.stack.amqp, (1..=4).map(|version| (n, version))).await;
    field.publish(5).await;
    let killer = format!("apply=return({})", event_id(n, version));
    let mut deaths = 0;
    let program = loop {
        let mut program = field.start(&killer);
        let held = async || -> i64 {
            sqlx::query_scalar("SELECT count(*) FROM inbox.held WHERE reason = 'poison'")
                .fetch_one(&field.stack.pool)
                .await
                .unwrap()
        };
        let mut found = false;
        until("it dies, or holds the event", async || {
            found = held().await == 1;
            found || program.has_died()
        })
        .await;
        if found {
            break program;
        }
        deaths += 1;
        assert!(deaths < 10, "it goes on dying");
    };
    // Twice with others, then three times alone.
    assert_eq!(deaths, 5);
    until("everybody else is at the end", async || {
        let sql = "SELECT count(*) FROM score.person WHERE cpf <= 20 AND version = $1";
        let versions = field.versions;
        sqlx::query_scalar::<_, i64>(sql).bind(versions).fetch_one(&field.stack.pool).await.unwrap() == 20
    })
    .await;
    until("it is ready", async || program.ready().await.is_some_and(|(status, _)| status == 200)).await;
    let held: Vec<(i64, String, i32)> = sqlx::query_as(
        "SELECT version, reason, attempts FROM inbox.held WHERE aggregate_id = $1 ORDER BY version",
    )
    .bind(person_id(n).to_string())
    .fetch_all(&field.stack.pool)
    .await
    .unwrap();
    let held: Vec<_> = held.iter().map(|(v, reason, attempts)| (*v, reason.as_str(), *attempts)).collect();
    assert_eq!(held, [(2, "poison", 3), (3, "behind", 0), (4, "behind", 0)]);
}
