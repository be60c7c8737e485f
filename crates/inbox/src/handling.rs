//! Calls of the handler: for a batch, and for one event in a savepoint.

use std::{panic::AssertUnwindSafe, slice};

use futures_util::FutureExt;
use sqlx::{Acquire, Postgres, Transaction};

use crate::{
    Event, Handler, HandlerError, Sequencer,
    attempt::{Attempt, NEVER_CAME_BACK},
    chain::Reason,
    plan::Plan,
    process::Process,
    rollback::Rollback,
    work::Mode,
};

impl<H: Handler> Sequencer<H> {
    /// Calls the handler for one event, unless the event has reached the limit of attempts without a return. Also returns
    /// the attempt number.
    pub(crate) async fn try_alone(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        mode: Mode,
        plan: &mut Plan<'_>,
        event: &Event,
        attempt: &mut Option<Attempt>,
    ) -> Result<(Result<(), HandlerError>, i32), Rollback> {
        let held = plan.due.first().and_then(|due| due.held);
        let attempts = held.map_or(0, |(_, attempts)| attempts);
        let tried = matches!(held, Some((Reason::Trying, _)));
        if mode == Mode::Retry || !tried && mode == Mode::Alone {
            return Ok((self.handle_alone(tx, event).await, attempts.saturating_add(1)));
        }
        match self.begin_attempt(event, held).await? {
            Some(begun) => {
                let attempts = attempt.insert(begun).attempts;
                plan.tried(attempts)?;
                Ok((self.handle_alone(tx, event).await, attempts))
            }
            None => Ok((Err(HandlerError::poison(NEVER_CAME_BACK)), attempts)),
        }
    }

    /// Calls the handler in a savepoint, so that its changes can be rolled back alone.
    pub(crate) async fn handle_alone(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        event: &Event,
    ) -> Result<(), HandlerError> {
        let mut savepoint = tx.begin().await?;
        let mut handled = self.handle(&mut savepoint, slice::from_ref(event)).await;
        if handled.is_ok() {
            // A deferred constraint would fail at the commit, where the event at fault is unknown.
            handled = sqlx::query("SET CONSTRAINTS ALL IMMEDIATE")
                .execute(&mut *savepoint)
                .await
                .map(drop)
                .map_err(HandlerError::from);
        }
        if handled.is_ok() {
            savepoint.commit().await?;
        } else {
            savepoint.rollback().await?;
        }
        handled
    }

    /// A handler that panics has a defect that these events show: poison, not the end of the process.
    pub(crate) async fn handle(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        events: &[Event],
    ) -> Result<(), HandlerError> {
        let handled = AssertUnwindSafe(self.handler.handle_batch(events, tx)).catch_unwind();
        let handled =
            handled.map(|h| h.unwrap_or_else(|_| Err(HandlerError::poison("the handler panicked"))));
        Process::begin(&self.consumer, events).within(handled).await
    }
}
