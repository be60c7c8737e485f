//! The private stack: PostgreSQL, RabbitMQ and the programs, for development and tests.

pub mod testing;
