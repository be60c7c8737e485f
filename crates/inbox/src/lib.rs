//! The receiving side of a transactional outbox: a consumer that applies each event once and in order.
//!
//! An event takes effect in the transaction that records its version. So a redelivery, a crash between commit and
//! acknowledgement, or a second consumer cannot apply it twice. An event that comes too early, or that its handler
//! refuses, waits in `inbox.held`; later events of its aggregate wait behind it, and no other aggregate waits.
//!
//! A source that was restored from a backup begins a new incarnation. The inbox takes it if it follows the newest one
//! known, and applies nothing of an earlier one any more. An event that begins an aggregate's chain anew arrives with
//! [`Event::begins_anew`]: the handler first ends its state of the aggregate. The view `inbox.left_behind` lists
//! the aggregates that the new incarnation has not begun.
//!
//! A subscriber writes a [`Handler`] and passes it to a [`Consumer`], which declares the queue, consumes, reconnects
//! and drains. The [`Sequencer`] between them also works without a broker. [`held`] and [`rejected`] list the events
//! that wait and the messages that cannot be applied. [`Sequencer::redrive`] applies held events again, and
//! [`Sequencer::skip`] gives one up. A program's own commands are a thin layer over these. A program without the handler
//! writes [`requests`], which a running [`Consumer`] works off.

mod after_commit;
mod alarms;
mod attempt;
mod breaker;
mod chain;
mod consumer;
mod digest;
mod erasure;
mod failpoint;
mod handler;
mod handling;
mod headers;
pub mod held;
mod identifiers;
mod incarnation;
mod incarnation_alarm;
mod ledger;
mod limits;
mod lock;
mod malformed;
mod message;
mod newest;
mod outcome;
mod parsed;
mod plan;
mod process;
mod queues;
mod recent;
mod redrive;
pub mod rejected;
mod rejection;
pub mod requests;
mod rollback;
mod save;
mod save_rejected;
mod schema;
mod sequencer;
mod series;
mod skip;
mod sources;
mod stall;
mod status;
mod stored_message;
mod subscription;
mod together;
mod topology;
mod transaction;
mod work;

pub use amqp::{InvalidNodes, Nodes};
pub use chain::Key as Aggregate;
pub use consumer::{Config, Consumer};
pub use digest::{Digest, digest};
pub use handler::{Handler, HandlerError};
pub use malformed::Malformed;
pub use message::{Envelope, Event};
pub use outcome::{Interrupted, Outcome};
pub use queues::{declare, remove};
pub use redrive::{Redrive, RedriveError, RedriveSummary, RedrivenAggregate, RefusedEvent};
pub use schema::{SCHEMA, migrator};
pub use sequencer::Sequencer;
pub use skip::Skip;
pub use sources::{InvalidPublisher, Publisher, Sources};
pub use status::{Part, Status};
pub use topology::{InvalidTopology, Topology};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
