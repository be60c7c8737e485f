//! The command line of a program, with its configuration file: a TOML table of settings by their flags' names, such as
//! `lanes = 4`.
//!
//! A flag overrides a variable, a variable the file, the file the default. The file may set what has a variable too, but
//! holds no passwords: those have files of their own. One file can serve all of a program's commands; each takes the
//! settings that it has.
//!
//! A program that does the same for several things, such as the relay for several outboxes, has a table for each:
//! `[outbox.shop]`. What stands in it is for that one alone, and overrides the general variables and the rest of the file.
//! A variable of its own, such as `OUTBOX_SHOP_LANES`, overrides the table.
//!
//! A setting may be a list of tables, `[[expect]]`. It is one setting: the list of a table replaces the general one.

mod file;

use std::{ffi::OsString, fmt, path::PathBuf};

use clap::{Arg, ArgMatches, Command, Parser, builder::Resettable, parser::ValueSource, value_parser};

use crate::config::{SettingError, has_password};
use file::{File, Values};

const FLAG: &str = "config";
const VARIABLE: &str = "CONFIG_FILE";
/// Behind a command's own flags, in its help.
const LAST: usize = 900;
/// How clap knows the flag that chooses a table.
const TABLE: &str = "table";

/// A parsed command line, and where each setting came from.
#[derive(Debug)]
pub struct Parsed<C> {
    /// The command and its settings.
    pub cli: C,
    /// The settings of the chosen command.
    pub settings: Vec<Setting>,
    /// The file's tables, for a command that is for all of them and where none was chosen.
    pub tables: Vec<Table<C>>,
    /// What the file has beside settings, see [`parse_beside`].
    pub own: toml::Table,
}

/// A table of the file, such as `[outbox.shop]`, with what is set for all.
#[derive(Debug)]
pub struct Table<C> {
    /// `shop`.
    pub name: String,
    /// The command and its settings.
    pub cli: C,
    /// The settings of the chosen command.
    pub settings: Vec<Setting>,
}

/// The tables that a program's file may have.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// What each is about: `outbox` for `[outbox.shop]`. The flag of this name chooses one.
    pub kind: &'static str,
    /// The commands that are for all tables at once. The others need one.
    pub commands: &'static [&'static str],
    /// Settings that are lists of tables in the file: `expect` for several `[[expect]]`. Flag and variable have the same
    /// as JSON, on one line.
    pub lists: &'static [&'static str],
}

/// A setting and its value.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The flag, without dashes.
    pub name: String,
    /// The value, as it was written; none when it is not set.
    pub value: Option<String>,
    /// Where the value is from.
    pub source: Source,
}

/// Where a setting's value is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The command line.
    Flag,
    /// This environment variable.
    Variable(String),
    /// This configuration file.
    File(PathBuf),
    /// This table of it.
    Table(PathBuf, String),
    /// The default of the program.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Table(path, table) => write!(f, "{} [{table}]", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// Parses the command line, the environment, and the file that `--config` or `CONFIG_FILE` names. Prints the help, or an
/// error of the command line or the environment, and ends the process, as clap does.
pub fn parse<C: Parser>() -> Result<Parsed<C>, SettingError> {
    parse_with(None, &[])
}

/// As [`parse`], where the file also has what is no setting: tables of these names, which the program reads itself.
pub fn parse_beside<C: Parser>(own: &'static [&'static str]) -> Result<Parsed<C>, SettingError> {
    parse_with(None, own)
}

/// As [`parse`], where the file may have tables.
pub fn parse_tables<C: Parser>(tables: Tables) -> Result<Parsed<C>, SettingError> {
    parse_with(Some(tables), &[])
}

/// As [`parse_tables`], for a process that runs and whose file may be another by now: it is never ended.
pub fn parse_again<C: Parser>(tables: Tables) -> Result<Parsed<C>, String> {
    let line =
        Line { command: command_with::<C>(Some(tables)), args: std::env::args_os().collect(), own: &[] };
    match line.parse(Some(tables)) {
        Ok(parsed) => Ok(parsed),
        Err(Wrong::Setting(error)) => Err(error.to_string()),
        Err(Wrong::Line(error, None)) => Err(error.to_string()),
        Err(Wrong::Line(error, Some(table))) => Err(format!("[{table}]: {error}")),
    }
}

fn parse_with<C: Parser>(
    tables: Option<Tables>,
    own: &'static [&'static str],
) -> Result<Parsed<C>, SettingError> {
    let line = Line { command: command_with::<C>(tables), args: std::env::args_os().collect(), own };
    match line.parse(tables) {
        Ok(parsed) => Ok(parsed),
        Err(Wrong::Setting(error)) => Err(error),
        Err(Wrong::Line(error, table)) => {
            let _closed = error.print();
            if let (true, Some(path)) = (error.use_stderr(), line.path()) {
                let of = table.map(|table| format!(", and these are of [{table}]")).unwrap_or_default();
                eprintln!("\nSettings are also from {}{of}.", path.display());
            }
            std::process::exit(error.exit_code())
        }
    }
}

