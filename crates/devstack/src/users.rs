//! The programs' users of RabbitMQ, with the rights that `deploy/permissions/rabbitmq.sh` gives them: each can do
//! what its program needs and no more, and a subscriber knows by it who published an event.

use anyhow::{Context, ensure};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{program::client, rabbitmq::RabbitMq};

/// The relay of the database `person`.
pub const PERSON_RELAY: &str = "outbox_relay_person";
/// The relay of the database `score`.
pub const SCORE_RELAY: &str = "outbox_relay_score";
/// score-projector.
pub const PROJECTOR: &str = "score_projector";
/// An operator who has history replayed.
pub const REPLAY: &str = "outbox_replay";
/// Whom score-projector believes.
pub const SOURCES: &str = "person=outbox_relay_person,person=outbox_replay";
/// The projector's queue.
const QUEUE: &str = "score";

/// What a user is for.
#[derive(Clone, Copy, Debug)]
pub enum Rights<'a> {
    /// Publishes events.
    Relay,
    /// Consumes from this queue, which it declares.
    Subscriber(&'a str),
    /// Publishes history, also to this queue alone.
    Replay(&'a str),
}

impl Rights<'_> {
    /// What it may configure, write and read.
    pub fn patterns(self) -> [String; 3] {
        let (file, queue) = match self {
            Rights::Relay => (include_str!("../../../deploy/permissions/relay"), ""),
            Rights::Subscriber(queue) => (include_str!("../../../deploy/permissions/subscriber"), queue),
            Rights::Replay(queue) => (include_str!("../../../deploy/permissions/replay"), queue),
        };
        let mut lines = file.lines().map(|line| line.replace("QUEUE", &queue.replace('.', "[.]")));
        std::array::from_fn(|_| lines.next().unwrap_or_default())
    }
}

/// Makes a user, or gives it this password and these rights anew. `management` is the management API's URL, with an
/// administrator's name and password; the virtual host as it stands in a URL.
pub async fn make(
    management: &str,
    vhost: &str,
    (user, password): (&str, &str),
    rights: Rights<'_>,
) -> anyhow::Result<()> {
    let [configure, write, read] = rights.patterns();
    put(management, &format!("users/{user}"), &json!({"password": password, "tags": ""})).await?;
    let rights = json!({"configure": configure, "write": write, "read": read});
    put(management, &format!("permissions/{vhost}/{user}"), &rights).await
}

/// Makes the programs' users in a virtual host, and the exchanges that the relays may not
/// declare.
pub async fn make_all(rabbitmq: &RabbitMq, vhost: &str) -> anyhow::Result<()> {
    let management = rabbitmq.management_url();
    for (user, rights) in [
        (PERSON_RELAY, Rights::Relay),
        (SCORE_RELAY, Rights::Relay),
        (PROJECTOR, Rights::Subscriber(QUEUE)),
        (REPLAY, Rights::Replay(QUEUE)),
    ] {
        make(&management, vhost, (user, rabbitmq.password()), rights).await?;
    }
    for (exchange, kind) in [("event_dispatcher", "topic"), ("event_dispatcher.by_aggregate", "headers")] {
        let kind = json!({"type": kind, "durable": true});
        put(&management, &format!("exchanges/{vhost}/{exchange}"), &kind).await?;
    }
    let bound = format!("bindings/{vhost}/e/event_dispatcher/e/event_dispatcher.by_aggregate");
    send(Method::POST, &management, &bound, &json!({"routing_key": "#"})).await
}

async fn put(management: &str, path: &str, body: &Value) -> anyhow::Result<()> {
    send(Method::PUT, management, path, body).await
}

async fn send(method: Method, management: &str, path: &str, body: &Value) -> anyhow::Result<()> {
    let request = client()?.request(method, format!("{management}/api/{path}")).json(body);
    // The error would quote the URL with its password.
    let answer = request.send().await.map_err(reqwest::Error::without_url);
    let status = answer.context("RabbitMQ's management API does not answer")?.status();
    ensure!(status.is_success(), "RabbitMQ does not take {path}: {status}");
    Ok(())
}
