//! Publishes any database's outbox to RabbitMQ. It knows nothing of what the events are about.
//!
//! The way of an event: [`reader`] finds it by its position, [`queue`] has it wait for its turn, a lane
//! [`publish`]es it and learns its fate, [`queue`] decides by the [`evidence`] what that means, `lead` settles it, has
//! it wait ([`waiting`]) or sets it aside ([`parked`]), and the [`session`] stores the progress. [`position`] remembers
//! what was read and what is missing.

pub mod broker;
pub mod budget;
pub mod cli;
pub mod command;
pub mod condition;
pub mod config;
pub mod erasure;
pub mod event;
pub mod evidence;
mod failpoint;
mod frame;
pub mod identity;
pub mod lane;
mod lead;
pub mod lease;
pub mod message;
mod migrate;
pub mod outboxes;
pub mod parked;
pub mod partition;
pub mod position;
pub mod publish;
pub mod queue;
pub mod reader;
pub mod relay;
pub mod row;
pub mod rules;
pub mod series;
mod serve;
pub mod session;
mod standby;
pub mod subscribers;
mod systemd;
mod task_connection;
pub mod unreadable;
pub mod waiting;
mod wake;

pub use config::RunArgs;
pub use migrate::migrate;
pub use outboxes::run;
