//! The connection to RabbitMQ.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use lapin::{
    tcp::{OwnedIdentity, OwnedTLSConfig},
    uri::{AMQPScheme, AMQPUri},
};
use secrecy::ExposeSecret;
use url::Url;

use super::{SettingError, permissions, secret};

const FORM: &str = "amqp://user:password@host:5672/vhost (amqps:// with TLS), or several of them with commas \
                    between";
/// What a URL's query may set: RabbitMQ's URI query parameters, but for those that would weaken TLS.
const PARAMETERS: [&str; 8] = [
    "auth_mechanism",
    "cacertfile",
    "certfile",
    "channel_max",
    "connection_timeout",
    "frame_max",
    "heartbeat",
    "keyfile",
];

/// Where the broker is. The URL itself is a secret: set `AMQP_URL`, or name a file that holds it.
#[derive(Clone, Debug, clap::Args)]
pub struct BrokerArgs {
    /// A file that holds the AMQP URL, instead of the variable `AMQP_URL`
    /// (`amqp://user:password@host:5672/vhost`; several nodes with commas between). With `amqps://`, the
    /// node must have a certificate for its host from an authority of this machine, or of `?cacertfile=PATH`;
    /// `&certfile=PATH&keyfile=PATH` is a certificate to show to it.
    #[arg(long, env = "AMQP_URL_FILE", value_name = "PATH")]
    pub amqp_url_file: Option<PathBuf>,
}

/// A node of the broker: how to connect to it.
#[derive(Clone)]
pub struct Node {
    /// The address and the user.
    pub uri: AMQPUri,
    /// The authorities to trust beside the machine's own, and the client certificate.
    pub tls: OwnedTLSConfig,
}

impl Node {
    /// Why what goes over the wire may be read or changed on its way.
    pub fn exposed(&self) -> Option<String> {
        let host = &self.uri.authority.host;
        (self.uri.scheme == AMQPScheme::AMQP && !super::is_this_machine(host))
            .then(|| format!("the connection to RabbitMQ on {host} is without TLS; use amqps://"))
    }
}

/// Warns of nodes on other machines without TLS. For the start of a program.
pub fn warn(nodes: &[Node]) {
    for exposed in nodes.iter().filter_map(Node::exposed) {
        tracing::warn!("{exposed}; --require-tls makes this an error");
    }
}

/// The address and the user, without the password.
impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AMQPUri { scheme, authority, vhost, .. } = &self.uri;
        let (user, vhost) = (&authority.userinfo.username, vhost.replace('/', "%2f"));
        write!(f, "{scheme}://{user}@{}:{}/{vhost}", authority.host, authority.port)
    }
}

impl BrokerArgs {
    /// The nodes, at least one, in the order in which to try them, with the files that they need.
    /// With `require_tls`, a node on another machine without TLS is an error.
    pub fn nodes(&self, require_tls: bool) -> Result<Vec<Node>, SettingError> {
        let list = secret("AMQP_URL", self.amqp_url_file.as_ref(), FORM)?;
        let nodes: Vec<Node> =
            list.expose_secret().split(',').map(|url| node(url.trim())).collect::<Result<_, _>>()?;
        match nodes.iter().find_map(Node::exposed) {
            Some(exposed) if require_tls => Err(SettingError::new("AMQP_URL", exposed)),
            _ => Ok(nodes),
        }
    }
}

/// Never quotes the URL, which holds the password.
fn node(text: &str) -> Result<Node, SettingError> {
    let wrong = || SettingError::new("AMQP_URL", format_args!("each node should look like {FORM}"));
    let mut uri: AMQPUri = text.parse().map_err(|_| wrong())?;
    let url = Url::parse(text).map_err(|_| wrong())?;
    // The parser takes an IPv6 address for no host, and no host for localhost.
    if let Some(address) = url.host_str().and_then(|host| host.strip_prefix('[')?.strip_suffix(']')) {
        address.clone_into(&mut uri.authority.host);
    }
    let mut tls = OwnedTLSConfig::default();
    let (mut certificate, mut key) = (None, None);
    for (name, value) in url.query_pairs() {
        let name = PARAMETERS.iter().find(|known| **known == name).ok_or_else(|| {
            let known = PARAMETERS.join(", ");
            SettingError::new("AMQP_URL", format_args!("a query parameter is unknown; known are {known}"))
        })?;
        if matches!(*name, "cacertfile" | "certfile" | "keyfile") && uri.scheme != AMQPScheme::AMQPS {
            return Err(SettingError::new("AMQP_URL", format_args!("{name} is for amqps:// only")));
        }
        let read = |what: &str| pem(name, &value, what);
        match *name {
            "cacertfile" => tls.cert_chain = Some(read("CERTIFICATE")?),
            "certfile" => certificate = Some(read("CERTIFICATE")?),
            "keyfile" => key = Some(read("PRIVATE KEY")?),
            // The others are lapin's.
            _ => {}
        }
    }
    if uri.vhost.is_empty() {
        return Err(SettingError::new(
            "AMQP_URL",
            "names the empty virtual host, by a / after the host with nothing behind it. The default virtual host is \
             written as %2f (amqp://host/%2f), or left out with its / (amqp://host)",
        ));
    }
    tls.identity = match (certificate, key) {
        (Some(pem), Some(key)) => Some(OwnedIdentity::PKCS8 { pem: pem.into(), key: key.into() }),
        (None, None) => None,
        _ => return Err(SettingError::new("AMQP_URL", "certfile and keyfile belong together")),
    };
    Ok(Node { uri, tls })
}

/// Reads a PEM file that a URL names.
fn pem(parameter: &str, path: &str, what: &str) -> Result<String, SettingError> {
    let wrong = |problem: &dyn fmt::Display| {
        SettingError::new("AMQP_URL", format_args!("{parameter}: cannot use {path}: {problem}"))
    };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
    if parameter == "keyfile" {
        permissions::warn_if_others_read("AMQP_URL (keyfile)", Path::new(path));
    }
    // `PRIVATE KEY`, `RSA PRIVATE KEY` and `EC PRIVATE KEY` all end like this.
    let begins =
        |line: &str| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{what}-----"));
    if text.lines().any(begins) {
        Ok(text)
    } else {
        Err(wrong(&format_args!("it should be a PEM file with a {what}")))
    }
}

#[cfg(test)]
mod tests {
    use super::node;

    #[test]
    fn the_virtual_host_without_a_name_is_refused() {
        for url in ["amqp://u:hush@host/", "amqps://u:hush@host:5671/?heartbeat=10"] {
            let error = node(url).unwrap_err().to_string();
            assert!(error.contains("amqp://host/%2f") && !error.contains("hush"), "{url}: {error}");
        }
        for (url, vhost) in [("amqp://host", "/"), ("amqp://host/%2f", "/"), ("amqp://host/v", "v")] {
            assert_eq!(node(url).unwrap().uri.vhost, vhost, "{url}");
        }
    }

    #[test]
    fn only_another_machine_without_tls_is_exposed() {
        for (url, exposed) in [
            ("amqp://rabbit", true),
            ("amqp://10.0.0.7:5672/v", true),
            ("amqp://[fd00::7]", true),
            ("amqp://localhost.example", true),
            ("amqps://rabbit", false),
            ("amqp://localhost", false),
            ("amqp://127.0.0.2", false),
            ("amqp://[::1]", false),
        ] {
            assert_eq!(node(url).unwrap().exposed().is_some(), exposed, "{url}");
        }
    }
}
