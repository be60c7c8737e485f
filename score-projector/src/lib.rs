//! The score service's consuming side: applies the person service's events to the read model and
//! appends the score service's own events to its outbox, in one transaction per batch.
//!
//! An event comes in through [`inbox`], which knows about order and repetition; [`projection`] says what
//! it means for the read model, [`score`] what an item is worth, and [`store`] holds all of the SQL.

pub mod command;
pub mod config;
pub mod digest;
pub mod projection;
pub mod schema;
pub mod score;
mod store;

use std::time::Duration;

use anyhow::{Context, anyhow};
use inbox::{Consumer, Sequencer, Topology};
use metrics_exporter_prometheus::PrometheusHandle;
use outbox::Waker;
use poem::Route;
use service::{
    config::{SettingError, broker::BrokerArgs, database},
    health::{Health, Part},
    shutdown::Shutdown,
    telemetry,
};
use sqlx::{ConnectOptions, Connection, PgConnection, migrate::Migrator};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{MigrateArgs, RunArgs},
    projection::Projection,
};

/// The consumer's name in the inbox. Not a setting: what was applied is remembered by it.
const CONSUMER: &str = "score";
/// How long the server lets one statement run.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Creating an index on a large table takes its time.
const MIGRATION_TIMEOUT: Duration = Duration::from_hours(1);
/// The channel on which score-api listens for "the read model has changed".
const CHANNEL: &str = "score_model";
/// Connections: the queue and its dead letters, each with a second one for an attempt that is committed
/// before its transaction; the check that the database is there; and two for notices, to the relay and
/// to the readers.
const POOL_SIZE: u32 = 7;
/// How many events one transaction takes at most.
const BATCH: u16 = 100;

/// Consumes until `shutdown` is requested and what is under way has been acknowledged.
pub async fn run(args: RunArgs, metrics: Option<PrometheusHandle>, shutdown: Shutdown) -> anyhow::Result<()> {
    let drain = args.shutdown.drain_timeout;
    let pool = database::pool(args.database.options("score-projector", STATEMENT_TIMEOUT)?, POOL_SIZE);
    let topology = Topology::new(
        events::EXCHANGE,
        events::EXCHANGE_BY_AGGREGATE,
        &args.queue,
        &[events::AGGREGATE_PERSON],
    )
    .map_err(|e| SettingError::new("QUEUE", e))?;
    let nodes = nodes(&args.broker)?;
    let health = Health::new();
    let [database, broker, consuming, holes, forks] =
        ["database", "broker", "consuming", "holes", "forks"].map(|name| health.part(name));
    shutdown.serve(args.listen, telemetry::observed(health.add_to(Route::new(), metrics)), drain).await?;

    // Without its schemas the program would only hold or refuse what it consumes.
    let stop = shutdown.requested().clone();
    let needed = schema::needed();
    let current = database::wait_until_current(&pool, &needed, &stop, |error| {
        database.waiting(format!("the database does not answer: {error}"));
    });
    match current.await {
        Ok(true) => {}
        Ok(false) => return shutdown.finish(drain).await,
        Err(error) => {
            shutdown.request();
            shutdown.finish(drain).await?;
            return Err(error.into());
        }
    }

    let (relay, readers) = (Waker::new(), Waker::on(CHANNEL));
    let projection = Projection::new(relay.clone(), readers.clone());
    let sequencer = Sequencer::new(CONSUMER, pool.clone(), projection);
    let config = inbox::Config {
        batch: BATCH,
        max_refused: args.max_refused,
        max_held: args.max_held,
        ..inbox::Config::new(topology, nodes, "score-projector")
    };
    let consumer = Consumer::new(config, sequencer);
    shutdown.spawn(
        "health",
        mirror(consumer.status(), [database, broker, consuming], [holes, forks], stop.clone()),
    );
    for (name, waker) in [("relay's waker", relay), ("readers' waker", readers)] {
        let (pool, until) = (pool.clone(), stop.clone());
        shutdown.spawn(name, async move {
            waker.run(pool, until).await;
            Ok(())
        });
    }
    shutdown.spawn("consumer", async move {
        consumer.run(stop).await;
        Ok(())
    });
    shutdown.finish(drain).await
}

fn nodes(broker: &BrokerArgs) -> Result<Vec<inbox::Node>, SettingError> {
    Ok(broker.nodes()?.into_iter().map(|node| inbox::Node::new(node.uri, node.tls)).collect())
}

/// Shows in the program's readiness what the consumer waits for.
async fn mirror(
    mut status: tokio::sync::watch::Receiver<inbox::Status>,
    parts: [Part; 3],
    attention: [Part; 2],
    stop: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        let now = status.borrow_and_update().clone();
        for (part, state) in parts.iter().zip([now.database, now.broker, now.consuming]) {
            match state {
                Ok(()) => part.ready(),
                Err(reason) => part.waiting(reason),
            }
        }
        for (part, reason) in attention.iter().zip([now.holes, now.forks]) {
            match reason {
                Some(reason) => part.attention(reason),
                None => part.ready(),
            }
        }
        // The sender goes with the consumer, at the end.
        if !matches!(stop.run_until_cancelled(status.changed()).await, Some(Ok(()))) {
            stop.cancelled().await;
            return Ok(());
        }
    }
}

/// Creates the schemas or brings them up to date, then grants. Running it again changes nothing.
pub async fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    let options = args.database.options("score-projector migrate", MIGRATION_TIMEOUT)?;
    let mut conn = options.connect().await.context("cannot connect to the database")?;
    apply(&mut conn, schema::SCHEMA, &schema::migrator()).await?;
    apply(&mut conn, inbox::SCHEMA, &inbox::migrator()).await?;
    for role in &args.grant_to {
        grant(&mut conn, role, "SELECT score.grant_projector($1::text::regrole)").await?;
        grant(&mut conn, role, "SELECT inbox.grant_consumer($1::text::regrole)").await?;
    }
    for role in &args.grant_api {
        grant(&mut conn, role, "SELECT score.grant_api($1::text::regrole)").await?;
        grant(&mut conn, role, "SELECT inbox.grant_reader($1::text::regrole)").await?;
    }
    conn.close().await?;
    println!("the schemas score and inbox are current");
    Ok(())
}

async fn apply(conn: &mut PgConnection, schema: &str, migrator: &Migrator) -> anyhow::Result<()> {
    migrator.run(conn).await.with_context(|| format!("the schema {schema} could not be migrated"))
}

async fn grant(conn: &mut PgConnection, role: &str, sql: &'static str) -> anyhow::Result<()> {
    sqlx::query(sql).bind(role).execute(conn).await.map_err(|error| {
        let reason =
            error.as_database_error().map_or_else(|| error.to_string(), |db| db.message().to_owned());
        anyhow!("the rights could not be granted to {role}: {reason}")
    })?;
    Ok(())
}
