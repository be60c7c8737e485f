//! Connections that break, servers that do not answer, events that the broker will not have.

use std::collections::HashSet;

use sqlx::Executor;
use tokio_util::sync::CancellationToken;

use crate::stack::{
    BROKER_PASSWORD, EXCHANGE, Message, Proxy, Relay, Stack, as_of_3_10, eventually, output, program,
};

#[tokio::test]
async fn order_holds_when_the_broker_connection_breaks() {
    let stack = Stack::new("relay_order").await;
    let mut subscriber = stack.subscribe("#").await;
    let proxy = Proxy::new(&stack.amqp_url).await;
    let mut program = stack.command("run");
    let relay = Relay::ready(program.env("AMQP_URL", proxy.url(&stack.amqp_url))).await;
    stack.append(0..6_000, 30, &["person.new", "person.changed"]).await;
    for seen in [300, 1_000, 1_700, 2_400, 3_100] {
        subscriber.until(|messages| messages.iter().any(|m| m.number() >= seen)).await;
        proxy.cut();
    }
    // An operator's way: the broker says goodbye. Its list of connections is some seconds behind, so what
    // it names may be gone already.
    stack.append(6_000..9_000, 30, &["person.changed"]).await;
    let path = format!("vhosts/{}/connections", stack.vhost);
    eventually("the broker closes the relay's connection", async || {
        let connections = stack.manage(reqwest::Method::GET, &path, None).await;
        for connection in connections.as_array()? {
            let name = connection["user_provided_name"].as_str().unwrap_or_default();
            if name.starts_with("outbox-relay ") && name.contains(" default ") {
                let name = connection["name"].as_str()?.replace(' ', "%20").replace('>', "%3E");
                stack.try_manage(reqwest::Method::DELETE, &format!("connections/{name}"), None).await.ok();
            }
        }
        relay.log().contains("CONNECTION_FORCED").then_some(())
    })
    .await;
    subscriber.complete(9_000).await;
    stack.settled("default", 9_000).await;
    relay.is_ready().await;
}

#[tokio::test]
async fn the_leader_s_database_connection_breaks() {
    let stack = Stack::new("relay_database").await;
    let mut subscriber = stack.subscribe("#").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..6_000, 30, &["person.new"]).await;
    let epoch = async || {
        let stored = sqlx::query_scalar::<_, i64>("SELECT epoch FROM outbox.relay");
        stored.fetch_one(&stack.admin).await.unwrap()
    };
    for seen in [300, 1_500, 3_000] {
        subscriber.until(|messages| messages.iter().any(|m| m.number() >= seen)).await;
        // 1869968492 is the class of the leader's lock.
        let kill = "SELECT pg_terminate_backend(pid) FROM pg_locks
                    WHERE locktype = 'advisory' AND classid = 1869968492 AND objsubid = 2
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        let before = epoch().await;
        eventually("the leader's backend is terminated", async || {
            sqlx::query_scalar::<_, bool>(kill).fetch_optional(&stack.admin).await.unwrap()
        })
        .await;
        eventually("leadership is taken anew", async || (epoch().await > before).then_some(())).await;
    }
    subscriber.complete(6_000).await;
    stack.settled("default", 6_000).await;
    relay.is_ready().await;
}

/// Terminates the backend that listens; false while there is none.
async fn deafen(stack: &Stack) -> bool {
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE datname = current_database() AND query LIKE 'LISTEN %'";
    sqlx::query_scalar(sql).fetch_optional(&stack.admin).await.unwrap() == Some(true)
}

#[tokio::test]
async fn without_a_listener_polling_goes_on() {
    let stack = Stack::new("relay_listen").await;
    let mut subscriber = stack.subscribe("#").await;
    let _relay = Relay::ready(&mut stack.command("run")).await;
    let waker = outbox::Waker::new();
    let stop = CancellationToken::new();
    let sender = tokio::spawn(waker.clone().run(stack.writer.clone(), stop.clone()));
    for n in 0..5 {
        eventually("the listener is gone, and came back before", async || deafen(&stack).await.then_some(()))
            .await;
        stack.append(n..n + 1, 1, &["person.new"]).await;
        waker.wake();
        subscriber.complete(usize::try_from(n + 1).unwrap()).await;
    }
    stop.cancel();
    sender.await.unwrap();
}

