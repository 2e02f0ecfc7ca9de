//! What the processes tell about themselves: logs, metrics, and the one wall clock.
//!
//! No path and no value goes through here: labels are closed sets, ids and names of nodes.

mod clock;
pub mod field;
mod logs;
mod metrics;

pub use clock::SystemClock;
pub use logs::{Format, InitError, TelemetryConfig, init};
pub use metrics::{BackendMetrics, Breaker, Health, Metrics, NodeMetrics};
