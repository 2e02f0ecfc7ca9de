//! Between the messages of `scaivault.secrets.v1` and the domain, for both planes.

use std::time::Duration;

use prost_types::{Duration as WireDuration, Timestamp as WireTimestamp};
use scaivault_domain::secret::{Kind, Source, State};
use scaivault_domain::time::Timestamp;
use scaivault_domain::{Error, Reason};
use scaivault_proto::secrets::v1 as pb;
use tonic::Status;

use crate::error::grpc;

/// Most paths of one batch.
const MAX_BATCH: usize = 100;

/// A time as a message.
pub fn time(time: Timestamp) -> WireTimestamp {
    let millis = time.as_millis();
    WireTimestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).expect("less than a second"),
    }
}

/// A time of a message.
///
/// # Errors
/// `invalid_request`, naming `pointer`.
pub fn parse_time(pointer: &str, time: &WireTimestamp) -> Result<Timestamp, Error> {
    let millis = time
        .seconds
        .checked_mul(1000)
        .and_then(|millis| millis.checked_add(i64::from(time.nanos) / 1_000_000));
    millis.map(Timestamp::from_millis).ok_or_else(|| Error::invalid(pointer, "is no time that can be"))
}

/// A duration as a message.
pub fn duration(duration: Duration) -> WireDuration {
    WireDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).expect("less than a second"),
    }
}

/// A duration of a message.
///
/// # Errors
/// One of `reason`, naming `pointer`.
pub fn parse_duration(reason: Reason, pointer: &str, duration: &WireDuration) -> Result<Duration, Error> {
    Duration::try_from(*duration)
        .map_err(|_| Error::field(reason, pointer, "is a duration that is not negative"))
}

/// A kind as a message.
pub fn kind(kind: Kind) -> pb::SecretType {
    match kind {
        Kind::Json => pb::SecretType::Json,
        Kind::Text => pb::SecretType::Text,
        Kind::Binary => pb::SecretType::Binary,
    }
}

/// A kind of a message; JSON if it says none.
///
/// # Errors
/// `invalid_request`, naming `secret_type`.
pub fn parse_kind(kind: i32) -> Result<Kind, Error> {
    match pb::SecretType::try_from(kind) {
        Ok(pb::SecretType::Unspecified | pb::SecretType::Json) => Ok(Kind::Json),
        Ok(pb::SecretType::Text) => Ok(Kind::Text),
        Ok(pb::SecretType::Binary) => Ok(Kind::Binary),
        Err(_) => Err(Error::invalid("/secret_type", "is `json`, `text` or `binary`")),
    }
}

/// A state as a message.
pub fn state(state: State) -> pb::SecretState {
    match state {
        State::Active => pb::SecretState::Active,
        State::Disabled => pb::SecretState::Disabled,
        State::Deleted => pb::SecretState::Deleted,
        State::Destroyed => pb::SecretState::Destroyed,
        State::Expired => pb::SecretState::Expired,
    }
}

/// A source as a message.
pub fn source(source: Source) -> pb::SecretSource {
    match source {
        Source::Proxy => pb::SecretSource::Proxy,
        Source::Local => pb::SecretSource::Local,
    }
}

/// Checks how many paths a batch has.
///
/// # Errors
/// `invalid_request`, naming `paths`.
pub fn check_batch(paths: &[String]) -> Result<(), Error> {
    if (1..=MAX_BATCH).contains(&paths.len()) {
        return Ok(());
    }
    Err(Error::invalid("/paths", "has 1 to 100 paths"))
}

/// What a batch says of one path that was refused.
pub fn refused(refusal: &Status) -> pb::BatchGetError {
    let error = grpc::error(refusal);
    pb::BatchGetError {
        code: refusal.code().into(),
        reason: error.reason.code().into(),
        message: error.message.into_owned(),
    }
}
