//! What a long command says while it works: nothing for the first three seconds; then on a terminal one line that it
//! writes anew each second, and elsewhere (a log, a pipe) a line every ten seconds. All of it goes to standard error.
//!
//! A thread of its own writes, so that a statement that takes a minute is no silence.

use std::{
    io::{IsTerminal, Write, stderr},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::command::{many, span};

/// What takes no longer than this says nothing.
const QUIET: Duration = Duration::from_secs(3);
/// How often the line on a terminal is written anew.
const REDRAW: Duration = Duration::from_secs(1);
/// How often a line is written elsewhere.
const LINES: Duration = Duration::from_secs(10);
/// The width of a bar.
const WIDTH: usize = 20;

/// Says what a command does, until it is dropped.
#[derive(Debug)]
pub struct Progress {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
struct State {
    step: Step,
    ended: bool,
}

/// One step of a command's work.
#[derive(Debug)]
struct Step {
    /// What is done: `comparing the aggregates`.
    what: String,
    /// What is counted, in the singular.
    noun: &'static str,
    began: Instant,
    /// How much of the way is done, of how much in all; none where nobody knows.
    way: Option<(u64, u64)>,
    /// How many are done.
    count: u64,
}

impl Progress {
    /// Begins with a first step: `what` says what is done, `noun` what is counted.
    pub fn new(what: impl Into<String>, noun: &'static str) -> Self {
        let state = State { step: Step::new(what.into(), noun), ended: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), ended: Condvar::new() });
        let writer = std::thread::Builder::new()
            .name("progress".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.write(stderr().is_terminal())
            })
            // Without the thread the command works all the same, in silence.
            .ok();
        Self { shared, writer }
    }

    /// Goes to the next step.
    pub fn step(&self, what: impl Into<String>, noun: &'static str) {
        self.shared.lock().step = Step::new(what.into(), noun);
    }

    /// So many are done, of so many in all.
    pub fn at(&self, done: u64, all: u64) {
        self.along((done, all), done);
    }

    /// So many are done; nobody knows of how many.
    pub fn count(&self, count: u64) {
        self.shared.lock().step.count = count;
    }

    /// So much of the way is done, and with it so many: where the way is measured in something else than what is counted.
    pub fn along(&self, way: (u64, u64), count: u64) {
        let step = &mut self.shared.lock().step;
        (step.way, step.count) = (Some(way), count);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.ended.notify_all();
        if let Some(writer) = self.writer.take() {
            // A panic there was printed there.
            let _panicked = writer.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes until the end.
    fn write(&self, terminal: bool) {
        let (mut wait, mut drawn) = (QUIET, 0);
        loop {
            let state = self.lock();
            let waited = self.ended.wait_timeout_while(state, wait, |state| !state.ended);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            let ended = state.ended;
            let text = (!ended).then(|| state.step.text(Instant::now()));
            drop(state);
            // A closed standard error is no reason to stop the work.
            let _closed = match text {
                Some(text) if terminal => {
                    let width = text.chars().count();
                    let written = write!(stderr(), "\r{text:<drawn$}").and_then(|()| stderr().flush());
                    drawn = width;
                    written
                }
                Some(text) => writeln!(stderr(), "{text}"),
                None if drawn > 0 => write!(stderr(), "\r{:drawn$}\r", ""),
                None => Ok(()),
            };
            if ended {
                return;
            }
            wait = if terminal { REDRAW } else { LINES };
        }
    }
}

impl Step {
    fn new(what: String, noun: &'static str) -> Self {
        Self { what, noun, began: Instant::now(), way: None, count: 0 }
    }

    /// `comparing: [######              ]  30 %  3000 events, 1000/s, 7.0 s left`.
    fn text(&self, now: Instant) -> String {
        let Self { what, noun, began, way, count } = self;
        let seconds = now.saturating_duration_since(*began).as_secs_f64().max(0.001);
        let (counted, rate) = (many(*count, noun), float(*count) / seconds);
        match way {
            Some((done, all)) => {
                let part = if *all == 0 { 1.0 } else { (float(*done) / float(*all)).clamp(0.0, 1.0) };
                // Rounding down: a hundred per cent is the end.
                let filled = "#".repeat(whole(part * float(WIDTH as u64)));
                let percent = whole(part * 100.0);
                let text = format!("{what}: [{filled:<WIDTH$}] {percent:>3} %  {counted}");
                if *done == 0 {
                    return format!("{text}, {}", span(seconds));
                }
                format!(
                    "{text}, {rate:.0}/s, {} left",
                    span(seconds * (1.0 - part) / part.max(f64::MIN_POSITIVE))
                )
            }
            None if *count > 0 => format!("{what}: {counted}, {rate:.0}/s, {}", span(seconds)),
            None => format!("{what}: {}", span(seconds)),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for a rate it is exact enough")]
fn float(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 100")]
fn whole(number: f64) -> usize {
    number as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_done_how_far_it_is_how_fast_and_how_long_it_takes() {
        let began = Instant::now();
        let text = |way, count| {
            let step = Step { what: "comparing".to_owned(), noun: "event", began, way, count };
            step.text(began + Duration::from_secs(3))
        };
        let lines = [
            text(None, 0),
            text(None, 3_000),
            text(Some((0, 1_000)), 0),
            text(Some((1, 1_000)), 3),
            text(Some((300, 1_000)), 3_000),
            text(Some((1_000, 1_000)), 1),
            text(Some((2_000, 1_000)), 1),
            text(Some((0, 0)), 0),
        ];
        insta::assert_snapshot!(lines.join("\n"), @r"
        comparing: 3.0 s
        comparing: 3000 events, 1000/s, 3.0 s
        comparing: [                    ]   0 %  0 events, 3.0 s
        comparing: [                    ]   0 %  3 events, 1/s, 50 min left
        comparing: [######              ]  30 %  3000 events, 1000/s, 7.0 s left
        comparing: [####################] 100 %  1 event, 0/s, 0.0 s left
        comparing: [####################] 100 %  1 event, 0/s, 0.0 s left
        comparing: [####################] 100 %  0 events, 3.0 s
        ");
    }
}
