//! The writing side of a transactional outbox.
//!
//! A service writes events in the transaction that changes its rows; `outbox-relay` publishes them. Either both are committed
//! or neither. [`publish()`] is the easiest way; [`append()`] is for a service that has versions of its own. A service in
//! another language does the same with `outbox.publish(...)` in SQL or a plain `INSERT INTO outbox.event`: this crate is a
//! convenience, the schema is the contract.

mod append;
pub mod database;
mod erase;
mod error;
mod prepare;
mod publish;
mod schema;
#[cfg(feature = "opentelemetry")]
pub mod trace;
#[cfg(not(feature = "opentelemetry"))]
mod trace;
mod wake;

pub use append::{
    MAX_HEADER_COUNT, MAX_HEADER_DEPTH, MAX_HEADERS, MAX_PAYLOAD, NewEvent, append, headers_rule,
};
pub use erase::{Ended, erase};
pub use error::AppendError;
pub use publish::{Event, Published, lock, lock_all, publish, publish_all};
pub use schema::{SCHEMA, Source, SourceError, check_source_name, install, migrator, require_utf8, source};
pub use wake::{CHANNEL, Waker};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
