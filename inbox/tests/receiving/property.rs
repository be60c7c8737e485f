//! Whatever way the events come, the outcome is that of reading each aggregate's events in order.

use std::collections::{BTreeMap, BTreeSet};

use inbox::{Envelope, Sequencer};
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
    Poison,
    Baseline,
}

/// One call of a consumer, or its death.
#[derive(Clone, Debug)]
struct Step {
    /// Indices into all events: a batch in any order, with repetitions.
    batch: Vec<prop::sample::Index>,
    /// The process dies at some point of it: before, in, or after the transaction, unacknowledged.
    dies_after_micros: Option<u64>,
}

type World = Vec<Vec<Kind>>;

fn worlds() -> impl Strategy<Value = (World, [Vec<Step>; 2])> {
    let kind = prop_oneof![
        8 => (1..100i64).prop_map(Kind::Add),
        1 => Just(Kind::Poison),
        1 => Just(Kind::Baseline),
    ];
    let step = (vec(any::<prop::sample::Index>(), 1..12), prop::option::weighted(0.2, 0..6_000u64))
        .prop_map(|(batch, dies_after_micros)| Step { batch, dies_after_micros });
    (vec(vec(kind, 1..9), 1..4), [vec(step.clone(), 0..6), vec(step, 0..6)])
}

fn sum_until(kinds: &[Kind], version: usize) -> i64 {
    kinds[..version].iter().map(|kind| if let Kind::Add(n) = kind { *n } else { 0 }).sum()
}

fn events(world: &World) -> Vec<Envelope> {
    let mut all = Vec::new();
    for (n, kinds) in world.iter().enumerate() {
        for (index, kind) in kinds.iter().enumerate() {
            let (aggregate, version) = (n.to_string(), i64::try_from(index).unwrap() + 1);
            all.push(match kind {
                Kind::Add(number) => event(&aggregate, version, &number.to_string()),
                Kind::Poison => event(&aggregate, version, "poison"),
                Kind::Baseline => {
                    let sum = sum_until(kinds, index).to_string();
                    typed("thing.baseline", &aggregate, version, &sum, &["baseline"])
                }
            });
        }
    }
    all
}

async fn work(sequencer: &Sequencer<Recorder>, all: &[Envelope], steps: &[Step]) {
    for step in steps {
        let batch: Vec<Envelope> = step.batch.iter().map(|index| index.get(all).clone()).collect();
        let apply = sequencer.apply(&batch);
        match step.dies_after_micros {
            Some(micros) => {
                // Dropped in the middle of whatever it does.
                let limit = std::time::Duration::from_micros(micros);
                let _ = tokio::time::timeout(limit, apply).await;
            }
            None => {
                apply.await.unwrap();
            }
        }
    }
}

async fn check(pool: &PgPool, name: &str, world: &World, steps: &[Vec<Step>; 2]) {
    let all = events(world);
    let consumers = [0, 1].map(|_| Sequencer::new(name, pool.clone(), Recorder::new(name)));
    tokio::join!(work(&consumers[0], &all, &steps[0]), work(&consumers[1], &all, &steps[1]));
    // What was not acknowledged comes again, to both at once and in opposite directions.
    let reversed: Vec<Envelope> = all.iter().rev().cloned().collect();
    let (one, two) = tokio::join!(consumers[0].apply(&all), consumers[1].apply(&reversed));
    one.unwrap();
    two.unwrap();

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
        let base = kinds.iter().rposition(|kind| *kind == Kind::Baseline).map_or(0, |index| index + 1);
        let end = kinds[base..]
            .iter()
            .position(|kind| *kind == Kind::Poison)
            .map_or(kinds.len(), |offset| base + offset);
        assert_eq!(sums.get(&aggregate).copied().unwrap_or(0), sum_until(kinds, end), "the sum of {n}");

        let order: Vec<i64> = applied.iter().filter(|(a, _)| *a == aggregate).map(|(_, v)| *v).collect();
        assert_eq!(order.last().copied().unwrap_or(0), i64::try_from(end).unwrap(), "the end of {n}");
        let mut last = 0;
        for version in order {
            let kind = kinds[usize::try_from(version - 1).unwrap()];
            assert!(
                version == last + 1 || version > last && kind == Kind::Baseline,
                "{n}: {version} after {last}"
            );
            last = version;
        }

        let waiting: Vec<_> = held.iter().filter(|(a, ..)| *a == aggregate).collect();
        let expected: BTreeSet<i64> = (end + 1..=kinds.len()).map(|v| i64::try_from(v).unwrap()).collect();
        assert_eq!(waiting.iter().map(|(_, v, ..)| *v).collect::<BTreeSet<_>>(), expected, "held of {n}");
        for (position, (_, _, reason, attempts)) in waiting.iter().enumerate() {
            let expected = if position == 0 { ("poison", 1) } else { ("behind", 0) };
            assert_eq!((reason.as_str(), *attempts), expected, "held of {n} at {position}");
        }
    }
}

#[test]
fn every_way_leads_to_the_same_state() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let pool = runtime.block_on(database("property"));
    let case = std::sync::atomic::AtomicU32::new(0);
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&worlds(), |(world, steps)| {
            let name = case.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string();
            runtime.block_on(check(&pool, &name, &world, &steps));
            Ok(())
        })
        .unwrap();
}
