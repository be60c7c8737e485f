//! The person service: takes persons, their incomes, assets and debts over HTTP, and writes rows and
//! outbox events in one transaction. Others learn of a change by its event.
//!
//! A request goes through [`api`] (the operations), [`request`] (what a client may send), [`store`] (all of
//! the SQL) and [`answer`] or [`problems`] (what a client gets). [`describe`] says the same to the
//! documentation. [`republish`] tells everybody's whole state once more.

mod answer;
pub mod api;
pub mod config;
mod describe;
mod kind;
mod problems;
mod readiness;
pub mod republish;
pub mod request;
pub mod schema;
pub mod store;

use std::time::Duration;

use anyhow::{Context, anyhow};
use metrics_exporter_prometheus::PrometheusHandle;
use outbox::Waker;
use service::{config::database, front::Front, health::Health, shutdown::Shutdown};
use sqlx::{ConnectOptions, Connection};

use crate::{
    api::Api,
    config::{MigrateArgs, RunArgs},
    store::{Store, idempotency},
};

/// How long the server lets one statement run.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Creating an index on a large table takes its time.
const MIGRATION_TIMEOUT: Duration = Duration::from_hours(1);
/// Connections for requests. Few: PostgreSQL writes fastest with about two per core and a disk's queue.
const POOL_SIZE: u32 = 16;

/// Serves the API until `shutdown` is requested and what is under way has ended.
pub async fn run(args: RunArgs, metrics: Option<PrometheusHandle>, shutdown: Shutdown) -> anyhow::Result<()> {
    let drain = args.shutdown.drain_timeout;
    let front = Front::new(args.listen, &args.front, 0)?;
    let options = database::by_index(args.database.options("person-api", STATEMENT_TIMEOUT)?);
    let health = Health::new();
    // Before anybody can ask: what is not named yet is not waited for.
    let database_health = health.part("database");
    // Readiness and notices have connections of their own: they must not wait behind requests.
    let aside = database::pool(options.clone(), 2);
    let waker = Waker::new();
    let store = Store::new(database::pool(options, POOL_SIZE)).behind(args.gate.gate());
    let api = Api::new(store, waker.clone()).checking(args.cpf_check);
    let answered = shutdown.serve(front, health.add_to(api.routes(), metrics), drain)?;

    shutdown
        .spawn("database", readiness::watch(aside.clone(), database_health, shutdown.requested().clone()));
    let (kept, stop) = (aside.clone(), shutdown.requested().clone());
    shutdown.spawn("kept answers", async move {
        idempotency::clean(kept, stop).await;
        Ok(())
    });
    let stop = shutdown.requested().clone();
    shutdown.spawn("waker", async move {
        waker.run(aside, stop).await;
        Ok(())
    });
    // Writes whose client hung up have no connection any more, but they are ours to finish.
    shutdown.spawn("writes", async move {
        answered.cancelled().await;
        api.finish().await;
        Ok(())
    });
    shutdown.finish(drain).await
}

/// Creates the schema or brings it up to date, then grants. Running it again changes nothing.
pub async fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    let options = args.database.options("person-api migrate", MIGRATION_TIMEOUT)?;
    let mut conn = options.connect().await.context("cannot connect to the database")?;
    schema::migrator().run(&mut conn).await.context("the schema person could not be migrated")?;
    for role in &args.grant_to {
        sqlx::query("SELECT person.grant_api($1::text::regrole)")
            .bind(role)
            .execute(&mut conn)
            .await
            .map_err(|error| {
                // Without the place in the server's source that the driver's own text ends in.
                let why =
                    error.as_database_error().map_or_else(|| error.to_string(), |e| e.message().to_owned());
                anyhow!("the rights on the schema person could not be granted to {role}: {why}")
            })?;
    }
    conn.close().await?;
    println!("the schema person is current");
    Ok(())
}
