//! What is remembered from one connection to the next.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::Backoff;

/// A connection that lived this long was a success, even if nothing was sent over it.
const LONG_ENOUGH: Duration = Duration::from_secs(30);

/// What a loop that always has a connection remembers from one attempt to the next: which node to begin with, and
/// how long to pause.
///
/// ```no_run
/// use amqp::{Connection, Nodes, Reconnect};
/// use tokio_util::sync::CancellationToken;
///
/// async fn always_connected(nodes: Nodes, stop: CancellationToken) {
///     let mut reconnect = Reconnect::default();
///     while !stop.is_cancelled() {
///         let error = match nodes.connect("shop", &mut reconnect).await {
///             Ok(connection) => work(connection, &mut reconnect).await,
///             Err(unreachable) => unreachable.to_string(),
///         };
///         println!("the broker is away: {error}");
///         reconnect.lost();
///         reconnect.wait(&stop).await;
///     }
/// }
///
/// /// One connection's life: why it ended.
/// async fn work(connection: Connection, reconnect: &mut Reconnect) -> String {
///     match connection.create_channel().await {
///         Ok(channel) => reconnect.works(),
///         Err(error) => return amqp::describe(&error),
///     }
///     // …
/// # String::new()
/// }
/// ```
#[derive(Debug, Default)]
pub struct Reconnect {
    /// The node to begin with.
    pub(crate) first: usize,
    /// Since when there is a connection.
    pub(crate) since: Option<Instant>,
    backoff: Backoff,
}

impl Reconnect {
    /// Begins with another than the first node; the number may be beyond the last one. So connections that are opened
    /// side by side are spread over the nodes.
    ///
    /// ```
    /// let other = amqp::Reconnect::beginning_with(1);
    /// ```
    pub fn beginning_with(node: usize) -> Self {
        Self { first: node, ..Self::default() }
    }

    /// The connection did what it is for: the next pause is a first one.
    ///
    /// ```
    /// # let mut reconnect = amqp::Reconnect::default();
    /// reconnect.works();
    /// ```
    pub fn works(&mut self) {
        self.backoff.reset();
    }

    /// The connection is lost, or there was none: the next attempt begins with the next node, which may be better off.
    ///
    /// ```
    /// # let mut reconnect = amqp::Reconnect::default();
    /// reconnect.lost();
    /// ```
    pub fn lost(&mut self) {
        self.first = self.first.wrapping_add(1);
    }

    /// How long to pause before the next attempt: see [`Backoff`]. After a connection that lived 30 s it is a first
    /// pause, too.
    ///
    /// ```
    /// let mut reconnect = amqp::Reconnect::default();
    /// assert!(reconnect.pause() < std::time::Duration::from_secs(1));
    /// ```
    pub fn pause(&mut self) -> Duration {
        if self.since.take().is_some_and(|since| since.elapsed() >= LONG_ENOUGH) {
            self.backoff.reset();
        }
        self.backoff.step()
    }

    /// Makes this [`pause`](Self::pause); a shorter one once `stop` is cancelled.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// # let (mut reconnect, stop) = (amqp::Reconnect::default(), tokio_util::sync::CancellationToken::new());
    /// reconnect.wait(&stop).await;
    /// # }
    /// ```
    pub async fn wait(&mut self, stop: &CancellationToken) {
        stop.run_until_cancelled(tokio::time::sleep(self.pause())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_connection_works_or_has_lived_long() {
        let short = Duration::from_millis(200);
        let mut reconnect = Reconnect::default();
        let fails = |reconnect: &mut Reconnect| {
            for _ in 0..10 {
                reconnect.pause();
            }
            assert!(reconnect.pause() > short);
        };
        fails(&mut reconnect);
        reconnect.works();
        assert!(reconnect.pause() <= short);

        fails(&mut reconnect);
        reconnect.since = Some(Instant::now());
        assert!(reconnect.pause() > short, "a connection that ended at once is no success");
        reconnect.since = Instant::now().checked_sub(LONG_ENOUGH);
        assert!(reconnect.pause() <= short);
    }
}
