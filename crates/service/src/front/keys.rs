//! Bearer keys (RFC 6750): who may come in. A file names them; it is read again when it changes.

mod file;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use poem::{
    Request,
    http::{HeaderMap, HeaderValue, header},
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use self::file::{Mark, mark, read};
use super::Caller;
use crate::{
    config::SettingError,
    health::{LIVE, READY},
    problem::{Problem, UNAUTHORIZED},
};

/// How often it is looked whether the file has changed.
const LOOK: Duration = Duration::from_secs(1);

/// What needs no key: what others ask who have none (a load balancer, a container's health check), and what
/// is the same for everybody and says nothing of anybody.
const OPEN: [&str; 4] = [LIVE, READY, "/docs", "/openapi.json"];

/// Who may come in.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct KeyArgs {
    /// A file with the keys of those who may come in, a line each: `name:secret`, or `name:sha256:` and the
    /// digest of the secret in hex. Read again when it changes; several keys may have one name.
    #[arg(long, env = "API_KEYS_FILE", value_name = "PATH")]
    pub api_keys_file: Option<PathBuf>,
    /// Let everybody in without a key, although others than this machine's can reach the address.
    #[arg(long, env = "ALLOW_ANONYMOUS")]
    pub allow_anonymous: bool,
}

/// SHA-256 of a secret.
type Secret = [u8; 32];

/// A key, without its secret.
struct Key {
    caller: Caller,
    secret: Secret,
}

/// The keys, as they are now. None: nobody is asked for one.
#[derive(Clone, Default)]
pub struct Keys(Option<Arc<Known>>);

struct Known {
    path: PathBuf,
    keys: RwLock<Vec<Key>>,
    /// Of the file that they are from.
    mark: Option<Mark>,
}

impl Keys {
    /// As the settings say. An error where the file is wrong, or where everybody could come in without
    /// anybody having said so.
    pub(super) fn new(args: &KeyArgs, listen: SocketAddr) -> Result<Self, SettingError> {
        let Some(path) = args.api_keys_file.clone() else {
            if args.allow_anonymous || listen.ip().to_canonical().is_loopback() {
                return Ok(Self::default());
            }
            let problem = format!(
                "others than this machine's can reach {listen}, and there are no keys; name some with \
                 --api-keys-file, or say --allow-anonymous"
            );
            return Err(SettingError::new("LISTEN", problem));
        };
        if args.allow_anonymous {
            let problem = "goes with no --api-keys-file: whoever has no key is refused, or nobody is";
            return Err(SettingError::new("ALLOW_ANONYMOUS", problem));
        }
        let wrong = |error| {
            SettingError::new(
                "API_KEYS_FILE (or --api-keys-file)",
                format_args!("{}: {error}", path.display()),
            )
        };
        let mark = mark(&path).ok();
        let keys = RwLock::new(read(&path).map_err(wrong)?);
        let known = Known { path, keys, mark };
        known.tell(true);
        Ok(Self(Some(Arc::new(known))))
    }

    /// Who asks. A problem when it is nobody who is known, where somebody has to be.
    pub(super) fn caller(&self, request: &Request) -> Result<Caller, Problem> {
        let Some(known) = &self.0 else { return Ok(Caller::of(request)) };
        let secret = bearer(request.headers());
        match secret.and_then(|secret| known.find(secret)) {
            Some(caller) => Ok(caller),
            None if OPEN.contains(&request.uri().path()) => Ok(Caller::anonymous()),
            None => Err(UNAUTHORIZED.problem()),
        }
    }

    /// Reads the file again whenever it changes, until `stop`. One that is wrong changes nothing.
    pub(crate) async fn watch(self, stop: CancellationToken) {
        let Some(known) = self.0 else { return stop.cancelled().await };
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut taken, mut seen) = (known.mark, known.mark);
        // What is wrong with the file now, if it is.
        let mut wrong = None;
        while stop.run_until_cancelled(looks.tick()).await.is_some() {
            let now = mark(&known.path).ok();
            // Not while somebody writes it: half a file could be a right one with half of the keys.
            let still = now == seen;
            seen = now;
            if (now == taken && wrong.is_none()) || !still {
                continue;
            }
            match read(&known.path) {
                Ok(keys) => {
                    (taken, wrong) = (now, None);
                    *known.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
                    known.tell(true);
                    tracing::info!(keys = known.count(), "the keys were read again");
                }
                Err(error) => {
                    // Tried again also while the file stays as it is: it may be the machine that was in trouble.
                    known.tell(false);
                    let why = Some((now, error.to_string()));
                    if wrong != why {
                        tracing::error!(%error, "the keys could not be read again; those of before stay");
                        wrong = why;
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Keys").field(&self.0.as_ref().map(|known| known.count())).finish()
    }
}

impl Known {
    /// Whose secret it is. Looks at all keys and at all of each, so that the time says nothing of how near
    /// somebody came.
    fn find(&self, secret: &[u8]) -> Option<Caller> {
        let secret: Secret = Sha256::digest(secret).into();
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.iter().fold(None, |found, key| {
            if key.secret.ct_eq(&secret).into() { Some(key.caller.clone()) } else { found }
        })
    }

    fn count(&self) -> usize {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn tell(&self, fresh: bool) {
        #[expect(clippy::cast_precision_loss, reason = "there are few")]
        metrics::gauge!("api_keys").set(self.count() as f64);
        metrics::gauge!("api_keys_stale").set(if fresh { 0.0 } else { 1.0 });
    }
}

/// What a request presents. Two are none: nobody could say which one counts.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut sent = headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes);
    let (Some(value), None) = (sent.next(), sent.next()) else { return None };
    let (scheme, secret) = value.split_at_checked("Bearer ".len())?;
    let secret = secret.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"Bearer ") && !secret.is_empty()).then_some(secret)
}
