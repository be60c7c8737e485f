//! Gives up a held event, on an operator's request.

use outbox::database::Attempts;
use serde_json::{Value, json};

use crate::{
    Event, Handler, HandlerError, Sequencer,
    held::HeldEvent,
    redrive::{RedriveError, RedrivenAggregate, within},
};

/// The event to skip, and the operator and reason to record.
#[derive(Clone, Debug)]
pub struct Skip<'a> {
    /// The event.
    pub event: &'a HeldEvent,
    /// The operator.
    pub by: &'a str,
    /// The reason. It is stored for good, so it must not contain personal data.
    pub why: &'a str,
    /// How many events one transaction takes at most.
    pub batch: usize,
    /// Call the handler and roll back.
    pub dry_run: bool,
}

impl<H: Handler> Sequencer<H> {
    /// Gives up the event that stops its aggregate. The handler gets the event's erased form instead, so the version rises
    /// and the chain has no hole; `inbox.skipped` records the event. Then the events behind it are applied.
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(
    /// #     sequencer: inbox::Sequencer<H>,
    /// #     event: inbox::held::HeldEvent,
    /// # ) -> Result<(), inbox::RedriveError> {
    /// use inbox::Skip;
    ///
    /// let request = Skip { event: &event, by: "ann", why: "the order was a test", batch: 64, dry_run: false };
    /// let result = sequencer.skip(&request).await?;
    /// println!("{} is at version {}", result.aggregate, result.to);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn skip(&self, skip: &Skip<'_>) -> Result<RedrivenAggregate, RedriveError> {
        let (key, version) = (&skip.event.aggregate, skip.event.version);
        let mut attempts = Attempts::default();
        let mut all = loop {
            let done = within(self.skip_once(skip)).await;
            if !matches!(done, Err(RedriveError::Conflict(_))) || !attempts.again().await {
                break done?;
            }
        };
        if all.unfinished && !skip.dry_run {
            let more = self.bring_on(key, skip.batch, false).await?;
            all = RedrivenAggregate { from: all.from, applied: all.applied + more.applied, ..more };
        }
        if !skip.dry_run {
            tracing::warn!(
                consumer = self.consumer,
                source = key.source,
                aggregate = %key,
                version,
                event = %skip.event.event_id,
                type_ = skip.event.type_,
                by = skip.by,
                "skipped by hand"
            );
        }
        Ok(all)
    }

    /// One transaction: gives up the event and applies some of those behind it.
    async fn skip_once(&self, skip: &Skip<'_>) -> Result<RedrivenAggregate, RedriveError> {
        let (key, version) = (&skip.event.aggregate, skip.event.version);
        let (mut tx, mut ledger) = self.lock(key).await?;
        let chain = ledger.chain(key)?;
        let held = chain.held.get(&version).filter(|held| held.id == skip.event.event_id);
        let Some(held) = held else { return Err(RedriveError::Gone) };
        if version != chain.next_version() || !held.reason.blocks() {
            return Err(RedriveError::NotNext(chain.version()));
        }
        let begins_anew = chain.begins_anew();
        let event = ledger.events(&mut tx, &[(key, version)]).await?.into_values().next();
        let Some(event) = event else { return Err(RedriveError::Gone) };
        // Its erased form needs no headers.
        ledger.unreadable.clear();
        match self.handle_alone(&mut tx, &erased(&event, begins_anew)).await {
            Ok(()) => {}
            Err(HandlerError::Conflict(reason)) => return Err(RedriveError::Conflict(reason)),
            Err(HandlerError::Transient(reason) | HandlerError::TooLong(reason)) => {
                return Err(RedriveError::Transient(reason));
            }
            Err(HandlerError::Poison(reason)) => return Err(RedriveError::Refused(reason)),
        }
        ledger.skip(&mut tx, key, version, skip.by, skip.why).await?;
        ledger.chain(key)?.advance(version, event.id);
        let done = self.next(&mut tx, &mut ledger, key, skip.batch, skip.dry_run).await?;
        self.end(tx, &done, skip.dry_run).await?;
        Ok(done)
    }
}

/// The erased form of an event, as the contract has it: a version without content.
fn erased(event: &Event, begins_anew: bool) -> Event {
    // Of an item it is the item's own id, where the body can be read.
    let body: Option<Value> = serde_json::from_slice(&event.payload).ok();
    let id = body.and_then(|body| body.get("id").cloned()).filter(Value::is_string);
    let id = id.unwrap_or_else(|| event.aggregate_id.clone().into());
    let mut erased = Event { begins_anew, ..event.clone() };
    erased.headers.insert("erased".to_owned(), true.into());
    erased.payload = json!({"id": id, "erased": true}).to_string().into_bytes();
    erased
}
