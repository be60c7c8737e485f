//! What every program needs and no more: configuration, telemetry, shutdown, health and problem
//! responses.

pub mod config;
pub mod health;
pub mod problem;
pub mod shutdown;
pub mod telemetry;
