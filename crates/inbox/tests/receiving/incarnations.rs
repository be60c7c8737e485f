//! A source that begins a new incarnation: which one is taken, how its chains begin, and what becomes of the earlier
//! ones.

use std::{sync::atomic::Ordering, time::Duration};

use inbox::{
    Config, Envelope, Outcome, Redrive, RedriveError, Sequencer, Skip, Status,
    held::{self, Filter},
};
use sqlx::PgPool;

use crate::{
    consumer::{Running, World},
    support::{DEADLINE, Recorder, database, event, in_incarnation, tables, typed},
};

/// The newest incarnation of these tests, as a clock gives it.
pub(crate) const NEW: i64 = 1_764_426_123_456;

/// A consumer with a read model.
pub(crate) struct Case {
    pub(crate) pool: PgPool,
    pub(crate) consumer: &'static str,
    pub(crate) handler: Recorder,
    pub(crate) sequencer: Sequencer<Recorder>,
}

impl Case {
    pub(crate) async fn new(consumer: &'static str) -> Self {
        let pool = database(consumer).await;
        let handler = Recorder::new(consumer);
        let sequencer = Sequencer::new(consumer, pool.clone(), handler.clone());
        Self { pool, consumer, handler, sequencer }
    }

    pub(crate) async fn apply(&self, messages: &[Envelope]) -> Outcome {
        self.sequencer.apply(messages).await.unwrap()
    }

    async fn tables(&self) -> String {
        tables(&self.pool, self.consumer).await
    }

