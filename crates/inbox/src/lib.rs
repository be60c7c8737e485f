//! The receiving side of a transactional outbox: a consumer that applies each event once and in order.
//!
//! An event takes effect in the same transaction that records its version, so a redelivery, a crash
//! between commit and acknowledgement, or a second consumer cannot apply it twice; an event that comes
//! too early, or that its handler refuses, waits in `inbox.held` and holds only its own aggregate.
//!
//! A subscriber writes a [`Handler`] and hands it to a [`Consumer`], which declares the queue, consumes,
//! reconnects and drains. The [`Sequencer`] between them is usable without a broker. What is held or
//! rejected is looked at with [`held`] and [`rejected`], and brought on with [`Sequencer::redrive`] and
//! [`Sequencer::skip`]: a program's own commands are a thin layer over these.

mod about;
mod alarms;
mod attempt;
mod breaker;
mod chain;
mod consumer;
mod digest;
mod erasure;
mod failpoint;
mod handler;
pub mod held;
mod kept;
mod ledger;
mod limits;
mod message;
mod plan;
mod queues;
mod redrive;
pub mod rejected;
mod save;
mod schema;
mod sequencer;
mod skip;
mod sources;
mod stall;
mod status;
mod subscription;
mod topology;
mod transaction;

pub use amqp::{InvalidNodes, Nodes};
pub use chain::Key as Aggregate;
pub use consumer::{Config, Consumer};
pub use digest::{Digest, digest};
pub use handler::{Failure, Handler};
pub use message::{Envelope, Event, Malformed};
pub use queues::{declare, remove};
pub use redrive::{NotDone, Redrive, Redriven, Redrives, Refused};
pub use schema::{SCHEMA, migrator};
pub use sequencer::{Interrupted, Outcome, Sequencer};
pub use skip::Skip;
pub use sources::{InvalidPublisher, Publisher, Sources};
pub use status::{Part, Status};
pub use topology::{InvalidTopology, Topology};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
