//! RabbitMQ's management API, for reading: which queues there are, and which events reach them.
//!
//! Responses are bounded in time and in size. A user with the tag `management` and a permission on the virtual host
//! that matches nothing (`^$`) may read all of this, and change nothing.

mod bindings;
mod pattern;
mod url;

use std::{fmt, time::Duration};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::StatusCode;
use serde::{Deserialize, de::DeserializeOwned};

pub use bindings::{Bindings, Coverage, Headers, Reaches};

/// No response takes longer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Connecting to it takes no longer.
const CONNECT: Duration = Duration::from_secs(5);
/// A response of more bytes is not read.
const MAX_RESPONSE: usize = 16 * 1024 * 1024;
/// So many exchanges are followed.
const MAX_EXCHANGES: usize = 100;

/// A broker's management API.
///
/// It is parsed from a URL, which holds a password, so neither an error nor `Debug` quotes it.
///
/// ```
/// let management: amqp::Management = "http://monitor:secret@rabbit:15672".parse()?;
/// assert_eq!(format!("{management:?}"), "http://monitor@rabbit:15672");
/// # Ok::<_, amqp::InvalidManagement>(())
/// ```
#[derive(Clone)]
pub struct Management {
    http: reqwest::Client,
    /// Without the user, and without a slash at its end.
    base: String,
    host: String,
    user: String,
    password: String,
}

/// What is wrong with a URL, and what it should look like. It never quotes the URL.
///
/// ```
/// let error = "amqp://monitor:secret@rabbit".parse::<amqp::Management>().unwrap_err().to_string();
/// assert!(error.starts_with("it should look like") && !error.contains("secret"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidManagement(String);

/// Why there is no answer.
///
/// ```no_run
/// # async fn example(management: amqp::Management) {
/// if let Err(error) = management.queue("/", "mail").await {
///     println!("{error}");
/// }
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManagementError {
    /// It cannot be reached, or does not answer in time.
    #[error("it cannot be reached: {0}")]
    Away(String),
    /// It does not let this user see that.
    #[error(
        "it does not let the user {user} in (HTTP {status}). The user needs the right password, the tag management and a \
         permission on the virtual host {vhost}: rabbitmqctl set_user_tags {user} management; rabbitmqctl \
         set_permissions -p {vhost} {user} '^$' '^$' '^$'"
    )]
    Refused {
        /// Who asked.
        user: String,
        /// About which virtual host.
        vhost: String,
        /// 401 or 403.
        status: u16,
    },
    /// What came is no answer.
    #[error("its response cannot be used: {0}")]
    Response(String),
}

/// A queue, as the broker's statistics last saw it.
///
/// ```no_run
/// # async fn example(management: amqp::Management) -> Result<(), amqp::ManagementError> {
/// match management.queue("/", "mail").await? {
///     Some(queue) => println!("{:?} consumers", queue.consumers),
///     None => println!("it does not exist"),
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct QueueState {
    /// How many consume from it; none when that is not counted (yet).
    #[serde(default)]
    pub consumers: Option<u64>,
    /// How many messages it has; none when that is not counted (yet).
    #[serde(default)]
    pub messages: Option<u64>,
}

#[derive(Deserialize)]
struct Exchange {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Binding {
    destination: String,
    destination_type: String,
    routing_key: String,
    #[serde(default)]
    arguments: serde_json::Map<String, serde_json::Value>,
}

impl Management {
    /// What a URL looks like, for messages.
    ///
    /// ```
    /// assert!(amqp::Management::FORM.starts_with("https://user:password@host:15671"));
    /// ```
    pub const FORM: &str = url::FORM;

    /// Where it is, without the user.
    ///
    /// ```
    /// let management: amqp::Management = "http://monitor:secret@rabbit:15672/".parse()?;
    /// assert_eq!(management.address(), "http://rabbit:15672");
    /// # Ok::<_, amqp::InvalidManagement>(())
    /// ```
    pub fn address(&self) -> &str {
        &self.base
    }

    /// Its host, as the URL has it; an IPv6 address without brackets.
    ///
    /// ```
    /// let management: amqp::Management = "http://monitor:secret@[::1]:15672".parse()?;
    /// assert_eq!(management.host(), "::1");
    /// # Ok::<_, amqp::InvalidManagement>(())
    /// ```
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether what goes over the wire is encrypted, and the broker proves who it is.
    ///
    /// ```
    /// let management: amqp::Management = "https://monitor:secret@rabbit:15671".parse()?;
    /// assert!(management.is_encrypted());
    /// # Ok::<_, amqp::InvalidManagement>(())
    /// ```
    pub fn is_encrypted(&self) -> bool {
        self.base.starts_with("https:")
    }

    /// Where a binding of `queue` to `exchange` is made, by a POST with its `routing_key` and `arguments`.
    ///
    /// ```
    /// let management: amqp::Management = "http://monitor:secret@rabbit:15672".parse()?;
    /// let url = management.binding_url("/", "events", "mail");
    /// assert_eq!(url, "http://rabbit:15672/api/bindings/%2F/e/events/q/mail");
    /// # Ok::<_, amqp::InvalidManagement>(())
    /// ```
    pub fn binding_url(&self, vhost: &str, exchange: &str, queue: &str) -> String {
        self.url(&["bindings", vhost, "e", exchange, "q", queue])
    }

