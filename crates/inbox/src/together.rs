//! Applies the held events of several aggregates in one transaction without savepoints, as long as all of them succeed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sqlx::{PgConnection, Postgres, Transaction};
use tokio_util::sync::CancellationToken;

use crate::{
    Handler, Redrive, RedriveError, RedriveSummary, RedrivenAggregate, Sequencer,
    chain::Key,
    handler::describe,
    ledger::columns,
    redrive::{LIMIT, RefusedEvent, turn},
    rollback::Rollback,
    schema::BEGIN,
    work::{Mode, Work},
};

/// What one transaction came to.
pub(crate) struct Together {
    /// By aggregate. Those that the transaction could not finish go on in another one.
    pub(crate) done: BTreeMap<Key, RedrivenAggregate>,
    /// What is next of these is taken alone, such as a later event that was refused and may jump.
    stuck: BTreeSet<Key>,
}

impl<H: Handler> Sequencer<H> {
    /// Applies the held events of these aggregates. `some` says how many aggregates and events one transaction takes: it
    /// doubles with each success, up to the batch, and halves with each failure, down to one aggregate by itself, whose
    /// events have a savepoint each. Returns false when `stop` ended it early.
    pub(crate) async fn bring_all_on(
        &self,
        keys: Vec<Key>,
        redrive: &Redrive,
        stop: &CancellationToken,
        some: &mut usize,
        all: &mut RedriveSummary,
        mut progress: impl FnMut(&RedriveSummary),
    ) -> Result<bool, RedriveError> {
        let mut waiting: VecDeque<RedrivenAggregate> = keys.into_iter().map(RedrivenAggregate::of).collect();
        while let Some(first) = waiting.front() {
            if stop.is_cancelled() {
                self.interrupted(waiting, all).await?;
                return Ok(false);
            }
            if *some > 1 {
                let keys: Vec<Key> = waiting.iter().take(*some).map(|one| one.aggregate.clone()).collect();
                // A dry run cannot go on where it ended.
                let budget = if redrive.dry_run { some.saturating_mul(redrive.batch.max(1)) } else { *some };
                match self.together(&keys, budget, redrive.dry_run).await {
                    Ok(done) => {
                        *some = redrive.batch.max(1).min(*some * 2);
                        self.settle_part(&keys, done, redrive, &mut waiting, all).await?;
                        progress(all);
                        continue;
                    }
                    Err(Rollback::Failed(_) | Rollback::TooLong(_) | Rollback::Unreadable(_)) => {
                        *some = (*some).min(keys.len()) / 2;
                        continue;
                    }
                    Err(rollback) => return Err(rollback.into()),
                }
            }
            let key = first.aggregate.clone();
            match self.some(&key, redrive.batch, redrive.dry_run).await {
                Ok(one) => {
                    *some = if one.refused.is_none() { redrive.batch.clamp(1, 2) } else { 1 };
                    let done =
                        Together { done: BTreeMap::from([(key.clone(), one)]), stuck: BTreeSet::new() };
                    self.settle_part(&[key], done, redrive, &mut waiting, all).await?;
                }
                // Its source has gone on meanwhile.
                Err(RedriveError::Superseded) => drop(waiting.pop_front()),
                Err(error) => return Err(error),
            }
            progress(all);
        }
        Ok(true)
    }

    /// Takes the result of one transaction for the first of those that wait.
    async fn settle_part(
        &self,
        keys: &[Key],
        Together { mut done, stuck }: Together,
        redrive: &Redrive,
        waiting: &mut VecDeque<RedrivenAggregate>,
        all: &mut RedriveSummary,
    ) -> Result<(), RedriveError> {
        let mut unfinished = VecDeque::new();
        for key in keys {
            let Some(before) = waiting.pop_front() else { break };
            // The source of one that is not there has gone on meanwhile.
            let Some(mut one) = done.remove(key) else { continue };
            if stuck.contains(key) {
                match self.some(key, redrive.batch, redrive.dry_run).await {
                    Ok(rest) => {
                        let applied = one.applied + rest.applied;
                        one = RedrivenAggregate { from: one.from, applied, ..rest };
                    }
                    Err(RedriveError::Superseded) => continue,
                    Err(error) => return Err(error),
                }
                if one.applied == 0 {
                    one.unfinished = false;
                }
            }
            let goes_on = one.unfinished && !redrive.dry_run;
            if before.applied > 0 {
                one.from = before.from;
                one.applied += before.applied;
            }
            if goes_on { unfinished.push_back(one) } else { all.add(one) }
        }
        unfinished.append(waiting);
        *waiting = unfinished;
        Ok(())
    }

