//! Whatever way the events come, the outcome is that of reading each aggregate's events in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
};

use futures_util::FutureExt;
use inbox::{Envelope, Interrupted, Outcome, Sequencer};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use sqlx::PgPool;

use crate::support::{Recorder, database, event, typed};

/// What an aggregate's event at some version is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Add(i64),
    /// Its content is gone.
    Erased,
    Poison,
    /// Its handler ends the process.
    Killer,
    Baseline,
    Deleted,
}

impl Kind {
    /// It says what the aggregate is, whatever was before.
    fn is_complete(self) -> bool {
        matches!(self, Self::Baseline | Self::Deleted)
    }

    /// It is never applied.
    fn is_refused(self) -> bool {
        matches!(self, Self::Poison | Self::Killer)
    }
}

/// One call of a consumer, or its death.
#[derive(Clone, Debug)]
struct Step {
    /// Indices into all events: a batch in any order, with repetitions.
    batch: Vec<prop::sample::Index>,
    /// The process dies at some point of it: before, in, or after the transaction, unacknowledged.
    dies_after_micros: Option<u64>,
    /// They have come back often, so that each is taken alone.
    suspect: bool,
}

type World = Vec<Vec<Kind>>;

fn worlds() -> impl Strategy<Value = (World, [Vec<Step>; 2])> {
    let kind = prop_oneof![
        8 => (1..100i64).prop_map(Kind::Add),
        1 => Just(Kind::Erased),
        1 => Just(Kind::Poison),
        1 => Just(Kind::Killer),
        1 => Just(Kind::Baseline),
        1 => Just(Kind::Deleted),
    ];
    let indices = vec(any::<prop::sample::Index>(), 1..12);
    let step = (indices, prop::option::weighted(0.2, 0..6_000u64), prop::bool::weighted(0.2))
        .prop_map(|(batch, dies_after_micros, suspect)| Step { batch, dies_after_micros, suspect });
    (vec(vec(kind, 1..9), 1..4), [vec(step.clone(), 0..6), vec(step, 0..6)])
}

fn sum_until(kinds: &[Kind], version: usize) -> i64 {
    kinds[..version].iter().fold(0, |sum, kind| match kind {
        Kind::Add(n) => sum + n,
        Kind::Deleted => 0,
        _ => sum,
    })
}

fn events(world: &World) -> Vec<Envelope> {
    let mut all = Vec::new();
    for (n, kinds) in world.iter().enumerate() {
        for (index, kind) in kinds.iter().enumerate() {
            let (aggregate, version) = (n.to_string(), i64::try_from(index).unwrap() + 1);
            all.push(match kind {
                Kind::Add(number) => event(&aggregate, version, &number.to_string()),
                Kind::Erased => typed("thing.changed", &aggregate, version, "{}", &["erased"]),
                Kind::Poison => event(&aggregate, version, "poison"),
                Kind::Killer => event(&aggregate, version, "hang"),
                Kind::Deleted => typed("thing.deleted", &aggregate, version, "delete", &[]),
                Kind::Baseline => {
                    let sum = sum_until(kinds, index).to_string();
                    typed("thing.baseline", &aggregate, version, &sum, &["baseline"])
                }
            });
        }
    }
    all
}

/// A consumer, and the handler that tells when it is about to die.
struct Consumer {
    sequencer: Sequencer<Recorder>,
    handler: Recorder,
}

impl Consumer {
    fn new(name: &str, pool: &PgPool) -> Self {
        let handler = Recorder::new(name);
        Self { sequencer: Sequencer::new(name, pool.clone(), handler.clone()), handler }
    }

    /// Whether it was settled, and the process lives.
    async fn survives(&self, call: impl Future<Output = Result<Outcome, Interrupted>>) -> bool {
        // Of a death before.
        let _ = self.handler.hanging.notified().now_or_never();
        tokio::select! {
            settled = call => { settled.unwrap(); true }
            () = self.handler.hanging.notified() => false,
        }
    }

