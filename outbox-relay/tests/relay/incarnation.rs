//! A new incarnation that begins while a relay takes the lead.

use crate::stack::{Relay, Stack, eventually};

/// The relay waits for the row that the new incarnation has changed and not committed yet. It must not store the old one
/// beside the new epoch: the incarnation would look unused, and be given to other events once more.
#[tokio::test]
async fn a_relay_that_waits_for_a_new_incarnation_leads_under_it() {
    let stack = Stack::new("relay_incarnation").await;
    let mut relay = Relay::ready(&mut stack.command("run")).await;
    assert!(relay.terminate().await.success());

    let mut begun = stack.admin.begin().await.unwrap();
    sqlx::query("SELECT outbox.begin_incarnation(NULL)").execute(&mut *begun).await.unwrap();
    let relay = Relay::start(&mut stack.command("run")).await;
    eventually("the relay waits for its row", async || {
        let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
                         AND application_name LIKE 'outbox-relay%' AND wait_event_type = 'Lock')";
        sqlx::query_scalar::<_, bool>(waits).fetch_one(&stack.admin).await.unwrap().then_some(())
    })
    .await;
    begun.commit().await.unwrap();
    relay.is_ready().await;
    let same = "SELECT r.incarnation = s.incarnation FROM outbox.relay r, outbox.source s";
    assert!(sqlx::query_scalar::<_, bool>(same).fetch_one(&stack.admin).await.unwrap());
}
