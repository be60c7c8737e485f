//! The queues of the broker, by RabbitMQ's management API.

use std::time::Duration;

use daemon::config::SettingError;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::watch::{Target, Watch};

/// How many queues are shown: those with most messages.
pub const QUEUES: usize = 200;
/// The largest response that is read.
const MAX_RESPONSE: usize = 1024 * 1024;
/// A response that takes longer is none.
const TIMEOUT: Duration = Duration::from_secs(4);

/// The broker.
#[derive(Debug)]
pub struct Broker {
    /// Where it is, without the password.
    pub address: String,
    queues: Url,
    http: reqwest::Client,
    /// What was seen last.
    pub watch: Watch<Vec<Queue>>,
}

/// A queue.
#[derive(Clone, Debug, Deserialize)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// How many consume it.
    #[serde(default)]
    pub consumers: u64,
    /// Messages that no consumer has yet.
    #[serde(default)]
    pub messages_ready: u64,
    /// Messages that a consumer has and has not acknowledged.
    #[serde(default)]
    pub messages_unacknowledged: u64,
    /// `running`, or what it is instead.
    #[serde(default)]
    pub state: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    items: Vec<Queue>,
}

impl Broker {
    /// With the URL of the management API: `http://USER:PASSWORD@HOST:15672/VHOST`.
    pub fn new(url: &str) -> Result<Self, SettingError> {
        let form = "it should look like http://USER:PASSWORD@HOST:15672/VHOST";
        let wrong = || SettingError::new("broker.management-url-file (or MANAGEMENT_URL)", form);
        let mut queues: Url = url.trim().parse().map_err(|_| wrong())?;
        if queues.scheme() != "http" || !queues.has_host() {
            return Err(wrong());
        }
        let vhost = match queues.path().trim_matches('/') {
            "" => "%2F".to_owned(),
            vhost => vhost.to_owned(),
        };
        let address = format!(
            "http://{}:{}/{vhost}",
            queues.host_str().unwrap_or_default(),
            queues.port_or_known_default().unwrap_or_default()
        );
        queues.set_path(&format!("/api/queues/{vhost}"));
        let columns = "name,consumers,messages_ready,messages_unacknowledged,state";
        let size = QUEUES.to_string();
        queues.query_pairs_mut().clear().extend_pairs([
            ("page", "1"),
            ("page_size", &size),
            ("columns", columns),
            ("sort", "messages"),
            ("sort_reverse", "true"),
        ]);
        let http = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build().map_err(|_| wrong())?;
        Ok(Self { address, queues, http, watch: Watch::default() })
    }

    /// Looks again and again, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        self.watch.run(stop, self).await;
    }
}

impl Target for Broker {
    type Look = Vec<Queue>;

    async fn look(&self) -> Result<Vec<Queue>, String> {
        // The URL, with its password, stands in no message.
        let failed = |error: reqwest::Error| error.without_url().to_string();
        let mut response = self.http.get(self.queues.clone()).send().await.map_err(failed)?;
        if !response.status().is_success() {
            return Err(format!("the management API responds with {}", response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_RESPONSE {
                return Err("the response of the management API is too large".to_owned());
            }
        }
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|_| "the response is not that of a management API".to_owned())?;
        Ok(answer.items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_no_password_and_the_virtual_host_is_a_path() {
        let broker = Broker::new("http://ann:hush@rabbit:15672/%2F").unwrap();
        assert_eq!(broker.address, "http://rabbit:15672/%2F");
        assert!(broker.queues.as_str().starts_with("http://ann:hush@rabbit:15672/api/queues/%2F?page=1"));
        assert_eq!(Broker::new("http://rabbit:15672/shop").unwrap().address, "http://rabbit:15672/shop");
        assert_eq!(Broker::new("http://rabbit:15672").unwrap().address, "http://rabbit:15672/%2F");
        for wrong in ["", "rabbit", "amqp://rabbit", "https://rabbit", "http://"] {
            assert!(Broker::new(wrong).is_err(), "{wrong}");
        }
    }
}
