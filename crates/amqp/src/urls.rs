//! Nodes from their URLs.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use lapin::{
    tcp::{OwnedIdentity, OwnedTLSConfig},
    uri::{AMQPScheme, AMQPUri},
};
use url::Url;

use crate::{InvalidNodes, Node, Nodes};

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

/// From URLs with commas between. The PEM files that they name are read.
///
/// With `amqps`, a node must have a certificate for its host from an authority that the machine trusts, or from the
/// one of `?cacertfile=PATH`; `&certfile=PATH&keyfile=PATH` is a certificate to show to it.
impl FromStr for Nodes {
    type Err = InvalidNodes;

    fn from_str(urls: &str) -> Result<Self, InvalidNodes> {
        Ok(Self(urls.split(',').map(|url| node(url.trim())).collect::<Result<_, _>>()?))
    }
}

impl Nodes {
    /// What a list of nodes looks like, for messages.
    ///
    /// ```
    /// assert!(amqp::Nodes::FORM.starts_with("amqp://user:password@host:5672/vhost"));
    /// ```
    pub const FORM: &str = FORM;
}

impl InvalidNodes {
    fn new(problem: impl fmt::Display) -> Self {
        Self(problem.to_string())
    }
}

/// Never quotes the URL, which holds the password.
fn node(text: &str) -> Result<Node, InvalidNodes> {
    let wrong = || InvalidNodes::new(format_args!("each node should look like {FORM}"));
    let mut uri: AMQPUri = text.parse().map_err(|_| wrong())?;
    let url = Url::parse(text).map_err(|_| wrong())?;
    // The parser takes an IPv6 address for no host, and no host for localhost.
    if let Some(address) = url.host_str().and_then(|host| host.strip_prefix('[')?.strip_suffix(']')) {
        address.clone_into(&mut uri.authority.host);
    }
    let mut tls = OwnedTLSConfig::default();
    let (mut certificate, mut key, mut key_file) = (None, None, None);
    for (name, value) in url.query_pairs() {
        let name = PARAMETERS.iter().find(|known| **known == name).ok_or_else(|| {
            let known = PARAMETERS.join(", ");
            InvalidNodes::new(format_args!("a query parameter is unknown; known are {known}"))
        })?;
        if matches!(*name, "cacertfile" | "certfile" | "keyfile") && uri.scheme != AMQPScheme::AMQPS {
            return Err(InvalidNodes::new(format_args!("{name} is for amqps:// only")));
        }
        let read = |what: &str| pem(name, &value, what);
        match *name {
            "cacertfile" => tls.cert_chain = Some(read("CERTIFICATE")?),
            "certfile" => certificate = Some(read("CERTIFICATE")?),
            "keyfile" => {
                key = Some(read("PRIVATE KEY")?);
                key_file = Some(PathBuf::from(&*value));
            }
            // The others are lapin's.
            _ => {}
        }
    }
    if uri.vhost.is_empty() {
        return Err(InvalidNodes::new(
            "names the empty virtual host, by a / after the host with nothing behind it. The default virtual host is \
             written as %2f (amqp://host/%2f), or left out with its / (amqp://host)",
        ));
    }
    tls.identity = match (certificate, key) {
        (Some(pem), Some(key)) => Some(OwnedIdentity::PKCS8 { pem: pem.into(), key: key.into() }),
        (None, None) => None,
        _ => return Err(InvalidNodes::new("certfile and keyfile belong together")),
    };
    Ok(Node { uri, tls, key_file })
}

/// Reads a PEM file that a URL names.
fn pem(parameter: &str, path: &str, what: &str) -> Result<String, InvalidNodes> {
    let wrong = |problem: &dyn fmt::Display| {
        InvalidNodes::new(format_args!("{parameter}: cannot use {path}: {problem}"))
    };
    let text = std::fs::read_to_string(Path::new(path)).map_err(|error| wrong(&error))?;
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
    use super::*;

    #[test]
    fn what_is_wrong_is_named_and_no_password_is() {
        for (urls, named) in [
            ("", "each node should look like"),
            ("hush", "each node should look like"),
            ("http://u:hush@host", "each node should look like"),
            ("amqp://u:hush@host,", "each node should look like"),
            ("amqp://u:hush@host?verify=verify_none", "a query parameter is unknown"),
            ("amqp://u:hush@host?keyfile=/nowhere", "keyfile is for amqps:// only"),
            ("amqps://u:hush@host?keyfile=/nowhere", "keyfile: cannot use /nowhere"),
            (
                "amqps://u:hush@host?cacertfile=/proc/self/status",
                "it should be a PEM file with a CERTIFICATE",
            ),
            ("amqp://u:hush@host/", "amqp://host/%2f"),
            ("amqps://u:hush@host:5671/?heartbeat=10", "amqp://host/%2f"),
        ] {
            let error = urls.parse::<Nodes>().unwrap_err().to_string();
            assert!(error.contains(named) && !error.contains("hush"), "{urls}: {error}");
        }
        let nodes: Nodes = "amqp://u:hush@one/%2f, amqps://u:hush@two:5673/v?heartbeat=1".parse().unwrap();
        assert_eq!(format!("{nodes:?}"), "[amqp://u@one:5672/%2f, amqps://u@two:5673/v]");
    }

    #[test]
    fn the_default_virtual_host_may_be_left_out() {
        for (url, vhost) in [("amqp://host", "/"), ("amqp://host/%2f", "/"), ("amqp://host/v", "v")] {
            assert_eq!(node(url).unwrap().uri.vhost, vhost, "{url}");
        }
    }
}
