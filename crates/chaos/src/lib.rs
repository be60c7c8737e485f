//! `make chaos`: everything goes wrong at once, to a seeded plan, while many clients write; then it is
//! quiet, and an oracle that shares no code with the programs says whether every promise was kept.
//!
//! The way of a run: [`schedule`] makes the plan, `field` starts servers and programs with a `wire` between
//! any two, `load` writes, `nemesis` carries the plan out, `subscriber` remembers what is delivered, `quiet`
//! waits until everything has arrived, `oracle` judges, and [`report`] says what was found.

pub mod command;
pub mod copy;
pub mod fault;
pub mod report;
pub mod run;
pub mod sabotage;
pub mod schedule;
pub mod settings;
pub mod verdict;

mod addresses;
mod broker;
mod client;
mod crew;
mod event;
mod field;
mod history;
mod load;
mod model;
mod nemesis;
mod notes;
mod oracle;
mod quiet;
mod subscriber;
mod wire;
