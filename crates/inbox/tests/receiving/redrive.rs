//! Redriving and skipping by hand, beside consumers that go on.

use std::sync::atomic::Ordering;

use inbox::{
    Envelope, Outcome, Redrive, RedriveError, RedriveSummary, Sequencer, Skip,
    held::{self, Filter, HeldEvent},
};
use sqlx::PgPool;

use crate::support::{Recorder, database, event, tables, typed, until, waiting_for_locks};

const ALL: Redrive =
    Redrive { filter: Filter { aggregate: None, reason: None, error: None }, batch: 64, dry_run: false };

struct Case {
    pool: PgPool,
    consumer: &'static str,
    handler: Recorder,
    sequencer: Sequencer<Recorder>,
}

impl Case {
    async fn new(consumer: &'static str) -> Self {
        let pool = database(consumer).await;
        let handler = Recorder::new(consumer);
        let sequencer = Sequencer::new(consumer, pool.clone(), handler.clone());
        Self { pool, consumer, handler, sequencer }
    }

    /// Another process with the same name.
    fn replica(&self) -> Sequencer<Recorder> {
        Sequencer::new(self.consumer, self.pool.clone(), self.handler.clone())
    }

    async fn apply(&self, messages: &[Envelope]) -> Outcome {
        self.sequencer.apply(messages).await.unwrap()
    }

    async fn redrive(&self, redrive: &Redrive) -> RedriveSummary {
        self.sequencer.redrive(redrive, |_| ()).await.unwrap()
    }

    async fn tables(&self) -> String {
        tables(&self.pool, self.consumer).await
    }

    async fn held(&self, aggregate: &str, version: i64) -> HeldEvent {
        let mut conn = self.pool.acquire().await.unwrap();
        held::at(&mut conn, self.consumer, "thing", aggregate, version).await.unwrap().pop().unwrap()
    }

    async fn skip(&self, event: &HeldEvent, dry_run: bool) -> Result<(u64, i64), RedriveError> {
        let skip = Skip { event, by: "ann@desk", why: "a test of ours", batch: 2, dry_run };
        self.sequencer.skip(&skip).await.map(|done| (done.applied, done.to))
    }

    fn fix(&self) {
        self.handler.passed.store(true, Ordering::Relaxed);
    }
}

/// An aggregate's poison and a chain that waits behind it, in transactions smaller than the chain; what
/// arrives meanwhile finds its place, whoever is first.
#[tokio::test]
async fn two_redrives_and_a_consumer_at_once_apply_all_once_and_in_order() {
    let case = Case::new("redrive_at_once").await;
    let names: Vec<String> = (0..12).map(|n| format!("a{n:02}")).collect();
    let waiting = |name: &String| -> Vec<Envelope> {
        (1..=20).map(|v| event(name, v, if v == 1 || v == 11 { "broken" } else { "1" })).collect()
    };
    for name in &names {
        case.apply(&waiting(name)).await;
    }
    case.fix();
    let small = Redrive { batch: 3, ..ALL };
    let (one, two, consumer) = (case.replica(), case.replica(), case.replica());
    let arriving = async {
        for version in 21..=30 {
            // A redelivery with it, of what may be waiting, applied, or under way just now.
            let batch: Vec<Envelope> = names
                .iter()
                .flat_map(|name| [event(name, version, "1"), event(name, version - 10, "1")])
                .collect();
            consumer.apply(&batch).await.unwrap();
        }
    };
    let (one, two, ()) = tokio::join!(one.redrive(&small, |_| ()), two.redrive(&small, |_| ()), arriving);
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!((one.refused, two.refused), (0, 0));

    let applied: Vec<(String, i64)> =
        sqlx::query_as("SELECT aggregate, version FROM applied ORDER BY aggregate, n")
            .fetch_all(&case.pool)
            .await
            .unwrap();
    let expected: Vec<(String, i64)> =
        names.iter().flat_map(|name| (1..=30).map(|version| (name.clone(), version))).collect();
    assert_eq!(applied, expected);
    let held: i64 =
        sqlx::query_scalar("SELECT count(*) FROM inbox.held").fetch_one(&case.pool).await.unwrap();
    assert_eq!(held, 0);
}

