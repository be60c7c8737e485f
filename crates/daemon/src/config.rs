//! Settings: where a program's values come from, and how a wrong one is reported.
//!
//! Settings are flags with an environment variable each (clap), but for secrets: those come from a
//! variable or a file, never from the command line, where every user of the machine could read them.

#[cfg(feature = "amqp")]
pub mod broker;
pub mod database;
pub mod permissions;

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use secrecy::{ExposeSecret, SecretString};

/// A setting that the program cannot start with.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct SettingError {
    /// The setting, as the user writes it.
    pub name: String,
    /// What is wrong and what it should look like. Never the value of a secret.
    pub problem: String,
}

impl SettingError {
    /// `problem` says what the setting should look like.
    pub fn new(name: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self { name: name.into(), problem: problem.to_string() }
    }
}

/// Reads a secret from the variable `name`, or from the file that `name_FILE` (or its flag, in `file`)
/// points to. `form` says what it should look like, for the error when there is none.
pub fn secret(name: &str, file: Option<&PathBuf>, form: &str) -> Result<SecretString, SettingError> {
    let value = match std::env::var(name) {
        Ok(value) => Some(SecretString::from(value)),
        Err(std::env::VarError::NotUnicode(_)) => {
            return Err(SettingError::new(name, format_args!("is not UTF-8; it should look like {form}")));
        }
        Err(std::env::VarError::NotPresent) => None,
    };
    secret_or_file(name, value.as_ref(), file, form)
}

/// A secret that is given by its `value`, or by a `file` that holds it.
fn secret_or_file(
    name: &str,
    value: Option<&SecretString>,
    file: Option<&PathBuf>,
    form: &str,
) -> Result<SecretString, SettingError> {
    let from_file = match file {
        Some(path) => Some(std::fs::read_to_string(path).map_err(|e| {
            SettingError::new(format!("{name}_FILE"), format_args!("cannot read {}: {e}", path.display()))
        })?)
        .inspect(|_| permissions::warn_if_others_read(&format!("{name}_FILE"), path)),
        None => None,
    };
    let value = match (value, from_file) {
        (Some(_), Some(_)) => {
            return Err(SettingError::new(name, format_args!("set either {name} or {name}_FILE, not both")));
        }
        (Some(value), None) => value.expose_secret().trim().to_owned(),
        (None, Some(value)) => value.trim().to_owned(),
        (None, None) => {
            let problem = format_args!("is not set; it should look like {form}");
            return Err(SettingError::new(format!("{name} (or {name}_FILE)"), problem));
        }
    };
    if value.is_empty() {
        return Err(SettingError::new(name, format_args!("is empty; it should look like {form}")));
    }
    Ok(value.into())
}

/// A secret as clap takes it: any text, so that no error quotes it.
#[expect(clippy::unnecessary_wraps, reason = "the form of a parser")]
fn secret_text(text: &str) -> Result<SecretString, std::convert::Infallible> {
    Ok(SecretString::from(text))
}

/// Whether one of a list of URLs has a password, as far as can be told of a text that may be no URL.
pub fn has_password(urls: &str) -> bool {
    urls.split(',').any(|url| {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
        user.contains(':') || url.contains("password=")
    })
}

/// Parses a secret that came from [`secret`] without ever quoting it.
pub fn parse_secret<T: FromStr>(name: &str, value: &SecretString, form: &str) -> Result<T, SettingError> {
    value.expose_secret().parse().map_err(|_| {
        SettingError::new(name, format_args!("cannot be understood; it should look like {form}"))
    })
}

/// Whether a URL's host is this machine, so that the traffic does not leave it.
fn is_this_machine(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
    let loopback = host.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    loopback || host == "localhost" || host.ends_with(".localhost")
}

/// Parses a duration such as `250ms`, `2s`, `1m 30s`, `12h` or `30d`, for clap.
pub fn duration(text: &str) -> Result<Duration, String> {
    // The library's own error is about units; ours is an example.
    humantime::parse_duration(text).map_err(|_| "it should look like 250ms, 2s, 1m, 12h or 30d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_a_url_is_seen() {
        for (urls, has) in [
            ("postgres://relay@db/shop", false),
            ("postgres://relay:hush@db/shop", true),
            ("postgres://db:5432/shop", false),
            ("postgres://relay@db/shop?password=hush", true),
            ("amqp://rabbit:5672,amqp://relay:hush@rabbit", true),
            ("amqps://rabbit/?auth_mechanism=external", false),
        ] {
            assert_eq!(has_password(urls), has, "{urls}");
        }
    }

    #[test]
    fn durations_are_numbers_with_a_unit() {
        for (text, seconds) in [
            ("250ms", 0.25),
            ("2s", 2.0),
            ("1m", 60.0),
            ("12h", 43_200.0),
            ("30d", 2_592_000.0),
            ("1m 30s", 90.0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs_f64(seconds)), "{text}");
        }
        for text in ["", "10", "s", "-1s", "1 parsec", "2s?", "99999999999999999999s"] {
            assert_eq!(
                duration(text).unwrap_err(),
                "it should look like 250ms, 2s, 1m, 12h or 30d",
                "{text}"
            );
        }
    }
}
