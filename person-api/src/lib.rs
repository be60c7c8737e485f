//! The person service: takes persons, their incomes, assets and debts over HTTP, and writes rows and
//! outbox events in one transaction. Others learn of a change by its event.
//!
//! A request goes through [`api`] (the operations), [`request`] (what a client may send), [`store`] (all of
//! the SQL) and [`response`] or [`problems`] (what a client gets). `openapi.yaml` says the same to
//! clients. [`republish`] publishes the whole state of persons once more.

pub mod api;
pub mod config;
pub mod model;
mod problems;
mod readiness;
pub mod republish;
pub mod request;
mod response;
pub mod schema;
pub mod store;

use std::time::Duration;

use anyhow::{Context, anyhow};
use daemon::{
    health::{Health, Identity},
    shutdown::Shutdown,
};
use metrics_exporter_prometheus::PrometheusHandle;
use outbox::Waker;
use sqlx::Connection;
use web::front::Front;

use crate::{
    api::Api,
    config::{MigrateArgs, RunArgs},
    store::{Connections, Store, erase, idempotency},
};

/// How long the server lets one statement run.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a statement waits for a row that another transaction has locked.
const LOCK_TIMEOUT: &str = "2s";
/// Creating an index on a large table takes its time.
const MIGRATION_TIMEOUT: Duration = Duration::from_hours(1);
/// Connections for requests. Few: PostgreSQL writes fastest with about two per core and a disk's queue. Of these
/// [`WRITES`](store::WRITES) may be writing.
const POOL_SIZE: u32 = 20;

/// Serves the API until `shutdown` is requested and what is under way has ended.
pub async fn run(args: RunArgs, metrics: Option<PrometheusHandle>, shutdown: Shutdown) -> anyhow::Result<()> {
    let drain = args.shutdown.drain_timeout;
    let front = Front::new(args.listen, &args.front, 0)?;
    let database = args.database.options("person-api", STATEMENT_TIMEOUT)?.by_index();
    database.warn();
    let database = database.with("lock_timeout", LOCK_TIMEOUT);
    let health = Health::of(Identity::of("person-api").at(&database));
    health.has_version(env!("CARGO_PKG_VERSION"));
    // Before the first request: `/ready` does not wait for a part that has no name yet.
    let (database_health, health_of_erasures) = (health.part("database"), health.part("erasures"));
    health_of_erasures.ready();
    // Readiness and notices have connections of their own: they must not wait behind requests.
    let aside = Connections::new(database.clone(), 2);
    let waker = Waker::new();
    let store = Store::new(Connections::new(database, POOL_SIZE)).limited_by(args.concurrency.limit());
    let api = Api::new(store, waker.clone()).checking(args.cpf_check);
    let served =
        front.start(&shutdown, web::health::add_to(api.routes(), &health, metrics.as_ref()), drain)?;

    let (left, erasures, stop) = (aside.clone(), health_of_erasures, shutdown.requested().clone());
    shutdown.spawn("erasures", async move {
        erase::clean(left, erasures, stop).await;
        Ok(())
    });
    let (writes, stop) = (api.write_health(), shutdown.requested().clone());
    shutdown.spawn("database", readiness::watch(aside.clone(), database_health, writes, stop));
    let (connections, stop) = (aside.clone(), shutdown.requested().clone());
    shutdown.spawn("stored responses", async move {
        idempotency::clean(connections, stop).await;
        Ok(())
    });
    let stop = shutdown.requested().clone();
    shutdown.spawn("waker", async move {
        waker.run(aside.pool().clone(), stop).await;
        Ok(())
    });
    // A write whose client hung up has no connection any more, and still has to end.
    shutdown.spawn("writes", async move {
        served.cancelled().await;
        api.finish().await;
        Ok(())
    });
    shutdown.finish(drain).await
}

/// Creates the schema or brings it up to date, then grants. Running it again changes nothing.
pub async fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    let database = args.database.options("person-api migrate", MIGRATION_TIMEOUT)?;
    let mut conn = database.connect().await.context("cannot connect to the database")?;
    outbox::require_utf8(&mut conn).await?;
    schema::migrator().run(&mut conn).await.context("the schema person could not be migrated")?;
    for role in &args.grant_to {
        sqlx::query("SELECT person.grant_api($1::text::regrole)")
            .bind(role)
            .execute(&mut conn)
            .await
            .map_err(|error| {
                // The driver's own text ends with a line of the server's source.
                let why =
                    error.as_database_error().map_or_else(|| error.to_string(), |e| e.message().to_owned());
                anyhow!("the rights on the schema person could not be granted to {role}: {why}")
            })?;
    }
    conn.close().await?;
    println!("the schema person is current");
    Ok(())
}
