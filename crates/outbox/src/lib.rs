//! The writing side of a transactional outbox.
//!
//! A service appends events in the transaction that changes its rows; `outbox-relay` publishes them.
//! Either both are committed or neither. A service in another language does the same with a plain
//! `INSERT INTO outbox.event`: this crate is a convenience, the schema is the contract.

mod append;
pub mod database;
mod erase;
mod schema;
mod wake;

pub use append::{
    AppendError, MAX_HEADER_COUNT, MAX_HEADER_DEPTH, MAX_HEADERS, MAX_PAYLOAD, NewEvent, append, headers_rule,
};
pub use erase::{Ended, erase};
pub use schema::{SCHEMA, Source, SourceError, check_source_name, install, migrator, require_utf8, source};
pub use wake::{CHANNEL, Waker};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
