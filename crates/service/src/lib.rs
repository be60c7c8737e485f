//! What every program needs and no more: configuration, telemetry, shutdown, health, problem responses,
//! the documentation of an API, and what stands in front of its routes.

pub mod config;
pub mod documentation;
pub mod front;
pub mod health;
pub mod problem;
pub mod shutdown;
pub mod telemetry;
