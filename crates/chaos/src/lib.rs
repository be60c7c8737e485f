//! `make chaos`: many clients write while a seeded plan of faults is carried out. When the faults are over and everything
//! has arrived, an oracle that shares no code with the programs checks every promise.
//!
//! One run:
//!
//! 1. [`schedule`] makes the plan of faults from the seed.
//! 2. `testbed` starts the servers and the programs, with a `proxy` on each link between two of them; `supervisor` keeps
//!    the programs running.
//! 3. `workload` writes and records a `history`; `subscriber` records what is delivered.
//! 4. `nemesis` carries the plan out. When a database goes back in time, all writers stop at a `barrier`, an operator follows
//!    the documented procedure, and `lost_time` records what has to be forgotten.
//! 5. `quiescence` waits until everything has arrived.
//! 6. `oracle` compares history, databases and deliveries, and adds to the [`violation`]s.
//! 7. [`report`] shows what was found.
//!
//! [`sabotage`] shows that the oracle can see: it removes one guard from the programs.

pub mod command;
pub mod fault;
pub mod report;
pub mod run;
pub mod sabotage;
pub mod schedule;
pub mod settings;
pub mod violation;

mod addresses;
mod barrier;
mod broker;
mod event;
mod history;
mod lost_time;
mod model;
mod nemesis;
mod oracle;
mod proxy;
mod quiescence;
mod subscriber;
mod supervisor;
mod testbed;
mod workload;
