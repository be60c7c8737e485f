//! A subscriber that keeps a copy of every order.
//!
//! It needs a database of its own and a broker, and declares everything else:
//!
//! ```sh
//! export DATABASE_URL=postgres://… AMQP_URL=amqp://… SOURCE=shop=outbox_relay_shop
//! subscriber            # consume until SIGTERM; ready or not at http://127.0.0.1:8010
//! subscriber held       # what waits, and why
//! subscriber redrive    # apply it again, after the program was fixed
//! ```
//!
//! What is its own is the table and the handler; the rest is the same for every subscriber. `docs/examples/rust` says what
//! it needs, and `docs/subscribing.md` explains it.

use std::env;

use inbox::{
    Config, Consumer, Event, Handler, HandlerError, Nodes, Publisher, Redrive, Sequencer, Sources, Status,
    Topology,
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

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS copy
    (source text, id text, body jsonb NOT NULL, PRIMARY KEY (source, id))";

/// Keeps the states of the aggregates of a type.
struct CopyOf {
    aggregate_type: String,
}

impl CopyOf {
    async fn delete(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
        let delete = sqlx::query("DELETE FROM copy WHERE (source, id) = ($1, $2)");
        delete.bind(name(event)).bind(&event.aggregate_id).execute(&mut **tx).await?;
        Ok(())
    }
}

/// The name of the source. The number of its incarnation is no part of it.
fn name(event: &Event) -> &str {
    event.source.split_once('~').map_or(&event.source, |(name, _)| name)
}

impl Handler for CopyOf {
    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        if event.begins_anew {
            // What it has is of a history that was lost.
            self.delete(event, tx).await?;
        }
        match event.type_.strip_prefix(&self.aggregate_type) {
            // Its content is gone; that it counts as a version is the inbox's business.
            _ if event.is_erased() => {}
            Some(".new" | ".changed" | ".baseline") => {
                // No personal data in the reason: operators read it.
                let body = std::str::from_utf8(&event.payload)
                    .map_err(|_| HandlerError::poison("the body is not UTF-8"))?;
                let insert = sqlx::query(
                    "INSERT INTO copy (source, id, body) VALUES ($1, $2, $3::text::jsonb)
                     ON CONFLICT (source, id) DO UPDATE SET body = excluded.body",
                );
                insert.bind(name(event)).bind(&event.aggregate_id).bind(body).execute(&mut **tx).await?;
            }
            Some(".deleted") => self.delete(event, tx).await?,
            // Whatever is invented later.
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
    sqlx::raw_sql(SCHEMA).execute(&pool).await?;
    let aggregate_type = env::var("AGGREGATE_TYPE").unwrap_or_else(|_| "order".to_owned());
    // Under this name the inbox remembers what was applied, and it is the queue's. It lives as long as the table.
    let name = format!("{aggregate_type}-copy-rust");
    let handler = CopyOf { aggregate_type: aggregate_type.clone() };
    let sequencer = Sequencer::new(&*name, pool.clone(), handler).following(sources()?);
    match env::args().nth(1).as_deref() {
        None => run(sequencer, &name, &aggregate_type).await?,
        Some("held") => {
            let groups = held::groups(&mut *pool.acquire().await?, &name, 50).await?;
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

/// The followed sources and their broker users, as `SOURCE=USER` separated by commas.
fn sources() -> Result<Sources, Box<dyn std::error::Error>> {
    Ok(env::var("SOURCE")?.split(',').map(str::parse::<Publisher>).collect::<Result<_, _>>()?)
}

/// Consumes until SIGTERM or Ctrl-C; then what is under way is committed and acknowledged.
async fn run(
    sequencer: Sequencer<CopyOf>,
    name: &str,
    aggregate_type: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    // All its events, by aggregate: a subscriber that follows versions also needs types that do not exist yet.
    let topology =
        Topology::new("event_dispatcher", "event_dispatcher.by_aggregate", name, &[aggregate_type])?;
    let nodes: Nodes = env::var("AMQP_URL")?.parse()?;
    let consumer = Consumer::new(Config::new(topology, nodes, name), sequencer);

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
