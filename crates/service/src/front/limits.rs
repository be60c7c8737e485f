//! What clients may take, of time and of places.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Open files for everything but connections of clients: the log, the database, the broker, and
/// [`RESERVE`](super::server::RESERVE).
const OWN_FILES: u64 = 192;

/// What clients may take.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct LimitArgs {
    /// How many connections may be open. At the bound the client that has kept the program waiting longest
    /// makes place for the next one; while all are being worked for, what comes beyond is told to come
    /// again (503).
    #[arg(long, env = "MAX_CONNECTIONS", default_value = "1024", value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_connections: u32,
    /// How long a client may take to send a request's head, once it has begun.
    #[arg(long, env = "HEADER_TIMEOUT", default_value = "10s", value_parser = timeout, value_name = "DURATION")]
    pub header_timeout: Duration,
    /// How long a client may take to send a request's body.
    #[arg(long, env = "BODY_TIMEOUT", default_value = "10s", value_parser = timeout, value_name = "DURATION")]
    pub body_timeout: Duration,
    /// How long a client may take nothing of an answer that it has asked for.
    #[arg(long, env = "ANSWER_TIMEOUT", default_value = "10s", value_parser = timeout, value_name = "DURATION")]
    pub answer_timeout: Duration,
    /// How long a connection may be open without a request. Longer than a proxy in front keeps its own,
    /// so that it never sends one into a connection that is just being closed.
    #[arg(long, env = "IDLE_TIMEOUT", default_value = "2m", value_parser = timeout, value_name = "DURATION")]
    pub idle_timeout: Duration,
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time = crate::config::duration(text)?;
    if (Duration::from_millis(100)..=Duration::from_hours(1)).contains(&time) {
        Ok(time)
    } else {
        Err("it should be from 100ms to 1h".to_owned())
    }
}

/// How many connections there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of clients in general.
    pub connections: u32,
    /// Of clients that wait for something to happen, beside the others.
    pub waiting: u32,
}

impl Room {
    /// Raises the process's limit on open files as far as this many need and the system lets it. Fewer
    /// than asked for where files would run out, since then nobody would be answered any more.
    pub fn make(connections: u32, waiting: u32) -> Self {
        let asked = Self { connections, waiting };
        let needed = OWN_FILES + u64::from(connections) + u64::from(waiting);
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let mut limit = current.unwrap_or(u64::MAX);
        if limit < needed {
            let raised = needed.min(maximum.unwrap_or(u64::MAX));
            if setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }).is_ok() {
                limit = raised;
            }
        }
        let room = asked.within(limit);
        if room != asked {
            let Self { connections, waiting } = room;
            tracing::warn!(
                limit,
                connections,
                waiting,
                "too few open files for as many connections as were asked for"
            );
        }
        room
    }

    fn within(self, files: u64) -> Self {
        let mut left = u32::try_from(files.saturating_sub(OWN_FILES)).unwrap_or(u32::MAX);
        let mut take = |asked: u32| {
            let taken = asked.min(left);
            left -= taken;
            taken
        };
        Self { connections: take(self.connections).max(1), waiting: take(self.waiting) }
    }

    /// All together.
    pub(super) fn all(self) -> usize {
        self.connections.saturating_add(self.waiting) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_within_the_files_there_are() {
        let asked = Room { connections: 1024, waiting: 10_000 };
        let within = |files| {
            let Room { connections, waiting } = asked.within(files);
            (connections, waiting)
        };
        assert_eq!(within(OWN_FILES + 11_024), (1024, 10_000));
        assert_eq!(within(OWN_FILES + 1027), (1024, 3));
        assert_eq!(within(OWN_FILES + 500), (500, 0));
        assert_eq!(within(10), (1, 0));
    }
}
