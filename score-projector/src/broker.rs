//! Where the events of persons come from.

use daemon::config::{SettingError, broker::BrokerArgs};
use inbox::{Nodes, Topology};

/// Exchanges and queues of a person's events.
pub(crate) fn topology(queue: &str) -> Result<Topology, SettingError> {
    Topology::new(events::EXCHANGE, events::EXCHANGE_BY_AGGREGATE, queue, &[events::AGGREGATE_PERSON])
        .map_err(|e| SettingError::new("QUEUE", e))
}

/// The broker's nodes, as the settings name them.
pub(crate) fn nodes(args: &BrokerArgs, require_tls: bool) -> Result<Nodes, SettingError> {
    let nodes = args.nodes(require_tls)?;
    daemon::config::broker::warn(&nodes);
    Ok(nodes)
}
