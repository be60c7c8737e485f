//! The clients that are connected, and for how long the program has been waiting for each of them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use poem::Request;
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{limits::LimitArgs, unsent::Unsent};

/// How often it is looked whose time is over.
const SWEEP: Duration = Duration::from_secs(1);

/// How long nobody is cut off for others: a client needs a moment to say what it wants, and a flood of those who
/// want nothing must not sweep it away.
const PATIENCE: Duration = Duration::from_millis(250);

/// What came of looking for a client to cut off.
pub(super) enum Cut {
    /// One was.
    Done,
    /// The one that has been waited for longest may be, then.
    NotBefore(Instant),
    /// All of them are being worked for.
    Nobody,
}

/// All clients of one server.
#[derive(Clone, Default)]
pub(super) struct Clients(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    left: Notify,
    unsent: Unsent,
}

#[derive(Default)]
struct State {
    open: usize,
    /// How many of them were cut off, and are as good as gone.
    leaving: usize,
    /// The key of the next wait: whoever has a smaller one has been waited for longer.
    next: u64,
    /// Whom the program waits for. Those for whom it works are not here.
    waits: BTreeMap<u64, Wait>,
}

struct Wait {
    since: Instant,
    until: Instant,
    /// Whether a large answer is kept for it meanwhile.
    keeps: bool,
    over: CancellationToken,
    cut: Arc<AtomicBool>,
}

impl State {
    fn cut(&mut self, wait: &Wait, reason: &'static str) {
        // A connection ends with the first wait that is cut short; there is no second one to be counted.
        if !wait.cut.swap(true, Ordering::Relaxed) {
            metrics::counter!("http_connections_cut_total", "reason" => reason).increment(1);
            self.leaving += 1;
        }
        wait.over.cancel();
    }
}

impl Clients {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are connected; and how many of them are to stay.
    pub(super) fn open(&self) -> (usize, usize) {
        let state = self.state();
        (state.open, state.open - state.leaving)
    }

    /// One more. `crowded`: nobody made place for it, so it is only told so.
    pub(super) fn enter(&self, crowded: bool, limits: LimitArgs) -> Arc<Client> {
        self.state().open += 1;
        metrics::gauge!("http_connections").increment(1);
        let client = Client {
            clients: self.clone(),
            limits,
            wait: AtomicU64::new(NONE),
            phase: AtomicU8::new(IDLE),
            keeps: AtomicBool::new(false),
            more: AtomicBool::new(false),
            heard: AtomicBool::new(false),
            over: CancellationToken::new(),
            cut: Arc::default(),
            crowded,
        };
        client.idle();
        Arc::new(client)
    }

    /// Ends the longest wait.
    pub(super) fn cut_longest(&self) -> Cut {
        self.cut_first(|_| true)
    }

    /// Ends the longest wait for somebody who does not take a large answer.
    pub(super) fn cut_keeper(&self) -> Cut {
        self.cut_first(|wait| wait.keeps)
    }

    fn cut_first(&self, may: impl Fn(&Wait) -> bool) -> Cut {
        let mut state = self.state();
        let longest = state.waits.iter().find(|(_, wait)| may(wait));
        let Some((key, earliest)) = longest.map(|(key, wait)| (*key, wait.since + PATIENCE)) else {
            return Cut::Nobody;
        };
        if earliest > Instant::now() {
            return Cut::NotBefore(earliest);
        }
        if let Some(wait) = state.waits.remove(&key) {
            state.cut(&wait, "crowded");
        }
        Cut::Done
    }

    /// What is kept for them of answers.
    pub(super) fn unsent(&self) -> &Unsent {
        &self.0.unsent
    }

    /// Returns when a client has left since it was last asked.
    pub(super) async fn left(&self) {
        self.0.left.notified().await;
    }

    /// Ends waits that have lasted too long, for ever.
    pub(super) async fn sweep(self) {
        let mut looks = interval(SWEEP);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = looks.tick().await;
            let mut state = self.state();
            let late: Vec<_> = state.waits.extract_if(.., |_, wait| wait.until <= now).collect();
            for (_, wait) in &late {
                state.cut(wait, "slow");
            }
        }
    }
}

/// The key of no wait.
const NONE: u64 = u64::MAX;

/// What a connection is at. Only its own task changes it.
const IDLE: u8 = 0;
/// A part of a request's head has come.
const HEAD: u8 = 1;
/// A request is worked for.
const WORK: u8 = 2;
/// Its body is read.
const BODY: u8 = 3;
/// Its answer is there, and has not been taken whole.
const ANSWER: u8 = 4;

