//! How many connections clients may have, and how long they may take.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Open files for everything but connections of clients: the log, the database, the broker.
const OWN_FILES: u64 = 192;

/// Limits of clients.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct LimitArgs {
    /// How many connections may be open. Further clients wait until one ends.
    #[arg(long, env = "MAX_CONNECTIONS", default_value = "1024", value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_connections: u32,
    /// How long a new connection may take to send the head of its first request.
    #[arg(long, env = "HEADER_TIMEOUT", default_value = "10s", value_parser = timeout, value_name = "DURATION")]
    pub header_timeout: Duration,
    /// How long a client may take to send a request's body.
    #[arg(long, env = "BODY_TIMEOUT", default_value = "10s", value_parser = timeout, value_name = "DURATION")]
    pub body_timeout: Duration,
    /// How long a client may read nothing of a response.
    #[arg(long, env = "ANSWER_TIMEOUT", default_value = "10s", value_parser = timeout, value_name = "DURATION")]
    pub answer_timeout: Duration,
    /// How long after a response the head of the next request may take. Set it above the idle timeout of a proxy in
    /// front, so that the proxy never uses a connection that is just being closed.
    #[arg(long, env = "IDLE_TIMEOUT", default_value = "2m", value_parser = timeout, value_name = "DURATION")]
    pub idle_timeout: Duration,
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time = daemon::config::duration(text)?;
    if (Duration::from_millis(100)..=Duration::from_hours(1)).contains(&time) {
        Ok(time)
    } else {
        Err("it should be from 100ms to 1h".to_owned())
    }
}

/// How many connections may be open at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Of clients in general.
    pub general: u32,
    /// Of clients that wait for an event, beside the others.
    pub waiting: u32,
}

impl ConnectionLimits {
    /// Raises the process's limit of open files to the system's maximum, and lowers the numbers if files would still run
    /// out: the program could not reach its database then.
    pub(super) fn within_open_files(general: u32, waiting: u32) -> Self {
        let Rlimit { maximum, current } = getrlimit(Resource::Nofile);
        let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
        let files = if raised.is_ok() { maximum } else { current }.unwrap_or(u64::MAX);
        let asked = Self { general, waiting };
        let limits = asked.within(files);
        if limits != asked {
            let Self { general: connections, waiting } = limits;
            tracing::warn!(files, connections, waiting, "the limit of open files allows fewer connections");
        }
        limits
    }

    fn within(self, files: u64) -> Self {
        let left = u32::try_from(files.saturating_sub(OWN_FILES)).unwrap_or(u32::MAX);
        let general = self.general.min(left).max(1);
        Self { general, waiting: self.waiting.min(left.saturating_sub(general)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_limited_by_open_files() {
        let asked = ConnectionLimits { general: 1024, waiting: 10_000 };
        let within = |files| {
            let ConnectionLimits { general, waiting } = asked.within(files);
            (general, waiting)
        };
        assert_eq!(within(OWN_FILES + 11_024), (1024, 10_000));
        assert_eq!(within(OWN_FILES + 1027), (1024, 3));
        assert_eq!(within(OWN_FILES + 500), (500, 0));
        assert_eq!(within(10), (1, 0));
    }
}
