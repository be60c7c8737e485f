//! Carries a plan out: each fault at its time, and undone at its end.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, ensure};
use futures_util::future::try_join_all;
use lapin::{
    options::QueueBindOptions,
    types::{AMQPValue, FieldTable},
};
use rustix::process::{Pid, Signal};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::time::Instant;

use devstack::proc;

use super::{
    field::Field,
    notes::{self, MEMO, NOTE},
    oracle::Stretch,
    schedule::{Fault, Member, Open, Place, What},
    subscriber::{connect, follow},
    trouble,
    wire::Weather,
};

/// For how long it is tried to begin a fault, or to undo it, while another one is in the way.
const PATIENCE: Duration = Duration::from_mins(5);
/// The pause before another try.
const PAUSE: Duration = Duration::from_millis(100);
/// What the broker takes before its memory alarm, in its own words.
const MEMORY: &str = "1GB";

/// What was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    /// How often each kind was.
    pub(crate) counts: BTreeMap<&'static str, usize>,
    /// What may have been set aside.
    pub(crate) notes_aside: Vec<Stretch>,
}

/// Carries out all of it, from `begin` on. Returns when everything is undone.
pub(crate) async fn carry_out(
    field: &Field,
    plan: &[Fault],
    begin: Instant,
    say: fn(&str),
) -> anyhow::Result<Done> {
    let mut done = Done::default();
    for fault in plan {
        *done.counts.entry(fault.what.kind()).or_default() += 1;
    }
    let faults = plan.iter().enumerate().map(async |(number, fault)| {
        tokio::time::sleep_until(begin + Duration::from_millis(fault.at)).await;
        say(&fault.to_string());
        let one = one(field, *fault, number).await;
        one.with_context(|| format!("this fault went wrong: {fault}"))
    });
    done.notes_aside = try_join_all(faults).await?.into_iter().flatten().collect();
    Ok(done)
}

async fn one(field: &Field, fault: Fault, number: usize) -> anyhow::Result<Option<Stretch>> {
    match fault.what {
        What::ScoreUnbound => {
            let stretch = unbound(field, fault, bind_score).await?;
            repair(field, stretch).await.map(|()| None)
        }
        What::NotesUnbound => {
            let bind = async |field: &Field, bound| bind_notes(field, &[NOTE, MEMO], bound).await;
            unbound(field, fault, bind).await.map(Some)
        }
        What::MemosUnbound => {
            let bind = async |field: &Field, bound| bind_notes(field, &[MEMO], bound).await;
            unbound(field, fault, bind).await.map(Some)
        }
        What::TypeDenied => {
            let above = until_done(async || position(field, ROUTED).await).await?;
            trouble::type_denied(field, Duration::from_millis(fault.lasts)).await?;
            let to = until_done(async || position(field, GIVEN).await).await?;
            Ok(Some(Stretch { above, to }))
        }
        _ => plain(field, fault, number).await.map(|()| None),
    }
}

/// A binding is away. Returns the positions whose events it may have missed.
async fn unbound(
    field: &Field,
    fault: Fault,
    bind: impl AsyncFn(&Field, bool) -> anyhow::Result<()>,
) -> anyhow::Result<Stretch> {
    let above = until_done(async || {
        let above = position(field, ROUTED).await?;
        bind(field, false).await?;
        Ok(above)
    })
    .await?;
    tokio::time::sleep(Duration::from_millis(fault.lasts)).await;
    until_done(async || bind(field, true).await).await?;
    let to = until_done(async || position(field, GIVEN).await).await?;
    Ok(Stretch { above, to })
}

/// Up to where everything has been routed: what waits aside is settled, and was not.
const ROUTED: &str = "SELECT least((SELECT coalesce(min(low_water), 0) FROM outbox.relay),
                                   (SELECT min(position) - 1 FROM outbox.parked))";
/// The last position that was given.
const GIVEN: &str = "SELECT last_value FROM outbox.position";

/// What a removed binding has kept from the projector's queue, an operator publishes again, to that queue alone.
/// By type, since notes have no place there; the inbox brings it into order.
async fn repair(field: &Field, Stretch { above, to }: Stretch) -> anyhow::Result<()> {
    until_done(async || {
        let settled = position(field, "SELECT coalesce(min(low_water), 0) FROM outbox.relay").await?;
        ensure!(settled >= to, "a replay goes no further than the relay has settled: {settled} of {to}");
        Ok(())
    })
    .await?;
    let (from, to, database) = ((above + 1).to_string(), to.to_string(), field.addresses.url("person"));
    let env = [("DATABASE_URL", database.as_str()), ("AMQP_URL", &field.addresses.replay)];
    for types in ["person.*", "income.*", "asset.*", "debt.*"] {
        let range = ["replay", "--from", &from, "--to", &to, "--type", types];
        let args = [&range[..], &["--to-queue", "score", "--rate", "20000"]].concat();
        // Other faults interrupt it.
        until_done(async || field.operator.command(&args, &env).await).await?;
    }
    Ok(())
}

