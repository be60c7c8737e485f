//! A subscriber whose events say what it shall do with them, and views of what came of it.

use std::{
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use inbox::{Envelope, Event, Handler, HandlerError, Publisher, Sources};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use sqlx::{PgPool, Postgres, Transaction, postgres::PgPoolOptions};
use tokio::sync::Notify;
use uuid::Uuid;

pub(crate) use devstack::testing::{DEADLINE, until};

/// A fresh database with the inbox and the subscriber's own table.
pub(crate) async fn database(name: &str) -> PgPool {
    let url = devstack::testing::database(name).await;
    let pool = PgPoolOptions::new().max_connections(8).acquire_timeout(DEADLINE).connect(&url).await.unwrap();
    inbox::migrator().run(&pool).await.unwrap();
    sqlx::raw_sql(
        "CREATE TABLE applied (n bigint GENERATED ALWAYS AS IDENTITY, consumer text, source text, aggregate text,
                               version bigint, type text, anew boolean, UNIQUE (consumer, source, aggregate, version));
         CREATE TABLE state (consumer text, aggregate text, sum bigint, PRIMARY KEY (consumer, aggregate));
         CREATE TABLE twin (of bigint UNIQUE DEFERRABLE INITIALLY DEFERRED);
         INSERT INTO twin VALUES (1)",
    )
    .execute(&pool)
    .await
    .unwrap();
    pool
}

/// Records what it applies. The event's body tells it what to do.
#[derive(Clone, Default)]
pub(crate) struct Recorder {
    pub(crate) consumer: String,
    /// Events of the bodies `transient` and `broken` succeed from now on.
    pub(crate) passed: Arc<AtomicBool>,
    pub(crate) commits: Arc<AtomicU32>,
    /// Told when an event of the body `hang` is at work, which never ends.
    pub(crate) hanging: Arc<Notify>,
    /// How often it was called, for one event or for many.
    pub(crate) calls: Arc<AtomicU32>,
}

impl Recorder {
    pub(crate) fn new(consumer: &str) -> Self {
        Self { consumer: consumer.to_owned(), ..Self::default() }
    }

    /// Ends its state of an aggregate.
    async fn delete(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        sqlx::query("DELETE FROM state WHERE consumer = $1 AND aggregate = $2")
            .bind(&self.consumer)
            .bind(&event.aggregate_id)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

impl Handler for Recorder {
    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        let sql = "INSERT INTO applied (consumer, source, aggregate, version, type, anew)
                   VALUES ($1, $2, $3, $4, $5, $6)";
        sqlx::query(sql)
            .bind(&self.consumer)
            .bind(&event.source)
            .bind(&event.aggregate_id)
            .bind(event.version)
            .bind(&event.type_)
            .bind(event.begins_anew)
            .execute(&mut **tx)
            .await?;
        if event.begins_anew {
            self.delete(event, tx).await?;
        }
        match std::str::from_utf8(&event.payload).unwrap() {
            "poison" => return Err(HandlerError::poison("it does not taste\0 good")),
            "panic" => panic!("as the event asked for"),
            "transient" if !self.passed.load(Ordering::Relaxed) => {
                return Err(HandlerError::Transient("another service is away".to_owned()));
            }
            "broken" if !self.passed.load(Ordering::Relaxed) => {
                return Err(HandlerError::poison("the handler is broken"));
            }
            "delete" => self.delete(event, tx).await?,
            "hang" => {
                self.hanging.notify_one();
                std::future::pending::<()>().await;
            }
            "divide" => run(tx, "SELECT 1 / 0").await?,
            // Its violation shows at the commit only.
            "deferred" => run(tx, "INSERT INTO twin VALUES (1)").await?,
            // A handler that overlooks an error leaves a transaction that can do nothing more.
            "overlook" => drop(run(tx, "SELECT 1 / 0").await),
            "slow" => run(tx, "SELECT pg_sleep(0.5)").await?,
            // Until whoever has the lock of that number gives it back.
            "locked" => run(tx, "SELECT pg_advisory_xact_lock_shared(1)").await?,
            // Where there is a limit, longer than it can be.
            "too long" => {
                let sql = "SELECT pg_sleep(600) WHERE current_setting('statement_timeout') <> '0'";
                run(tx, sql).await?;
            }
            body => {
                if let Ok(number) = body.parse::<i64>() {
                    let sql = if event.is_baseline() {
                        "INSERT INTO state VALUES ($1, $2, $3)
                         ON CONFLICT (consumer, aggregate) DO UPDATE SET sum = excluded.sum"
                    } else {
                        "INSERT INTO state VALUES ($1, $2, $3)
                         ON CONFLICT (consumer, aggregate) DO UPDATE SET sum = state.sum + excluded.sum"
                    };
                    sqlx::query(sql)
                        .bind(&self.consumer)
                        .bind(&event.aggregate_id)
                        .bind(number)
                        .execute(&mut **tx)
                        .await?;
                }
            }
        }
        Ok(())
    }

    async fn handle_batch(
        &self,
        events: &[Event],
        tx: &mut Transaction<'_, Postgres>,
    ) -> Result<(), HandlerError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        for event in events {
            self.handle(event, tx).await?;
        }
        Ok(())
    }

    fn committed(&self) {
        self.commits.fetch_add(1, Ordering::Relaxed);
    }
}

