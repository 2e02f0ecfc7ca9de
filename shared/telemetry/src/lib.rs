//! What the processes tell about themselves: logs, traces, metrics, and the one wall clock.
//!
//! No path and no value goes through here: labels and fields are closed sets, ids and names of nodes.

mod clock;
mod export;
pub mod field;
mod logs;
mod metrics;
pub mod trace;

pub use clock::SystemClock;
pub use export::{TraceConfig, Traces};
pub use logs::{Format, InitError, TelemetryConfig, init, init_with_traces};
pub use metrics::{BackendMetrics, Breaker, Flow, Health, Lookup, Metrics, NodeMetrics};
