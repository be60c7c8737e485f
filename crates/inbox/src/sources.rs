//! Which broker user may publish which source. A user with a right to write can put any source into a message, but
//! RabbitMQ verifies the user's own name, `user_id`.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use lapin::types::ShortString;

use crate::{Envelope, incarnation::name, rejection::Rejection};

/// The sources that a consumer follows, and the broker users that publish each of them.
///
/// A message of any other source is foreign: it is stored in `inbox.rejected` and has no other effect. A message of a
/// followed source from another user, or without a user, is forged, or the publisher's user was renamed. It is stored
/// there with the reason `wrong-user`, and the consumer is not ready until an operator has deleted it.
///
/// An empty list follows every source and believes every user. Any user that may write to the exchange can then forge
/// events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    users: BTreeMap<String, BTreeSet<String>>,
}

/// A source and a broker user that publishes it: `shop=outbox_relay_shop`. The source has no incarnation here: the
/// user publishes all incarnations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publisher {
    /// AMQP's `app_id`, without `~` and what follows it.
    pub source: String,
    /// AMQP's `user_id`: the publisher's broker user.
    pub user: String,
}

/// A text that names no source and user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it should look like SOURCE=USER, with the source's name as its outbox has stored it")]
pub struct InvalidPublisher;

impl FromStr for Publisher {
    type Err = InvalidPublisher;

    fn from_str(text: &str) -> Result<Self, InvalidPublisher> {
        let (source, user) = text.split_once('=').ok_or(InvalidPublisher)?;
        let named = |name: &str| (1..=255).contains(&name.len());
        if !named(source) || !named(user) || source != name(source) {
            return Err(InvalidPublisher);
        }
        Ok(Self { source: source.to_owned(), user: user.to_owned() })
    }
}

impl FromIterator<Publisher> for Sources {
    fn from_iter<T: IntoIterator<Item = Publisher>>(publishers: T) -> Self {
        let mut users: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for Publisher { source, user } in publishers {
            users.entry(source).or_default().insert(user);
        }
        Self { users }
    }
}

impl Sources {
    /// Whether the list is empty, so that every source is followed and every user believed.
    ///
    /// ```
    /// use inbox::{Publisher, Sources};
    ///
    /// assert!(Sources::default().is_all());
    /// let shop: Publisher = "shop=outbox_relay_shop".parse().unwrap();
    /// assert!(!Sources::from_iter([shop]).is_all());
    /// ```
    pub fn is_all(&self) -> bool {
        self.users.is_empty()
    }

    /// The names of the followed sources. None when every source is followed.
    pub(crate) fn names(&self) -> Option<Vec<&str>> {
        (!self.is_all()).then(|| self.users.keys().map(String::as_str).collect())
    }

    /// Why a message is rejected for its source or user. None when it is not, also when it names no source.
    pub(crate) fn refuse(&self, envelope: &Envelope) -> Option<(Rejection, String)> {
        if self.is_all() {
            return None;
        }
        let source = envelope.properties.app_id().as_ref()?.as_str();
        let Some(users) = self.users.get(name(source)) else {
            return Some((Rejection::Foreign, "its source is none of those that are followed".to_owned()));
        };
        let user = envelope.properties.user_id().as_ref().map(ShortString::as_str);
        if user.is_some_and(|user| users.contains(user)) {
            return None;
        }
        // The broker has verified the name, so there are no more texts than it has users.
        let who = user.map_or("it names no user".to_owned(), |user| format!("its user is {user:?}"));
        let right = users.iter().map(String::as_str).collect::<Vec<_>>().join(" or ");
        Some((Rejection::WrongUser, format!("{who}, and {:?} is published by {right}", name(source))))
    }
}

#[cfg(test)]
mod tests {
    use lapin::BasicProperties;

    use super::*;

    fn sources(publishers: &[&str]) -> Sources {
        publishers.iter().map(|text| text.parse::<Publisher>().unwrap()).collect()
    }

    fn refused(sources: &Sources, source: Option<&str>, user: Option<&str>) -> Option<Rejection> {
        let mut properties = BasicProperties::default();
        if let Some(source) = source {
            properties = properties.with_app_id(source.into());
        }
        if let Some(user) = user {
            properties = properties.with_user_id(user.into());
        }
        let envelope = Envelope { routing_key: String::new(), properties, body: Vec::new() };
        sources.refuse(&envelope).map(|(reason, _)| reason)
    }

    #[test]
    fn who_may_publish_what() {
        let sources = sources(&["orders=relay", "orders=relay_new", "shop=shop"]);
        let table = [
            (Some("orders"), Some("relay"), None),
            (Some("orders"), Some("relay_new"), None),
            (Some("orders~2"), Some("relay"), None),
            (Some("orders~1767225600000"), Some("relay"), None),
            (Some("shop"), Some("shop"), None),
            (Some("orders"), Some("shop"), Some(Rejection::WrongUser)),
            (Some("shop"), Some("relay"), Some(Rejection::WrongUser)),
            (Some("orders~2"), Some("intruder"), Some(Rejection::WrongUser)),
            (Some("orders"), Some("Relay"), Some(Rejection::WrongUser)),
            (Some("orders"), Some(""), Some(Rejection::WrongUser)),
            (Some("orders"), None, Some(Rejection::WrongUser)),
            (Some("orderss"), Some("relay"), Some(Rejection::Foreign)),
            (Some("ORDERS"), Some("relay"), Some(Rejection::Foreign)),
            (Some(""), Some("relay"), Some(Rejection::Foreign)),
            (Some("~2"), None, Some(Rejection::Foreign)),
            // It is no event at all, which is said of it later.
            (None, Some("relay"), None),
        ];
        for (source, user, expected) in table {
            assert_eq!(refused(&sources, source, user), expected, "{source:?} from {user:?}");
        }
        assert_eq!(refused(&Sources::default(), Some("anything"), None), None);
    }

    #[test]
    fn a_publisher_is_a_source_and_a_user() {
        for wrong in ["", "orders", "=relay", "orders=", "orders~2=relay", "~=relay"] {
            assert_eq!(wrong.parse::<Publisher>(), Err(InvalidPublisher), "{wrong:?}");
        }
        // A user may be called anything.
        let publisher: Publisher = "orders=a=b ~ü".parse().unwrap();
        assert_eq!(publisher, Publisher { source: "orders".to_owned(), user: "a=b ~ü".to_owned() });
    }
}
