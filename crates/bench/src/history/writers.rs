//! The writers beside the commands: a write each 10 ms through person-api, whatever the last one does; and a reader who
//! wants to see one of them in the score.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

/// Between two writes.
const APART: Duration = Duration::from_millis(10);
/// Between two looks for a score.
const LOOK: Duration = Duration::from_millis(50);
/// How long a write or a look may take.
const TIMEOUT: Duration = Duration::from_mins(1);
/// How long the scores may take to catch up with the writes, also behind baselines of a hundred thousand persons.
const CATCH_UP: Duration = Duration::from_mins(5);
/// As long as score-api waits at most.
const WAIT: &str = "10s";

/// What became of the writes that were under way in some time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waits {
    /// The longest write, in seconds.
    pub(crate) longest: f64,
    /// How many writes failed.
    pub(crate) failed: usize,
    /// The latest that the score contained a write, in seconds.
    pub(crate) late: f64,
}

/// Runs until it is stopped.
#[derive(Debug)]
pub(crate) struct Writers {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Seen {
    waits: Waits,
    /// Writes under way, by when they began.
    open: Vec<Instant>,
    /// The last write: its person, its token, and when it was there.
    last: Option<(i64, String, Instant)>,
    /// When the last write was there that a score contained.
    read: Option<Instant>,
}

impl Seen {
    /// It was looked for what was there at `written`.
    fn looked(&mut self, written: Instant, there: bool) {
        self.waits.late = self.waits.late.max(written.elapsed().as_secs_f64());
        if there {
            self.read = Some(written);
        }
    }
}

impl Writers {
    /// Writes items of the persons with the cpfs from `cpf` on.
    pub(crate) fn start(person: &str, score: &str, (cpf, persons): (i64, i64)) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build()?;
        let (seen, stop) = (Arc::default(), CancellationToken::new());
        let mut tasks = JoinSet::new();
        tasks.spawn(write(
            client.clone(),
            person.to_owned(),
            (cpf, persons),
            Arc::clone(&seen),
            stop.clone(),
        ));
        tasks.spawn(look(client, score.to_owned(), Arc::clone(&seen), stop.clone()));
        Ok(Self { seen, stop, tasks })
    }

    /// What was seen since this was called last.
    pub(crate) fn take(&self) -> Waits {
        let mut seen = locked(&self.seen);
        // What is under way has waited for so long already.
        let open = seen.open.iter().map(|begin| begin.elapsed().as_secs_f64()).fold(0.0, f64::max);
        let waits = std::mem::take(&mut seen.waits);
        Waits { longest: waits.longest.max(open), ..waits }
    }

    /// Waits until a score contains a write from after now, as long as that may take.
    pub(crate) async fn caught_up(&self) {
        let now = Instant::now();
        while locked(&self.seen).read.is_none_or(|read| read < now) && now.elapsed() < CATCH_UP {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends them, after the writes that are under way.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

fn locked(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write(
    client: reqwest::Client,
    url: String,
    (cpf, persons): (i64, i64),
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
) {
    let mut writes = JoinSet::new();
    let mut due = Instant::now();
    while stop.run_until_cancelled(tokio::time::sleep_until(due)).await.is_some() {
        due += APART;
        while writes.try_join_next().is_some() {}
        let cpf = cpf + rand::random_range(0..persons);
        let request = client
            .post(format!("{url}/person/{cpf}/income"))
            .json(&serde_json::json!({"type": "renting", "value": 1000}));
        let (seen, begin) = (Arc::clone(&seen), Instant::now());
        locked(&seen).open.push(begin);
        writes.spawn(async move {
            let token = token(request).await;
            let mut seen = locked(&seen);
            if let Some(n) = seen.open.iter().position(|open| *open == begin) {
                seen.open.swap_remove(n);
            }
            seen.waits.longest = seen.waits.longest.max(begin.elapsed().as_secs_f64());
            match token {
                Ok(token) => seen.last = Some((cpf, token, Instant::now())),
                Err(_) => seen.waits.failed += 1,
            }
        });
    }
    while writes.join_next().await.is_some() {}
}

/// Sends a write, and returns the token of what it has written.
async fn token(request: reqwest::RequestBuilder) -> anyhow::Result<String> {
    let response = request.send().await?.error_for_status()?;
    let token = response.headers().get("etag").context("a write without an ETag")?.to_str()?;
    Ok(token.trim_matches('"').to_owned())
}

async fn look(client: reqwest::Client, url: String, seen: Arc<Mutex<Seen>>, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let last = locked(&seen).last.clone();
        let Some((cpf, token, written)) = last else { continue };
        loop {
            let request = client.get(format!("{url}/{cpf}/score?after={token}&wait={WAIT}")).send();
            let there = request.await.is_ok_and(|response| response.status().is_success());
            locked(&seen).looked(written, there);
            if there || stop.is_cancelled() {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
