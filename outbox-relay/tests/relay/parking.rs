//! Events that are set aside, and come back.

use lapin::types::FieldTable;
use outbox_relay::{
    evidence::PublishFailure,
    parked::{Parking, SetAside, park},
};
use serde_json::Value;
use sqlx::Executor;

use crate::stack::{Relay, Stack, eventually, output};

async fn parked(stack: &Stack) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM outbox.parked WHERE state = 'parked'")
        .fetch_one(&stack.admin)
        .await
        .unwrap()
}

/// What `/ready` says that somebody should look at, while it is ready.
async fn attention(relay: &Relay) -> String {
    eventually("it is ready, with something to look at", async || {
        let (status, body) = relay.get("ready").await?;
        let body: Value = serde_json::from_str(&body).ok()?;
        (status == 200).then(|| Some(body["attention"][0]["reason"].as_str()?.to_owned()))?
    })
    .await
}

/// Appends events that somebody takes after the first `count`, until those are settled: only a confirm
/// tells that somebody listens at all. Returns the last position.
async fn goes_on(stack: &Stack, count: i64) -> i64 {
    let mut last = count;
    eventually("what nobody takes is set aside", async || {
        stack.append(last..last + 1, 100, &["person.new"]).await;
        last += 1;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let sql = "SELECT coalesce(max(low_water), 0) >= $1 FROM outbox.relay";
        sqlx::query_scalar::<_, bool>(sql).bind(count).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    last
}

#[tokio::test]
async fn what_no_queue_takes_is_set_aside_and_comes_back() {
    let stack = Stack::new("relay_park").await;
    let mut persons = stack.subscribe("person.*").await;
    stack.append(0..2_000, 100, &["person.new", "score.new", "score.changed"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    let mut last = goes_on(&stack, 2_000).await;
    // An event that nothing follows waits until something else is taken.
    eventually("all of them are aside", async || {
        if parked(&stack).await == 1_333 {
            return Some(());
        }
        stack.append(last..last + 1, 100, &["person.new"]).await;
        last += 1;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        None
    })
    .await;
    stack.settled("default", last).await;
    // 667 of the first 2,000 are for a person, and all after that.
    let expected = usize::try_from(667 + last - 2_000).unwrap();
    persons.until(|messages| messages.len() == expected).await;
    persons.assert_rising();
    eventually("it says so, and no more", async || {
        let aside = "events are set aside (outbox-relay parked list); the rest goes on";
        (attention(&relay).await == aside).then_some(())
    })
    .await;
    insta::assert_snapshot!(
        sqlx::query_scalar::<_, String>(
            "SELECT string_agg(format('%s %s: %s', count, reason, detail), E'\n' ORDER BY detail)
             FROM (SELECT count(*), reason, detail FROM outbox.parked
                   WHERE next_attempt_at IS NOT NULL GROUP BY reason, detail) p",
        )
        .fetch_one(&stack.admin)
        .await
        .unwrap()
    );

    // Without a restart, and in the order of each aggregate.
    stack.bind("scores", "score.*", FieldTable::default()).await;
    let mut scores = stack.consume("scores").await;
    scores.until(|messages| messages.len() == 1_333).await;
    scores.assert_rising();
    eventually("nothing is aside", async || (parked(&stack).await == 0).then_some(())).await;
    eventually("nothing is to be looked at", async || {
        (!relay.get("ready").await?.1.contains("attention")).then_some(())
    })
    .await;
    relay.counts(last.unsigned_abs(), 0).await;
}

/// Nobody listens, or nobody listens any more: then it is not the events.
#[tokio::test]
async fn when_everything_comes_back_the_relay_waits() {
    let stack = Stack::new("relay_nobody").await;
    stack.append(0..1_000, 100, &["person.new", "score.new"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    insta::assert_snapshot!(
        relay.waits("no queue").await.replace("person", "KIND").replace("score", "KIND"),
        @"events: no queue takes events of type KIND.new: bind a queue to the exchange event_dispatcher"
    );
    let mut all = stack.subscribe("#").await;
    all.complete(1_000).await;
    stack.settled("default", 1_000).await;
    relay.is_ready().await;
    stack
        .channel()
        .await
        .queue_delete("#".into(), lapin::options::QueueDeleteOptions::default())
        .await
        .unwrap();
    stack.append(1_000..2_000, 100, &["person.new", "score.new"]).await;
    relay.waits("no queue").await;
    assert_eq!(parked(&stack).await, 0);
    let mut all = stack.subscribe("#").await;
    all.until(|messages| messages.len() == 1_000).await;
    all.assert_rising();
    relay.is_ready().await;
    relay.counts(2_000, 0).await;
    assert_eq!(relay.metric("outbox_relay_parked_total").await.as_deref(), Some("0"));
}

/// While a try is under way the relay says what it waits for, and so does a new session of the leader before its first try.
/// It logs each change, so no moment is missed here.
#[tokio::test]
async fn a_relay_that_waits_is_not_ready_in_between() {
    let stack = Stack::new("relay_still_nobody").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    // With one event, nothing waits while a try is under way.
    stack.append(0..1, 1, &["person.new"]).await;
    relay.waits("no queue").await;
    let tries = async || {
        relay.metric("outbox_relay_window_seconds_count").await.map_or(0, |n| n.parse::<u64>().unwrap())
    };
    for session in 0..2 {
        let before = tries().await;
        eventually("it has tried several times", async || {
            let (status, body) = relay.get("ready").await?;
            assert_eq!(status, 503, "{session}: {body}");
            (tries().await >= before + 3).then_some(())
        })
        .await;
        // 1869968492 is the class of the leader's lock.
        let kill = "SELECT pg_terminate_backend(pid) FROM pg_locks
                    WHERE locktype = 'advisory' AND classid = 1869968492 AND objsubid = 2
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        let ended: Vec<bool> = sqlx::query_scalar(kill).fetch_all(&stack.admin).await.unwrap();
        assert_eq!(ended, [true]);
    }
    let said = |relay: &Relay| -> Vec<String> {
        let log = relay.log();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let events = lines.filter(|line| line["part"] == "events" || line["fields"]["part"] == "events");
        let message = |line: serde_json::Value| {
            line["message"].as_str().or(line["fields"]["message"].as_str()).map(str::to_owned)
        };
        events.filter_map(message).collect()
    };
    // It started, and was ready once, before there was an event.
    assert_eq!(said(&relay), ["waiting", "ready", "waiting"], "{}", relay.log());
    let mut all = stack.subscribe("#").await;
    all.complete(1).await;
    relay.is_ready().await;
    assert_eq!(said(&relay), ["waiting", "ready", "waiting", "ready"]);
}

#[tokio::test]
async fn when_too_much_is_aside_the_relay_waits() {
    let stack = Stack::new("relay_many").await;
    let mut persons = stack.subscribe("person.*").await;
    let relay = Relay::ready(stack.command("run").env("MAX_PARKED", "10")).await;
    stack.append(0..100, 100, &["person.new", "score.new"]).await;
    // Only what is taken later tells that it is the events.
    let mut last = 100;
    let said = eventually("the limit is reached", async || {
        stack.append(last..last + 1, 100_000, &["person.new"]).await;
        last += 1;
        let body: Value = serde_json::from_str(&relay.get("ready").await?.1).ok()?;
        let reason = body["waiting"][0]["reason"].as_str()?;
        reason.contains("set aside already").then(|| format!("events: {reason}"))
    })
    .await;
    insta::assert_snapshot!(
        said,
        @"events: 10 events are set aside already, as many as --max-parked allows, so others wait: no queue takes events of type score.new: bind a queue to the exchange event_dispatcher"
    );
    assert_eq!(parked(&stack).await, 10);
    stack.bind("all", "score.*", FieldTable::default()).await;
    stack.consume("all").await.until(|messages| messages.len() == 50).await;
    persons.until(|messages| messages.len() == usize::try_from(last - 50).unwrap()).await;
    relay.is_ready().await;
}

/// What no broker would take is set aside for good, and says why; a command tries it again.
#[tokio::test]
async fn what_cannot_be_carried_is_set_aside() {
    let stack = Stack::new("relay_refused").await;
    let mut subscriber = stack.subscribe("#").await;
    // As before the schema had limits: it leaves alone what is stored already.
    let append = "
        ALTER TABLE outbox.event DROP CONSTRAINT event_rules;
        INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers) VALUES
            ('thing', 'a', 1, 'thing.new', '{\"n\": 0}', '{\"CC\": \"queue\"}'),
            ('thing', 'b', 1, 'thing.new', to_json(repeat('x', 16 * 1024 * 1024)), NULL),
            ('thing', 'c', 1, 'thing.new', '{\"n\": 0}', jsonb_build_object('note', repeat('x', 64 * 1024))),
            ('thing', 'a', 2, 'thing.changed', '{\"n\": 1}', NULL)";
    stack.admin.execute(append).await.unwrap();
    let relay = Relay::ready(&mut stack.command("run")).await;
    assert_eq!(subscriber.until(|m| m.len() == 1).await[0].number(), 1);
    let aside = eventually("the others are aside", async || {
        let sql = "SELECT format('%s/%s: %s, next attempt %s: %s', aggregate_id, version, reason,
                                 coalesce(next_attempt_at::text, 'by hand'), replace(detail, id::text, 'ID'))
                   FROM outbox.parked ORDER BY position";
        let aside = sqlx::query_scalar::<_, String>(sql).fetch_all(&stack.admin).await.unwrap();
        (aside.len() == 3).then(|| aside.join("\n"))
    })
    .await;
    insta::assert_snapshot!(aside, @r"
    a/1: refused, next attempt by hand: event ID of type thing.new: AMQP cannot carry it: it has a header named CC, which RabbitMQ takes for more routing keys
    b/1: refused, next attempt by hand: event ID of type thing.new: AMQP cannot carry it: its body has 16777218 bytes, and at most 16777216 are published
    c/1: refused, next attempt by hand: event ID of type thing.new: AMQP cannot carry it: its headers are larger than 65536 bytes
    ");
    // In vain, and said so.
    stack.admin.execute("UPDATE outbox.parked SET next_attempt_at = now()").await.unwrap();
    eventually("it was tried again", async || {
        let tried = "SELECT bool_and(attempts = 2 AND next_attempt_at IS NULL) FROM outbox.parked";
        sqlx::query_scalar::<_, bool>(tried).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    relay.is_ready().await;
}

/// A leader that is killed leaves what it set aside to the next one.
#[tokio::test]
async fn what_is_aside_outlives_the_relay() {
    let stack = Stack::new("relay_aside").await;
    let mut persons = stack.subscribe("person.*").await;
    stack.append(0..100, 100, &["score.new"]).await;
    let relay = Relay::start(&mut stack.command("run")).await;
    let last = goes_on(&stack, 100).await;
    stack.settled("default", last).await;
    persons.until(|m| m.len() == usize::try_from(last - 100).unwrap()).await;
    eventually("nothing waits", async || {
        let waits = "SELECT NOT EXISTS (SELECT FROM outbox.parked WHERE state = 'waiting')";
        sqlx::query_scalar::<_, bool>(waits).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    relay.kill().await;
    stack.bind("scores", "score.*", FieldTable::default()).await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.consume("scores").await.until(|messages| messages.len() == 100).await;
    eventually("nothing is aside", async || (parked(&stack).await == 0).then_some(())).await;
    relay.counts(100, 0).await;
}

#[tokio::test]
async fn a_paused_relay_publishes_nothing() {
    let stack = Stack::new("relay_pause").await;
    let mut subscriber = stack.subscribe("#").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    let pause =
        "UPDATE outbox.relay SET paused_at = '2026-01-02 03:04:05Z', paused_by = 'somebody@somewhere'";
    stack.admin.execute(pause).await.unwrap();
    insta::assert_snapshot!(
        relay.waits("paused").await,
        @"paused: paused by somebody@somewhere since 2026-01-02 03:04:05 UTC; it goes on with: outbox-relay resume"
    );
    stack.append(0..10, 1, &["person.new"]).await;
    // The next leader is paused as well, and the database knows.
    relay.kill().await;
    let relay = Relay::start(&mut stack.command("run")).await;
    relay.waits("paused").await;
    eventually("the database knows", async || {
        let waiting = "SELECT waiting @? '$[*] ? (@.part == \"paused\")' FROM outbox.relay";
        sqlx::query_scalar::<_, bool>(waiting).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    assert_eq!(relay.counted().await.0, "0");
    stack.admin.execute("UPDATE outbox.relay SET paused_at = NULL, paused_by = NULL").await.unwrap();
    subscriber.complete(10).await;
    relay.is_ready().await;
}

#[tokio::test]
async fn what_is_being_erased_is_set_aside_without_its_content() {
    let stack = Stack::new("relay_park_erased").await;
    stack.append(0..1, 100, &["person.new"]).await;
    stack.admin.execute("INSERT INTO outbox.relay (name) VALUES ('default')").await.unwrap();
    let mut erasing = stack.admin.begin().await.unwrap();
    let erase =
        "SELECT outbox.erase(array_agg(aggregate_type), array_agg(aggregate_id), array_agg(version + 1))
                 FROM outbox.event";
    erasing.execute(erase).await.unwrap();

    let mut relay = stack.admin.acquire().await.unwrap();
    let parking = tokio::spawn(async move {
        let detail = "no queue takes it".to_owned();
        let parking = Parking { position: 1, reason: PublishFailure::Unroutable, detail };
        park(&mut relay, "default", 0, &[parking], devstack::testing::DEADLINE).await
    });
    let waits = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_database d ON d.oid = database
                                WHERE d.datname = current_database() AND locktype = 'advisory' AND objid = 3
                                  AND NOT granted)";
    eventually("it waits for the erasure", async || {
        let waits = sqlx::query_scalar::<_, bool>(waits).fetch_one(&stack.admin).await.unwrap();
        (waits || parking.is_finished()).then_some(())
    })
    .await;
    erasing.commit().await.unwrap();
    assert_eq!(parking.await.unwrap().unwrap(), SetAside::Done, "the epoch is its own");
    let erased = "SELECT payload ->> 'erased' FROM outbox.parked";
    assert_eq!(sqlx::query_scalar::<_, String>(erased).fetch_one(&stack.admin).await.unwrap(), "true");
}

/// An erasure may belong to a transaction that stays open for minutes. What is to be set aside waits for it, and nothing
/// else does: the leader stays the leader, and publishes.
#[tokio::test]
async fn an_erasure_that_stays_open_stops_no_event() {
    let stack = Stack::new("relay_open_erasure").await;
    let mut persons = stack.subscribe("person.*").await;
    let relay = Relay::ready(&mut stack.command("run")).await;
    stack.append(0..10, 100, &["person.new"]).await;
    persons.complete(10).await;
    let epoch = async || -> i64 {
        sqlx::query_scalar("SELECT epoch FROM outbox.relay").fetch_one(&stack.admin).await.unwrap()
    };
    let before = epoch().await;
    let mut erasing = stack.admin.begin().await.unwrap();
    erasing.execute("SELECT pg_advisory_xact_lock_shared(1869968482, 3)").await.unwrap();

    let mut n = 10;
    // Tries to set the event aside are seen in the log once, and go on.
    eventually("the relay wants to set the event aside", async || {
        stack.append(n..n + 1, 100, &["score.new"]).await;
        stack.append(n + 1..n + 2, 100, &["person.new"]).await;
        n += 2;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        relay.log().contains("an erasure is under way").then_some(())
    })
    .await;
    for _ in 0..20 {
        stack.append(n..n + 1, 100, &["person.new"]).await;
        n += 1;
        persons.until(|messages| messages.iter().any(|message| message.number() == n - 1)).await;
    }
    assert_eq!((parked(&stack).await, epoch().await), (0, before));

    erasing.rollback().await.unwrap();
    eventually("it is set aside", async || (parked(&stack).await > 0).then_some(())).await;
    stack.settled("default", n).await;
    assert_eq!(epoch().await, before);
}

/// Thousands that are given up are summed up, on the terminal and in JSON.
#[tokio::test]
async fn what_is_dropped_by_the_thousand_is_summed_up() {
    let stack = Stack::new("relay_drop_many").await;
    stack.append(0..3_000, 100, &["score.new", "person.new"]).await;
    stack
        .admin
        .execute(
            "INSERT INTO outbox.relay (name, low_water, high) VALUES ('default', 3000, 3000);
             INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                        created_at, reason, detail)
             SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, created_at,
                    'unroutable', 'no queue' FROM outbox.event",
        )
        .await
        .unwrap();
    let said = output(stack.command("parked").args(["drop", "--all", "--yes", "--json"])).await;
    assert_eq!(parked(&stack).await, 0);
    assert!(said.contains(r#""count": 3000"#) && said.contains(r#""score.new": 1500"#), "{said}");
    assert!(said.len() < 4_000, "{} bytes", said.len());
}
