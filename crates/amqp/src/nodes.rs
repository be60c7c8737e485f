//! The nodes of a cluster, and connecting to one of them.

use std::{
    fmt,
    future::ready,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lapin::{
    tcp::OwnedTLSConfig,
    uri::{AMQPScheme, AMQPUri},
};

use crate::{Connection, Reconnect, describe};

/// How long connecting to one node may take, the handshake included, unless its URL says otherwise.
const CONNECT: Duration = Duration::from_secs(10);

/// The nodes of a broker, at least one, in the order in which to try them.
///
/// They are parsed from a list of URLs with commas between. A URL holds a password, so neither an error nor `Debug`
/// quotes it.
///
/// ```
/// let nodes: amqp::Nodes = "amqp://shop:secret@one/%2f,amqp://shop:secret@two/%2f".parse()?;
/// assert_eq!(format!("{nodes:?}"), "[amqp://shop@one:5672/%2f, amqp://shop@two:5672/%2f]");
/// # Ok::<_, amqp::InvalidNodes>(())
/// ```
#[derive(Clone)]
pub struct Nodes(pub(crate) Vec<Node>);

/// One node: where it is, as whom to log in, and with `amqps` whom to trust and what to show.
///
/// ```
/// let nodes: amqp::Nodes = "amqps://shop:secret@rabbit/%2f".parse()?;
/// let [node] = nodes.as_ref() else { panic!() };
/// assert_eq!(format!("{node:?}"), "amqps://shop@rabbit:5671/%2f");
/// # Ok::<_, amqp::InvalidNodes>(())
/// ```
#[derive(Clone)]
pub struct Node {
    pub(crate) uri: AMQPUri,
    pub(crate) tls: OwnedTLSConfig,
    pub(crate) key_file: Option<PathBuf>,
}

/// What is wrong with a list of nodes, and what it should look like. It never quotes a URL.
///
/// ```
/// let error = "amqp://shop:secret@host/?verify=none".parse::<amqp::Nodes>().unwrap_err().to_string();
/// assert!(error.starts_with("a query parameter is unknown") && !error.contains("secret"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidNodes(pub(crate) String);

/// There is no connection: of each node, where it is and why it cannot be used.
///
/// ```no_run
/// # async fn example() -> Result<(), amqp::InvalidNodes> {
/// let nodes: amqp::Nodes = "amqp://localhost:1".parse()?;
/// let unreachable = nodes.connect("shop", &mut amqp::Reconnect::default()).await.unwrap_err();
/// assert_eq!(unreachable.to_string(), "localhost:1: IO error: Connection refused (os error 111)");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct Unreachable(Vec<String>);

impl Nodes {
    /// Connects to the first node that lets this user in, beginning with the one that `reconnect` remembers, and has it
    /// remember the one that it was. `name` is what the broker's operators see the connection as.
    ///
    /// Each node has 10 s for it, or what the `connection_timeout` of its URL says, in milliseconds. When the future is
    /// dropped, nothing is left of the attempt.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let nodes: amqp::Nodes = "amqp://shop:secret@one,amqp://shop:secret@two".parse()?;
    /// let connection = nodes.connect("shop", &mut amqp::Reconnect::default()).await?;
    /// # Ok(()) }
    /// ```
    pub async fn connect(&self, name: &str, reconnect: &mut Reconnect) -> Result<Connection, Unreachable> {
        self.connect_with(name, reconnect, |connection| ready(Ok(connection))).await
    }

    /// As [`connect`](Self::connect), for a connection with which something has to be done before it is of use, such as
    /// to open a channel. When `prepare` fails, with the reason, the next node is tried. It has to end by itself.
    ///
    /// ```no_run
    /// # async fn example(nodes: amqp::Nodes) -> Result<(), amqp::Unreachable> {
    /// let prepare = async |connection: amqp::Connection| match connection.create_channel().await {
    ///     Ok(channel) => Ok((connection, channel)),
    ///     Err(error) => Err(amqp::describe(&error)),
    /// };
    /// let (connection, channel) =
    ///     nodes.connect_with("shop", &mut amqp::Reconnect::default(), prepare).await?;
    /// # Ok(()) }
    /// ```
    pub async fn connect_with<T, F: Future<Output = Result<T, String>>>(
        &self,
        name: &str,
        reconnect: &mut Reconnect,
        prepare: impl Fn(Connection) -> F,
    ) -> Result<T, Unreachable> {
        reconnect.since = None;
        let mut reasons = vec![String::new(); self.0.len()];
        for n in 0..self.0.len() {
            let n = reconnect.first.wrapping_add(n) % self.0.len();
            let node = &self.0[n];
            let reason = match node.connect(name).await {
                Ok(connection) => match prepare(connection).await {
                    Ok(prepared) => {
                        (reconnect.first, reconnect.since) = (n, Some(Instant::now()));
                        return Ok(prepared);
                    }
                    Err(reason) => format!(": {reason}"),
                },
                Err(reason) => reason,
            };
            tracing::debug!(?node, reason, "a node cannot be used");
            // In the order of the list, whichever was the first: the same reasons are the same text.
            reasons[n] = format!("{}:{}{reason}", node.uri.authority.host, node.uri.authority.port);
        }
        Err(Unreachable(reasons))
    }
}

impl Node {
    async fn connect(&self, name: &str) -> Result<Connection, String> {
        let limit = self.uri.query.connection_timeout.map_or(CONNECT, Duration::from_millis);
        let opening = Connection::open(self.uri.clone(), self.tls.clone(), name);
        match tokio::time::timeout(limit, opening).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(format!(": {}", describe(&error))),
            Err(_) => Err(format!(" did not answer within {limit:?}")),
        }
    }

    /// Its host, as the URL has it; an IPv6 address without brackets.
    ///
    /// ```
    /// let nodes: amqp::Nodes = "amqp://[::1]".parse()?;
    /// assert_eq!(nodes.as_ref()[0].host(), "::1");
    /// # Ok::<_, amqp::InvalidNodes>(())
    /// ```
    pub fn host(&self) -> &str {
        &self.uri.authority.host
    }

    /// The virtual host that its URL names.
    ///
    /// ```
    /// let nodes: amqp::Nodes = "amqp://rabbit/shop".parse()?;
    /// assert_eq!(nodes.as_ref()[0].virtual_host(), "shop");
    /// # Ok::<_, amqp::InvalidNodes>(())
    /// ```
    pub fn virtual_host(&self) -> &str {
        &self.uri.vhost
    }

    /// Whether what goes over the wire is encrypted, and the node proves who it is.
    ///
    /// ```
    /// let nodes: amqp::Nodes = "amqps://rabbit".parse()?;
    /// assert!(nodes.as_ref()[0].is_encrypted());
    /// # Ok::<_, amqp::InvalidNodes>(())
    /// ```
    pub fn is_encrypted(&self) -> bool {
        self.uri.scheme == AMQPScheme::AMQPS
    }

    /// The file of the private key that its URL names, a secret too.
    ///
    /// ```
    /// let nodes: amqp::Nodes = "amqps://rabbit".parse()?;
    /// assert_eq!(nodes.as_ref()[0].key_file(), None);
    /// # Ok::<_, amqp::InvalidNodes>(())
    /// ```
    pub fn key_file(&self) -> Option<&Path> {
        self.key_file.as_deref()
    }
}

impl AsRef<[Node]> for Nodes {
    fn as_ref(&self) -> &[Node] {
        &self.0
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where it is, and as whom to log in, without the password.
impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AMQPUri { scheme, authority, vhost, .. } = &self.uri;
        let (user, vhost) = (&authority.userinfo.username, vhost.replace('/', "%2f"));
        write!(f, "{scheme}://{user}@{}:{}/{vhost}", authority.host, authority.port)
    }
}
