//! Expected subscribers: queues that should get events of certain types. A queue that is not bound beside one that is
//! gets nothing, and no error says so: the broker takes each event. So the relay looks for it.

mod expect;
mod look;
mod passive;
mod watch;

use std::collections::BTreeSet;

use amqp::{Management, Nodes};
use daemon::config::{
    SettingError,
    broker::{BrokerArgs, ManagementArgs},
};
use lapin::types::ShortString;

pub use expect::{Expectation, Expectations};
pub use look::{Fault, Found, Looked};
pub use passive::Passive;
pub(crate) use watch::watch;

/// The queues that should get events.
#[derive(Clone, Debug, clap::Args)]
pub struct ExpectArgs {
    /// Queues that should get events, and the types that each should get, as patterns of a topic binding:
    /// `[{"queue": "mail", "types": ["order.*"]}]`. In the configuration file, a table `[[expect]]` for each. A queue that
    /// is missing, has no consumer or is not bound is shown as `attention` at /ready.
    #[arg(long, env = "EXPECT", value_name = "JSON")]
    pub expect: Option<Expectations>,
    /// RabbitMQ's management API, which knows the bindings.
    #[command(flatten)]
    pub management: ManagementArgs,
}

/// What should be there, and whom to ask for it.
#[derive(Clone, Debug)]
pub struct Subscribers {
    expectations: Vec<Expectation>,
    nodes: Nodes,
    management: Option<Management>,
    exchange: ShortString,
}

impl Subscribers {
    /// By the settings; none when no subscriber is expected.
    pub fn new(
        args: &ExpectArgs,
        nodes: &Nodes,
        exchange: &ShortString,
        require_tls: bool,
    ) -> Result<Option<Self>, SettingError> {
        let management = args.management.management(require_tls)?;
        let Some(expectations) = &args.expect else { return Ok(None) };
        Ok(Some(Self {
            expectations: expectations.0.clone(),
            nodes: nodes.clone(),
            management,
            exchange: exchange.clone(),
        }))
    }

    /// The queues' names.
    pub fn queues(&self) -> BTreeSet<&str> {
        self.expectations.iter().map(|expectation| expectation.queue.as_str()).collect()
    }

    /// The management API, if it is asked.
    pub(crate) fn management(&self) -> Option<&Management> {
        self.management.as_ref()
    }

    /// The virtual host, which is the same at all nodes of a broker.
    fn virtual_host(&self) -> &str {
        self.nodes.as_ref().first().map_or("/", amqp::Node::virtual_host)
    }
}

/// The management API and the virtual host, if both are known.
pub(crate) fn management(
    management: &ManagementArgs,
    broker: &BrokerArgs,
    require_tls: bool,
) -> Result<Option<(Management, String)>, SettingError> {
    let Some(management) = management.management(require_tls)? else { return Ok(None) };
    if broker.amqp_url.is_none() && broker.amqp_url_file.is_none() {
        return Ok(None);
    }
    let nodes = broker.nodes(require_tls)?;
    let vhost = nodes.as_ref().first().map_or("/", amqp::Node::virtual_host).to_owned();
    Ok(Some((management, vhost)))
}
