//! Bearer keys (RFC 6750): which clients may use the API. A file names them; it is read again when it changes.

mod file;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use daemon::{
    config::SettingError,
    health::{LIVE, READY},
    host::{self, AllowedHost},
};
use poem::{
    Request,
    http::{HeaderMap, HeaderValue, header},
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

pub use self::file::Key;
use self::file::{FileState, Secret, file_state, read};
use super::{admission::Admission, caller::Caller};
use crate::problem::{Problem, UNAUTHORIZED, UNKNOWN_HOST};

/// How often the program looks whether the file has changed.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// What needs no key: what a load balancer or a container's health check asks for, and what is the same for all and
/// names no person.
const OPEN: [&str; 4] = [LIVE, READY, "/docs", "/openapi.json"];

/// Which clients may use the API.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct KeyArgs {
    /// A file with the keys of clients, a line each: `name:secret`, or `name:sha256:` and the digest of the secret in
    /// hex. The program reads it again when it changes. Several keys may have one name.
    #[arg(long, env = "API_KEYS_FILE", value_name = "PATH")]
    pub api_keys_file: Option<PathBuf>,
    /// Serve clients without a key, although other machines can reach the address.
    #[arg(long, env = "ALLOW_ANONYMOUS")]
    pub allow_anonymous: bool,
    /// Without keys: the hosts that a request may name in `Host`, separated by commas, beside `localhost`, names
    /// below it, loopback addresses and the address that the client connects to. Without ports; `*` for any. Other
    /// hosts get 421: a web page could use the API under its own name.
    #[arg(long, env = "ALLOWED_HOSTS", value_name = "HOST", value_delimiter = ',')]
    pub allowed_hosts: Vec<AllowedHost>,
}

/// The keys, as they are now.
#[derive(Clone, Default)]
pub struct Keys {
    /// None: the API needs no key.
    known: Option<Arc<KeyFile>>,
    /// Without keys: the hosts that are served beside this machine's own names.
    hosts: Arc<[AllowedHost]>,
}

struct KeyFile {
    path: PathBuf,
    /// The file's state from before it was first read: a change that comes after that is not missed.
    state: Option<FileState>,
    keys: RwLock<Vec<Key>>,
}

impl Keys {
    /// As the settings say. An error where the file is wrong, or where other machines could use the API although no
    /// setting says so.
    pub(super) fn new(args: &KeyArgs, listen: SocketAddr) -> Result<Self, SettingError> {
        let Some(path) = args.api_keys_file.clone() else {
            if args.allow_anonymous || listen.ip().to_canonical().is_loopback() {
                return Ok(Self { known: None, hosts: args.allowed_hosts.clone().into() });
            }
            let problem = format!(
                "other machines can reach {listen}, and there are no keys. Name a file of keys with --api-keys-file, \
                 or set --allow-anonymous"
            );
            return Err(SettingError::new("LISTEN", problem));
        };
        if args.allow_anonymous {
            let problem = "cannot be combined with --api-keys-file, which refuses clients without a key";
            return Err(SettingError::new("ALLOW_ANONYMOUS", problem));
        }
        let wrong = |error| {
            let problem = format!("{}: {error}", path.display());
            SettingError::new("API_KEYS_FILE (or --api-keys-file)", problem)
        };
        let state = file_state(&path);
        let known = KeyFile { keys: RwLock::new(read(&path).map_err(wrong)?), state, path };
        known.report(false);
        Ok(Self { known: Some(Arc::new(known)), hosts: Arc::default() })
    }

    /// Whether there are keys at all: without, every client is served.
    pub fn are_needed(&self) -> bool {
        self.known.is_some()
    }

    /// The key with this secret.
    pub fn find(&self, secret: &[u8]) -> Option<Key> {
        self.known.as_ref()?.find(secret)
    }

    /// The key that a request presents as a bearer.
    pub fn of(&self, request: &Request) -> Option<Key> {
        self.find(bearer(request.headers())?)
    }

    /// Whether the file still has this key.
    pub fn has(&self, key: &Key) -> bool {
        self.known.as_ref().is_some_and(|known| known.by_digest(&key.secret).is_some_and(|now| now == *key))
    }

