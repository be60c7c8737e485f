//! The receiving side of a transactional outbox: a consumer that applies each event once and in order.
//!
//! An event takes effect in the same transaction that records its version, so a redelivery, a crash
//! between commit and acknowledgement, or a second consumer cannot apply it twice; an event that comes
//! too early, or that its handler refuses, waits in `inbox.held` and holds only its own aggregate.
//!
//! A subscriber writes a [`Handler`] and hands it to a [`Consumer`], which declares the queue, consumes,
//! reconnects and drains. The [`Sequencer`] between them is usable without a broker.

mod alarms;
mod attempt;
mod backoff;
mod breaker;
mod chain;
mod consumer;
mod digest;
mod failpoint;
mod handler;
mod ledger;
mod message;
mod plan;
mod save;
mod schema;
mod sequencer;
mod status;
mod subscription;
mod topology;
mod transaction;

pub use consumer::{Config, Consumer, Node};
pub use digest::{Digest, digest};
pub use handler::{Failure, Handler};
pub use message::{Envelope, Event, Malformed};
pub use schema::{SCHEMA, migrator};
pub use sequencer::{Interrupted, Outcome, Sequencer};
pub use status::{Part, Status};
pub use topology::{InvalidTopology, Topology};
