//! Between messages and the domain.

use prost_types::{Duration as WireDuration, Timestamp as WireTimestamp};
use scaivault_domain::secret::{Kind, Source, State};
use scaivault_domain::time::Timestamp;
use scaivault_domain::{Error, Reason};
use scaivault_proto::secrets::v1 as pb;

pub(super) fn time(time: Timestamp) -> WireTimestamp {
    let millis = time.as_millis();
    WireTimestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).expect("less than a second"),
    }
}

pub(super) fn parse_time(pointer: &str, time: &WireTimestamp) -> Result<Timestamp, Error> {
    let millis = time
        .seconds
        .checked_mul(1000)
        .and_then(|millis| millis.checked_add(i64::from(time.nanos) / 1_000_000));
    millis.map(Timestamp::from_millis).ok_or_else(|| Error::invalid(pointer, "is no time that can be"))
}

pub(super) fn duration(duration: std::time::Duration) -> WireDuration {
    WireDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).expect("less than a second"),
    }
}

pub(super) fn parse_duration(
    reason: Reason,
    pointer: &str,
    duration: &WireDuration,
) -> Result<std::time::Duration, Error> {
    std::time::Duration::try_from(*duration)
        .map_err(|_| Error::field(reason, pointer, "is a duration that is not negative"))
}

pub(super) fn kind(kind: Kind) -> pb::SecretType {
    match kind {
        Kind::Json => pb::SecretType::Json,
        Kind::Text => pb::SecretType::Text,
        Kind::Binary => pb::SecretType::Binary,
    }
}

pub(super) fn parse_kind(kind: i32) -> Result<Kind, Error> {
    match pb::SecretType::try_from(kind) {
        Ok(pb::SecretType::Unspecified | pb::SecretType::Json) => Ok(Kind::Json),
        Ok(pb::SecretType::Text) => Ok(Kind::Text),
        Ok(pb::SecretType::Binary) => Ok(Kind::Binary),
        Err(_) => Err(Error::invalid("/secret_type", "is `json`, `text` or `binary`")),
    }
}

pub(super) fn state(state: State) -> pb::SecretState {
    match state {
        State::Active => pb::SecretState::Active,
        State::Disabled => pb::SecretState::Disabled,
        State::Deleted => pb::SecretState::Deleted,
        State::Destroyed => pb::SecretState::Destroyed,
        State::Expired => pb::SecretState::Expired,
    }
}

pub(super) fn source(source: Source) -> pb::SecretSource {
    match source {
        Source::Proxy => pb::SecretSource::Proxy,
        Source::Local => pb::SecretSource::Local,
    }
}
