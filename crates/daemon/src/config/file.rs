//! The configuration file: a TOML table of settings by their flags' names, such as `lanes = 4`.
//!
//! A flag goes before a variable, a variable before the file, the file before what is built in. The file
//! may hold whatever has a variable too, but no secrets: those have files of their own. One file can serve
//! all of a program's commands; each takes what it knows.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Command, Parser, parser::ValueSource, value_parser};
use toml::{Table, Value};

use super::SettingError;

const FLAG: &str = "config";
const VARIABLE: &str = "CONFIG_FILE";

/// A command line that was understood, and where each setting came from.
#[derive(Debug)]
pub struct Parsed<C> {
    /// What the program does.
    pub cli: C,
    /// The settings of the command that was chosen.
    pub settings: Vec<Setting>,
}

/// A setting and its value.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The flag, without dashes.
    pub name: String,
    /// What it is set to, as it was written. None when it is not set at all.
    pub value: Option<String>,
    /// Who set it.
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
    /// The program.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// Parses the command line, the environment, and the file that `--config` or `CONFIG_FILE` names. Ends
/// the process, as clap does, where help is asked for or something is wrong with what is not in the file.
pub fn parse<C: Parser>() -> Result<Parsed<C>, SettingError> {
    let help = "A TOML file with settings by the names of their flags (`log = \"debug\"`), for those that neither \
                a flag nor a variable sets. It holds no secrets";
    let config = Arg::new(FLAG)
        .long(FLAG)
        .env(VARIABLE)
        .value_name("PATH")
        .value_parser(value_parser!(PathBuf))
        .global(true)
        .help(help);
    let mut command = C::command().arg(config);
    let file = match path(&command) {
        Some(path) => Some((read(&path, &command)?, path)),
        None => None,
    };
    if let Some((values, _)) = &file {
        command = with_defaults(command, values);
    }
    let path = file.as_ref().map(|(_, path)| path.as_path());
    let ended = |error: &clap::Error| -> ! {
        let _closed = error.print();
        if let (true, Some(path)) = (error.use_stderr(), path) {
            eprintln!("\nSettings are also from {}.", path.display());
        }
        std::process::exit(error.exit_code())
    };
    let mut matches = command.try_get_matches_from_mut(std::env::args_os()).unwrap_or_else(|e| ended(&e));
    let settings = settings(&command, &matches, file.as_ref().map(|(values, path)| (values, path.as_path())));
    let cli =
        C::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| ended(&error.format(&mut command)));
    Ok(Parsed { cli, settings })
}

/// The file, if somebody names one. Whatever else is wrong is not to be judged before it is read.
fn path(command: &Command) -> Option<PathBuf> {
    let matches = command.clone().ignore_errors(true).try_get_matches().ok()?;
    let mut matches = &matches;
    // A flag may stand before or after the command.
    let mut path = matches.get_one(FLAG);
    while let Some((_, inner)) = matches.subcommand() {
        matches = inner;
        path = matches.get_one(FLAG).or(path);
    }
    path.cloned()
}

/// The file's values, each for a flag of some command, as they would be written there.
fn read(path: &Path, command: &Command) -> Result<Vec<(String, String)>, SettingError> {
    let wrong = |problem: &dyn fmt::Display| {
        SettingError::new(format!("{VARIABLE} (or --{FLAG})"), format_args!("{}: {problem}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
    // The parser's own text would quote the line, which may hold what should not be in there.
    let table: Table = toml::from_str(&text).map_err(|error: toml::de::Error| {
        let line =
            error.span().and_then(|span| text.get(..span.start)).map_or(0, |s| s.matches('\n').count());
        wrong(&format_args!("line {}: {}", line + 1, error.message()))
    })?;
    let mut known = Vec::new();
    all(command, &mut known);
    known.sort_unstable();
    known.dedup();
    let value = |(name, value): (String, Value)| {
        if !known.contains(&name) {
            let known = known.join(", ");
            return Err(wrong(&format_args!("{name} is no setting; known are {known}")));
        }
        let value = match value {
            Value::String(text) => text,
            Value::Integer(number) => number.to_string(),
            Value::Boolean(flag) => flag.to_string(),
            _ => return Err(wrong(&format_args!("{name} should be a string, a number or true or false"))),
        };
        Ok((name, value))
    };
    table.into_iter().map(value).collect()
}

/// The flag's name of what may be in a file.
fn name(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|long| arg.get_env().is_some() && *long != FLAG)
}

fn all(command: &Command, names: &mut Vec<String>) {
    names.extend(command.get_arguments().filter_map(name).map(str::to_owned));
    command.get_subcommands().for_each(|inner| all(inner, names));
}

/// The command with the file's values in the place of those that are built in.
fn with_defaults(command: Command, values: &[(String, String)]) -> Command {
    let command =
        command.mut_args(|arg| match values.iter().find(|(name, _)| self::name(&arg) == Some(name)) {
            Some((_, value)) => arg.default_value(value.clone()).required(false),
            None => arg,
        });
    command.mut_subcommands(|inner| with_defaults(inner, values))
}

/// The settings of the command that was chosen.
fn settings(
    command: &Command,
    matches: &ArgMatches,
    file: Option<(&Vec<(String, String)>, &Path)>,
) -> Vec<Setting> {
    if let Some((inner, matches)) = matches.subcommand()
        && let Some(command) = command.find_subcommand(inner)
    {
        return settings(command, matches, file);
    }
    let setting = |arg: &Arg| {
        let name = name(arg)?;
        let id = arg.get_id().as_str();
        let raw = matches.get_raw(id).map(|values| {
            let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
            values.join(",")
        });
        let source = match (matches.value_source(id), file) {
            (Some(ValueSource::CommandLine), _) => Source::Flag,
            (Some(ValueSource::EnvVariable), _) => {
                Source::Variable(arg.get_env().unwrap_or_default().to_string_lossy().into_owned())
            }
            (Some(_), Some((values, path))) if values.iter().any(|(known, _)| known == name) => {
                Source::File(path.to_owned())
            }
            _ => Source::Default,
        };
        Some(Setting { name: name.to_owned(), value: raw, source })
    };
    command.get_arguments().filter_map(setting).collect()
}
