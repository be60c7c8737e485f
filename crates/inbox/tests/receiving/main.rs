//! The receiving side against a real PostgreSQL and a real RabbitMQ.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report, in its helpers too")]

mod alarms;
mod attempt;
mod breaker;
mod consumer;
mod erasure;
mod examples;
mod property;
mod redrive;
mod sequencer;
mod support;