/// The program's command line, with the flag of the file. For completions and manual pages.
pub fn command<C: Parser>() -> Command {
    command_with::<C>(None)
}

/// As [`command`], where the file may have tables.
pub fn command_with<C: Parser>(tables: Option<Tables>) -> Command {
    let command = C::command().arg(config());
    match tables {
        Some(tables) => command.arg(choice(tables.kind)),
        None => command,
    }
}

/// The flag of the file.
fn config() -> Arg {
    let help = "A TOML file with settings by the names of their flags (`log = \"debug\"`), for those that neither \
                a flag nor a variable sets. It holds no secrets";
    Arg::new(FLAG)
        .long(FLAG)
        .env(VARIABLE)
        .value_name("PATH")
        .value_parser(value_parser!(PathBuf))
        .global(true)
        .display_order(LAST)
        .help(help)
}

/// The flag that chooses a table.
fn choice(kind: &'static str) -> Arg {
    let help = format!("The table of the file that is meant, [{kind}.NAME], where it has some");
    Arg::new(TABLE)
        .long(kind)
        .env(kind.to_uppercase())
        .value_name("NAME")
        .global(true)
        .display_order(LAST)
        .help(help)
}

/// What is wrong with the settings: as a whole, or as clap says it.
enum Wrong {
    Setting(SettingError),
    /// In this table of the file.
    Line(clap::Error, Option<String>),
}

impl From<SettingError> for Wrong {
    fn from(error: SettingError) -> Self {
        Self::Setting(error)
    }
}

/// A command line, before it is parsed.
struct Line {
    command: Command,
    args: Vec<OsString>,
    /// What the program reads of the file itself.
    own: &'static [&'static str],
}

impl Line {
    fn parse<C: Parser>(&self, tables: Option<Tables>) -> Result<Parsed<C>, Wrong> {
        let file = self.path().map(|path| File::read(path, &self.command, tables, self.own)).transpose()?;
        let (Some(file), Some(tables)) = (&file, tables) else {
            let (cli, settings) = self.parse_one(file.as_ref(), None)?;
            let own = file.map(|file| file.own).unwrap_or_default();
            return Ok(Parsed { cli, settings, tables: Vec::new(), own });
        };
        let lenient = self.lenient();
        let chosen = lenient.as_ref().and_then(|matches| matches.get_one::<String>(TABLE));
        let command = lenient.as_ref().and_then(ArgMatches::subcommand_name);
        let is_for_all = command.is_none_or(|command| tables.commands.contains(&command));
        let table = match chosen {
            Some(chosen) => Some(file.table(chosen, tables.kind)?),
            None if is_for_all => None,
            None => file.only_table(tables.kind)?,
        };
        let (cli, settings) = self.parse_one(Some(file), table)?;
        let all = if table.is_none() && command.is_some() { file.tables.as_slice() } else { &[] };
        let parse = |table: &(String, Values)| -> Result<Table<C>, Wrong> {
            let (cli, settings) = self.parse_one(Some(file), Some(table))?;
            Ok(Table { name: table.0.clone(), cli, settings })
        };
        Ok(Parsed {
            cli,
            settings,
            tables: all.iter().map(parse).collect::<Result<_, _>>()?,
            own: toml::Table::new(),
        })
    }

    fn parse_one<C: Parser>(
        &self,
        file: Option<&File>,
        table: Option<&(String, Values)>,
    ) -> Result<(C, Vec<Setting>), Wrong> {
        let mut command = self.command.clone();
        if let Some(file) = file {
            command = with_defaults(command, &file.values);
            if let (Some((name, values)), Some(kind)) = (table, file.kind) {
                command = with_table(command, &Overrides { kind, name, values });
            }
        }
        let of =
            || file.zip(table).map(|(file, (name, _))| format!("{}.{name}", file.kind.unwrap_or_default()));
        let wrong = |error| Wrong::Line(error, of());
        let mut matches = command.try_get_matches_from_mut(&self.args).map_err(wrong)?;
        refuse_passwords(&command, &matches)?;
        let settings = settings(&command, &matches, file, table);
        let parsed = C::from_arg_matches_mut(&mut matches);
        Ok((parsed.map_err(|error| wrong(error.format(&mut command)))?, settings))
    }

    /// Other errors wait until the file is read: it may set what is missing.
    fn lenient(&self) -> Option<ArgMatches> {
        self.command.clone().ignore_errors(true).try_get_matches_from(&self.args).ok()
    }

    /// The path of the file, if there is one. clap hands a global flag that stands behind the command up to here.
    fn path(&self) -> Option<PathBuf> {
        self.lenient()?.get_one(FLAG).cloned()
    }
}

/// The name of a setting that the file may set: a flag that has a variable.
fn name(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|long| arg.get_env().is_some() && *long != FLAG && arg.get_id() != TABLE)
}

/// The command with the file's values as its defaults.
fn with_defaults(command: Command, values: &Values) -> Command {
    let command = command.mut_args(|arg| match name(&arg).and_then(|name| values.get(name)) {
        Some(value) => arg.default_value(value.clone()).required(false),
        None => arg,
    });
    command.mut_subcommands(|inner| with_defaults(inner, values))
}

