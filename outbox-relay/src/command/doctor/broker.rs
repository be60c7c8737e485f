//! What `doctor` asks the broker.

use std::sync::Arc;

use amqp::{Nodes, Reconnect};
use daemon::config::{SettingError, broker::BrokerArgs};
use lapin::types::ShortString;

use super::Check;
use crate::{broker::Broker, condition::BrokerError};

const BROKER: &str = "broker";
const EXCHANGE: &str = "exchange";
const BLOCKED: &str = "blocked";

/// The broker's nodes; none when nobody said where it is.
pub(super) fn nodes(args: &BrokerArgs, require_tls: bool) -> Result<Option<Nodes>, SettingError> {
    if args.amqp_url_file.is_none() && args.amqp_url.is_none() {
        return Ok(None);
    }
    args.nodes(require_tls).map(Some)
}

/// Connects as the relay does, but declares nothing, and what it publishes to prove its name it takes back.
pub(super) async fn checks(nodes: Option<Nodes>, exchange: &ShortString) -> Vec<Check> {
    let Some(nodes) = nodes else {
        return [BROKER, EXCHANGE, BLOCKED]
            .map(|name| Check::skipped(name, "AMQP_URL (or AMQP_URL_FILE) is not set"))
            .into();
    };
    let name = "outbox-relay doctor".to_owned();
    let broker =
        Broker { nodes, exchange: exchange.clone(), declare: false, name, was_missing: Arc::default() };
    match broker.connect(&mut Reconnect::default()).await {
        Ok(link) => {
            let blocked = link.condition().ok().flatten();
            link.close().await;
            vec![reached(), Check::ok(EXCHANGE, format!("{exchange} exists")), block(blocked)]
        }
        Err(
            error @ (BrokerError::NoExchange(_)
            | BrokerError::NotDeclared { .. }
            | BrokerError::OtherKind { .. }
            | BrokerError::Forbidden { .. }),
        ) => {
            let advice = "declare it (topic, durable) in the virtual host that AMQP_URL names, or let the relay \
                          do it (--declare-exchange); another one is named with --exchange";
            let finding = match error {
                BrokerError::NoExchange(exchange) => format!("{exchange} does not exist"),
                other => other.to_string(),
            };
            let skipped = Check::skipped(BLOCKED, "there is no exchange to publish to");
            vec![reached(), Check::problem(EXCHANGE, finding, advice), skipped]
        }
        Err(error @ BrokerError::WrongName(_)) => {
            let advice = "write into AMQP_URL the name under which RabbitMQ lists the relay's connections: \
                          rabbitmqctl list_connections user client_properties";
            let skipped = [EXCHANGE, BLOCKED].map(|name| Check::skipped(name, "the user's name is wrong"));
            [Check::problem(BROKER, error.to_string(), advice)].into_iter().chain(skipped).collect()
        }
        Err(BrokerError::Blocked(reason)) => {
            vec![reached(), Check::ok(EXCHANGE, format!("{exchange} exists")), block(Some(reason))]
        }
        Err(error) => {
            let advice = "see whether RabbitMQ runs and can be reached from here, and whether user, password \
                          and virtual host of AMQP_URL are right";
            let skipped =
                [EXCHANGE, BLOCKED].map(|name| Check::skipped(name, "the broker cannot be reached"));
            [Check::problem(BROKER, error.to_string(), advice)].into_iter().chain(skipped).collect()
        }
    }
}

fn reached() -> Check {
    Check::ok(BROKER, "it is reachable, and accepts this user")
}

/// RabbitMQ says that it is blocked to connections that publish, and to others at most by chance: what a
/// leader waits for is the better witness, and a check of its own.
fn block(blocked: Option<String>) -> Check {
    match blocked {
        Some(reason) => Check::problem(
            BLOCKED,
            format!("the broker takes no messages: {reason}"),
            "free memory or disk space on the broker; the relay goes on by itself then",
        ),
        None => Check::ok(
            BLOCKED,
            "the broker reports none (it reports one for certain only to connections that publish, such as the \
            leader's)",
        ),
    }
}
