//! What a background program needs: settings, telemetry, shutdown, health and metrics, and the three paths by which
//! others ask for them.

mod backoff;
pub mod config;
pub mod health;
pub mod host;
pub mod probes;
pub mod shutdown;
pub mod telemetry;

pub use backoff::backoff;