/// What is set for a table alone.
struct Overrides<'a> {
    kind: &'a str,
    name: &'a str,
    values: &'a Values,
}

impl Overrides<'_> {
    /// The variable that sets for this table alone what `variable` sets for all.
    fn variable(&self, variable: &str) -> String {
        format!("{}_{}_{variable}", self.kind, self.name.replace('-', "_")).to_uppercase()
    }

    fn sets(&self, name: &str, variable: &str) -> bool {
        self.values.contains_key(name) || std::env::var_os(self.variable(variable)).is_some()
    }
}

/// The command with a table's values as its defaults, and with the table's own variables instead of the general ones.
fn with_table(command: Command, table: &Overrides<'_>) -> Command {
    const IN_FILE: &str = "-file";
    let command = command.mut_args(|arg| {
        let Some(name) = name(&arg) else { return arg };
        let variable = arg.get_env().unwrap_or_default().to_string_lossy().into_owned();
        if table.sets(name, &variable) {
            let value = table.values.get(name).cloned();
            let arg = arg.env(table.variable(&variable)).required(false);
            return match value {
                Some(value) => arg.default_value(value),
                None => arg,
            };
        }
        // A secret of this one alone, given in the other way, replaces the general one.
        let other = match name.strip_suffix(IN_FILE) {
            Some(plain) => table.sets(plain, variable.trim_end_matches("_FILE")),
            None => table.sets(&format!("{name}{IN_FILE}"), &format!("{variable}_FILE")),
        };
        if other {
            arg.env(table.variable(&variable)).default_value(Resettable::Reset).required(false)
        } else {
            arg
        }
    });
    command.mut_subcommands(|inner| with_table(inner, table))
}

/// Every user of the machine can read a command line.
fn refuse_passwords(command: &Command, matches: &ArgMatches) -> Result<(), SettingError> {
    if let Some((inner, matches)) = matches.subcommand()
        && let Some(command) = command.find_subcommand(inner)
    {
        return refuse_passwords(command, matches);
    }
    for arg in command.get_arguments().filter(|arg| arg.is_hide_env_values_set()) {
        let id = arg.get_id().as_str();
        let is_flag = matches.value_source(id) == Some(ValueSource::CommandLine);
        let values = matches.get_raw(id).into_iter().flatten();
        if is_flag && values.into_iter().any(|value| has_password(&value.to_string_lossy())) {
            let variable = arg.get_env().unwrap_or_default().display().to_string();
            let problem = format!(
                "has a password, which every user of this machine could read; set the variable {variable}, or name a \
                 file that holds the URL: --{id}-file",
                id = arg.get_long().unwrap_or_default()
            );
            return Err(SettingError::new(format!("--{}", arg.get_long().unwrap_or_default()), problem));
        }
    }
    Ok(())
}

/// The settings of the chosen command.
fn settings(
    command: &Command,
    matches: &ArgMatches,
    file: Option<&File>,
    table: Option<&(String, Values)>,
) -> Vec<Setting> {
    if let Some((inner, matches)) = matches.subcommand()
        && let Some(command) = command.find_subcommand(inner)
    {
        return settings(command, matches, file, table);
    }
    let setting = |arg: &Arg| {
        let name = name(arg)?;
        let id = arg.get_id().as_str();
        let value = matches.get_raw(id).map(|values| {
            let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
            values.join(",")
        });
        // A secret's value is not shown.
        let value = if arg.is_hide_env_values_set() { value.map(|_| "***".to_owned()) } else { value };
        let source = match (matches.value_source(id), file) {
            (Some(ValueSource::CommandLine), _) => Source::Flag,
            (Some(ValueSource::EnvVariable), _) => {
                Source::Variable(arg.get_env().unwrap_or_default().to_string_lossy().into_owned())
            }
            (Some(_), Some(file)) => match table {
                Some((table, values)) if values.contains_key(name) => {
                    Source::Table(file.path.clone(), format!("{}.{table}", file.kind.unwrap_or_default()))
                }
                _ if file.values.contains_key(name) => Source::File(file.path.clone()),
                _ => Source::Default,
            },
            _ => Source::Default,
        };
        Some(Setting { name: name.to_owned(), value, source })
    };
    command.get_arguments().filter_map(setting).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_may_be_named_before_and_after_the_command_and_beside_errors() {
        let needed = Arg::new("needed").long("needed").required(true);
        let command = Command::new("program").arg(config()).subcommand(Command::new("run").arg(needed));
        let line = |text: &str| Line {
            own: &[],
            command: command.clone(),
            args: text.split(' ').map(OsString::from).collect(),
        };
        for text in
            ["program --config f run", "program run --config f", "program run --config=f --no-such-flag"]
        {
            assert_eq!(line(text).path(), Some(PathBuf::from("f")), "{text}");
        }
        assert_eq!(line("program run").path(), None);
    }
}
