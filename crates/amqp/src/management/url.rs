//! A management API from its URL.

use std::{fmt, str::FromStr};

use percent_encoding::percent_decode_str;
use reqwest::{Certificate, Identity, redirect::Policy};
use url::Url;

use super::{CONNECT, InvalidManagement, Management, TIMEOUT, cause};

pub(super) const FORM: &str =
    "https://user:password@host:15671 (http://user:password@host:15672 without TLS)";
/// As `amqps` has them.
const PARAMETERS: [&str; 3] = ["cacertfile", "certfile", "keyfile"];

impl InvalidManagement {
    fn new(problem: impl fmt::Display) -> Self {
        Self(problem.to_string())
    }
}

/// The PEM files that the URL names are read. With `https`, the broker must have a certificate for its host from an
/// authority that the machine trusts, or from the one of `?cacertfile=PATH`; `&certfile=PATH&keyfile=PATH` is a
/// certificate to show to it.
impl FromStr for Management {
    type Err = InvalidManagement;

    fn from_str(text: &str) -> Result<Self, InvalidManagement> {
        let wrong = || InvalidManagement::new(format_args!("it should look like {FORM}"));
        let url = Url::parse(text).map_err(|_| wrong())?;
        let host = url.host_str().filter(|_| matches!(url.scheme(), "http" | "https")).ok_or_else(wrong)?;
        let decoded =
            |text: &str| percent_decode_str(text).decode_utf8().map(Into::into).map_err(|_| wrong());
        let user: String = decoded(url.username())?;
        let password: String = decoded(url.password().unwrap_or_default())?;
        if user.is_empty() || url.fragment().is_some() {
            return Err(wrong());
        }

        // Passwords go to the broker alone.
        let mut http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .connect_timeout(CONNECT)
            .redirect(Policy::none())
            .no_proxy();
        let (mut certificate, mut key) = (None, None);
        for (name, value) in url.query_pairs() {
            let name = PARAMETERS.iter().find(|known| **known == name).ok_or_else(|| {
                let known = PARAMETERS.join(", ");
                InvalidManagement::new(format_args!("a query parameter is unknown; known are {known}"))
            })?;
            if url.scheme() != "https" {
                return Err(InvalidManagement::new(format_args!("{name} is for https:// only")));
            }
            let wrong = |problem: &dyn fmt::Display| {
                InvalidManagement::new(format_args!("{name}: cannot use {value}: {problem}"))
            };
            let pem = std::fs::read(&*value).map_err(|error| wrong(&error))?;
            match *name {
                "cacertfile" => {
                    let authorities = Certificate::from_pem_bundle(&pem).map_err(|error| wrong(&error))?;
                    if authorities.is_empty() {
                        return Err(wrong(&"it should be a PEM file with a CERTIFICATE"));
                    }
                    http = http.tls_certs_only(authorities);
                }
                "certfile" => certificate = Some(pem),
                _ => key = Some(pem),
            }
        }
        match (certificate, key) {
            (Some(mut pem), Some(key)) => {
                pem.push(b'\n');
                pem.extend(key);
                let identity = Identity::from_pem(&pem)
                    .map_err(|_| InvalidManagement::new("certfile and keyfile cannot be used together"))?;
                http = http.identity(identity);
            }
            (None, None) => {}
            _ => return Err(InvalidManagement::new("certfile and keyfile belong together")),
        }

        let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
        let base = format!("{}://{host}{port}{}", url.scheme(), url.path().trim_end_matches('/'));
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let http = http
            .build()
            .map_err(|error| InvalidManagement::new(format_args!("TLS cannot be used: {}", cause(&error))))?;
        Ok(Self { http, base, host, user, password })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named_and_no_password_is() {
        for (url, named) in [
            ("", "it should look like"),
            ("u:hush@host", "it should look like"),
            ("amqp://u:hush@host", "it should look like"),
            ("http://host:15672", "it should look like"),
            ("http://u:hush@host/#x", "it should look like"),
            ("https://u:hush@host?verify=none", "a query parameter is unknown"),
            ("http://u:hush@host?cacertfile=/nowhere", "cacertfile is for https:// only"),
            ("https://u:hush@host?cacertfile=/nowhere", "cacertfile: cannot use /nowhere"),
            ("https://u:hush@host?cacertfile=/dev/null", "it should be a PEM file with a CERTIFICATE"),
            ("https://u:hush@host?certfile=/dev/null", "certfile and keyfile belong together"),
        ] {
            let error = url.parse::<Management>().unwrap_err().to_string();
            assert!(error.contains(named) && !error.contains("hush"), "{url}: {error}");
        }
        let management: Management = "http://u:h%40sh@host:15672/rabbit/".parse().unwrap();
        assert_eq!(format!("{management:?}"), "http://u@host:15672/rabbit");
        assert_eq!(management.password, "h@sh");
    }
}
