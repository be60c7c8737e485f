//! The score service's consuming side: applies the person service's events to the read model and
//! appends the score service's own events to its outbox, in one transaction per batch.
//!
//! An event comes in through [`inbox`], which knows about order and repetition; [`batch`] says what it
//! means for the read model, [`score`] what an item is worth, [`store`] writes the read model, [`publish`] the
//! events that follow from it, and [`projection`] puts them together.

mod batch;
mod broker;
pub mod command;
pub mod config;
mod consumers;
pub mod digest;
pub mod model;
pub mod projection;
mod publish;
pub mod rebuild;
pub mod republish;
pub mod schema;
pub mod score;
mod store;
pub mod verify;

use std::time::Duration;

use anyhow::{Context, anyhow};
use daemon::{
    health::{Health, Identity},
    probes,
    shutdown::Shutdown,
};
use metrics_exporter_prometheus::PrometheusHandle;
use outbox::{AppendError, Waker};
use sqlx::{Connection, PgConnection, migrate::Migrator};

use crate::{
    config::{MigrateArgs, RunArgs},
    consumers::Consumers,
    model::Role,
};

/// The timeout of one statement.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout of a migration: an index on a large table takes long.
const MIGRATION_TIMEOUT: Duration = Duration::from_hours(1);
/// The `NOTIFY` channel on which score-api waits for changes of the read model.
const CHANNEL: &str = "score_model";
/// Connections: two for the queue and two for its dead letters (the second commits an attempt before its transaction);
/// one each for the check of the database, for the alarms, for the list of models, for notices, and for what an operator
/// asks for, with its progress.
const POOL_SIZE: u32 = 10;
/// How many events one transaction takes at most.
const BATCH: u16 = 100;

/// Consumes until `shutdown` is requested and the transactions under way are acknowledged.
pub async fn run(args: RunArgs, metrics: Option<PrometheusHandle>, shutdown: Shutdown) -> anyhow::Result<()> {
    let drain = args.shutdown.drain_timeout;
    let options = args.database.options("score-projector", STATEMENT_TIMEOUT)?.by_index();
    options.warn();
    let pool = Role::Live.options(options.clone()).pool(POOL_SIZE);
    broker::topology(&args.queue)?;
    let nodes = broker::nodes(&args.broker, args.database.require_tls)?;
    let identity = Identity::of("score-projector").with("queue", &args.queue).at(&options);
    let health = Health::of(identity);
    health.has_version(env!("CARGO_PKG_VERSION"));
    let [database, broker, consuming, sources, holes, forks, incarnations, queue, limits] =
        ["database", "broker", "consuming", "sources", "holes", "forks", "incarnations", "queue", "limits"]
            .map(|name| health.part(name));
    probes::serve(&shutdown, args.listen, &args.probes, &health, metrics)?;

    // Without its schemas the program would hold or reject everything.
    let stop = shutdown.requested().clone();
    let needs = schema::needs();
    match needs.wait(&options, &pool, &stop, |reason| database.waiting(reason)).await {
        Ok(true) => {}
        Ok(false) => return shutdown.finish(drain).await,
        Err(error) => {
            shutdown.request();
            shutdown.finish(drain).await?;
            return Err(error.into());
        }
    }

    if !publish::chains_handed_over(&pool, &stop, |reason| database.waiting(reason)).await {
        return shutdown.finish(drain).await;
    }

    let waker = Waker::on(&[outbox::CHANNEL, CHANNEL]);
    let consumers = Consumers {
        pool: pool.clone(),
        options,
        queue: args.queue,
        nodes,
        batch: BATCH,
        max_refused: args.max_refused,
        max_held: args.max_held,
        max_rejected: args.max_rejected,
        max_gaps: args.max_gaps,
        sources: args.source.into_iter().collect(),
        waker: waker.clone(),
        known: health,
        health: [database, broker, consuming, sources],
        attention: [holes, forks, incarnations, queue, limits],
    };
    let until = stop.clone();
    shutdown.spawn("waker", async move {
        waker.run(pool, until).await;
        Ok(())
    });
    shutdown.spawn("consumers", consumers.run(stop));
    shutdown.finish(drain).await
}

/// Creates the schemas or brings them up to date, then grants. Running it again changes nothing.
pub async fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    let database = args.database.options("score-projector migrate", MIGRATION_TIMEOUT)?;
    let mut conn = database.connect().await.context("cannot connect to the database")?;
    outbox::require_utf8(&mut conn).await?;
    apply(&mut conn, schema::SCHEMA, &schema::migrator()).await?;
    apply(&mut conn, inbox::SCHEMA, &inbox::migrator()).await?;
    let hand_over = "SELECT score.hand_over_chains() WHERE to_regprocedure('outbox.number_by(text, text, text)') IS NOT NULL";
    let handed_over = sqlx::query(hand_over).execute(&mut conn).await.map_err(AppendError::from);
    handed_over.map_err(|error| anyhow!(publish::reason(&error)))?;
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
