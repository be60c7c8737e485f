//! Who may do what: keys with roles, and the sessions of browsers that logged in with one.

mod session;

use std::{collections::BTreeMap, sync::Arc};

use poem::{
    Request,
    http::{HeaderMap, Method, header, uri::Authority},
};
use serde::Deserialize;
use web::{
    front::{Admission, Caller, Key, Keys},
    problem::Problem,
};

pub use self::session::{COOKIES, SESSION_HOURS, Sessions, Token};

/// What a key may. Each role may what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Look, without bodies.
    Look,
    /// Pause, resume, try again, drop.
    Act,
    /// Look at the bodies of events, which have personal data.
    Bodies,
}

impl Role {
    /// As the file has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Act => "act",
            Self::Bodies => "bodies",
        }
    }
}

/// Who sends a request.
#[derive(Clone, Debug)]
pub struct User {
    /// The key's name.
    pub name: String,
    /// What it may.
    pub role: Role,
    /// The token that its forms carry. None for a program that sends its key each time: no other site can make it do so.
    pub form_token: Option<String>,
}

/// The keys, their roles, and the sessions.
#[derive(Clone)]
pub struct Access {
    keys: Keys,
    roles: Arc<BTreeMap<String, Role>>,
    sessions: Arc<Sessions>,
}

impl Access {
    /// With the keys of the front.
    pub fn new(keys: Keys, roles: BTreeMap<String, Role>) -> Self {
        Self { keys, roles: Arc::new(roles), sessions: Arc::default() }
    }

    fn role(&self, key: &Key) -> Option<Role> {
        self.roles.get(key.caller().name()).copied()
    }

    /// Who sends a request; none where it has no key that has a role.
    pub fn user(&self, request: &Request) -> Option<User> {
        let (key, form_token) = if let Some(key) = self.keys.of(request) {
            (key, None)
        } else {
            let session = self.sessions.find(&Token::of(request.headers())?)?;
            // Also while the session goes on: the key may have been taken out of the file.
            if !self.keys.has(&session.key) {
                return None;
            }
            (session.key, Some(session.form_token))
        };
        let role = self.role(&key)?;
        Some(User { name: key.caller().name().to_owned(), role, form_token })
    }

    /// Begins a session with a key's secret. None where there is no such key, or where it has no role.
    pub fn log_in(&self, secret: &str) -> Option<Token> {
        let key = self.keys.find(secret.trim().as_bytes())?;
        self.role(&key)?;
        Some(self.sessions.begin(key))
    }

    /// Ends the session of a request.
    pub fn log_out(&self, request: &Request) {
        if let Some(token) = Token::of(request.headers()) {
            self.sessions.end(&token);
        }
    }
}

/// Every request reaches the routes, which send those of no user to the login. The name is for the log.
impl Admission for Access {
    fn caller(&self, request: &Request) -> Result<Caller, Problem> {
        Ok(self.user(request).map_or_else(Caller::anonymous, |user| Caller::new(&user.name)))
    }
}

/// Whether a page of another site may have sent a request: browsers say where a form stands. A request without these
/// headers comes from no browser, or from one that knows no `SameSite` cookies either.
pub fn is_from_elsewhere(method: &Method, headers: &HeaderMap) -> bool {
    if method.is_safe() {
        return false;
    }
    if let Some(site) = headers.get("sec-fetch-site")
        && site != "same-origin"
        && site != "none"
    {
        return true;
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let host = headers.get(header::HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    let origin = origin.and_then(|(_, host)| host.parse::<Authority>().ok());
    origin.is_none() || origin != host
}

/// Whether the browser came by HTTPS, as a proxy in front may have ended it.
pub fn is_secure(headers: &HeaderMap) -> bool {
    headers.get(header::ORIGIN).is_some_and(|origin| origin.as_bytes().starts_with(b"https://"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_of_another_site_is_known() {
        let elsewhere = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().unwrap());
            }
            is_from_elsewhere(&Method::POST, &headers)
        };
        let host = ("host", "console:8005");
        assert!(!elsewhere(&[host]));
        assert!(!elsewhere(&[host, ("origin", "http://console:8005"), ("sec-fetch-site", "same-origin")]));
        assert!(!elsewhere(&[host, ("origin", "https://console:8005")]));
        for origin in ["http://evil.example", "null", "http://console:8006", "console:8005", ""] {
            assert!(elsewhere(&[host, ("origin", origin)]), "{origin}");
        }
        assert!(elsewhere(&[host, ("sec-fetch-site", "cross-site")]));
        assert!(elsewhere(&[host, ("sec-fetch-site", "same-site")]));
        assert!(elsewhere(&[("origin", "http://console:8005")]));
    }
}
