//! A batch of events is one fold: it comes to the same as its events one by one, for a bounded number of
//! statements.

use std::cell::Cell;

use inbox::{Event, Handler};
use score_projector::{
    model::{Model, Role},
    projection::Projection,
};
use serde_json::{Value, json};
use sqlx::{Connection, PgPool};
use tracing_subscriber::{Layer, layer::SubscriberExt};
use uuid::Uuid;

use crate::stack::{Stack, id, item, person};

thread_local! {
    /// How many statements this thread, and so this test, has sent.
    static SENT: Cell<usize> = const { Cell::new(0) };
}

/// Counts what sqlx says it sends. For the whole process: whether a place in the code logs at all is
/// remembered, and a subscriber of one thread comes too late where another one has asked before.
struct Statements;

impl<S: tracing::Subscriber> Layer<S> for Statements {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() == "sqlx::query" {
            SENT.set(SENT.get() + 1);
        }
    }
}

fn event(type_: &str, person: Uuid, version: i64, body: &Value) -> Event {
    Event {
        id: Uuid::now_v7(),
        source: "person".to_owned(),
        aggregate_type: "person".to_owned(),
        aggregate_id: person.to_string(),
        version,
        type_: type_.to_owned(),
        occurred_at: None,
        headers: serde_json::Map::new(),
        payload: body.to_string().into_bytes(),
        begins_anew: false,
    }
}

/// Everything that can happen to a person, for persons `from` to `to`, their events mixed.
fn everything(from: u128, to: u128) -> [Vec<Event>; 2] {
    let base = |n: u128| n * 100;
    let baseline = |n: u128, cpf: i64, items: &[u128]| {
        let mut body = person(id(base(n)), cpf);
        let item =
            |i: &u128| json!({"id": id(base(n) + i), "value": 100, "created_at": "2026-01-01T00:00:01Z"});
        body["incomes"] = items.iter().map(item).collect();
        body["assets"] = json!([]);
        body["debts"] = json!([]);
        body
    };
    let mut before = Vec::new();
    let mut batch: Vec<Vec<Event>> = vec![Vec::new(); 8];
    for n in from..=to {
        let (p, other) = (id(base(n)), id(base(n) + 50));
        let item = |i: u128, value| item(id(base(n) + i), p, 1, value);
        before.push(event("person.new", p, 1, &person(p, 1)));
        before.push(event("income.new", p, 2, &item(1, "100")));
        before.push(event("asset.new", p, 3, &item(2, "100")));
        before.push(event("person.new", other, 1, &person(other, 2)));
        let mut step = 0;
        let mut then = |event: Event| {
            batch[step].push(event);
            step += 1;
        };
        then(event("income.changed", p, 4, &item(1, "200")));
        then(event("asset.deleted", p, 5, &item(2, "100")));
        // Its id is free again.
        then(event("debt.new", p, 6, &item(2, "40")));
        then(event("person.changed", p, 7, &person(p, 3)));
        then(event("person.baseline", p, 9, &baseline(n, 4, &[2, 3])));
        then(event("person.tomorrow", p, 10, &json!({})));
        if n % 2 == 0 {
            then(event("person.deleted", p, 11, &json!({"id": p})));
            // Never heard of before, and taking an item's id over from somebody who is gone.
            let mut life = baseline(n, 5, &[3]);
            life["id"] = json!(other);
            then(event("person.baseline", other, 5, &life));
        }
    }
    [before, batch.concat()]
}

/// Applies them, and says for how many statements. What a new connection sets first is none of them.
async fn apply(stack: &Stack, events: &[Event]) -> usize {
    let projection = Projection::new(Model::new(Role::Live, "score".to_owned(), None));
    let pool: PgPool = Role::Live.options(stack.database.parse().unwrap()).pool(1);
    let mut conn = pool.acquire().await.unwrap();
    let sent = SENT.get();
    let mut tx = conn.begin().await.unwrap();
    projection.begin(&mut tx).await.unwrap();
    projection.handle_batch(events, &mut tx).await.unwrap();
    tx.commit().await.unwrap();
    SENT.get() - sent
}

/// Keeps what is appended to the outbox as it was before a deletion erases it.
async fn keep_appended(stack: &Stack) {
    sqlx::raw_sql(
        "CREATE TABLE public.appended (row text);
         CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO public.appended
             SELECT concat_ws(' ', NEW.type, NEW.aggregate_id, NEW.version, NEW.payload, NEW.headers);
             RETURN NULL;
         END $$;
         GRANT INSERT ON public.appended TO PUBLIC;
         CREATE TRIGGER keep AFTER INSERT ON outbox.event FOR EACH ROW EXECUTE FUNCTION public.keep()",
    )
    .execute(&stack.pool)
    .await
    .unwrap();
}

async fn appended(stack: &Stack) -> String {
    let sql = "SELECT string_agg(row, E'\n  ' ORDER BY ctid) FROM public.appended";
    let rows: String = sqlx::query_scalar(sql).fetch_one(&stack.pool).await.unwrap();
    format!("appended\n  {rows}\n")
}

#[tokio::test]
async fn a_batch_is_its_events_one_by_one() {
    let (together, single) = (Stack::new("together").await, Stack::new("single").await);
    for stack in [&together, &single] {
        keep_appended(stack).await;
    }
    let batches = everything(1, 4);
    for batch in &batches {
        apply(&together, batch).await;
        for event in batch {
            apply(&single, std::slice::from_ref(event)).await;
        }
    }
    let state = together.state().await + &appended(&together).await;
    assert_eq!(state, single.state().await + &appended(&single).await);
    insta::assert_snapshot!(state);
}

#[tokio::test]
async fn a_batch_takes_the_same_few_statements_however_large_it_is() {
    let stack = Stack::new("statements").await;
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Statements)).unwrap();
    let mut counts = Vec::new();
    for (from, to) in [(1, 2), (3, 60)] {
        let [before, batch] = everything(from, to);
        apply(&stack, &before).await;
        counts.push((batch.len(), apply(&stack, &batch).await));
    }
    // The fence, three reads, what is gone and what is written of the read model, the outbox, and what ended erased in
    // the outbox and in the model of before; beginning and committing are none.
    assert_eq!(counts, [(14, 11), (406, 11)]);
}
