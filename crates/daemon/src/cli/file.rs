//! The configuration file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use clap::{Arg, Command};
use toml::{Table, Value};

use super::{FLAG, Tables, VARIABLE, name};
use crate::config::{SettingError, has_password};

/// Settings with their values, as a flag would have them.
pub(super) type Values = BTreeMap<String, String>;

/// What a file says.
pub(super) struct File {
    pub(super) path: PathBuf,
    /// What each table is about, where there may be some.
    pub(super) kind: Option<&'static str>,
    /// What is set for all.
    pub(super) values: Values,
    /// The tables by their names, in order.
    pub(super) tables: Vec<(String, Values)>,
    /// What the program reads itself.
    pub(super) own: Table,
}

impl File {
    /// Reads the file at `path`, which may set what `command` has as settings, and may have what is called as one of
    /// `own`.
    pub(super) fn read(
        path: PathBuf,
        command: &Command,
        tables: Option<Tables>,
        own: &[&str],
    ) -> Result<Self, SettingError> {
        let kind = tables.map(|tables| tables.kind);
        let mut file = Self { path, kind, values: Values::new(), tables: Vec::new(), own: Table::new() };
        let text = std::fs::read_to_string(&file.path).map_err(|error| file.wrong(error))?;
        // The parser's own text would quote the line, which may hold a secret by mistake.
        let mut table: Table = toml::from_str(&text).map_err(|error: toml::de::Error| {
            let line =
                error.span().and_then(|span| text.get(..span.start)).map_or(0, |s| s.matches('\n').count());
            file.wrong(format_args!("line {}: {}", line + 1, error.message()))
        })?;
        let lists = tables.map_or(&[][..], |tables| tables.lists);
        let mut known = Known { lists, ..Known::default() };
        known.add(command);
        if let Some(kind) = kind
            && let Some(tables) = table.remove(kind)
        {
            file.tables = file.tables_of(kind, tables, &known)?;
        }
        file.own.extend(own.iter().filter_map(|name| table.remove_entry(*name)));
        file.values = file.values_of("", table, &known)?;
        Ok(file)
    }

    fn wrong(&self, problem: impl fmt::Display) -> SettingError {
        let name = format!("{VARIABLE} (or --{FLAG})");
        SettingError::new(name, format_args!("{}: {problem}", self.path.display()))
    }

    fn tables_of(
        &self,
        kind: &str,
        tables: Value,
        known: &Known,
    ) -> Result<Vec<(String, Values)>, SettingError> {
        let Value::Table(tables) = tables else {
            return Err(self.wrong(format_args!("{kind} is the name of tables: [{kind}.NAME]")));
        };
        let table = |(name, table): (String, Value)| {
            let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            match table {
                Value::Table(table) if is_name => {
                    let values = self.values_of(&format!("{kind}.{name}."), table, known)?;
                    Ok((name, values))
                }
                Value::Table(_) => Err(self.wrong(format_args!(
                    "[{kind}.{name}]: the name should be lower-case letters, digits or '-', a letter first"
                ))),
                _ => Err(self.wrong(format_args!(
                    "{kind}.{name} is no table; what is for one {kind} alone stands below [{kind}.NAME]"
                ))),
            }
        };
        tables.into_iter().map(table).collect()
    }

    fn values_of(&self, place: &str, table: Table, known: &Known) -> Result<Values, SettingError> {
        let value = |(name, value): (String, Value)| {
            if !known.names.contains(&name) {
                let known: Vec<_> = known.names.iter().map(String::as_str).collect();
                return Err(
                    self.wrong(format_args!("{place}{name} is no setting; known are {}", known.join(", ")))
                );
            }
            let is_list = known.lists.contains(&name.as_str());
            let value = match value {
                Value::Array(_) if is_list => serde_json::to_string(&value)
                    .map_err(|error| self.wrong(format_args!("{place}{name} cannot be used: {error}")))?,
                _ if is_list => {
                    return Err(self.wrong(format_args!(
                        "{place}{name} is a list of tables; each begins with a line [[{place}{name}]]"
                    )));
                }
                Value::String(text) => text,
                Value::Integer(number) => number.to_string(),
                Value::Boolean(flag) => flag.to_string(),
                _ => {
                    return Err(self
                        .wrong(format_args!("{place}{name} should be a string, a number or true or false")));
                }
            };
            if known.secrets.contains(&name) && has_password(&value) {
                return Err(self.wrong(format_args!(
                    "{place}{name} has a password, which this file is not for; put the URL into a file of its own, \
                     and name that: {name}-file"
                )));
            }
            Ok((name, value))
        };
        table.into_iter().map(value).collect()
    }

    /// The table `name`.
    pub(super) fn table(&self, name: &str, kind: &str) -> Result<&(String, Values), SettingError> {
        self.tables.iter().find(|(known, _)| known == name).ok_or_else(|| {
            let setting = format!("{} (or --{kind})", kind.to_uppercase());
            SettingError::new(
                setting,
                format_args!("{} has no table [{kind}.{name}]{}", self.path.display(), self.names()),
            )
        })
    }

    /// The only table, if there is one at all.
    pub(super) fn only_table(&self, kind: &str) -> Result<Option<&(String, Values)>, SettingError> {
        match self.tables.as_slice() {
            [] => Ok(None),
            [only] => Ok(Some(only)),
            _ => {
                let setting = format!("{} (or --{kind})", kind.to_uppercase());
                let problem =
                    format_args!("is not set, and {} has several{}", self.path.display(), self.names());
                Err(SettingError::new(setting, problem))
            }
        }
    }

    fn names(&self) -> String {
        let names: Vec<_> = self.tables.iter().map(|(name, _)| name.as_str()).collect();
        if names.is_empty() { String::new() } else { format!("; there are {}", names.join(", ")) }
    }
}

/// What a file may set.
#[derive(Default)]
struct Known {
    names: BTreeSet<String>,
    /// Those whose values are not shown.
    secrets: BTreeSet<String>,
    /// Those that are lists of tables.
    lists: &'static [&'static str],
}

impl Known {
    fn add(&mut self, command: &Command) {
        let of = |arg: &Arg| name(arg).map(|name| (name.to_owned(), arg.is_hide_env_values_set()));
        for (name, is_secret) in command.get_arguments().filter_map(of) {
            if is_secret {
                self.secrets.insert(name.clone());
            }
            self.names.insert(name);
        }
        command.get_subcommands().for_each(|inner| self.add(inner));
    }
}
