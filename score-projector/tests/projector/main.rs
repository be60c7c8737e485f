//! The program against a real PostgreSQL and a real RabbitMQ, under a role with no more rights than it
//! is granted.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report, in its helpers too")]

mod batch;
mod by_hand;
mod chains;
mod cli;
mod hostile;
mod incarnations;
mod projection;
mod rebuild;
mod rebuild_under_load;
mod stack;