    /// Counts those that were begun and not finished.
    async fn interrupted(
        &self,
        waiting: VecDeque<RedrivenAggregate>,
        all: &mut RedriveSummary,
    ) -> Result<(), RedriveError> {
        let begun: Vec<RedrivenAggregate> = waiting.into_iter().filter(|one| one.applied > 0).collect();
        let keys: Vec<&Key> = begun.iter().map(|one| &one.aggregate).collect();
        let held = counts(&mut *self.pool.acquire().await?, &self.consumer, &keys).await?;
        for one in begun {
            let held = held.get(&one.aggregate).copied().unwrap_or_default();
            all.add(RedrivenAggregate { held, ..one });
        }
        Ok(())
    }

    /// One transaction: applies at most `budget` held events of these aggregates, in order. All fail together. Those whose
    /// source has gone on are left out of the result.
    pub(crate) async fn together(
        &self,
        keys: &[Key],
        budget: usize,
        dry_run: bool,
    ) -> Result<Together, Rollback> {
        let mut attempts = outbox::database::Attempts::default();
        loop {
            let work = Work {
                messages: &[],
                resume: keys,
                mode: Mode::Retry,
                budget,
                refuse: None,
                exclusive: false,
            };
            let done = match tokio::time::timeout(LIMIT, self.together_once(work, dry_run)).await {
                Ok(done) => done,
                Err(_) => Err(Rollback::TooLong(format!("a transaction took longer than {LIMIT:?}"))),
            };
            if !matches!(done, Err(Rollback::Conflict(_))) || !attempts.again().await {
                return done;
            }
        }
    }

    async fn together_once(&self, work: Work<'_>, dry_run: bool) -> Result<Together, Rollback> {
        let away = |error: sqlx::Error| Rollback::Transient(describe(&error));
        let mut tx: Transaction<'static, Postgres> = self.pool.begin_with(BEGIN).await.map_err(away)?;
        self.handler.begin(&mut tx).await.map_err(|failure| Rollback::from(failure).of_waiting())?;
        let mut plan = self.decide(&mut tx, work).await?;
        plan.reject_forked(&mut tx, self.limits.rejected()).await?;
        let events = plan.events(&mut tx).await?;
        if !plan.ledger.unreadable.is_empty() {
            return Err(Rollback::Unreadable(plan.ledger.unreadable));
        }
        if !events.is_empty() {
            self.handle(&mut tx, &events).await?;
        }
        self.write(&mut tx, &mut plan, &events).await?;
        let (mut done, mut stuck) = (BTreeMap::new(), BTreeSet::new());
        for (key, chain) in &plan.ledger.chains {
            let unfinished = plan.unfinished.contains(key);
            // Where nothing at all was applied, another transaction would be like this one.
            let next = turn(chain).is_some();
            let is_stuck = if events.is_empty() { next || unfinished } else { next && !unfinished };
            if is_stuck {
                stuck.insert(key.clone());
            }
            let (from, to) = (chain.stored, chain.version());
            let one = RedrivenAggregate { from, to, unfinished, ..RedrivenAggregate::of(key.clone()) };
            done.insert(key.clone(), one);
        }
        for due in &plan.due {
            if let Some(one) = done.get_mut(&due.key) {
                one.applied += 1;
            }
        }
        for event in &plan.forks {
            if let Some(one) = done.get_mut(&Key::from(event)) {
                one.refused = Some(RefusedEvent::forked(event));
            }
        }
        let finished: Vec<&Key> =
            done.values().filter(|one| !one.unfinished).map(|one| &one.aggregate).collect();
        let held = counts(&mut tx, &self.consumer, &finished).await?;
        for (key, held) in held {
            if let Some(one) = done.get_mut(&key) {
                one.held = held;
            }
        }
        if dry_run {
            tx.rollback().await?;
            return Ok(Together { done, stuck });
        }
        tx.commit().await?;
        self.committed(&plan, &events);
        Ok(Together { done, stuck })
    }
}

/// How many events of aggregates are held, of those that hold any.
async fn counts(conn: &mut PgConnection, consumer: &str, keys: &[&Key]) -> sqlx::Result<BTreeMap<Key, i64>> {
    #[derive(sqlx::FromRow)]
    struct Row {
        #[sqlx(flatten)]
        key: Key,
        held: i64,
    }
    if keys.is_empty() {
        return Ok(BTreeMap::new());
    }
    let (sources, types, ids) = columns(keys.iter().copied());
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT k.source, k.aggregate_type, k.aggregate_id, h.held
         FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id),
              LATERAL (SELECT count(*) AS held FROM inbox.held
                       WHERE (consumer, source, aggregate_type, aggregate_id)
                           = ($1, k.source, k.aggregate_type, k.aggregate_id)) AS h
         WHERE h.held > 0",
    )
    .bind(consumer)
    .bind(sources)
    .bind(types)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.key, row.held)).collect())
}