    async fn work(&self, all: &[Envelope], steps: &[Step]) {
        for step in steps {
            let batch: Vec<Envelope> = step.batch.iter().map(|index| index.get(all).clone()).collect();
            if step.suspect {
                for message in &batch {
                    self.survives(self.sequencer.attempt(message)).await;
                }
                continue;
            }
            let apply = self.survives(self.sequencer.apply(&batch));
            match step.dies_after_micros {
                Some(micros) => {
                    // Dropped in the middle of whatever it does.
                    let limit = std::time::Duration::from_micros(micros);
                    let _ = tokio::time::timeout(limit, apply).await;
                }
                None => drop(apply.await),
            }
        }
    }
}

async fn check(pool: &PgPool, name: &str, world: &World, steps: &[Vec<Step>; 2]) {
    let all = events(world);
    let [one, two] = [0, 1].map(|_| Consumer::new(name, pool));
    tokio::join!(one.work(&all, &steps[0]), two.work(&all, &steps[1]));
    // What was not acknowledged comes again, to both at once and in opposite directions.
    let reversed: Vec<Envelope> = all.iter().rev().cloned().collect();
    let again =
        async |consumer: &Consumer, all: &[Envelope]| consumer.survives(consumer.sequencer.apply(all)).await;
    if !tokio::join!(again(&one, &all), again(&two, &reversed)).eq(&(true, true)) {
        // And again, until nobody dies of it any more.
        for message in &all {
            while !one.survives(one.sequencer.attempt(message)).await {}
        }
    }

    let applied: Vec<(String, i64)> =
        sqlx::query_as("SELECT aggregate, version FROM applied WHERE consumer = $1 ORDER BY n")
            .bind(name)
            .fetch_all(pool)
            .await
            .unwrap();
    let held: Vec<(String, i64, String, i32)> = sqlx::query_as(
        "SELECT aggregate_id, version, reason, attempts FROM inbox.held WHERE consumer = $1 ORDER BY 1, 2",
    )
    .bind(name)
    .fetch_all(pool)
    .await
    .unwrap();
    let sums: Vec<(String, i64)> = sqlx::query_as("SELECT aggregate, sum FROM state WHERE consumer = $1")
        .bind(name)
        .fetch_all(pool)
        .await
        .unwrap();
    let sums: BTreeMap<_, _> = sums.into_iter().collect();
    for (n, kinds) in world.iter().enumerate() {
        let aggregate = n.to_string();
        // From the last complete state on, up to the first event that is refused.
        let base = kinds.iter().rposition(|kind| kind.is_complete()).map_or(0, |index| index + 1);
        let end = kinds[base..]
            .iter()
            .position(|kind| kind.is_refused())
            .map_or(kinds.len(), |offset| base + offset);
        assert_eq!(sums.get(&aggregate).copied().unwrap_or(0), sum_until(kinds, end), "the sum of {n}");

        let order: Vec<i64> = applied.iter().filter(|(a, _)| *a == aggregate).map(|(_, v)| *v).collect();
        assert_eq!(order.last().copied().unwrap_or(0), i64::try_from(end).unwrap(), "the end of {n}");
        let mut last = 0;
        for version in order {
            let kind = kinds[usize::try_from(version - 1).unwrap()];
            assert!(
                version == last + 1 || version > last && kind.is_complete(),
                "{n}: {version} after {last}"
            );
            last = version;
        }

        let waiting: Vec<_> = held.iter().filter(|(a, ..)| *a == aggregate).collect();
        let expected: BTreeSet<i64> = (end + 1..=kinds.len()).map(|v| i64::try_from(v).unwrap()).collect();
        assert_eq!(waiting.iter().map(|(_, v, ..)| *v).collect::<BTreeSet<_>>(), expected, "held of {n}");
        for (position, (_, _, reason, attempts)) in waiting.iter().enumerate() {
            let expected = match position {
                0 if kinds[end] == Kind::Killer => ("poison", 3),
                0 => ("poison", 1),
                _ => ("behind", 0),
            };
            assert_eq!((reason.as_str(), *attempts), expected, "held of {n} at {position}");
        }
    }
}

#[test]
fn every_way_leads_to_the_same_state() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let pool = runtime.block_on(database("property"));
    let case = std::sync::atomic::AtomicU32::new(0);
    let config = Config { cases: 150, failure_persistence: None, max_shrink_iters: 100, ..Config::default() };
    TestRunner::new(config)
        .run(&worlds(), |(world, steps)| {
            let name = case.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string();
            runtime.block_on(check(&pool, &name, &world, &steps));
            Ok(())
        })
        .unwrap();
}
