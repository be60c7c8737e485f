//! Waits of tests. Each has an end, also where the question itself is never answered.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

/// How long a test waits for anything, on a machine that does much else.
pub const DEADLINE: Duration = Duration::from_mins(2);
/// How often a test asks.
const INTERVAL: Duration = Duration::from_millis(10);

/// Asks until there is an answer.
///
/// # Panics
/// When there is none within [`DEADLINE`]: with what was `awaited` and what was seen last.
pub async fn eventually<T>(awaited: &str, ask: impl AsyncFnMut() -> Result<T, String>) -> T {
    within(DEADLINE, awaited, ask).await
}

async fn within<T>(deadline: Duration, awaited: &str, mut ask: impl AsyncFnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    let mut seen = "nothing, the first question was not answered".to_owned();
    // An answer that is there at once is never too late for `timeout_at`.
    while Instant::now() < end {
        match timeout_at(end, ask()).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(answer)) => seen = answer,
            Err(_) => break,
        }
        sleep(INTERVAL).await;
    }
    panic!("not within {deadline:?}: {awaited}; last seen: {seen}");
}

/// Asks until `condition` holds.
///
/// # Panics
/// When it does not within [`DEADLINE`]: with what was `awaited`.
pub async fn until(awaited: &str, mut condition: impl AsyncFnMut() -> bool) {
    eventually(awaited, async || if condition().await { Ok(()) } else { Err("not yet".to_owned()) }).await;
}

/// An HTTP client that waits for no answer for longer than 20 s, so that whoever asks can ask again.
///
/// # Panics
/// When there is no TLS, which is a fault of the build.
pub fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().expect("the build has TLS")
}

/// Whether a line is what a command says while it works: on a slow machine there are some.
pub fn is_progress(line: &str) -> bool {
    line.rsplit_once(": ").is_some_and(|(_, rest)| {
        let ends = [" s", " min", " left"].iter().any(|end| rest.ends_with(end));
        ends && rest.starts_with(|c: char| c == '[' || c.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "not within 50ms: the end; last seen: not yet")]
    async fn a_question_that_is_answered_at_once_has_an_end_too() {
        within(Duration::from_millis(50), "the end", async || Err::<(), _>("not yet".to_owned())).await;
    }
}