    fn url(&self, path: &[&str]) -> String {
        // What a URL's path may have as it is.
        const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
        let path: Vec<String> =
            path.iter().map(|part| utf8_percent_encode(part, ENCODED).to_string()).collect();
        format!("{}/api/{}", self.base, path.join("/"))
    }

    /// A queue; none when it does not exist.
    ///
    /// ```no_run
    /// # async fn example(management: amqp::Management) -> Result<(), amqp::ManagementError> {
    /// let exists = management.queue("/", "mail").await?.is_some();
    /// # Ok(()) }
    /// ```
    pub async fn queue(&self, vhost: &str, name: &str) -> Result<Option<QueueState>, ManagementError> {
        self.get(vhost, &["queues", vhost, name]).await
    }

    /// What `exchange` feeds, with the exchanges behind it; none when it does not exist.
    ///
    /// ```no_run
    /// # async fn example(management: amqp::Management) -> Result<(), amqp::ManagementError> {
    /// if let Some(bindings) = management.bindings("/", "event_dispatcher").await? {
    ///     println!("{:?}", bindings.queues("order.new", &amqp::Headers::default()));
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn bindings(&self, vhost: &str, exchange: &str) -> Result<Option<Bindings>, ManagementError> {
        let mut bindings = Bindings::of(exchange);
        // An exchange is followed once, however it is bound: bindings may go round in a circle.
        while let Some(name) = bindings.next_exchange() {
            if bindings.exchanges() > MAX_EXCHANGES {
                let problem = format!("{exchange} feeds more than {MAX_EXCHANGES} exchanges");
                return Err(ManagementError::Response(problem));
            }
            let exchange: Option<Exchange> = self.get(vhost, &["exchanges", vhost, &name]).await?;
            let Some(Exchange { kind }) = exchange else {
                if bindings.is_origin(&name) {
                    return Ok(None);
                }
                // It was deleted since.
                bindings.follow(&name, "", Vec::new());
                continue;
            };
            let path = ["exchanges", vhost, &name, "bindings", "source"];
            let found: Vec<Binding> = self.get(vhost, &path).await?.unwrap_or_default();
            bindings.follow(&name, &kind, found);
        }
        Ok(Some(bindings))
    }

    /// Asks for a thing; none when it does not exist.
    async fn get<T: DeserializeOwned>(
        &self,
        vhost: &str,
        path: &[&str],
    ) -> Result<Option<T>, ManagementError> {
        let away = |error: reqwest::Error| {
            let timeout = error.is_timeout();
            ManagementError::Away(if timeout { "no response in time".to_owned() } else { cause(&error) })
        };
        let request = self.http.get(self.url(path)).basic_auth(&self.user, Some(&self.password));
        let mut response = request.send().await.map_err(away)?;
        let status = response.status();
        match status {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(ManagementError::Refused {
                    user: self.user.clone(),
                    vhost: vhost.to_owned(),
                    status: status.as_u16(),
                });
            }
            _ => return Err(ManagementError::Response(format!("HTTP {}", status.as_u16()))),
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > MAX_RESPONSE {
                let problem = format!("it has more than {} MiB", MAX_RESPONSE / 1024 / 1024);
                return Err(ManagementError::Response(problem));
            }
            body.extend_from_slice(&chunk);
        }
        let parsed = serde_json::from_slice(&body);
        parsed
            .map(Some)
            .map_err(|error| ManagementError::Response(format!("it is not what RabbitMQ responds: {error}")))
    }
}

/// The last cause: the error's own words name the URL, and hide it.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// Where it is, and as whom to log in, without the password.
impl fmt::Debug for Management {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.base.split_once("://").unwrap_or_default();
        write!(f, "{scheme}://{}@{rest}", self.user)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// What a server that is no RabbitMQ makes of it: each of its responses begins with `head`, and `body` follows again
    /// and again.
    async fn asked(head: &'static str, body: &'static [u8]) -> Result<Option<QueueState>, ManagementError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut request = [0; 4_096];
            let read = client.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /api/queues/%2F/mail%2Fa HTTP/1.1\r\n"));
            client.write_all(head.as_bytes()).await.unwrap();
            while !body.is_empty() && client.write_all(body).await.is_ok() {}
        });
        let management: Management = format!("http://monitor:hush@{address}").parse().unwrap();
        let asked = management.queue("/", "mail/a").await;
        server.await.unwrap();
        asked
    }

    #[tokio::test]
    async fn what_is_no_answer_is_not_taken_for_one() {
        let said = |asked: Result<Option<QueueState>, ManagementError>| asked.unwrap_err().to_string();
        let spaces = " ".repeat(65_536).leak();
        let endless = asked("HTTP/1.1 200 OK\r\n\r\n", spaces.as_bytes()).await;
        assert_eq!(said(endless), "its response cannot be used: it has more than 16 MiB");
        let elsewhere = "HTTP/1.1 301 Moved\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(said(asked(elsewhere, b"").await), "its response cannot be used: HTTP 301");
        let text = said(asked("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"").await);
        assert!(text.starts_with("its response cannot be used: it is not what RabbitMQ responds"), "{text}");
        let refused = said(asked("HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", b"").await);
        assert!(refused.contains("the user monitor") && !refused.contains("hush"), "{refused}");
        let absent = asked("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", b"").await;
        assert_eq!(absent, Ok(None));
        let broken = said(asked("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{", b"").await);
        assert!(broken.starts_with("it cannot be reached"), "{broken}");
    }
}
