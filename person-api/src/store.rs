//! All of the SQL: statements of more than a few lines are files in `store/sql/`. Each write is one statement, so it is
//! one transaction in one round trip: the rows, the aggregate's next version and the outbox event are committed together
//! or not at all. Only erasing a person takes more ([`erase`]).

mod connection;
mod creation;
pub mod erase;
mod error;
pub mod idempotency;
mod items;
mod outcome;
mod persons;
pub mod write_health;
mod write_slots;

#[cfg(test)]
mod plan;

pub(crate) use self::outcome::ItemPage;
pub use self::{
    connection::{Connections, Store},
    error::StoreError,
    outcome::{AddOutcome, ChangeOutcome, Refusal, Representation, StoredResponse, Written},
    write_slots::WRITES,
};
