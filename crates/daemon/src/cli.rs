//! The command line of a program, with its configuration file: a TOML table of settings by their flags' names, such as
//! `lanes = 4`.
//!
//! A flag overrides a variable, a variable the file, the file the default. The file may set what has a variable too, but
//! holds no secrets: those have files of their own. One file can serve all of a program's commands; each takes the
//! settings that it has.

use std::{
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Command, Parser, parser::ValueSource, value_parser};
use toml::{Table, Value};

use crate::config::SettingError;

const FLAG: &str = "config";
const VARIABLE: &str = "CONFIG_FILE";

/// A parsed command line, and where each setting came from.
#[derive(Debug)]
pub struct Parsed<C> {
    /// The command and its settings.
    pub cli: C,
    /// The settings of the chosen command.
    pub settings: Vec<Setting>,
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
    /// The default of the program.
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

/// Parses the command line, the environment, and the file that `--config` or `CONFIG_FILE` names. Prints the help, or an
/// error of the command line or the environment, and ends the process, as clap does.
pub fn parse<C: Parser>() -> Result<Parsed<C>, SettingError> {
    let mut command = command::<C>();
    let file = match path(&command, std::env::args_os()) {
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

/// The program's command line, with the flag of the file. For completions and manual pages.
pub fn command<C: Parser>() -> Command {
    C::command().arg(config())
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
        .help(help)
}

/// The path of the file, if there is one. Other errors wait until the file is read: it may set what is missing.
fn path(command: &Command, args: impl IntoIterator<Item = OsString>) -> Option<PathBuf> {
    // clap hands a global flag that stands behind the command up to here.
    command.clone().ignore_errors(true).try_get_matches_from(args).ok()?.get_one(FLAG).cloned()
}

/// The file's settings, with their values as a flag would have them.
fn read(path: &Path, command: &Command) -> Result<Vec<(String, String)>, SettingError> {
    let wrong = |problem: &dyn fmt::Display| {
        SettingError::new(format!("{VARIABLE} (or --{FLAG})"), format_args!("{}: {problem}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
    // The parser's own text would quote the line, which may hold a secret by mistake.
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

/// The name of a setting that the file may set: a flag that has a variable.
fn name(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|long| arg.get_env().is_some() && *long != FLAG)
}

fn all(command: &Command, names: &mut Vec<String>) {
    names.extend(command.get_arguments().filter_map(name).map(str::to_owned));
    command.get_subcommands().for_each(|inner| all(inner, names));
}

/// The command with the file's values as its defaults.
fn with_defaults(command: Command, values: &[(String, String)]) -> Command {
    let command =
        command.mut_args(|arg| match values.iter().find(|(name, _)| self::name(&arg) == Some(name)) {
            Some((_, value)) => arg.default_value(value.clone()).required(false),
            None => arg,
        });
    command.mut_subcommands(|inner| with_defaults(inner, values))
}

/// The settings of the chosen command.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_may_be_named_before_and_after_the_command_and_beside_errors() {
        let needed = Arg::new("needed").long("needed").required(true);
        let command = Command::new("program").arg(config()).subcommand(Command::new("run").arg(needed));
        for line in
            ["program --config f run", "program run --config f", "program run --config=f --no-such-flag"]
        {
            let path = path(&command, line.split(' ').map(OsString::from));
            assert_eq!(path, Some(PathBuf::from("f")), "{line}");
        }
        assert_eq!(path(&command, ["program", "run"].map(OsString::from)), None);
    }
}
