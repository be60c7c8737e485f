//! The tables of the configuration file: outboxes, inboxes, the broker, and the roles of keys.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use daemon::config::{
    SettingError,
    database::{Database, DatabaseArgs},
    has_password, secret,
};
use secrecy::ExposeSecret;
use serde::Deserialize;

use crate::{access::Role, broker::Broker};

/// What is read here. The rest of the file are settings.
pub const TABLES: [&str; 4] = ["outbox", "inbox", "broker", "role"];
/// The timeout of a statement. The looks read bounded numbers of rows by index.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// The tables.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// The outboxes by name.
    pub outbox: BTreeMap<String, OutboxTable>,
    /// The inboxes by name.
    pub inbox: BTreeMap<String, InboxTable>,
    /// The broker.
    pub broker: BrokerTable,
    /// What the keys may, by their names.
    pub role: BTreeMap<String, Role>,
}

/// An outbox.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct OutboxTable {
    /// The URL of its database, without a password.
    pub database_url: Option<String>,
    /// A file with the URL.
    pub database_url_file: Option<PathBuf>,
    /// The one relay name to look at; all without.
    pub name: Option<String>,
}

/// An inbox.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct InboxTable {
    /// The URL of its database, without a password.
    pub database_url: Option<String>,
    /// A file with the URL.
    pub database_url_file: Option<PathBuf>,
    /// The consumer's name; the table's without.
    pub consumer: Option<String>,
    /// Its queues.
    pub queues: Vec<String>,
}

/// The broker.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct BrokerTable {
    /// A file with the URL of the management API.
    pub management_url_file: Option<PathBuf>,
}

fn wrong(problem: impl fmt::Display) -> SettingError {
    SettingError::new("CONFIG_FILE (or --config)", problem)
}

impl File {
    /// Reads the tables.
    pub fn read(tables: toml::Table) -> Result<Self, SettingError> {
        let file: Self = tables.try_into().map_err(|error: toml::de::Error| wrong(error.message()))?;
        let names = file.outbox.keys().map(|name| ("outbox", name));
        for (kind, name) in names.chain(file.inbox.keys().map(|name| ("inbox", name))) {
            let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            if !is_name {
                let rule = "the name should be lower-case letters, digits or '-', a letter first";
                return Err(wrong(format_args!("[{kind}.{name}]: {rule}")));
            }
        }
        if file.outbox.is_empty() && file.inbox.is_empty() {
            return Err(wrong("it names no database: write a table [outbox.NAME] or [inbox.NAME]"));
        }
        if file.role.is_empty() {
            return Err(wrong(
                "it gives no key a role: write a table [role] with lines such as alice = \"act\"",
            ));
        }
        Ok(file)
    }
}

/// The database of the table `[kind.name]`: the variable `KIND_NAME_DATABASE_URL` overrides what the table has.
pub fn database(
    kind: &str,
    name: &str,
    url: Option<&String>,
    file: Option<&PathBuf>,
    require_tls: bool,
) -> Result<Database, SettingError> {
    if url.is_some_and(|url| has_password(url)) {
        return Err(wrong(format_args!(
            "{kind}.{name}.database-url has a password, which this file is not for; put the URL into a file of its own, \
             and name that: database-url-file"
        )));
    }
    let variable = format!("{kind}_{name}_DATABASE_URL").to_uppercase().replace('-', "_");
    let (database_url, database_url_file) = match std::env::var(&variable) {
        Ok(url) => (Some(url.into()), None),
        Err(_) => (url.map(|url| url.clone().into()), file.cloned()),
    };
    let args = DatabaseArgs { database_url, database_url_file, require_tls };
    let named = |error: SettingError| {
        SettingError::new(format!("{kind}.{name}.database-url-file (or {variable})"), error.problem)
    };
    let database = args.options("outbox-console", STATEMENT_TIMEOUT).map_err(named)?;
    database.warn();
    Ok(database)
}

/// The broker's management API, where it is set.
pub fn broker(table: &BrokerTable) -> Result<Option<Broker>, SettingError> {
    const VARIABLE: &str = "MANAGEMENT_URL";
    if table.management_url_file.is_none() && std::env::var_os(VARIABLE).is_none() {
        return Ok(None);
    }
    let url = secret(VARIABLE, table.management_url_file.as_ref(), "http://USER:PASSWORD@HOST:15672/VHOST")?;
    Broker::new(url.expose_secret()).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        let file = File::read(text.parse().unwrap());
        let databases = file.and_then(|file| {
            for (name, table) in &file.outbox {
                database(
                    "outbox",
                    name,
                    table.database_url.as_ref(),
                    table.database_url_file.as_ref(),
                    true,
                )?;
            }
            Ok(format!("{:?} {:?} {:?}", file.outbox.keys(), file.inbox.keys(), file.role))
        });
        databases.unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn a_file_says_what_is_wrong_with_it() {
        let role = "[role]\nalice = 'act'\n";
        let all = [
            said(&format!(
                "{role}[outbox.shop]\ndatabase-url = 'postgres://a@localhost/c'\n[inbox.mail]\nqueues = ['m']"
            )),
            said("[outbox.shop]"),
            said(role),
            said("[role]\nalice = 'root'"),
            said(&format!("{role}[outbox.Shop]")),
            said(&format!("{role}[outbox.shop]")),
            said(&format!("{role}[outbox.shop]\nport = 1")),
            said(&format!("{role}[outbox.shop]\ndatabase-url = 'postgres://a:hush@b/c'")),
            said(&format!("{role}[outbox.shop]\ndatabase-url = 'postgres://a@elsewhere/c'")),
            said(&format!("{role}[outbox.shop]\ndatabase-url-file = '/nowhere'")),
        ];
        assert!(!all.join("").contains("hush"));
        insta::assert_snapshot!(all.join("\n"), @r#"
        ["shop"] ["mail"] {"alice": Act}
        CONFIG_FILE (or --config): it gives no key a role: write a table [role] with lines such as alice = "act"
        CONFIG_FILE (or --config): it names no database: write a table [outbox.NAME] or [inbox.NAME]
        CONFIG_FILE (or --config): unknown variant `root`, expected one of `look`, `act`, `bodies`
        CONFIG_FILE (or --config): [outbox.Shop]: the name should be lower-case letters, digits or '-', a letter first
        outbox.shop.database-url-file (or OUTBOX_SHOP_DATABASE_URL): is not set; it should look like postgres://user:password@host:5432/database
        CONFIG_FILE (or --config): unknown field `port`, expected one of `database-url`, `database-url-file`, `name`
        CONFIG_FILE (or --config): outbox.shop.database-url has a password, which this file is not for; put the URL into a file of its own, and name that: database-url-file
        outbox.shop.database-url-file (or OUTBOX_SHOP_DATABASE_URL): the connection to PostgreSQL on elsewhere may be without TLS (sslmode Prefer); set sslmode=verify-full in the URL, with sslrootcert where the machine does not know the authority
        outbox.shop.database-url-file (or OUTBOX_SHOP_DATABASE_URL): cannot read /nowhere: No such file or directory (os error 2)
        "#);
    }
}
