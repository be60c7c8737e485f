//! The configuration file: outboxes, inboxes, the broker, and the roles of keys.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use daemon::config::{
    SettingError,
    database::{self, Database},
};
use serde::Deserialize;

use crate::access::Role;

/// The timeout of a statement. The looks read bounded numbers of rows by index.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the file says.
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
    /// A file with the URL of its database.
    pub database_url_file: Option<PathBuf>,
    /// The one relay name to look at; all without.
    pub relay: Option<String>,
}

/// An inbox.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct InboxTable {
    /// A file with the URL of its database.
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

impl File {
    /// Reads it.
    pub fn read(path: &Path) -> Result<Self, SettingError> {
        let wrong = |problem: &dyn fmt::Display| {
            SettingError::new("CONFIG_FILE (or --config)", format_args!("{}: {problem}", path.display()))
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
        // The parser's own text would quote the line, which may hold a secret by mistake.
        let file: Self = toml::from_str(&text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start));
            let line = before.map_or(0, |text| text.matches('\n').count()) + 1;
            wrong(&format_args!("line {line}: {}", error.message()))
        })?;
        let names = file.outbox.keys().map(|name| ("outbox", name));
        for (kind, name) in names.chain(file.inbox.keys().map(|name| ("inbox", name))) {
            let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            if !is_name {
                let rule = "the name should be lower-case letters, digits or '-', a letter first";
                return Err(wrong(&format_args!("[{kind}.{name}]: {rule}")));
            }
        }
        if file.outbox.is_empty() && file.inbox.is_empty() {
            return Err(wrong(&"names no database: write a table [outbox.NAME] or [inbox.NAME]"));
        }
        if file.role.is_empty() {
            return Err(wrong(&"gives no key a role: write a table [role] with lines such as alice = \"act\""));
        }
        Ok(file)
    }
}

/// The database of a table: from its file, or the variable `KIND_NAME_DATABASE_URL`.
pub fn database(kind: &str, name: &str, file: Option<&PathBuf>) -> Result<Database, SettingError> {
    let variable = format!("{kind}_{name}_DATABASE_URL").to_uppercase().replace('-', "_");
    let database = database::options(&variable, file, "outbox-console", STATEMENT_TIMEOUT)?;
    database.warn();
    Ok(database)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        let path = std::env::temp_dir().join(format!("console-{}.toml", uuid::Uuid::new_v4()));
        std::fs::write(&path, text).unwrap();
        let read = File::read(&path);
        std::fs::remove_file(&path).unwrap();
        match read {
            Ok(file) => format!("{:?} {:?} {:?}", file.outbox.keys(), file.inbox.keys(), file.role),
            Err(error) => error.problem.replace(&path.display().to_string(), "FILE"),
        }
    }

    #[test]
    fn a_file_says_what_is_wrong_with_it_and_quotes_nothing() {
        let role = "[role]\nalice = 'act'\n";
        let all = [
            said(&format!("{role}[outbox.shop]\ndatabase-url-file = 'x'\n[inbox.mail]\nqueues = ['m']")),
            said("[outbox.shop]"),
            said(role),
            said("[role]\nalice = 'root'"),
            said(&format!("{role}[outbox.Shop]")),
            said(&format!("{role}[outbox.shop]\ndatabase-url = 'postgres://a:hush@b/c'")),
            said(&format!("{role}[outbox.shop]\npassword = hush")),
            said("outbox = 1"),
        ];
        assert!(!all.join("").contains("hush"));
        insta::assert_snapshot!(all.join("\n"), @"");
    }
}
