//! `make bench` measures figures. A figure is some work of the system, round by round, next to its ceiling: the same work by
//! the simplest means, on the same servers, in the same minutes.

pub mod command;
pub mod figure;
pub mod goal;
pub mod history;
pub mod report;
pub mod scale;
pub mod statistics;
pub mod testbed;

mod broker;
mod capture;
mod events;
mod files;
mod growth;
mod http;
mod idle;
mod latency;
mod machine;
mod memory;
mod pgbench;
mod plot;
mod processor_time;
mod project;
mod read;
mod relay;
mod traces;
mod wait;
mod write;

pub use capture::Capture;
pub use growth::Growth;
pub use idle::Idle;
pub use latency::Latency;
pub use memory::Memory;
pub use project::Project;
pub use read::Read;
pub use relay::Relay;
pub use traces::Traces;
pub use write::Write;