/// Deliveries, restarts and replicas are no attempts; each redrive that fails is one.
#[tokio::test]
async fn attempts_are_counted_where_the_handler_was_called() {
    let case = Case::new("redrive_attempts").await;
    let batch = [event("a", 1, "poison"), event("a", 2, "1"), event("b", 1, "1")];
    let attempts = async || -> i32 {
        sqlx::query_scalar("SELECT attempts FROM inbox.held WHERE version = 1")
            .fetch_one(&case.pool)
            .await
            .unwrap()
    };
    let (one, two) = (case.replica(), case.replica());
    let (first, second) = tokio::join!(one.apply(&batch), two.apply(&batch));
    assert_eq!(first.unwrap().poison + second.unwrap().poison, 1);
    for _ in 0..3 {
        case.replica().apply(&batch).await.unwrap();
    }
    assert_eq!(attempts().await, 1);

    let before = case.tables().await;
    let dry = case.redrive(&Redrive { dry_run: true, ..ALL }).await;
    assert_eq!((dry.aggregates, dry.applied, dry.refused, dry.held), (1, 0, 1, 2));
    assert_eq!(case.tables().await, before, "a dry run changes nothing");

    case.redrive(&ALL).await;
    assert_eq!(attempts().await, 2);
    let (one, two) = tokio::join!(one.redrive(&ALL, |_| ()), two.redrive(&ALL, |_| ()));
    assert_eq!(one.unwrap().refused + two.unwrap().refused, 2);
    assert_eq!(attempts().await, 4);
}

/// Only what was chosen is touched, and a dry run says what the real one does.
#[tokio::test]
async fn what_is_chosen_is_redriven() {
    let case = Case::new("redrive_chosen").await;
    case.apply(&[
        event("a", 1, "broken"),
        event("a", 2, "1"),
        event("a", 3, "broken"),
        event("b", 1, "poison"),
        event("b", 2, "1"),
        event("c", 1, "broken"),
        // A gap, and behind it a complete state that was refused.
        event("d", 1, "1"),
        event("d", 3, "1"),
        typed("thing.baseline", "d", 5, "broken", &["baseline"]),
        event("d", 6, "1"),
    ])
    .await;
    case.fix();
    let before = case.tables().await;
    let dry = case.redrive(&Redrive { dry_run: true, ..ALL }).await;
    assert_eq!(case.tables().await, before);
    insta::assert_json_snapshot!("redrive_dry_run", dry);

    let of = |filter| Redrive { filter, ..ALL };
    let nobody = of(Filter { aggregate: Some(("thing".to_owned(), "z".to_owned())), ..Filter::default() });
    assert_eq!(case.redrive(&nobody).await.aggregates, 0);
    let only = of(Filter { aggregate: Some(("thing".to_owned(), "c".to_owned())), ..Filter::default() });
    assert_eq!(case.redrive(&only).await.applied, 1);
    let by_error = of(Filter { error: Some("is broken".to_owned()), ..Filter::default() });
    assert_eq!(case.redrive(&by_error).await.aggregates, 2);
    insta::assert_snapshot!("redrive_chosen", case.tables().await);
}

/// A transaction takes no more than it was told to, and the process may die between two of them.
#[tokio::test]
async fn a_redrive_goes_on_where_another_was_killed() {
    let case = Case::new("redrive_killed").await;
    let chain: Vec<Envelope> = (1..=150)
        .map(|v| {
            event(
                "a",
                v,
                if v == 1 {
                    "broken"
                } else if v == 100 {
                    "locked"
                } else {
                    "1"
                },
            )
        })
        .collect();
    case.apply(&chain).await;
    case.fix();
    let small = Redrive { batch: 10, ..ALL };
    let mut holder = case.pool.begin().await.unwrap();
    sqlx::raw_sql("SELECT pg_advisory_xact_lock(1)").execute(&mut *holder).await.unwrap();
    let killed = case.replica();
    let killed = tokio::spawn({
        let small = small.clone();
        async move { killed.redrive(&small, |_| ()).await }
    });
    until("it is at the hundredth", async || waiting_for_locks(&case.pool).await == 1).await;
    killed.abort();
    assert!(killed.await.unwrap_err().is_cancelled());
    holder.commit().await.unwrap();
    assert_eq!(case.redrive(&small).await.aggregates, 1, "it is found, though nothing of it is poison");
    let order: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM applied ORDER BY n").fetch_all(&case.pool).await.unwrap();
    assert_eq!(order, (1..=150).collect::<Vec<_>>());
    // Nine before the one that was killed, and six after it.
    assert_eq!(case.handler.commits.load(Ordering::Relaxed), 15);
}