async fn position(field: &Field, sql: &'static str) -> anyhow::Result<i64> {
    let mut conn = field.addresses.connect("person").await?;
    let position = sqlx::query_scalar(sql).fetch_one(&mut conn).await?;
    conn.close().await?;
    Ok(position)
}

async fn plain(field: &Field, fault: Fault, number: usize) -> anyhow::Result<()> {
    let lasts = Duration::from_millis(fault.lasts);
    let crew = &field.crew;
    match fault.what {
        What::Killed(member) => crew.kill(member, lasts).await,
        What::Stopped(member) => crew.stop_and_go_on(member, lasts).await,
        What::DatabaseCrashed | What::CommitsLost | What::SessionsEnded => {
            let disturbed = Member::ALL;
            database(field, fault.what, &disturbed, lasts).await?;
            crew.calm(&disturbed);
            Ok(())
        }
        What::Transaction(open, commits) => transaction(field, open, commits, lasts, number).await,
        What::Slow(place, delay) => {
            weather(field, place, Weather::Slow(Duration::from_millis(delay)), lasts).await
        }
        What::Cut(place) => weather(field, place, Weather::Cut, lasts).await,
        What::Silent(place, direction) => weather(field, place, Weather::Silent(direction), lasts).await,
        What::BrokerKilled
        | What::BrokerApp
        | What::BrokerStopped
        | What::BrokerBlocked
        | What::ConnectionsClosed
        | What::ChannelsClosed => {
            let disturbed: Vec<Member> =
                Member::ALL.into_iter().filter(|member| member.has_broker()).collect();
            crew.disturb(&disturbed);
            broker(field, fault.what, lasts).await?;
            crew.calm(&disturbed);
            Ok(())
        }
        What::QueueFull => trouble::queue_full(field, lasts, number).await,
        What::BodyTooLarge => trouble::body_too_large(field, number).await,
        What::RowUnsendable => trouble::row_unsendable(field, number).await,
        What::ForeignSender => trouble::foreign_sender(field).await,
        What::ReadOnly(database) => trouble::read_only(field, database, lasts).await,
        // See `one`.
        What::ScoreUnbound | What::NotesUnbound | What::MemosUnbound | What::TypeDenied => Ok(()),
    }
}

async fn broker(field: &Field, what: What, lasts: Duration) -> anyhow::Result<()> {
    let mut rabbitmq = field.rabbitmq.lock().await;
    match what {
        What::BrokerKilled => {
            rabbitmq.kill().await;
            tokio::time::sleep(lasts).await;
            rabbitmq.start().await
        }
        What::BrokerApp => {
            rabbitmq.control(&["stop_app"]).await?;
            tokio::time::sleep(lasts).await;
            rabbitmq.control(&["start_app"]).await?;
            rabbitmq.ready().await
        }
        What::BrokerBlocked => {
            rabbitmq.control(&["set_vm_memory_high_watermark", "absolute", "1"]).await?;
            tokio::time::sleep(lasts).await;
            rabbitmq.control(&["set_vm_memory_high_watermark", "absolute", MEMORY]).await
        }
        What::ConnectionsClosed => rabbitmq.control(&["close_all_connections", "an operator"]).await,
        What::ChannelsClosed => {
            let end = "[exit(Channel, kill) || Channel <- rabbit_channel:list_local()], ok.";
            rabbitmq.control(&["eval", end]).await
        }
        _ => {
            rabbitmq.pause();
            tokio::time::sleep(lasts).await;
            rabbitmq.resume();
            Ok(())
        }
    }
}

async fn database(field: &Field, what: What, disturbed: &[Member], lasts: Duration) -> anyhow::Result<()> {
    let mut postgres = field.postgres.lock().await;
    match what {
        What::DatabaseCrashed => {
            field.crew.disturb(disturbed);
            postgres.abort().await;
            tokio::time::sleep(lasts).await;
            postgres.start().await
        }
        What::CommitsLost => {
            let mut conn = field.addresses.connect("postgres").await?;
            let writer: i32 =
                sqlx::query_scalar("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
                    .fetch_one(&mut conn)
                    .await?;
            proc::signal(&Pid::from_raw(writer).into_iter().collect::<Vec<_>>(), Signal::STOP);
            tokio::time::sleep(lasts).await;
            field.crew.disturb(disturbed);
            postgres.kill().await;
            postgres.start().await
        }
        _ => {
            let mut conn = field.addresses.connect("postgres").await?;
            field.crew.disturb(disturbed);
            end_sessions(&mut conn).await?;
            Ok(conn.close().await?)
        }
    }
}

/// Ends every session of the programs.
pub(crate) async fn end_sessions(conn: &mut PgConnection) -> anyhow::Result<()> {
    conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE usename IN ('person_api', 'outbox_relay', 'score_projector', 'score_api')",
    )
    .await?;
    Ok(())
}

