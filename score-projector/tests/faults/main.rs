//! The projector under fire: servers stopped, queues deleted, processes killed at every step, under load.
//! After each fault everything that was published is in the read model, once and in order, and the
//! projector is ready again by itself; meanwhile it said what it waited for. Slow, and with servers of
//! their own, so `make test-faults` runs them.
//!
//! What one process can show on servers that go on is in `inbox/tests` and runs with `make test`.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

#[path = "../projector/stack.rs"]
#[expect(dead_code, reason = "shared with the tests that need no servers of their own")]
mod stack;

mod field;
mod scenarios;
mod standby;