#[tokio::test]
async fn a_skipped_event_counts_as_a_version_and_is_remembered() {
    let case = Case::new("skip").await;
    case.apply(&[
        event("a", 1, "1"),
        event("a", 2, "poison"),
        event("a", 3, "1"),
        event("a", 4, "1"),
        event("a", 5, "1"),
        event("a", 6, "poison"),
        event("a", 7, "1"),
        event("b", 2, "1"),
        event("c", 1, "1"),
        typed("thing.baseline", "c", 4, "poison", &["baseline"]),
    ])
    .await;
    let before = case.tables().await;
    let poison = case.held("a", 2).await;
    assert_eq!(case.skip(&poison, true).await, Ok((2, 4)));
    assert_eq!(case.skip(&case.held("a", 3).await, false).await, Err(RedriveError::NotNext(1)));
    assert_eq!(case.skip(&case.held("b", 2).await, false).await, Err(RedriveError::NotNext(0)));
    assert_eq!(case.skip(&case.held("c", 4).await, false).await, Err(RedriveError::NotNext(1)));
    assert_eq!(case.tables().await, before, "nothing is changed by what is only tried or not done");

    assert_eq!(case.skip(&poison, false).await, Ok((3, 5)));
    assert_eq!(case.skip(&poison, false).await, Err(RedriveError::Gone));
    // Its redelivery is a duplicate like any other.
    assert_eq!(case.apply(&[event("a", 2, "poison")]).await.duplicates, 1);
    let skipped: Vec<String> = sqlx::query_scalar(
        "SELECT concat_ws(' ', consumer, source, aggregate_type || '/' || aggregate_id, version, event_id, type,
                          quote_literal(error), skipped_by, quote_literal(why)) FROM inbox.skipped",
    )
    .fetch_all(&case.pool)
    .await
    .unwrap();
    insta::assert_snapshot!(
        "skip",
        format!("{}\ninbox.skipped\n  {}", case.tables().await, skipped.join("\n  "))
    );
}

/// Whatever the number that waits, what is read of it is bounded.
#[tokio::test]
async fn causes_and_pages() {
    let case = Case::new("held_pages").await;
    case.apply(&[event("a", 1, "poison"), event("b", 2, "1")]).await;
    // Many more, by hand: behind the poison, of another error each, and of another consumer.
    sqlx::raw_sql(
        "INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id)
         SELECT 'held_pages', 'things', 'thing', 'x' || n FROM generate_series(1, 30) n;
         INSERT INTO inbox.held (consumer, source, aggregate_type, aggregate_id, version, event_id, type, headers, payload,
                                 reason, error, attempts)
         SELECT 'held_pages', 'things', 'thing', 'a', n, gen_random_uuid(), 'thing.changed', '{}'::json, ''::bytea, 'behind', NULL, 0
         FROM generate_series(2, 1000) n
         UNION ALL
         SELECT 'held_pages', 'things', 'thing', 'x' || n, 1, gen_random_uuid(), 'thing.new', '{}'::json, ''::bytea, 'poison', 'error ' || n, n
         FROM generate_series(1, 30) n
         UNION ALL
         SELECT 'other', 'things', 'thing', 'a', n, gen_random_uuid(), 'thing.new', '{}'::json, ''::bytea, 'gap', NULL, 0
         FROM generate_series(1, 30) n",
    )
    .execute(&case.pool)
    .await
    .unwrap();
    let mut conn = case.pool.acquire().await.unwrap();
    let groups = held::groups(&mut conn, case.consumer, 3).await.unwrap();
    let causes: Vec<_> = groups
        .groups
        .iter()
        .map(|g| {
            format!(
                "{} of {}, {} {:?}, {} at {}",
                g.events, g.aggregates, g.reason, g.error, g.oldest, g.version
            )
        })
        .collect();
    insta::assert_snapshot!(format!(
        "{} events\n{}\nand {} more",
        groups.events,
        causes.join("\n"),
        groups.more
    ));

    let mut seen = std::collections::BTreeSet::new();
    let mut after = None;
    loop {
        let page = held::events(&mut conn, case.consumer, &Filter::default(), after, 300).await.unwrap();
        assert!(page.len() <= 300);
        let Some(last) = page.last() else { break };
        after = Some(last.event_id);
        seen.extend(page.iter().map(|event| (event.aggregate.clone(), event.version)));
    }
    assert_eq!(seen.len(), 1_031);
}

