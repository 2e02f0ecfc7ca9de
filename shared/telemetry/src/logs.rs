//! Log lines on standard error.

use std::io::{self, IsTerminal as _};

use opentelemetry_otlp::ExporterBuildError;
use tracing::level_filters::LevelFilter;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{EnvFilter, FilterExt as _, ParseError, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::export::{TraceConfig, Traces};
use crate::trace::TARGET;

/// The transport below us logs every frame at `debug`; a filter that names these targets still gets them.
const QUIET: &str = "hyper=warn,hyper_util=warn,h2=warn,tonic=warn,tower=warn,rustls=warn";

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Pretty,
    /// One JSON object a line, for collectors.
    Json,
}

/// How to log.
#[derive(Clone, Debug, Default)]
pub struct TelemetryConfig {
    /// How a line looks.
    pub format: Format,
    /// Which lines, as `RUST_LOG` spells it; `RUST_LOG` itself wins. Without either: `info`.
    pub filter: Option<String>,
}

/// Telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// Correct the filter.
    #[error("the log filter {filter:?} is no list such as `info,scaivault=debug`")]
    Filter {
        /// The filter as it was written.
        filter: String,
        /// Where it is wrong.
        source: ParseError,
    },
    /// Correct the collector's address.
    #[error("the OTLP endpoint is no address such as `http://localhost:4317`")]
    Endpoint(#[source] ExporterBuildError),
    /// Correct the ratio.
    #[error("the sample ratio of traces is {0}, which is not between 0 and 1")]
    SampleRatio(f64),
    /// It is set up once a process.
    #[error("telemetry is already set up")]
    Again(#[from] TryInitError),
}

/// Sets up logging for the process.
///
/// # Errors
/// If the filter is none, or if it was set up before.
pub fn init(config: TelemetryConfig) -> Result<(), InitError> {
    Ok(tracing_subscriber::registry().with(lines(config)?).try_init()?)
}

/// Sets up logging and traces for the process, within its tokio runtime.
///
/// # Errors
/// If the settings are wrong, or if it was set up before.
pub fn init_with_traces(config: TelemetryConfig, traces: TraceConfig) -> Result<Traces, InitError> {
    let lines = lines(config)?;
    let traces = Traces::start(traces)?;
    let registry = tracing_subscriber::registry().with(lines);
    // Not `with` an `Option`: a layer that is none is asked about every span all the same.
    match traces.layer() {
        Some(spans) => registry.with(spans).try_init()?,
        None => registry.try_init()?,
    }
    Ok(traces)
}

/// The layer that writes lines. The filter is its own, so that traces do not depend on what is logged.
fn lines<S>(config: TelemetryConfig) -> Result<Box<dyn Layer<S> + Send + Sync>, InitError>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let asked = std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty()).or(config.filter);
    let filter = filter(asked.as_deref().unwrap_or("info"))?
        .and(filter_fn(may_log).with_max_level_hint(LevelFilter::TRACE));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()));
    Ok(match config.format {
        Format::Pretty => lines.with_filter(filter).boxed(),
        Format::Json => lines.json().flatten_event(true).with_current_span(true).with_filter(filter).boxed(),
    })
}

/// Whether something may be logged at all, whatever the filter says: the client of logins logs what the backend answers,
/// tokens included, the AWS SDK logs whole requests, values included, and the spans of traces would only repeat what the
/// log's own say.
fn may_log(metadata: &Metadata<'_>) -> bool {
    ![TARGET, "vaultrs", "rustify", "aws_"].iter().any(|kept_out| metadata.target().starts_with(kept_out))
}

fn filter(asked: &str) -> Result<EnvFilter, InitError> {
    EnvFilter::try_new(format!("{QUIET},{asked}"))
        .map_err(|source| InitError::Filter { filter: asked.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transport_is_quiet_unless_named() {
        let shown = filter("debug").expect("a filter").to_string();
        assert!(shown.contains("hyper=warn") && shown.contains("debug"), "{shown}");
        let shown = filter("info,hyper=trace").expect("a filter").to_string();
        assert!(shown.contains("hyper=trace") && !shown.contains("hyper=warn"), "{shown}");
    }

    #[test]
    fn a_bad_filter_is_named() {
        let error = filter("scaivault=loud").expect_err("no level of this name");
        assert!(error.to_string().contains("scaivault=loud"), "{error}");
    }
}
