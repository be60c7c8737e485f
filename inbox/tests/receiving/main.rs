//! The receiving side against a real PostgreSQL and a real RabbitMQ.

mod consumer;
mod property;
mod sequencer;
mod support;
