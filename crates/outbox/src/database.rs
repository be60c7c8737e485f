//! PostgreSQL as the outbox's programs meet it: what its errors mean, and a session that one task keeps.

mod again;
mod failure;
mod session;
mod words;

pub use again::{ATTEMPTS, Attempts, again, is_conflict};
pub use failure::{Failure, SharedSessions};
pub use session::Session;
pub use words::{POOLER, describe, meaning, reason};