async fn weather(field: &Field, place: Place, weather: Weather, lasts: Duration) -> anyhow::Result<()> {
    let disturbed: Vec<Member> = place.member().into_iter().collect();
    field.crew.disturb(&disturbed);
    field.turn(place, weather);
    tokio::time::sleep(lasts).await;
    field.turn(place, Weather::Clear);
    field.crew.calm(&disturbed);
    Ok(())
}

/// Tries until it is done: the server may be away just now, by another fault.
pub(crate) async fn until_done<T>(mut work: impl AsyncFnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match work().await {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn bind_notes(field: &Field, kinds: &[&str], bound: bool) -> anyhow::Result<()> {
    let (connection, channel) = connect(&field.addresses.broker).await?;
    follow(&channel, kinds, bound).await?;
    Ok(connection.close(200, "bye".into()).await?)
}

/// The binding of the projector's queue, which the projector makes itself whenever it connects.
async fn bind_score(field: &Field, bound: bool) -> anyhow::Result<()> {
    let (connection, channel) = connect(&field.addresses.broker).await?;
    let mut matching = FieldTable::default();
    matching.insert("x-match".into(), AMQPValue::LongString("all".into()));
    matching.insert("aggregate_type".into(), AMQPValue::LongString("person".into()));
    let (queue, exchange) = ("score".into(), "event_dispatcher.by_aggregate".into());
    if bound {
        channel.queue_bind(queue, exchange, "".into(), QueueBindOptions::default(), matching).await?;
    } else {
        channel.queue_unbind(queue, exchange, "".into(), matching).await?;
    }
    Ok(connection.close(200, "bye".into()).await?)
}

/// Somebody's transaction, open for so long. A crash ends it early, unless it was prepared.
async fn transaction(
    field: &Field,
    open: Open,
    commits: bool,
    lasts: Duration,
    number: usize,
) -> anyhow::Result<()> {
    let elsewhere = matches!(open, Open::ReadingElsewhere | Open::PreparedElsewhere);
    let name = format!("chaos-{number}");
    let begun = until_done(async || {
        let mut conn = reach(field, elsewhere).await?;
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        Ok(conn)
    })
    .await?;
    let end = if commits { "COMMIT" } else { "ROLLBACK" };
    match open {
        Open::Reading | Open::ReadingElsewhere => {
            let _crashed = rest(begun, "SELECT txid_current()", lasts, end).await;
            Ok(())
        }
        Open::Appending => {
            let _crashed = append(begun, &name, lasts, end).await;
            Ok(())
        }
        Open::Prepared | Open::PreparedElsewhere => {
            // Whether it was prepared shows at the end.
            let _crashed = prepare(begun, &name, elsewhere).await;
            tokio::time::sleep(lasts).await;
            until_done(async || {
                let mut conn = reach(field, elsewhere).await?;
                let prepared: bool =
                    sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_prepared_xacts WHERE gid = $1)")
                        .bind(&name)
                        .fetch_one(&mut conn)
                        .await?;
                if prepared {
                    conn.execute(AssertSqlSafe(format!("{end} PREPARED '{name}'"))).await?;
                }
                Ok(conn.close().await?)
            })
            .await
        }
    }
}

async fn reach(field: &Field, elsewhere: bool) -> anyhow::Result<PgConnection> {
    if elsewhere {
        field.addresses.connect_elsewhere().await
    } else {
        field.addresses.connect("person").await
    }
}

async fn rest(
    mut conn: PgConnection,
    sql: &'static str,
    lasts: Duration,
    end: &'static str,
) -> sqlx::Result<()> {
    conn.execute(sql).await?;
    tokio::time::sleep(lasts).await;
    conn.execute(end).await?;
    conn.close().await
}

async fn append(mut conn: PgConnection, name: &str, lasts: Duration, end: &'static str) -> sqlx::Result<()> {
    notes::write(&mut conn, NOTE, name).await?;
    tokio::time::sleep(lasts).await;
    conn.execute(end).await?;
    conn.close().await
}

async fn prepare(mut conn: PgConnection, name: &str, elsewhere: bool) -> sqlx::Result<()> {
    if elsewhere {
        conn.execute("SELECT txid_current()").await?;
    } else {
        notes::write(&mut conn, NOTE, name).await?;
    }
    conn.execute(AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'"))).await?;
    conn.close().await
}
