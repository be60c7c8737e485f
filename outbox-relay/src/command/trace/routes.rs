//! Which queues take an event: by the bindings of now. Which took it when it was published, the broker does not say.

use amqp::{Bindings, Headers, Management, Reaches};
use lapin::types::ShortString;
use serde::Serialize;

use super::StoredEvent;

/// What is known of the bindings.
pub(super) enum Routes {
    /// No management API is set.
    NotAsked,
    /// It could not be asked, for this reason.
    Unknown(String),
    Known(Bindings),
}

/// Where an event would go now.
#[derive(Debug, Default, Serialize)]
pub(super) struct Queues<'a> {
    /// By a binding of its type, or of headers that are known.
    queues: Vec<&'a str>,
    /// It depends on the event's own headers, or on an exchange that chooses.
    perhaps: Vec<&'a str>,
}

impl Routes {
    pub(super) async fn ask(management: &Management, vhost: &str, exchange: &ShortString) -> Self {
        match management.bindings(vhost, exchange.as_str()).await {
            Ok(Some(bindings)) => Self::Known(bindings),
            Ok(None) => Self::Unknown(format!("the exchange {exchange} does not exist")),
            Err(error) => {
                Self::Unknown(format!("RabbitMQ's management API at {}: {error}", management.address()))
            }
        }
    }

    /// None where it is not known.
    pub(super) fn of(&self, event: &StoredEvent) -> Option<Queues<'_>> {
        let Self::Known(bindings) = self else { return None };
        let headers = Headers::from([
            ("aggregate_type".to_owned(), event.aggregate_type.as_str().into()),
            ("aggregate_id".to_owned(), event.aggregate_id.as_str().into()),
            ("aggregate_version".to_owned(), event.version.into()),
        ]);
        let mut queues = Queues::default();
        for (queue, reaches) in bindings.queues(&event.type_, &headers) {
            match reaches {
                Reaches::Yes => queues.queues.push(queue),
                Reaches::Perhaps => queues.perhaps.push(queue),
                Reaches::No => {}
            }
        }
        Some(queues)
    }

    /// For people.
    pub(super) fn text(&self, event: &StoredEvent) -> String {
        let names = |queues: &[&str]| {
            let named: Vec<String> = queues.iter().map(|queue| escape::line(queue).to_string()).collect();
            named.join(", ")
        };
        let said = match (self, self.of(event)) {
            (Self::Unknown(why), _) => format!("not known: {}", escape::line(why)),
            (_, Some(Queues { queues, perhaps })) if queues.is_empty() && perhaps.is_empty() => {
                "none takes this type".to_owned()
            }
            (_, Some(Queues { queues, perhaps })) if perhaps.is_empty() => names(&queues),
            (_, Some(Queues { queues, perhaps })) if queues.is_empty() => {
                format!("perhaps {} (by headers, or by an exchange that chooses)", names(&perhaps))
            }
            (_, Some(Queues { queues, perhaps })) => format!(
                "{}; perhaps {} (by headers, or by an exchange that chooses)",
                names(&queues),
                names(&perhaps)
            ),
            (_, None) => return String::new(),
        };
        format!("  queues, by the bindings of now: {said}\n")
    }
}
