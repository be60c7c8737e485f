//! Two histories under one source, found by the ids of events.

use inbox::{Envelope, Outcome};

use crate::{
    incarnations::{Case, baseline},
    support::{event, forked},
};

/// The receiver keeps the last sixteen ids of each aggregate.
#[tokio::test]
async fn a_fork_is_found_by_the_ids_that_were_applied() {
    let case = Case::new("incarnation_forks").await;
    let all: Vec<Envelope> = (1..=20).map(|version| event("a", version, "1")).collect();
    case.apply(&all[..7]).await;
    case.apply(&all[7..]).await;
    let other: Vec<Envelope> = (1..=20).map(|v| forked(event("a", v, "other"), "a", v, 0)).collect();
    // Those of versions 1 to 4 are not known any more.
    assert_eq!(case.apply(&other).await, Outcome { duplicates: 4, forks: 16, ..Outcome::default() });
    assert_eq!(case.apply(&all).await, Outcome { duplicates: 20, ..Outcome::default() });
    let bytes = "SELECT octet_length(recent) FROM inbox.aggregate";
    assert_eq!(sqlx::query_scalar::<_, i32>(bytes).fetch_one(&case.pool).await.unwrap(), 64);

    // What a baseline jumped over was never seen here.
    case.apply(&[baseline("a", 25, "1"), event("a", 26, "1")]).await;
    let other = [20, 24, 25, 26].map(|v| forked(event("a", v, "other"), "a", v, 0));
    assert_eq!(case.apply(&other).await, Outcome { duplicates: 2, forks: 2, ..Outcome::default() });
}
