//! The complete services of `docs/examples`, run as they stand: each writer publishes, each subscriber has a copy, and
//! nothing that happens in between makes a copy differ from its tables.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is the report of a test")]

mod events;
mod following;
mod forks;
mod packages;
mod programs;
mod proxy;
mod races;
mod readmes;
mod services;
mod subscribers;
mod writers;
