//! What a database URL may say: what the driver would ignore, or misunderstand, is an error that names it.

use std::path::Path;

use crate::config::{SettingError, permissions};

pub(super) const FORM: &str = "postgres://user:password@host:5432/database";

/// What a URL's query may set.
const PARAMETERS: [&str; 18] = [
    "application_name",
    "channel_binding",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "user",
];
/// Those that name a file.
const FILES: [&str; 7] =
    ["sslrootcert", "ssl-root-cert", "ssl-ca", "sslcert", "ssl-cert", "sslkey", "ssl-key"];

/// The URL as the driver takes it. Never quotes it, nor a value of it: they may be the password.
pub(super) fn supported(setting: &str, text: &str) -> Result<String, SettingError> {
    let wrong = |problem: String| Err(SettingError::new(setting, problem));
    // The driver takes any scheme, and would look for PostgreSQL at a MySQL server.
    let Some((_, rest)) =
        text.split_once("://").filter(|(scheme, _)| ["postgres", "postgresql"].contains(scheme))
    else {
        return wrong(format!("should look like {FORM}"));
    };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
    if hosts.contains(',') {
        return wrong(several());
    }
    // The host of `user@/database?host=/folder` is in the query; the parser insists on one.
    let filled = hosts.is_empty() && authority.contains('@') && text.contains("host=");
    let text = if filled { text.replacen("@/", "@localhost/", 1) } else { text.to_owned() };
    let Ok(mut url) = url::Url::parse(&text) else {
        return wrong(format!(
            "cannot be understood; it should look like {FORM}. Characters such as /, #, ? and @ in the user or the \
             password are written as %2F, %23, %3F and %40"
        ));
    };
    let mut parameters: Vec<(String, String)> = Vec::new();
    for (name, value) in url.query_pairs() {
        if name.starts_with("options[") {
            parameters.push((name.into_owned(), value.into_owned()));
            continue;
        }
        let Some(name) = PARAMETERS.into_iter().find(|known| **known == *name) else {
            return wrong(unknown(&name));
        };
        match name {
            "channel_binding" if value == "require" => {
                return wrong(
                    "channel_binding=require is not supported; use sslmode=verify-full instead, which \
                     keeps others out of the connection, too"
                        .to_owned(),
                );
            }
            // The other two are what the driver does.
            "channel_binding" => continue,
            "host" | "hostaddr" | "port" if value.contains(',') => return wrong(several()),
            _ if FILES.contains(&name) => {
                if let Err(error) = std::fs::File::open(&*value) {
                    return wrong(format!("{name}: cannot read {value}: {error}"));
                }
                if matches!(name, "sslkey" | "ssl-key") {
                    permissions::warn_if_others_read(&format!("{setting} ({name})"), Path::new(&*value));
                }
            }
            _ => {}
        }
        parameters.push((name.to_owned(), value.into_owned()));
    }
    if parameters.is_empty() {
        url.set_query(None);
    } else {
        url.query_pairs_mut().clear().extend_pairs(parameters);
    }
    Ok(url.into())
}

fn several() -> String {
    "names several hosts, and one is supported: name the primary, or a name or address that always leads to it".to_owned()
}

fn unknown(name: &str) -> String {
    let instead = match name {
        "connect_timeout" => "; leave connect_timeout out: connecting is tried for 5 to 10 s, then again",
        "target_session_attrs" | "load_balance_hosts" => "; leave it out: the one host must be the primary",
        "keepalives"
        | "keepalives_idle"
        | "keepalives_interval"
        | "keepalives_count"
        | "tcp_user_timeout" => "; leave it out: a dead connection is noticed within 10 s",
        "pgbouncer" | "prepareThreshold" | "statement_cache_mode" | "statement-cache-capacity" => {
            "; leave it out: each connection needs a session of its own (a pooler in session mode, or none)"
        }
        _ => "",
    };
    let known = PARAMETERS.join(", ");
    // A name is the operator's own word unless the password has an unescaped `?` or `&`, so only a known one is quoted.
    if instead.is_empty() {
        format!("a query parameter is unknown; supported are {known}")
    } else {
        format!("a query parameter is not supported{instead}. Supported are {known}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(url: &str) -> String {
        supported("DATABASE_URL", url).unwrap_err().to_string()
    }

    #[test]
    fn what_is_supported_stays_as_it_is() {
        for url in [
            "postgres://u:p%40@db:5432/d",
            "postgresql://u@[::1]/d?sslmode=require&application_name=x",
            "postgres://u@/d?host=%2Frun%2Fpostgresql&port=6432",
            "postgres://u@%2Frun%2Fpostgresql/d",
            "postgres:///d",
        ] {
            let url_for_driver = supported("DATABASE_URL", url).unwrap();
            assert!(
                url_for_driver.parse::<sqlx::postgres::PgConnectOptions>().is_ok(),
                "{url}: {url_for_driver}"
            );
        }
        for binding in ["prefer", "disable"] {
            let url = format!("postgres://u@db/d?sslmode=require&channel_binding={binding}");
            assert_eq!(supported("DATABASE_URL", &url).unwrap(), "postgres://u@db/d?sslmode=require");
        }
    }

    #[test]
    fn what_is_not_supported_is_named_and_never_quoted() {
        for (url, expected) in [
            ("postgres://u:hush@a:5432,b:5432/d", "names several hosts"),
            ("postgres://u:hush@a,b/d", "names several hosts"),
            ("postgres://u:hush@/d?host=a,b", "names several hosts"),
            ("postgres://u:hush@a/d?channel_binding=require", "channel_binding=require is not supported"),
            ("postgres://u:hush@a/d?connect_timeout=10", "leave connect_timeout out"),
            ("postgres://u:hush@a/d?target_session_attrs=read-write", "must be the primary"),
            ("postgres://u:hush@a/d?keepalives_idle=5", "a dead connection is noticed"),
            ("postgres://u:hush@a/d?pgbouncer=true", "needs a session of its own"),
            ("postgres://u@a/d?pasword=hush", "a query parameter is unknown"),
            ("postgres://u:hush@a/d?sslrootcert=/nowhere/ca.pem", "sslrootcert: cannot read /nowhere/ca.pem"),
            ("postgres://u:hush/1@a/d", "written as %2F"),
            ("mysql://u:hush@a/d", "should look like postgres://"),
            ("hush", "should look like postgres://"),
        ] {
            let error = error(url);
            assert!(error.contains(expected) && !error.contains("hush"), "{url}: {error}");
        }
    }
}