/// Deleting the exchange stands for a broker that lost its data directory.
#[tokio::test]
async fn a_broker_that_lost_its_data_is_told_of() {
    let stack = Stack::without_exchange("relay_lost_broker").await;
    stack.permit("^event_dispatcher$").await;
    let start = async || Relay::ready(stack.command("run").arg("--declare-exchange")).await;
    let mut relay = start().await;
    let mut subscriber = stack.subscribe("#").await;
    stack.append(0..5, 5, &["person.new"]).await;
    subscriber.complete(5).await;
    stack.settled("default", 5).await;
    let attention = async |relay: &Relay| {
        let (status, body) = relay.get("ready").await.unwrap();
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let said = body["attention"].as_array().into_iter().flatten().find(|said| said["part"] == "exchange");
        (status, said.map(|said| said["reason"].as_str().unwrap().to_owned()))
    };
    assert_eq!(attention(&relay).await, (200, None), "an exchange that was new before all events");
    assert!(relay.terminate().await.success());
    relay = start().await;
    assert_eq!(attention(&relay).await, (200, None), "an exchange that was there");
    assert!(relay.terminate().await.success());

    let path = format!("exchanges/{}/{EXCHANGE}", stack.vhost);
    stack.manage(reqwest::Method::DELETE, &path, None).await;
    relay = start().await;
    let said = eventually("the relay tells of it", async || attention(&relay).await.1).await;
    insta::assert_snapshot!(said);
    assert!(relay.log().contains("did not exist, although everything up to position 5"), "{}", relay.log());
    // The subscribers' queues exist again, and what the message says brings back what was lost.
    let mut again = stack.subscribe("person.*").await;
    let replayed = output(stack.command("replay").args(["--all", "--to-everybody", "--yes"])).await;
    assert!(replayed.contains("5 events replayed"), "{replayed}");
    again.complete(5).await;
}

#[tokio::test]
async fn another_node_is_taken_when_the_first_is_dead() {
    let stack = Stack::new("relay_nodes").await;
    let dead = "amqp://guest:guest@127.0.0.1:1/%2f";
    let nodes = format!("{dead}, {}", stack.amqp_url);
    let _relay = Relay::ready(stack.command("run").env("AMQP_URL", nodes)).await;
    stack.append(0..1, 1, &["person.new"]).await;
    stack.subscribe("#").await.complete(1).await;
}

#[tokio::test]
async fn what_is_waited_for_is_said() {
    let stack = Stack::new("relay_reasons").await;
    let host = "127.0.0.1:1";
    let mut reasons = Vec::new();
    for (name, variable, value, reason) in [
        ("away", "AMQP_URL", format!("amqp://guest:mqs3cretmqs3cret@{host}/x"), "broker: no"),
        (
            "wrong",
            "AMQP_URL",
            stack.amqp_url.replace(&format!(":{BROKER_PASSWORD}@"), ":wr0ng@"),
            "broker: no",
        ),
        ("vhost", "AMQP_URL", format!("{}-not", stack.amqp_url), "broker: no"),
        (
            "database",
            "DATABASE_URL",
            format!("postgres://relay:dbs3cretdbs3cret@{host}/x"),
            "database: the database",
        ),
    ] {
        let relay = Relay::start(stack.command("run").args(["--name", name]).env(variable, value)).await;
        let said = relay.waits(reason).await.replace(&stack.vhost, "VHOST");
        let (_, broker) = stack.amqp_url.rsplit_once('@').unwrap();
        reasons.push(format!("{name}\n{}", said.replace(broker.split('/').next().unwrap(), "NODE")));
        assert!(!relay.log().contains("s3cret") && !relay.log().contains("wr0ng"), "{}", relay.log());
    }
    insta::assert_snapshot!(reasons.join("\n\n"));
}