    /// Reads the file again whenever it changes, until `stop`. A file that is wrong changes nothing.
    pub(super) async fn watch(self, stop: CancellationToken) {
        let Some(known) = self.known else { return stop.cancelled().await };
        let mut looks = interval(CHECK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut seen, mut judged, mut stale) = (known.state, known.state, false);
        while stop.run_until_cancelled(looks.tick()).await.is_some() {
            let now = file_state(&known.path);
            // Half a file could be a right one with half of the keys: one that is being written has to settle.
            let settled = std::mem::replace(&mut seen, now) == now;
            // A wrong one is tried again even if it stays: the machine may have been in trouble.
            if !settled || (now == judged && !stale) {
                continue;
            }
            match read(&known.path) {
                Ok(keys) => {
                    tracing::info!(keys = keys.len(), "the keys were read again");
                    *known.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
                    stale = false;
                }
                Err(error) => {
                    if now != judged {
                        tracing::error!(error, "the keys could not be read again; the earlier ones stay");
                    }
                    stale = true;
                }
            }
            judged = now;
            known.report(stale);
        }
    }
}

impl Admission for Keys {
    /// A problem where a request needs a key and has none, or names a host that is not served.
    fn caller(&self, request: &Request) -> Result<Caller, Problem> {
        if !self.are_needed() {
            let local = request.local_addr().as_socket_addr().map(SocketAddr::ip);
            if !host::is_allowed(request.uri(), request.headers(), local, &self.hosts) {
                return Err(UNKNOWN_HOST.problem());
            }
            return Ok(Caller::of(request));
        }
        match self.of(request) {
            Some(key) => Ok(key.caller),
            None if OPEN.contains(&request.uri().path()) => Ok(Caller::anonymous()),
            None => Err(UNAUTHORIZED.problem()),
        }
    }
}

impl KeyFile {
    /// The key with this secret. Compares with all keys and all of each, so that the time says nothing of how
    /// close a guess was.
    fn find(&self, secret: &[u8]) -> Option<Key> {
        self.by_digest(&Sha256::digest(secret).into())
    }

    fn by_digest(&self, secret: &Secret) -> Option<Key> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.iter().fold(
            None,
            |found, key| {
                if key.secret.ct_eq(secret).into() { Some(key.clone()) } else { found }
            },
        )
    }

    fn report(&self, stale: bool) {
        #[expect(clippy::cast_precision_loss, reason = "there are few")]
        let count = self.keys.read().unwrap_or_else(PoisonError::into_inner).len() as f64;
        metrics::gauge!("api_keys").set(count);
        metrics::gauge!("api_keys_stale").set(u8::from(stale));
    }
}

/// The secret that a request presents. Two headers are none: neither counts more than the other.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut sent = headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes);
    let (Some(value), None) = (sent.next(), sent.next()) else { return None };
    let (scheme, secret) = value.split_at_checked("Bearer ".len())?;
    let secret = secret.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"Bearer ") && !secret.is_empty()).then_some(secret)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_change_right_after_the_start_is_not_missed() {
        let path = std::env::temp_dir().join(format!("keys-{}", uuid::Uuid::new_v4()));
        fs::write(&path, "shop:0123456789abcdef").unwrap();
        let args = KeyArgs { api_keys_file: Some(path.clone()), ..KeyArgs::default() };
        let keys = Keys::new(&args, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let replaced = path.with_extension("new");
        fs::write(&replaced, "bank:fedcba9876543210").unwrap();
        fs::rename(&replaced, &path).unwrap();
        let stop = CancellationToken::new();
        let watch = tokio::spawn(keys.clone().watch(stop.clone()));
        let known = keys.known.unwrap();
        let taken = async {
            while known.find(b"fedcba9876543210").is_none() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let taken = tokio::time::timeout(Duration::from_secs(20), taken).await;
        stop.cancel();
        watch.await.unwrap();
        fs::remove_file(&path).unwrap();
        taken.expect("the file is read again");
    }
}
