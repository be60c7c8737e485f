//! A command or a request, and what is asked of it.

use std::fmt;

use serde::Serialize;

/// A command or a request: how it is written, and what is asked of it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Operation {
    /// `outbox-relay status`, or `GET person-api/person/{ordinary.cpf}`. Names in braces stand for what the history has.
    pub(crate) line: &'static str,
    /// How it may grow with the history.
    pub(crate) growth: Growth,
    /// What is to be reached at ten million events.
    pub(crate) reach: Option<Reach>,
    /// What says how much of its work is done, for its rate.
    #[serde(skip)]
    pub(crate) count: Option<Count>,
    /// It is interrupted after some time: its rate is known by then.
    #[serde(skip)]
    pub(crate) sampled: bool,
    /// It is about the score service's database, and its program is of both.
    pub(crate) score: bool,
}

/// Where to count what is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    /// A statement of the operation's database.
    Rows(&'static str),
    /// The messages of the queue that history is replayed to.
    Messages,
}

/// How the buffers that an operation touches may grow with the history.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Growth {
    /// Not at all.
    Steady,
    /// As the history does: it passes over it once.
    Linear,
    /// At most this part of what the outbox's events take.
    Part(f64),
    /// At most so many, where it stops by itself: at 1,000 items, at 10,000 events.
    AtMost(f64),
    /// At most so many for each row that its statements return.
    ForEachRow(f64),
}

/// What is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reach {
    /// In seconds.
    Time(f64),
    /// Seconds for each partition.
    TimePerPartition(f64),
    /// A second, from the first progress to the last.
    Rate(f64),
    /// At least this part of the relay's own rate.
    OfRelay(f64),
    /// The read model stands still for less than so many seconds: a score is not later than that.
    Still(f64),
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(seconds) => write!(f, "{seconds} s"),
            Self::TimePerPartition(seconds) => write!(f, "{seconds} s a partition"),
            Self::Rate(rate) => write!(f, "{rate}/s"),
            Self::OfRelay(part) => write!(f, "{part} of the relay's rate"),
            Self::Still(seconds) => write!(f, "a score < {seconds} s late"),
        }
    }
}

impl Operation {
    const fn new(line: &'static str, growth: Growth) -> Self {
        Self { line, growth, reach: None, count: None, sampled: false, score: false }
    }

    /// One that does not grow with the history.
    pub(crate) const fn steady(line: &'static str) -> Self {
        Self::new(line, Growth::Steady)
    }

    /// One that passes over the history once.
    pub(crate) const fn linear(line: &'static str) -> Self {
        Self::new(line, Growth::Linear)
    }

    /// One that reads at most a part of the outbox.
    pub(crate) const fn part(line: &'static str, part: f64) -> Self {
        Self::new(line, Growth::Part(part))
    }

    /// One that stops at so many buffers.
    pub(crate) const fn at_most(line: &'static str, buffers: f64) -> Self {
        Self::new(line, Growth::AtMost(buffers))
    }

    /// One that reads so many buffers for each row that it shows.
    pub(crate) const fn for_each_row(line: &'static str, buffers: f64) -> Self {
        Self::new(line, Growth::ForEachRow(buffers))
    }

    pub(crate) const fn reach(self, reach: Reach) -> Self {
        Self { reach: Some(reach), ..self }
    }

    pub(crate) const fn on_score(self) -> Self {
        Self { score: true, ..self }
    }

    pub(crate) const fn counted(self, count: Count) -> Self {
        Self { count: Some(count), ..self }
    }

    pub(crate) const fn sampled(self) -> Self {
        Self { sampled: true, ..self }
    }

    /// It is held against the relay's own rate.
    pub(crate) fn is_against_relay(&self) -> bool {
        matches!(self.reach, Some(Reach::OfRelay(_)))
    }

    /// Its first word: a program, or the method of a request.
    pub(crate) fn program(&self) -> &'static str {
        self.line.split(' ').next().unwrap_or_default()
    }

    pub(crate) fn is_request(&self) -> bool {
        self.program().chars().all(|letter| letter.is_ascii_uppercase())
    }
}
