//! A projector that is led to a standby: it consumes nothing, and says so.

use crate::{field::Field, stack::until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn a_projector_on_a_standby_costs_no_message_anything() {
    let mut field = Field::new("faults_standby").await;
    // Declares the queue.
    field.add().await;
    field.publish(2).await;
    field.whole("before").await;
    field.programs.clear();

    let mut standby = field.standby().await;
    standby.start().await.unwrap();
    field.publish(2).await;
    // The same role and database, on the other server.
    let of = |url: &str| reqwest::Url::parse(url).unwrap();
    let mut database = of(&field.stack.database);
    database.set_port(of(&standby.url()).port()).unwrap();
    assert_ne!(database.as_str(), field.stack.database);
    field.programs.push(field.start_at(database.as_str(), ""));
    let fault = "led to a standby";
    field.says(fault, "takes no writes").await;
    until("nobody consumes", async || field.consumers("score").await == Some(0)).await;
    assert_eq!(field.redelivered().await, 0, "{fault}");
    field.programs.clear();

    // Led to the primary again, everything is there for it.
    field.add().await;
    field.whole(fault).await;
    assert_eq!(field.messages("score.dead").await, Some(0), "{fault}");
    assert_eq!(field.redelivered().await, 0, "{fault}");
    let rejected: i64 =
        sqlx::query_scalar("SELECT count(*) FROM inbox.rejected").fetch_one(&field.stack.pool).await.unwrap();
    assert_eq!(rejected, 0, "{fault}");
    field.programs.clear();
    standby.stop(&tokio_util::sync::CancellationToken::new()).await;
}
