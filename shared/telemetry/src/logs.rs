//! Log lines on standard error.

use std::io::{self, IsTerminal as _};

use tracing::Metadata;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{EnvFilter, ParseError, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

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

/// Logging could not be set up.
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
    /// Logging is set up once a process.
    #[error("logging is already set up")]
    Again(#[from] TryInitError),
}

/// Sets up logging for the process.
///
/// # Errors
/// If the filter is none, or if logging was set up before.
pub fn init(config: TelemetryConfig) -> Result<(), InitError> {
    let asked = std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty()).or(config.filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()));
    let registry = tracing_subscriber::registry().with(filter(asked.as_deref().unwrap_or("info"))?);
    match config.format {
        Format::Pretty => registry.with(lines.with_filter(filter_fn(may_log))).try_init()?,
        Format::Json => {
            let lines = lines.json().flatten_event(true).with_current_span(true);
            registry.with(lines.with_filter(filter_fn(may_log))).try_init()?;
        }
    }
    Ok(())
}

/// Whether something may be logged at all, whatever the filter says: the client of logins logs what the backend answers,
/// tokens included.
fn may_log(metadata: &Metadata<'_>) -> bool {
    !["vaultrs", "rustify"].iter().any(|secretive| metadata.target().starts_with(secretive))
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
