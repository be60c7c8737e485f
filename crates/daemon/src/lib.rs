//! What a background program needs: settings, telemetry, shutdown, health and metrics, and the three paths that serve
//! them. [`cli`] and [`command`] stand above; [`config`] has the settings below.

mod backoff;
pub mod cli;
pub mod command;
pub mod config;
pub mod health;
pub mod host;
pub mod probes;
pub mod progress;
pub mod shutdown;
pub mod telemetry;
#[cfg(feature = "otlp")]
pub mod traces;

pub use backoff::backoff;
