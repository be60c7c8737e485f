//! The receiving side against a real PostgreSQL and a real RabbitMQ.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report, in its helpers too")]

mod alarms;
mod attempt;
mod breaker;
mod conflicts;
mod consumer;
mod erasure;
mod forks;
mod hostile;
mod incarnations;
mod known_sources;
mod limits;
mod property;
mod read_only;
mod redrive;
mod sequencer;
mod sources;
mod stalled;
mod support;
mod told_alone;
mod too_long;
