//! Sessions of browsers, in memory: a restart ends them.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use poem::http::{HeaderMap, header};
use uuid::Uuid;
use web::front::Key;

/// How long a session lasts.
pub const SESSION_HOURS: u64 = 12;
/// How many there may be. The oldest gives way.
const MOST: usize = 1_000;
/// What the cookie is called: over HTTPS, browsers see to it that it is of this very host and secure.
pub const COOKIES: [&str; 2] = ["__Host-outbox-console", "outbox-console"];

/// What a cookie has: 244 random bits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Token(String);

impl Token {
    fn new() -> Self {
        Self(random())
    }

    /// The one that a request carries.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let lines = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
        let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
        let found = pairs.find(|(name, _)| COOKIES.contains(name));
        found.map(|(_, value)| Self(value.to_owned()))
    }

    /// As the cookie has it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// 244 random bits.
fn random() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// A session.
#[derive(Clone)]
pub struct Session {
    /// The key that it began with.
    pub key: Key,
    /// What its forms carry.
    pub form_token: String,
    began: Instant,
}

/// All sessions.
#[derive(Default)]
pub struct Sessions(Mutex<HashMap<Token, Session>>);

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<Token, Session>> {
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, session| session.began.elapsed() < Duration::from_hours(SESSION_HOURS));
        sessions
    }

    /// Begins one.
    pub fn begin(&self, key: Key) -> Token {
        let mut sessions = self.lock();
        if sessions.len() >= MOST {
            let oldest = sessions.iter().min_by_key(|(_, session)| session.began);
            if let Some(oldest) = oldest.map(|(token, _)| token.clone()) {
                sessions.remove(&oldest);
            }
        }
        let token = Token::new();
        sessions.insert(token.clone(), Session { key, form_token: random(), began: Instant::now() });
        token
    }

    /// The one with this token.
    pub fn find(&self, token: &Token) -> Option<Session> {
        self.lock().get(token).cloned()
    }

    /// Ends one.
    pub fn end(&self, token: &Token) {
        self.lock().remove(token);
    }
}