/// The broker ends the channel over a single event. It must not take the others of its window with it,
/// nor have them published over and over again.
#[tokio::test]
async fn an_event_that_the_broker_refuses_is_found() {
    let stack = Stack::new("relay_culprit").await;
    let mut subscriber = stack.subscribe("#").await;
    // Everything but one type may be published.
    let rights = |write: &str| serde_json::json!({"exchange": EXCHANGE, "write": write, "read": ""});
    let path = format!("topic-permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights(r"^person\."))).await;
    stack.append(0..950, 1_000, &["person.new"]).await;
    stack.append(950..951, 1_000, &["secret.new"]).await;
    stack.append(951..1_000, 1_000, &["person.new"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    let parked = eventually("it is set aside", async || {
        let parked = "SELECT format('%s, attempts %s, next attempt %s, because %s', reason, attempts,
                                    coalesce(next_attempt_at::text, 'by hand'), replace(detail, id::text, 'ID'))
                      FROM outbox.parked WHERE type = 'secret.new' AND state = 'parked'";
        sqlx::query_scalar::<_, String>(parked).fetch_optional(&stack.admin).await.unwrap()
    })
    .await;
    insta::assert_snapshot!(as_of_3_10(&parked.replace(&stack.vhost, "VHOST")));
    stack.settled("default", 1_000).await;
    relay.is_ready().await;
    subscriber.until(|m| m.iter().map(Message::number).collect::<HashSet<_>>().len() == 999).await;
    let received = subscriber.messages.len();
    assert!(received < 2_000, "each was published twice at most, or so: {received}");

    // By hand, once the permission is there.
    stack.manage(reqwest::Method::PUT, &path, Some(rights(".*"))).await;
    stack.admin.execute("UPDATE outbox.parked SET next_attempt_at = now()").await.unwrap();
    subscriber.complete(1_000).await;
}

/// Without the right to publish at all, nobody's event is the culprit: the relay waits.
#[tokio::test]
async fn a_broker_that_refuses_everything_is_waited_for() {
    let stack = Stack::new("relay_forbidden").await;
    let mut subscriber = stack.subscribe("#").await;
    let rights = |write: &str| serde_json::json!({"exchange": EXCHANGE, "write": write, "read": ""});
    let path = format!("topic-permissions/{0}/{0}", stack.vhost);
    stack.manage(reqwest::Method::PUT, &path, Some(rights("^$"))).await;
    stack.append(0..500, 100, &["person.new", "person.changed"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    relay.waits("events: event ").await;
    stack.manage(reqwest::Method::PUT, &path, Some(rights(".*"))).await;
    subscriber.complete(500).await;
    relay.is_ready().await;
    eventually("nothing is set aside", async || {
        (relay.metric("outbox_relay_parked_events").await? == "0").then_some(())
    })
    .await;
}

/// Whatever the relay waits for, SIGTERM ends it well within the time to drain.
#[tokio::test]
async fn a_waiting_relay_stops_when_told() {
    let stack = Stack::new("relay_waits").await;
    let (broker, database) = (Proxy::new(&stack.amqp_url).await, Proxy::new(&stack.database_url).await);
    let run = |name: &str| {
        let mut program = stack.command("run");
        program.args(["--name", name, "--drain-timeout", "30s"]);
        program
    };
    let mut relays = vec![
        ("leading and idle", Relay::ready(&mut run("idle")).await),
        ("standing by", Relay::ready(&mut run("idle")).await),
    ];
    // Something to publish that is not confirmed, as while the broker has an alarm.
    let silent = Relay::ready(run("silent").env("AMQP_URL", broker.url(&stack.amqp_url))).await;
    broker.hang();
    // A leader whose database falls silent.
    let leader = Relay::ready(run("leader").env("DATABASE_URL", database.url(&stack.database_url))).await;
    database.hang();
    stack.append(0..10, 10, &["person.new"]).await;
    let unreachable = Proxy::new(&stack.amqp_url).await;
    unreachable.hang();
    let deaf = Relay::start(run("deaf").env("AMQP_URL", unreachable.url(&stack.amqp_url))).await;
    let lost = Proxy::new(&stack.database_url).await;
    lost.hang();
    let blind = Relay::start(run("blind").env("DATABASE_URL", lost.url(&stack.database_url))).await;
    let holding = Relay::start(&mut run("holding")).await;
    holding.waits("no queue").await;
    relays.extend([
        ("holding", holding),
        ("without a confirm", silent),
        ("without a broker", deaf),
        ("without a database", blind),
        ("with a silent database", leader),
    ]);
    // A relay that does not drain in time says so with its exit code.
    futures_util::future::join_all(relays.into_iter().map(async |(waiting, mut relay)| {
        let status = relay.terminate().await;
        assert!(status.success(), "{waiting}: {status}: {}", relay.log());
    }))
    .await;
}

/// `health` tells a container's health check what `/ready` says.
#[tokio::test]
async fn health_tells_whether_it_is_ready() {
    let stack = Stack::new("relay_health").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    let health = async |address: &str| {
        output(program().arg("health").env("LISTEN", address)).await.replace(address, "ADDRESS")
    };
    eventually("every lane has a connection", async || {
        (!relay.get("ready").await?.1.contains("attention")).then_some(())
    })
    .await;
    let mut said = vec![health(relay.address()).await];
    stack.append(0..1, 1, &["person.new"]).await;
    relay.waits("no queue").await;
    // For a moment it may be ready again: it tries.
    let waiting = eventually("health says what it waits for", async || {
        let said = health(relay.address()).await;
        said.contains(r#""seconds":"#).then_some(said)
    })
    .await;
    let (before, after) = waiting.split_once(r#""seconds":"#).unwrap();
    let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
    said.push(format!(r#"{before}"seconds":N{after}"#));
    let address = relay.address().to_owned();
    relay.kill().await;
    said.push(health(&address).await);
    insta::with_settings!({filters => vec![(r#""database":"[0-9a-f]{16}""#, r#""database":"[digest]""#)]}, {
        insta::assert_snapshot!(said.join("\n\n"));
    });
}
