//! The connection to RabbitMQ.

use std::path::PathBuf;

use amqp::{Node, Nodes};
use secrecy::{ExposeSecret, SecretString};

use super::{SettingError, permissions, secret_or_file, secret_text};

/// Where the broker is. The URL itself is a secret: set `AMQP_URL`, or name a file that holds it.
#[derive(Clone, Debug, clap::Args)]
pub struct BrokerArgs {
    /// The AMQP URL.
    #[arg(
        long, env = "AMQP_URL", hide = true, hide_env_values = true, value_parser = secret_text, value_name = "URL"
    )]
    pub amqp_url: Option<SecretString>,
    /// A file that holds the AMQP URL, instead of the variable `AMQP_URL`
    /// (`amqp://user:password@host:5672/vhost`; several nodes with commas between). With `amqps://`, the
    /// node must have a certificate for its host from an authority of this machine, or of `?cacertfile=PATH`;
    /// `&certfile=PATH&keyfile=PATH` is a certificate to show to it.
    #[arg(long, env = "AMQP_URL_FILE", value_name = "PATH")]
    pub amqp_url_file: Option<PathBuf>,
}

impl BrokerArgs {
    /// The URLs, from where they are.
    pub fn urls(&self) -> Result<SecretString, SettingError> {
        secret_or_file("AMQP_URL", self.amqp_url.as_ref(), self.amqp_url_file.as_ref(), Nodes::FORM)
    }

    /// The nodes, with the files that they need. With `require_tls`, a node on another machine without TLS is an
    /// error.
    pub fn nodes(&self, require_tls: bool) -> Result<Nodes, SettingError> {
        let list = self.urls()?;
        let nodes: Nodes =
            list.expose_secret().parse().map_err(|invalid| SettingError::new("AMQP_URL", invalid))?;
        for key in nodes.as_ref().iter().filter_map(Node::key_file) {
            permissions::warn_if_others_read("AMQP_URL (keyfile)", key);
        }
        if require_tls && let Some(exposed) = exposed(&nodes).next() {
            return Err(SettingError::new("AMQP_URL", exposed));
        }
        Ok(nodes)
    }
}

/// Where the broker's management API is. The URL itself is a secret: set `MANAGEMENT_URL`, or name a file that holds it.
#[cfg(feature = "management")]
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ManagementArgs {
    /// The URL of RabbitMQ's management API.
    #[arg(
        long, env = "MANAGEMENT_URL", hide = true, hide_env_values = true, value_parser = secret_text,
        value_name = "URL"
    )]
    pub management_url: Option<SecretString>,
    /// A file that holds the URL of RabbitMQ's management API, instead of the variable `MANAGEMENT_URL`
    /// (`https://user:password@host:15671`). It is only read, and shows which queues get which events. The user needs
    /// the tag `management`. `?cacertfile=PATH`, `&certfile=PATH&keyfile=PATH` are as in `AMQP_URL`.
    #[arg(long, env = "MANAGEMENT_URL_FILE", value_name = "PATH")]
    pub management_url_file: Option<PathBuf>,
}

#[cfg(feature = "management")]
impl ManagementArgs {
    /// The URL, from where it is; none when it is not set.
    pub fn url(&self) -> Result<Option<SecretString>, SettingError> {
        if self.management_url.is_none() && self.management_url_file.is_none() {
            return Ok(None);
        }
        let file = self.management_url_file.as_ref();
        secret_or_file("MANAGEMENT_URL", self.management_url.as_ref(), file, amqp::Management::FORM).map(Some)
    }

    /// The API; none when it is not set. With `require_tls`, one on another machine without TLS is an error.
    pub fn management(&self, require_tls: bool) -> Result<Option<amqp::Management>, SettingError> {
        let Some(url) = self.url()? else { return Ok(None) };
        let wrong = |problem: &dyn std::fmt::Display| SettingError::new("MANAGEMENT_URL", problem);
        let management: amqp::Management = url.expose_secret().parse().map_err(|error| wrong(&error))?;
        match exposed_management(&management) {
            Some(exposed) if require_tls => Err(wrong(&exposed)),
            _ => Ok(Some(management)),
        }
    }
}

/// Warns of a management API on another machine without TLS. For the start of a program.
#[cfg(feature = "management")]
pub fn warn_of_management(management: &amqp::Management) {
    if let Some(exposed) = exposed_management(management) {
        tracing::warn!("{exposed}; --require-tls makes this an error");
    }
}

#[cfg(feature = "management")]
fn exposed_management(management: &amqp::Management) -> Option<String> {
    let host = management.host();
    let is_exposed = !management.is_encrypted() && !super::is_this_machine(host);
    is_exposed.then(|| {
        format!("the connection to RabbitMQ's management API on {host} is without TLS; use https://")
    })
}

/// Warns of nodes on other machines without TLS. For the start of a program.
pub fn warn(nodes: &Nodes) {
    for exposed in exposed(nodes) {
        tracing::warn!("{exposed}; --require-tls makes this an error");
    }
}

/// Why what goes over the wire may be read or changed on its way.
fn exposed(nodes: &Nodes) -> impl Iterator<Item = String> {
    let is_exposed = |node: &&Node| !node.is_encrypted() && !super::is_this_machine(node.host());
    nodes
        .as_ref()
        .iter()
        .filter(is_exposed)
        .map(|node| format!("the connection to RabbitMQ on {} is without TLS; use amqps://", node.host()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_machine_without_tls_is_exposed() {
        for (url, is_exposed) in [
            ("amqp://rabbit", true),
            ("amqp://10.0.0.7:5672/v", true),
            ("amqp://[fd00::7]", true),
            ("amqp://localhost.example", true),
            ("amqps://rabbit", false),
            ("amqp://localhost", false),
            ("amqp://127.0.0.2", false),
            ("amqp://[::1]", false),
        ] {
            assert_eq!(exposed(&url.parse().unwrap()).next().is_some(), is_exposed, "{url}");
        }
    }
}