async fn run(tx: &mut Transaction<'_, Postgres>, sql: &'static str) -> sqlx::Result<()> {
    sqlx::query(sql).execute(&mut **tx).await?;
    Ok(())
}

/// How many sessions of the database wait for a lock.
pub(crate) async fn waiting_for_locks(pool: &PgPool) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND wait_event_type = 'Lock'";
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// An id that tells what it is of; made at a fixed time, plus `seconds`.
pub(crate) fn id(aggregate: &str, version: i64, seconds: u64) -> Uuid {
    let millis = 1_767_225_600_000 + seconds * 1_000;
    let mut random = [0; 10];
    random[0] = aggregate.bytes().fold(0, u8::wrapping_add);
    random[2..].copy_from_slice(&version.to_be_bytes());
    uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
}

/// An event of the aggregate `thing/<aggregate>`.
pub(crate) fn event(aggregate: &str, version: i64, body: &str) -> Envelope {
    typed("thing.changed", aggregate, version, body, &[])
}

/// One with a type and flags of its own.
pub(crate) fn typed(type_: &str, aggregate: &str, version: i64, body: &str, flags: &[&str]) -> Envelope {
    let mut headers = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    headers.insert("aggregate_type".into(), text("thing"));
    headers.insert("aggregate_id".into(), text(aggregate));
    headers.insert("aggregate_version".into(), AMQPValue::LongLongInt(version));
    for flag in flags {
        headers.insert((*flag).into(), AMQPValue::Boolean(true));
    }
    let properties = BasicProperties::default()
        .with_message_id(id(aggregate, version, 0).to_string().into())
        .with_type(type_.into())
        .with_app_id("things".into())
        .with_timestamp(1_767_225_600)
        .with_headers(headers);
    Envelope { routing_key: type_.to_owned(), properties, body: body.as_bytes().to_vec() }
}

/// The same message from another source, by a user of the broker.
pub(crate) fn from(mut envelope: Envelope, source: &str, user: &str) -> Envelope {
    envelope.properties = envelope.properties.with_app_id(source.into()).with_user_id(user.into());
    envelope
}

/// The same message in an incarnation of its source, which follows `parent`; under an id of its own.
pub(crate) fn in_incarnation(mut envelope: Envelope, number: i64, parent: Option<i64>) -> Envelope {
    let mut headers = envelope.properties.headers().clone().unwrap_or_default();
    if let Some(parent) = parent {
        headers.insert("source_parent".into(), AMQPValue::LongLongInt(parent));
    }
    let id: Uuid = envelope.properties.message_id().as_ref().unwrap().as_str().parse().unwrap();
    let id = Uuid::from_u128(id.as_u128() ^ u128::from(number.cast_unsigned()) << 8);
    let source = match number {
        1 => "things".to_owned(),
        number => format!("things~{number}"),
    };
    envelope.properties = envelope
        .properties
        .with_headers(headers)
        .with_message_id(id.to_string().into())
        .with_app_id(source.into());
    envelope
}

/// The sources that these texts name.
pub(crate) fn sources(publishers: &[&str]) -> Sources {
    publishers.iter().map(|publisher| publisher.parse::<Publisher>().unwrap()).collect()
}

/// The same event under another id, made `seconds` later.
pub(crate) fn forked(mut envelope: Envelope, aggregate: &str, version: i64, seconds: u64) -> Envelope {
    let other = Uuid::from_u128(id(aggregate, version, seconds).as_u128() ^ 1);
    envelope.properties = envelope.properties.with_message_id(other.to_string().into());
    envelope
}

/// What stands in the inbox and what was applied, for one consumer.
pub(crate) async fn tables(pool: &PgPool, consumer: &str) -> String {
    let mut text = String::new();
    let sections = [
        (
            "applied",
            "SELECT concat_ws(' ', aggregate, version, type, CASE WHEN anew THEN 'anew' END)
             FROM applied WHERE consumer = $1 ORDER BY n",
        ),
        (
            "inbox.aggregate",
            "SELECT concat_ws(' ', source, aggregate_type || '/' || aggregate_id, version, last_event_id,
                              CASE WHEN ended THEN 'ended' END)
             FROM inbox.aggregate WHERE consumer = $1 ORDER BY source, aggregate_type, aggregate_id",
        ),
        (
            "inbox.held",
            "SELECT concat_ws(' ', source, aggregate_type || '/' || aggregate_id, version, type, occurred_at,
                              headers, encode(payload, 'escape'), reason, quote_nullable(error), attempts)
             FROM inbox.held WHERE consumer = $1 ORDER BY source, aggregate_type, aggregate_id, version",
        ),
        (
            "inbox.rejected",
            "SELECT concat_ws(' ', reason, quote_literal(detail), routing_key, properties,
                              encode(body, 'escape'), 'times ' || times, length(digest) || ' bytes of digest')
             FROM inbox.rejected WHERE consumer = $1 ORDER BY reason DESC, body, detail, properties::text",
        ),
    ];
    for (title, sql) in sections {
        let rows: Vec<String> = sqlx::query_scalar(sql).bind(consumer).fetch_all(pool).await.unwrap();
        writeln!(text, "{title}").unwrap();
        for row in rows {
            writeln!(text, "  {row}").unwrap();
        }
    }
    text
}
