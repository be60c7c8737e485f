//! What follows a commit: log lines, metrics, and the handler's wake-up.

use chrono::Utc;

use crate::{
    Event, Handler, Outcome, Sequencer, plan::Plan, rejection::Rejection, save_rejected::RejectedMessage,
};

impl<H: Handler> Sequencer<H> {
    /// Logs, counts, and lets the handler notify readers. Only after the commit, since a rollback has no effect.
    pub(crate) fn committed(&self, plan: &Plan<'_>, events: &[Event]) {
        for rejected in &plan.rejected {
            self.log_rejected(rejected);
        }
        for event in &plan.forks {
            self.log_rejected(&RejectedMessage::forked(event));
        }
        let outcome = plan.outcome;
        self.log_refused(&outcome);
        for (source, (before, incarnation)) in &plan.taken {
            tracing::info!(
                consumer = self.consumer,
                source,
                incarnation,
                before,
                "a new incarnation of the source begins"
            );
        }
        let count = |name: &'static str, n: u64| {
            metrics::counter!(name, "consumer" => self.consumer.clone()).increment(n);
        };
        count("inbox_applied_total", outcome.applied);
        count("inbox_duplicates_total", outcome.duplicates);
        count("inbox_held_total", outcome.held);
        count("inbox_poison_total", outcome.poison);
        count("inbox_rejected_total", outcome.rejected);
        count("inbox_foreign_total", outcome.foreign);
        count("inbox_wrong_user_total", outcome.wrong_user);
        count("inbox_forks_total", outcome.forks);
        count("inbox_superseded_total", outcome.superseded);
        count("inbox_unrelated_total", outcome.unrelated);
        if outcome.applied > 0 {
            let mut streaks = self.streaks();
            for event in events {
                streaks.applied(&event.source);
            }
            drop(streaks);
            let lag = metrics::histogram!("inbox_lag_seconds", "consumer" => self.consumer.clone());
            let now = Utc::now();
            for made in events.iter().filter_map(Event::made_at) {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a lag of 285 million years is precise enough"
                )]
                let seconds = (now - made).num_milliseconds() as f64 / 1_000.0;
                lag.record(seconds.max(0.0));
                self.backlog.applied(made);
            }
            self.handler.committed();
        }
    }

    /// One line a transaction, since any user may send any number of such messages.
    fn log_refused(&self, outcome: &Outcome) {
        let Outcome { foreign, wrong_user, superseded, unrelated, .. } = *outcome;
        let consumer = &self.consumer;
        if foreign > 0 {
            tracing::warn!(consumer, messages = foreign, "messages of sources that are not followed");
        }
        if superseded > 0 {
            tracing::warn!(
                consumer,
                messages = superseded,
                "messages of an earlier incarnation of a source are kept in inbox.rejected and not applied"
            );
        }
        if unrelated > 0 {
            tracing::error!(
                consumer,
                messages = unrelated,
                "messages of an unrelated incarnation of a source are kept in inbox.rejected and not applied"
            );
        }
        if wrong_user > 0 {
            tracing::error!(
                consumer,
                messages = wrong_user,
                "messages of a followed source from a user that does not publish it: they are kept in \
                 inbox.rejected and not applied. Another user forges events, or the publisher's user was renamed"
            );
        }
    }

    /// As [`committed`](Self::committed), for one held event that turned out to be a suspected fork.
    pub(crate) fn rejected_held(&self, forked: &RejectedMessage<'_>) {
        self.log_rejected(forked);
        metrics::counter!("inbox_forks_total", "consumer" => self.consumer.clone()).increment(1);
    }

    fn log_rejected(&self, rejected: &RejectedMessage<'_>) {
        use Rejection::{Foreign, Superseded, Unrelated, WrongUser};
        if matches!(rejected.reason, Foreign | WrongUser | Superseded | Unrelated) {
            return;
        }
        let (consumer, detail) = (&self.consumer, &rejected.detail);
        let Some(event) = rejected.event.filter(|_| rejected.reason == Rejection::Fork) else {
            tracing::warn!(consumer, detail, "a message cannot be applied");
            return;
        };
        tracing::warn!(
            consumer,
            source = event.source,
            aggregate = format_args!("{}/{}", escape::line(&event.aggregate_type), escape::line(&event.aggregate_id)),
            version = event.version,
            event = %event.id,
            detail,
            "suspected fork: the source's history was rewritten without a new incarnation; the event is kept \
             in inbox.rejected and not applied"
        );
    }
}