/// Aggregates that succeed share transactions; one that is refused again costs only itself.
#[tokio::test]
async fn many_aggregates_take_few_transactions() {
    let case = Case::new("redrive_together").await;
    for n in 0..200 {
        case.apply(&[event(&format!("a{n:03}"), 1, if n == 77 { "poison" } else { "broken" })]).await;
        case.apply(&[event(&format!("a{n:03}"), 2, "1")]).await;
    }
    case.fix();
    let dry = case.redrive(&Redrive { dry_run: true, ..ALL }).await;
    assert_eq!((dry.aggregates, dry.applied, dry.refused, dry.held), (200, 398, 1, 2));
    let all = case.redrive(&ALL).await;
    assert_eq!((all.aggregates, all.applied, all.refused, all.held), (200, 398, 1, 2));
    let transactions: i64 =
        sqlx::query_scalar("SELECT count(DISTINCT xmin::text) FROM inbox.aggregate WHERE version = 2")
            .fetch_one(&case.pool)
            .await
            .unwrap();
    assert!(transactions < 40, "{transactions} transactions for 199 aggregates");
    let each: Vec<(i64, i64)> = all.each.iter().map(|one| (one.from, one.to)).collect();
    assert!(each.iter().all(|one| [(0, 2), (0, 0)].contains(one)), "{each:?}");
    let stopped = all.each.iter().find(|one| one.refused.is_some()).unwrap();
    assert_eq!(stopped.aggregate.aggregate_id, "a077");
}

/// An aggregate of which more is held than a transaction takes, among others.
#[tokio::test]
async fn a_long_chain_among_others_is_applied_in_order() {
    let case = Case::new("redrive_long").await;
    for name in ["a", "b", "c"] {
        let versions = if name == "b" { 300 } else { 2 };
        let chain: Vec<Envelope> =
            (1..=versions).map(|v| event(name, v, if v == 1 { "broken" } else { "1" })).collect();
        case.apply(&chain).await;
    }
    case.fix();
    let all = case.redrive(&ALL).await;
    assert_eq!((all.aggregates, all.applied, all.refused, all.held), (3, 304, 0, 0));
    let each: Vec<(&str, i64, i64, u64)> = all
        .each
        .iter()
        .map(|one| (one.aggregate.aggregate_id.as_str(), one.from, one.to, one.applied))
        .collect();
    let mut each = each;
    each.sort_unstable();
    assert_eq!(each, [("a", 0, 2, 2), ("b", 0, 300, 300), ("c", 0, 2, 2)]);
}

#[tokio::test]
async fn an_interrupted_redrive_says_how_far_it_is_and_the_next_goes_on() {
    let case = Case::new("redrive_stopped").await;
    for n in 0..50 {
        case.apply(&[event(&format!("a{n:02}"), 1, "broken")]).await;
    }
    case.fix();
    let stop = tokio_util::sync::CancellationToken::new();
    let small = Redrive { batch: 8, ..ALL };
    let some = case.sequencer.redrive_until(&small, &stop, |_| stop.cancel()).await.unwrap();
    assert!(some.interrupted && some.applied > 0 && some.applied < 50, "{some:?}");
    let rest = case.redrive(&ALL).await;
    assert_eq!((rest.interrupted, some.applied + rest.applied), (false, 50));
}
