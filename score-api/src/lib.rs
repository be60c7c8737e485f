//! Serves each person's score from the read model that the score projector writes. It only reads, and calls no other
//! service. A reader may wait for a write of its own.

mod api;
mod problems;
mod read_model;
mod request;
mod response;
mod token;
mod waiters;

use std::{net::SocketAddr, time::Duration};

use daemon::{
    config::{
        database::{Database, DatabaseArgs, Schema},
        duration,
    },
    health::{Health, Identity, Part},
    shutdown::{Shutdown, ShutdownArgs},
    telemetry::TelemetryArgs,
};
use metrics_exporter_prometheus::PrometheusHandle;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use web::front::{ConcurrencyArgs, Front, FrontArgs};

use crate::{api::Api, read_model::scores::Scores, waiters::Waiters};

/// The timeout of a statement. Every read is one row by an index.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections to the database, beside the one for `LISTEN`. Reads are short, so a few serve many requests.
const CONNECTIONS: u32 = 10;

/// How often readiness checks the database.
const PROBE_EVERY: Duration = Duration::from_secs(2);

/// Serves each person's score over HTTP.
#[derive(Debug, clap::Parser)]
#[command(version, about)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Serve `GET /{cpf}/score` until SIGTERM.
    Run(Box<Config>),
    /// Ask the running program whether it is ready, as a container's health check does.
    Health {
        /// The address at which it listens.
        #[command(flatten)]
        listen: ListenArgs,
        /// The database of the process that is meant. A process with another database counts as not ready.
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// The address at which the program listens.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ListenArgs {
    /// The address of the API, /live, /ready and /metrics.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8001", value_name = "ADDRESS")]
    pub listen: SocketAddr,
}

/// The limits of reads that wait for a write.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct WaitArgs {
    /// The longest `wait` of a read with `?after=…&wait=…`. At most 50s, since an idle connection is closed after a
    /// minute.
    #[arg(long, env = "MAX_WAIT", default_value = "10s", value_parser = max_wait, value_name = "DURATION")]
    pub max_wait: Duration,
    /// How many reads may wait at the same time, each on a client's connection. Further ones get 503 at once.
    #[arg(long, env = "MAX_WAITERS", default_value = "10000", value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_waiters: u32,
}

fn max_wait(text: &str) -> Result<Duration, String> {
    let wait = duration(text)?;
    if wait > Duration::from_secs(50) { Err("it must be at most 50s".to_owned()) } else { Ok(wait) }
}

/// All settings of `run`.
#[derive(Clone, Debug, clap::Args)]
#[expect(missing_docs, reason = "each group documents itself")]
pub struct Config {
    #[command(flatten)]
    pub listen: ListenArgs,
    #[command(flatten)]
    pub database: DatabaseArgs,
    #[command(flatten)]
    pub wait: WaitArgs,
    #[command(flatten)]
    pub front: FrontArgs,
    #[command(flatten)]
    pub concurrency: ConcurrencyArgs,
    #[command(flatten)]
    pub shutdown: ShutdownArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// Serves until `shutdown` is requested. Fails when the settings are wrong, the address is taken, or the schema is not
/// the one for which this program was built.
pub async fn run(
    config: Config,
    metrics: Option<PrometheusHandle>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let front = Front::new(config.listen.listen, &config.front, config.wait.max_waiters)?;
    let database = read_model::options(config.database.options("score-api", STATEMENT_TIMEOUT)?);
    database.warn();
    let pool = database.pool(CONNECTIONS);

    let health = Health::of(Identity::of("score-api").at(&database));
    health.has_version(env!("CARGO_PKG_VERSION"));
    let readiness =
        watch(database.clone(), pool.clone(), health.part("database"), shutdown.requested().clone());
    shutdown.spawn("readiness", readiness);

    let waiters = Waiters::new(front.connections().waiting as usize, shutdown.requested().clone());
    let (listen, look) = (waiters.clone().listen(database), waiters.clone().look(pool.clone()));
    shutdown.spawn("listening", async move {
        listen.await;
        Ok(())
    });
    shutdown.spawn("looking", async move {
        look.await;
        Ok(())
    });

    let scores = Scores::new(pool.clone(), &shutdown);
    let (limit, max_wait) = (config.concurrency.limit(), config.wait.max_wait);
    // Only the routes own the `Api`, so the task that reads scores ends with the last request.
    let routes = api::routes(&Api { scores, pool, limit, waiters, max_wait });
    let routes = web::health::add_to(routes, &health, metrics.as_ref());
    let drain = config.shutdown.drain_timeout;
    front.start(&shutdown, routes, drain)?;
    shutdown.finish(drain).await
}

/// Ready while the database responds and its schemas are current. Another schema ends the program, also after a
/// reconnect: waiting would not change it.
async fn watch(
    options: Database,
    pool: PgPool,
    database: Part,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let needs = read_model::needs();
    if !needs.wait(&options, &pool, &stop, |reason| database.waiting(reason)).await? {
        return Ok(());
    }
    database.ready();
    while stop.run_until_cancelled(tokio::time::sleep(PROBE_EVERY)).await.is_some() {
        match needs.look(&options, &pool).await {
            Ok(()) => database.ready(),
            Err(error) if error.passes() => database.waiting(error.to_string()),
            Err(fatal) => return Err(fatal.into()),
        }
    }
    Ok(())
}

/// The schemas that the program reads. The score projector's migrations create them.
pub fn schemas() -> [Schema; 2] {
    read_model::schemas()
}
