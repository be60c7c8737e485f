//! A complete subscriber: an address book that follows the person service.
//!
//! It needs a database of its own and a broker, and declares everything else:
//!
//! ```sh
//! export DATABASE_URL=postgres://… AMQP_URL=amqp://… SOURCE=person=outbox_relay_person
//! address_book            # consume until SIGTERM; ready or not at http://127.0.0.1:8010
//! address_book held       # what waits, and why
//! address_book redrive    # apply it again, after the program was fixed
//! ```
//!
//! What is its own is the table in `migrations` and the handler; the rest is the same for every subscriber.
//! `docs/subscribing.md` explains both.

use std::env;

use inbox::{
    Config, Consumer, Event, Handler, HandlerError, InvalidPublisher, Nodes, Publisher, Redrive, Sequencer,
    Sources, Status, Topology,
    held::{self, Filter},
};
use sqlx::{PgPool, Postgres, Transaction};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

/// The name under which the inbox remembers what was applied, and the queue's. It lives as long as the table.
const NAME: &str = "address-book";

struct AddressBook;

#[derive(serde::Deserialize)]
struct Person {
    id: uuid::Uuid,
    name: String,
    address: Option<String>,
}

impl Handler for AddressBook {
    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        match event.type_.as_str() {
            // Its content is gone; that it counts as a version is the inbox's business.
            _ if event.is_erased() => {}
            "person.new" | "person.changed" | "person.baseline" => {
                // No personal data in the reason: operators read it.
                let person: Person = serde_json::from_slice(&event.payload)
                    .map_err(|_| HandlerError::poison("the body is not a person"))?;
                sqlx::query(
                    "INSERT INTO contact (id, name, address) VALUES ($1, $2, $3)
                     ON CONFLICT (id) DO UPDATE SET name = excluded.name, address = excluded.address",
                )
                .bind(person.id)
                .bind(person.name)
                .bind(person.address)
                .execute(&mut **tx)
                .await?;
            }
            "person.deleted" => {
                let delete = sqlx::query("DELETE FROM contact WHERE id = $1::uuid").bind(&event.aggregate_id);
                delete.execute(&mut **tx).await?;
            }
            // Incomes, and whatever is invented later.
            _ => {}
        }
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    let pool = PgPool::connect(&env::var("DATABASE_URL")?).await?;
    inbox::migrator().run(&pool).await?;
    sqlx::migrate!("examples/address_book/migrations").run(&pool).await?;
    let sequencer = Sequencer::new(NAME, pool.clone(), AddressBook).following(sources()?);
    match env::args().nth(1).as_deref() {
        None => run(sequencer).await?,
        Some("held") => {
            let groups = held::groups(&mut *pool.acquire().await?, NAME, 50).await?;
            println!("{}", serde_json::to_string_pretty(&groups)?);
        }
        Some("redrive") => {
            let all = Redrive { filter: Filter::default(), batch: 64, dry_run: false };
            println!("{}", serde_json::to_string_pretty(&sequencer.redrive(&all, |_| ()).await?)?);
        }
        Some(other) => return Err(format!("{other} is neither held nor redrive").into()),
    }
    Ok(())
}

/// The sources and their broker users, as `SOURCE=USER` separated by commas. Without any, every user that may write to
/// the exchange is believed.
fn sources() -> Result<Sources, InvalidPublisher> {
    let named = env::var("SOURCE").unwrap_or_default();
    named.split(',').filter(|publisher| !publisher.is_empty()).map(str::parse::<Publisher>).collect()
}

/// Consumes until SIGTERM or Ctrl-C; then what is under way is committed and acknowledged.
async fn run(sequencer: Sequencer<AddressBook>) -> Result<(), Box<dyn std::error::Error>> {
    // All events of persons, by aggregate: a subscriber that follows versions also needs types that do not exist yet.
    let topology = Topology::new("event_dispatcher", "event_dispatcher.by_aggregate", NAME, &["person"])?;
    let nodes: Nodes = env::var("AMQP_URL")?.parse()?;
    let consumer = Consumer::new(Config::new(topology, nodes, NAME), sequencer);

    let listen = env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:8010".to_owned());
    tokio::spawn(health(TcpListener::bind(listen).await?, consumer.status()));
    let (mut terminated, mut interrupted) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} }
            stop.cancel();
        }
    });
    consumer.run(stop).await;
    Ok(())
}

/// Responds to every request with 200, or with 503 and the reasons. A service with a web framework uses a route
/// instead.
async fn health(listener: TcpListener, status: watch::Receiver<Status>) {
    while let Ok((mut client, _)) = listener.accept().await {
        let waiting = status.borrow().waiting();
        let (code, body) = if waiting.is_empty() {
            ("200 OK", "ready".to_owned())
        } else {
            ("503 Waiting", waiting.join("\n"))
        };
        let length = body.len();
        let answer =
            format!("HTTP/1.1 {code}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
        tokio::spawn(async move {
            let _ = client.read(&mut [0; 4096]).await;
            let _ = client.write_all(answer.as_bytes()).await;
        });
    }
}
