//! The JSON of REST, written by hand: protobuf types get neither serde nor schemas.

pub(super) mod access;
pub(super) mod backend;
mod config;
pub(super) mod mapping;
pub(super) mod secret;
pub(super) mod status;
pub(super) mod sync;
pub(super) mod test;

use std::time::Duration;

use scaivault_domain::time::{Timestamp, parse_duration};
use scaivault_domain::{Error, Reason};
use serde::Deserialize;
use utoipa::ToSchema;

/// A time as RFC 3339 in UTC.
fn rfc3339(time: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = time?;
    Some(Timestamp::from_millis(millis(time)).to_string())
}

/// Milliseconds since the Unix epoch.
fn millis(time: &prost_types::Timestamp) -> i64 {
    time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos / 1_000_000))
}

/// A duration; negative ones do not occur and are zero.
fn duration(duration: Option<&prost_types::Duration>) -> Option<Duration> {
    duration.map(|duration| Duration::try_from(*duration).unwrap_or_default())
}

/// A duration on the wire. Longer than protobuf can say is as long as it can.
fn to_wire(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).expect("below a billion"),
    }
}

/// A text that is there; an empty one stands for none.
fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// One name of a closed set, e.g. a mode.
///
/// # Errors
/// What `parse` says, about `pointer`.
fn named<T>(
    pointer: &str,
    text: Option<String>,
    parse: fn(&str) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    text.map(|text| parse(&text).map_err(|error| at(pointer, error))).transpose()
}

/// The error, of whatever field it was, as one about `pointer`.
fn at(pointer: &str, error: Error) -> Error {
    let detail = error.violations.into_iter().next().map(|violation| violation.detail);
    Error::field(error.reason, pointer, detail.unwrap_or_else(|| error.message.into_owned()))
}

/// A duration as it is written, e.g. `15m`.
///
/// # Errors
/// `invalid_config`, naming `pointer`.
fn span(pointer: &str, text: Option<String>) -> Result<Option<Duration>, Error> {
    let span = text.as_deref().map(parse_duration).transpose();
    span.map_err(|detail| Error::field(Reason::InvalidConfig, pointer, detail))
}

/// A request without fields.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}