    /// The newest incarnations, and those before each of them.
    pub(crate) async fn sources(&self) -> Vec<(String, i64, Vec<i64>)> {
        sqlx::query_as("SELECT name, incarnation, earlier FROM inbox.source ORDER BY name")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    /// The read model.
    pub(crate) async fn state(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT aggregate, sum FROM state ORDER BY aggregate")
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    /// What is left behind, and its version.
    pub(crate) async fn left_behind(&self) -> Vec<(String, i64, i64)> {
        let sql = "SELECT aggregate_id, incarnation, version FROM inbox.left_behind ORDER BY 1, 2";
        sqlx::query_as(sql).fetch_all(&self.pool).await.unwrap()
    }
}

/// One of the new incarnation, which follows the first one.
pub(crate) fn new(envelope: Envelope) -> Envelope {
    in_incarnation(envelope, NEW, Some(1))
}

pub(crate) fn named(states: &[(&str, i64)]) -> Vec<(String, i64)> {
    states.iter().map(|(name, sum)| ((*name).to_owned(), *sum)).collect()
}

pub(crate) fn baseline(aggregate: &str, version: i64, body: &str) -> Envelope {
    typed("thing.baseline", aggregate, version, body, &["baseline"])
}

/// A first event that was written after its incarnation had begun.
fn flagged(aggregate: &str, body: &str) -> Envelope {
    typed("thing.new", aggregate, 1, body, &["chain_start"])
}

#[tokio::test]
async fn a_newer_incarnation_is_taken_if_it_follows_the_newest_one() {
    let case = Case::new("incarnation_taken").await;
    // Nothing is known of the source yet.
    assert_eq!(case.apply(&[in_incarnation(event("a", 1, "1"), 5, Some(3))]).await.applied, 1);
    assert_eq!(case.sources().await, [("things".to_owned(), 5, vec![])]);
    // Its chains and its parent do not matter any more.
    assert_eq!(case.apply(&[in_incarnation(event("a", 2, "10"), 5, None)]).await.applied, 1);

    assert_eq!(case.apply(&[in_incarnation(event("b", 1, "1"), NEW, Some(5))]).await.applied, 1);
    assert_eq!(case.apply(&[in_incarnation(event("b", 2, "1"), NEW + 1, Some(NEW))]).await.held, 1);
    assert_eq!(case.sources().await, [("things".to_owned(), NEW + 1, vec![5, NEW])]);
}

#[tokio::test]
async fn one_that_does_not_follow_is_refused_until_somebody_has_looked() {
    let case = Case::new("incarnation_unrelated").await;
    case.apply(&[event("a", 1, "1"), event("a", 3, "")]).await;
    let before = case.tables().await;
    let unrelated = [
        // A clone of staging that was raised, an incarnation in between that never arrived, and an old publisher.
        in_incarnation(baseline("a", 9, "666"), NEW, Some(7)),
        in_incarnation(typed("thing.deleted", "a", 9, "delete", &[]), NEW, None),
        in_incarnation(event("never seen", 1, "666"), NEW, Some(NEW - 1)),
    ];
    assert_eq!(case.apply(&unrelated).await, Outcome { unrelated: 3, ..Outcome::default() });
    assert_eq!(case.apply(&unrelated[..1]).await.unrelated, 1);
    assert_eq!(case.state().await, named(&[("a", 1)]));
    assert_eq!(case.sources().await, [("things".to_owned(), 1, vec![])]);
    let rejected = before.find("inbox.rejected").unwrap();
    assert_eq!(case.tables().await[..rejected], before[..rejected], "nothing else is stored");
    let details: Vec<(String, String)> = sqlx::query_as("SELECT DISTINCT reason, detail FROM inbox.rejected")
        .fetch_all(&case.pool)
        .await
        .unwrap();
    insta::assert_compact_debug_snapshot!(details, @r#"[("unrelated", "it does not follow incarnation 1 of the source \"things\", the newest one known here. Find out whose events these are. If they are right, begin a new incarnation of the source above 1")]"#);

    // Begun once more, above the one that is known here.
    assert_eq!(case.apply(&[in_incarnation(baseline("a", 9, "7"), NEW + 5, Some(1))]).await.applied, 1);
    assert_eq!(case.state().await, named(&[("a", 7)]));
}

#[tokio::test]
async fn an_old_primary_that_wakes_up_changes_nothing() {
    let case = Case::new("incarnation_superseded").await;
    case.apply(&[event("a", 1, "1"), event("b", 1, "1")]).await;
    case.apply(&[new(baseline("a", 3, "7"))]).await;
    let before = case.tables().await;
    let old = [
        event("a", 2, "100"),
        typed("thing.deleted", "a", 4, "delete", &[]),
        baseline("b", 5, "100"),
        // Of an aggregate that the new incarnation has not begun, and of one that nobody knows.
        event("b", 2, "100"),
        event("unknown", 1, "100"),
        // It follows the newest one, as it says.
        in_incarnation(event("a", 4, "100"), NEW - 1, Some(NEW)),
    ];
    assert_eq!(case.apply(&old).await, Outcome { superseded: 6, ..Outcome::default() });
    assert_eq!(case.state().await, named(&[("a", 7), ("b", 1)]));
    let rejected = before.find("inbox.rejected").unwrap();
    assert_eq!(case.tables().await[..rejected], before[..rejected], "nothing else is stored");
    let details: Vec<(String, String, i64)> =
        sqlx::query_as("SELECT reason, detail, count(*) FROM inbox.rejected GROUP BY 1, 2")
            .fetch_all(&case.pool)
            .await
            .unwrap();
    insta::assert_compact_debug_snapshot!(details, @r#"[("superseded", "the source \"things\" has begun incarnation 1764426123456", 6)]"#);
}

/// What may begin a chain where the read model has a state of an earlier incarnation.
#[tokio::test]
async fn a_chain_begins_anew_only_with_a_complete_state() {
    let case = Case::new("incarnation_begins").await;
    let aggregates = ["baseline", "deleted", "erased", "flagged", "later", "unflagged"];
    case.apply(&aggregates.map(|aggregate| event(aggregate, 1, "1"))).await;
    case.apply(&aggregates.map(|aggregate| event(aggregate, 2, "10"))).await;
    // It has ended here, and this one is new to it.
    case.apply(&[event("ended", 1, "1"), typed("thing.deleted", "ended", 2, "delete", &[])]).await;
    let outcome = case
        .apply(&[
            new(baseline("baseline", 7, "700")),
            new(typed("thing.deleted", "deleted", 2, "delete", &[])),
            new(typed("thing.baseline", "erased", 1, "700", &["baseline", "erased"])),
            new(flagged("flagged", "700")),
            new(event("later", 3, "700")),
            new(event("unflagged", 1, "700")),
            new(event("ended", 1, "700")),
            new(event("new", 1, "700")),
        ])
        .await;
    assert_eq!(outcome, Outcome { applied: 5, held: 3, ..Outcome::default() });
    insta::assert_snapshot!("begins", case.tables().await);
    let expected =
        [("baseline", 700), ("ended", 700), ("erased", 11), ("flagged", 700), ("later", 11), ("new", 700)];
    let expected = named(&[&expected[..], &[("unflagged", 11)]].concat());
    assert_eq!(case.state().await, expected);

    // A flag without a first version is none.
    let flagged_later = new(typed("thing.changed", "later", 2, "700", &["chain_start"]));
    assert_eq!(case.apply(&[flagged_later]).await.held, 1);
    // Deliveries of what waits are duplicates, nobody applies it by hand, and the chain goes on from its baseline.
    let all = Redrive { filter: Filter::default(), batch: 64, dry_run: false };
    assert_eq!(case.sequencer.redrive(&all, |_| ()).await.unwrap().applied, 0);
    assert_eq!(case.apply(&[new(event("unflagged", 1, "700"))]).await.duplicates, 1);
    assert_eq!(
        case.apply(&[new(event("unflagged", 2, "30")), new(event("unflagged", 4, "50"))]).await.held,
        2
    );
    assert_eq!(case.apply(&[new(baseline("unflagged", 3, "5"))]).await.applied, 2);
    assert!(case.state().await.contains(&("unflagged".to_owned(), 55)));
    let anew: Vec<(String, i64)> =
        sqlx::query_as("SELECT aggregate, version FROM applied WHERE anew ORDER BY 1")
            .fetch_all(&case.pool)
            .await
            .unwrap();
    assert_eq!(anew, named(&[("baseline", 7), ("deleted", 2), ("flagged", 1), ("unflagged", 3)]));
}

#[tokio::test]
async fn the_earlier_chains_end_with_what_is_held_of_them() {
    let case = Case::new("incarnation_ends").await;
    // A hole, poison with one behind it, and an aggregate of which nothing was ever applied.
    case.apply(&[
        event("hole", 1, "1"),
        event("hole", 3, ""),
        event("poison", 1, "1"),
        event("poison", 2, "poison"),
    ])
    .await;
    case.apply(&[
        event("poison", 3, ""),
        event("only held", 2, ""),
        event("other", 1, "1"),
        event("other", 3, ""),
    ])
    .await;
    // In between, a second incarnation that the aggregates have not all begun.
    let second = |envelope| in_incarnation(envelope, 2, Some(1));
    case.apply(&[second(baseline("hole", 5, "5")), second(event("hole", 7, ""))]).await;
    let third = |envelope| in_incarnation(envelope, NEW, Some(2));
    let outcome = case
        .apply(&[
            third(baseline("hole", 1, "10")),
            third(flagged("poison", "20")),
            // Nothing of it is known here, so any first event begins it.
            third(event("only held", 1, "30")),
        ])
        .await;
    assert_eq!(outcome, Outcome { applied: 3, ..Outcome::default() });
    insta::assert_snapshot!("ends", case.tables().await);
    assert_eq!(case.left_behind().await, [("other".to_owned(), 1, 1)]);
    let ended = third(typed("thing.deleted", "other", 1, "delete", &[]));
    assert_eq!(case.apply(&[ended]).await.applied, 1);
    assert_eq!(case.left_behind().await, []);
    assert_eq!(case.state().await, named(&[("hole", 10), ("only held", 30), ("poison", 20)]));
    let held: i64 =
        sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&case.pool).await.unwrap();
    assert_eq!(held, 0);
}

#[tokio::test]
async fn a_beginning_that_is_refused_ends_nothing() {
    let case = Case::new("incarnation_refused").await;
    case.apply(&[event("a", 1, "1"), event("a", 3, "")]).await;
    let transient = typed("thing.new", "a", 1, "transient", &["chain_start"]);
    let before = case.tables().await;
    assert!(case.sequencer.apply(&[new(transient)]).await.is_err());
    assert_eq!(case.tables().await, before);
    assert_eq!(case.sources().await, [("things".to_owned(), 1, vec![])]);

    let broken = typed("thing.new", "a", 1, "broken", &["chain_start"]);
    assert_eq!(case.apply(&[new(broken), new(event("a", 2, "1"))]).await.poison, 1);
    assert_eq!(case.left_behind().await, [("a".to_owned(), 1, 1)]);
    assert_eq!(case.state().await, named(&[("a", 1)]));
    insta::assert_snapshot!("refused", case.tables().await);

    // The handler is mended, and the beginning is still one.
    case.handler.passed.store(true, Ordering::Relaxed);
    let all = Redrive { filter: Filter::default(), batch: 64, dry_run: false };
    let summary = case.sequencer.redrive(&all, |_| ()).await.unwrap();
    assert_eq!((summary.aggregates, summary.applied, summary.held), (1, 2, 0));
    assert_eq!(case.left_behind().await, []);
    assert_eq!(case.state().await, named(&[("a", 1)]), "not 2: the old state has ended");
}

#[tokio::test]
async fn a_beginning_that_is_skipped_ends_the_state_too() {
    let case = Case::new("incarnation_skipped").await;
    case.apply(&[event("a", 1, "1")]).await;
    case.apply(&[new(typed("thing.new", "a", 1, "poison", &["chain_start"])), new(event("a", 2, "20"))])
        .await;
    let mut conn = case.pool.acquire().await.unwrap();
    let event = held::at(&mut conn, case.consumer, "thing", "a", 1).await.unwrap().pop().unwrap();
    let skip = Skip { event: &event, by: "ann@desk", why: "a test of ours", batch: 2, dry_run: false };
    assert_eq!(case.sequencer.skip(&skip).await.unwrap().applied, 1);
    assert_eq!(case.state().await, named(&[("a", 20)]));
    assert_eq!(case.left_behind().await, []);
}

/// Neither by hand nor by the breaker.
#[tokio::test]
async fn what_is_held_of_an_earlier_incarnation_is_never_applied() {
    let case = Case::new("incarnation_held").await;
    case.apply(&[event("a", 1, "broken"), event("a", 2, "1")]).await;
    case.apply(&[new(event("b", 1, ""))]).await;
    case.handler.passed.store(true, Ordering::Relaxed);
    let all = Redrive { filter: Filter::default(), batch: 64, dry_run: false };
    assert_eq!(case.sequencer.redrive(&all, |_| ()).await.unwrap().aggregates, 0);
    let mut conn = case.pool.acquire().await.unwrap();
    let event = held::at(&mut conn, case.consumer, "thing", "a", 1).await.unwrap().pop().unwrap();
    let skip = Skip { event: &event, by: "ann@desk", why: "a test of ours", batch: 2, dry_run: false };
    assert_eq!(case.sequencer.skip(&skip).await.unwrap_err(), RedriveError::Superseded);
    assert_eq!(case.left_behind().await, [("a".to_owned(), 1, 0)]);
    assert_eq!(case.state().await, []);
}

#[tokio::test]
async fn one_batch_may_have_events_of_both() {
    let case = Case::new("incarnation_batch").await;
    let outcome = case
        .apply(&[
            event("a", 1, "1"),
            event("b", 1, "1"),
            event("a", 2, "10"),
            new(baseline("a", 2, "7")),
            event("a", 3, "100"),
            new(event("a", 3, "1")),
            new(baseline("b", 1, "8")),
        ])
        .await;
    assert_eq!(outcome, Outcome { applied: 6, superseded: 1, ..Outcome::default() });
    assert_eq!(case.state().await, named(&[("a", 8), ("b", 8)]));
    assert_eq!(case.left_behind().await, []);
}

async fn says(running: &mut Running, what: impl FnMut(&Status) -> bool) -> Status {
    let waited = running.status.wait_for(what);
    tokio::time::timeout(DEADLINE, waited).await.unwrap().unwrap().clone()
}

#[tokio::test]
async fn an_operator_sees_what_is_of_another_incarnation() {
    let world = World::new("incarnation_alarms").await;
    let before = Sequencer::new("things", world.pool.clone(), Recorder::new("things"));
    // More poison than may be held, and holes. Nothing of it stops the new incarnation.
    for n in 0..5 {
        let poison = format!("poison {n}");
        before.apply(&[event(&poison, 1, "poison"), event(&poison, 2, "")]).await.unwrap();
    }
    before.apply(&[event("a", 1, ""), event("a", 3, "")]).await.unwrap();
    before.apply(&[new(event("b", 1, ""))]).await.unwrap();
    let set = |config| Config { hole_after: Duration::ZERO, max_held: 1, ..config };
    let mut running = world.start_with(Recorder::new("things"), set);
    running.until_consuming().await;
    let status = says(&mut running, |status| status.incarnations.is_some()).await;
    assert_eq!((status.waiting(), &status.holes), (vec![], &None));
    insta::assert_snapshot!(status.incarnations.unwrap());

    world.publish(event("a", 2, "")).await;
    world.publish(in_incarnation(event("b", 2, ""), NEW + 1, Some(7))).await;
    // It waits for a baseline, not for a version.
    world.publish(new(event("a", 1, ""))).await;
    let status = says(&mut running, |status| {
        let incarnations = status.incarnations.as_deref().unwrap_or_default();
        incarnations.contains("earlier incarnation, from")
            && incarnations.contains("unknown")
            && status.holes.is_some()
    })
    .await;
    assert!(status.forks.is_none() && status.waiting().is_empty());
    insta::assert_snapshot!(status.holes.unwrap());
    let said = status.incarnations.unwrap();
    let (from, to) = (said.find(", from 20").unwrap(), said.find(" UTC: ").unwrap());
    insta::assert_snapshot!(format!("{} (times){}", &said[..from], &said[to + 4..]));

    world.publish(new(baseline("a", 3, ""))).await;
    for n in 0..5 {
        world.publish(new(typed("thing.deleted", &format!("poison {n}"), 1, "", &[]))).await;
    }
    sqlx::query("DELETE FROM inbox.rejected").execute(&world.pool).await.unwrap();
    says(&mut running, |status| status.incarnations.is_none() && status.holes.is_none()).await;
    running.stop().await;
}
