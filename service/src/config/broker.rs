//! The connection to RabbitMQ.

use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};

use super::{SettingError, secret};

const FORM: &str = "amqp://user:password@host:5672/vhost, or several of them with commas between";

/// Where the broker is. The URL itself is a secret: set `AMQP_URL`, or name a file that holds it.
#[derive(Clone, Debug, clap::Args)]
pub struct BrokerArgs {
    /// A file that holds the AMQP URL, instead of the variable `AMQP_URL`
    /// (`amqp://user:password@host:5672/vhost`; several nodes with commas between).
    #[arg(long, env = "AMQP_URL_FILE", value_name = "PATH")]
    pub amqp_url_file: Option<PathBuf>,
}

impl BrokerArgs {
    /// The nodes' URLs, at least one, in the order in which to try them.
    pub fn urls(&self) -> Result<Vec<SecretString>, SettingError> {
        let list = secret("AMQP_URL", self.amqp_url_file.as_ref(), FORM)?;
        list.expose_secret()
            .split(',')
            .map(str::trim)
            .map(|url| {
                if url.starts_with("amqp://") || url.starts_with("amqps://") {
                    Ok(SecretString::from(url))
                } else {
                    Err(SettingError::new("AMQP_URL", format_args!("each node should look like {FORM}")))
                }
            })
            .collect()
    }
}
