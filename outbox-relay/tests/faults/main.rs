//! The relay under fire: servers stopped, killed, lost and replaced, processes killed and stopped, all of
//! it under load. After each fault everything that was committed has arrived, each aggregate's events
//! first came in their order, and the relay was ready again by itself; meanwhile it said what it waited
//! for. Slow, and with servers of their own, so `make test-faults` runs them.
//!
//! What needs neither servers of its own nor minutes is in `tests/relay` and runs with `make test`: a
//! connection closed by an operator, a channel closed over one event, a leader whose session is
//! terminated, returns among thousands of messages, an idle leader that never answers again.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

#[macro_use]
#[path = "../relay/stack.rs"]
#[expect(dead_code, unused_macros, reason = "shared with the tests that need no servers of their own")]
mod stack;

mod broker;
mod cluster;
mod database;
mod field;
mod isolation;
mod process;
mod standby;
mod tls;
