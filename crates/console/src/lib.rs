//! The operator's page for outboxes and inboxes.
//!
//! One task looks at each database ([`watch`]); a page shows what was seen last ([`pages`]) with the verdict on it
//! ([`verdict`]). Who may see and do what is decided before every route ([`access`], [`routes`]).

pub mod access;
pub mod audit;
pub mod broker;
pub mod cli;
pub mod file;
mod handlers;
pub mod inbox;
pub mod job;
pub mod lag;
mod looks;
pub mod outbox;
pub mod page;
pub mod pages;
pub mod plot;
pub mod routes;
pub mod sample;
pub mod verdict;
pub mod watch;
pub mod way;

use std::{collections::BTreeMap, sync::Arc};

use daemon::{
    config::SettingError,
    health::{Health, Identity},
    shutdown::Shutdown,
};
use metrics_exporter_prometheus::PrometheusHandle;
use web::front::Front;

use crate::{
    access::Access, broker::Broker, cli::RunArgs, file::File, inbox::Inbox, job::Jobs, lag::Follows,
    outbox::Outbox,
};

/// What the pages are about.
pub struct Console {
    /// The outboxes by name.
    pub outboxes: BTreeMap<String, Arc<Outbox>>,
    /// The inboxes by name.
    pub inboxes: BTreeMap<String, Arc<Inbox>>,
    /// Each inbox with each outbox that it may follow.
    pub follows: Vec<Arc<Follows>>,
    /// The broker, if its management API is known.
    pub broker: Option<Arc<Broker>>,
    /// Who may see and do what.
    pub access: Access,
    /// What operators have begun.
    pub jobs: Jobs,
}

/// Serves the pages until `shutdown` is requested. Fails when the settings are wrong or the address is taken. A database
/// that is away is no failure: its card says so.
pub async fn run(
    args: RunArgs,
    file: File,
    metrics: PrometheusHandle,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    if args.front.keys.api_keys_file.is_none() {
        let problem = "is not set; the console needs the keys of its operators: name a file with lines such as alice:SECRET";
        return Err(SettingError::new("API_KEYS_FILE (or --api-keys-file)", problem).into());
    }
    let front = Front::new(args.listen.listen, &args.front, 0)?;
    let mut outboxes = BTreeMap::new();
    for (name, table) in file.outbox {
        let (url, file) = (table.database_url.as_ref(), table.database_url_file.as_ref());
        let database = file::database("outbox", &name, url, file, args.require_tls)?;
        outboxes.insert(name.clone(), Arc::new(Outbox::new(&name, table.name, &database)));
    }
    let mut inboxes = BTreeMap::new();
    for (name, table) in file.inbox {
        let (url, file) = (table.database_url.as_ref(), table.database_url_file.as_ref());
        let database = file::database("inbox", &name, url, file, args.require_tls)?;
        let inbox = Inbox::new(&name, table.consumer, table.queues, &database);
        inboxes.insert(name, Arc::new(inbox));
    }
    for outbox in outboxes.values() {
        let (outbox, stop) = (Arc::clone(outbox), shutdown.requested().clone());
        shutdown.spawn("outbox", async move {
            outbox.run(stop).await;
            Ok(())
        });
    }
    for inbox in inboxes.values() {
        let (inbox, stop) = (Arc::clone(inbox), shutdown.requested().clone());
        shutdown.spawn("inbox", async move {
            inbox.run(stop).await;
            Ok(())
        });
    }
    let mut follows = Vec::new();
    for inbox in inboxes.values() {
        for outbox in outboxes.values() {
            let pair = Arc::new(Follows::new(outbox, inbox));
            follows.push(Arc::clone(&pair));
            let stop = shutdown.requested().clone();
            shutdown.spawn("lag", async move {
                pair.run(stop).await;
                Ok(())
            });
        }
    }
    let broker = file::broker(&file.broker)?.map(Arc::new);
    if let Some(broker) = broker.clone() {
        let stop = shutdown.requested().clone();
        shutdown.spawn("broker", async move {
            broker.run(stop).await;
            Ok(())
        });
    }
    let access = Access::new(front.keys().clone(), file.role);
    let health = Health::of(Identity::of("outbox-console"));
    let console = Arc::new(Console {
        outboxes,
        inboxes,
        follows,
        broker,
        access: access.clone(),
        jobs: Jobs::new(&shutdown),
    });
    let routes = routes::routes(&console, |routes| web::health::add_to(routes, &health, Some(&metrics)));
    let drain = args.shutdown.drain_timeout;
    front.start_with(&shutdown, routes, access, drain)?;
    shutdown.finish(drain).await
}
