//! The connection to PostgreSQL, and the checks that it is the database that a program needs.

mod needs;
mod schema;
mod sessions;
mod target;
mod url;

use std::{path::PathBuf, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;

pub use needs::Needs;
pub use outbox::database::Failure;
pub use schema::{Schema, SchemaError};
pub use sessions::Sessions;
pub use target::Database;

use self::url::FORM;
use super::{SettingError, parse_secret, secret, secret_or_file, secret_text};

/// Where the database is. The URL itself is a secret: set `DATABASE_URL`, or name a file that holds it.
#[derive(Clone, Debug, clap::Args)]
pub struct DatabaseArgs {
    /// The PostgreSQL URL.
    #[arg(
        long, env = "DATABASE_URL", hide = true, hide_env_values = true, value_parser = secret_text,
        value_name = "URL"
    )]
    pub database_url: Option<SecretString>,
    /// A file that holds the PostgreSQL URL, instead of the variable `DATABASE_URL`
    /// (`postgres://user:password@host:5432/database`).
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "PATH")]
    pub database_url_file: Option<PathBuf>,
    /// Refuse a URL, of the database or of the broker, that leads to another machine and does not make TLS certain.
    /// Without this setting, `run` warns.
    #[arg(long, env = "REQUIRE_TLS")]
    pub require_tls: bool,
}

impl DatabaseArgs {
    /// The URL, from where it is.
    pub fn url(&self) -> Result<SecretString, SettingError> {
        let (url, file) = (self.database_url.as_ref(), self.database_url_file.as_ref());
        secret_or_file("DATABASE_URL", url, file, FORM)
    }

    /// How to connect, under the program's name, with every statement limited to `statement_timeout`.
    pub fn options(&self, application: &str, statement_timeout: Duration) -> Result<Database, SettingError> {
        let database = options_of("DATABASE_URL", &self.url()?, application, statement_timeout)?;
        match database.exposed() {
            Some(exposed) if self.require_tls => Err(SettingError::new("DATABASE_URL", exposed)),
            _ => Ok(database),
        }
    }
}

/// As [`DatabaseArgs::options`], for another database: its URL is in the variable `name`, or in `file`.
pub fn options(
    name: &str,
    file: Option<&PathBuf>,
    application: &str,
    statement_timeout: Duration,
) -> Result<Database, SettingError> {
    options_of(name, &secret(name, file, FORM)?, application, statement_timeout)
}

fn options_of(
    name: &str,
    text: &SecretString,
    application: &str,
    statement_timeout: Duration,
) -> Result<Database, SettingError> {
    let text = url::supported(name, text.expose_secret())?.into();
    let options: PgConnectOptions = parse_secret(name, &text, FORM)?;
    let database = Database::from(options.application_name(application));
    Ok(database.with("statement_timeout", statement_timeout.as_millis().to_string()))
}
