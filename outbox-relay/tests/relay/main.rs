//! The relay as a process, against real servers: what arrives, in which order, how often, and what it
//! says when it cannot go on. Each test has a database, a virtual host and roles of its own.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

#[macro_use]
#[expect(dead_code, reason = "shared with the fault suite")]
mod stack;

mod by_hand;
mod capturing;
mod chains;
mod command_line;
mod conflicts;
mod digest;
mod doctor;
mod erasures;
mod faults;
mod hostile;
mod identity;
mod incarnation;
mod isolation;
mod outboxes;
mod parking;
mod partitions;
mod progress;
mod publishing;
mod repairs;
mod replay;
mod rows;
mod script;
mod sequence;
mod status;
mod subscribers;
mod systemd;
mod tour;