/// One of them: a connection.
pub(super) struct Client {
    clients: Clients,
    limits: LimitArgs,
    /// The key of the wait for this client, if there is one.
    wait: AtomicU64,
    phase: AtomicU8,
    /// Whether its answer is a large one.
    keeps: AtomicBool,
    /// Whether it has sent something since its last request that is none of its body.
    more: AtomicBool,
    /// Whether the body of its last request was read to the end.
    heard: AtomicBool,
    over: CancellationToken,
    cut: Arc<AtomicBool>,
    pub(super) crowded: bool,
}

impl Client {
    /// Of a request. None behind another server, as in tests without a socket.
    pub(super) fn of(request: &Request) -> Option<&Arc<Self>> {
        request.data()
    }

    /// The program waits for the next request, or for the rest of it when a part has come already.
    pub(super) fn idle(&self) {
        if self.more.swap(false, Ordering::Relaxed) {
            self.enters(HEAD);
            self.wait(self.limits.header_timeout, self.over.clone());
        } else {
            self.enters(IDLE);
            self.wait(self.limits.idle_timeout, self.over.clone());
        }
    }

    /// Something came. When it is the first of a request, the rest has so long to follow.
    pub(super) fn received(&self) {
        match self.phase() {
            IDLE => {
                self.enters(HEAD);
                self.wait(self.limits.header_timeout, self.over.clone());
            }
            WORK | ANSWER => self.more.store(true, Ordering::Relaxed),
            _ => {}
        }
    }

    /// A request has come: the program works for it.
    pub(super) fn asked(&self) {
        self.more.store(false, Ordering::Relaxed);
        self.heard.store(false, Ordering::Relaxed);
        self.keeps.store(false, Ordering::Relaxed);
        self.works();
    }

    /// The program waits for a request's body. `over` says when it should not any more.
    pub(super) fn body(&self, over: CancellationToken) {
        self.enters(BODY);
        self.wait(self.limits.body_timeout, over);
    }

    /// The program works for it, and whatever that takes is not its fault.
    pub(super) fn works(&self) {
        self.enters(WORK);
        self.wait_no_more();
    }

    /// The answer to its request is large.
    pub(super) fn keeps(&self) {
        self.keeps.store(true, Ordering::Relaxed);
    }

    /// The answer is there.
    pub(super) fn answered(&self) {
        self.enters(ANSWER);
    }

    /// The system takes no more of the answer: the client has so long to take some.
    pub(super) fn stalls(&self) {
        if self.phase() == ANSWER && !self.waited_for() {
            self.wait(self.limits.answer_timeout, self.over.clone());
        }
    }

    /// It took some of it.
    pub(super) fn took(&self) {
        if self.phase() == ANSWER {
            self.wait_no_more();
        }
    }

    /// It took all of it.
    pub(super) fn took_all(&self) {
        if self.phase() == ANSWER {
            self.keeps.store(false, Ordering::Relaxed);
            self.idle();
        }
    }

    /// The body has come, to its end.
    pub(super) fn heard(&self) {
        self.more.store(false, Ordering::Relaxed);
        self.heard.store(true, Ordering::Relaxed);
    }

    /// Whether the body has come to its end.
    pub(super) fn was_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    /// All clients of its server.
    pub(super) fn all(&self) -> &Clients {
        &self.clients
    }

    fn phase(&self) -> u8 {
        self.phase.load(Ordering::Relaxed)
    }

    fn enters(&self, phase: u8) {
        self.phase.store(phase, Ordering::Relaxed);
    }

    fn wait_no_more(&self) {
        let wait = self.wait.swap(NONE, Ordering::Relaxed);
        if wait != NONE {
            self.clients.state().waits.remove(&wait);
        }
    }

    fn waited_for(&self) -> bool {
        self.wait.load(Ordering::Relaxed) != NONE
    }

    fn wait(&self, at_most: Duration, over: CancellationToken) {
        let mut state = self.clients.state();
        let key = state.next;
        state.next += 1;
        state.waits.remove(&self.wait.swap(key, Ordering::Relaxed));
        let since = Instant::now();
        let (cut, keeps) = (Arc::clone(&self.cut), self.keeps.load(Ordering::Relaxed));
        state.waits.insert(key, Wait { since, until: since + at_most, keeps, over, cut });
    }

    /// Returns when the connection is to end: its time is over, or others need the place.
    pub(super) async fn over(&self) {
        self.over.cancelled().await;
    }

    /// Whether a part of a request's head has come, and not all of it.
    pub(super) fn sending(&self) -> bool {
        self.phase() == HEAD
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.wait_no_more();
        let mut state = self.clients.state();
        state.open -= 1;
        state.leaving -= usize::from(self.cut.load(Ordering::Relaxed));
        drop(state);
        metrics::gauge!("http_connections").decrement(1);
        self.clients.0.left.notify_one();
    }
}
