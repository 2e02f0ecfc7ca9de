//! Between the messages and the domain, for both planes.

use std::time::Duration;

use prost_types::{Duration as WireDuration, Timestamp as WireTimestamp};
use scaivault_domain::mapping::{GivenRule, Overrides};
use scaivault_domain::secret::{Kind, Source, State};
use scaivault_domain::sync::{ConflictPolicy, Mode, WritePolicy};
use scaivault_domain::time::Timestamp;
use scaivault_domain::{Error, Reason};
use scaivault_proto::federation::v1 as federation;
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
        Source::Sync => pb::SecretSource::Sync,
        Source::Local => pb::SecretSource::Local,
    }
}

/// A mode as a message.
pub fn mode(mode: Mode) -> federation::Mode {
    match mode {
        Mode::Proxy => federation::Mode::Proxy,
        Mode::Sync => federation::Mode::Sync,
    }
}

/// A mode of a message; `None` if it says none.
///
/// # Errors
/// `invalid_config`, naming `pointer`.
pub fn parse_mode(pointer: &str, mode: i32) -> Result<Option<Mode>, Error> {
    match federation::Mode::try_from(mode) {
        Ok(federation::Mode::Unspecified) => Ok(None),
        Ok(federation::Mode::Proxy) => Ok(Some(Mode::Proxy)),
        Ok(federation::Mode::Sync) => Ok(Some(Mode::Sync)),
        Err(_) => Err(none_of(pointer, Mode::ALL, Mode::as_str)),
    }
}

/// A write policy as a message.
pub fn write_policy(policy: WritePolicy) -> federation::WritePolicy {
    match policy {
        WritePolicy::Disabled => federation::WritePolicy::Disabled,
        WritePolicy::WriteThrough => federation::WritePolicy::WriteThrough,
        WritePolicy::LocalOnly => federation::WritePolicy::LocalOnly,
    }
}

/// A write policy of a message; `None` if it says none.
///
/// # Errors
/// `invalid_config`, naming `pointer`.
pub fn parse_write_policy(pointer: &str, policy: i32) -> Result<Option<WritePolicy>, Error> {
    match federation::WritePolicy::try_from(policy) {
        Ok(federation::WritePolicy::Unspecified) => Ok(None),
        Ok(federation::WritePolicy::Disabled) => Ok(Some(WritePolicy::Disabled)),
        Ok(federation::WritePolicy::WriteThrough) => Ok(Some(WritePolicy::WriteThrough)),
        Ok(federation::WritePolicy::LocalOnly) => Ok(Some(WritePolicy::LocalOnly)),
        Err(_) => Err(none_of(pointer, WritePolicy::ALL, WritePolicy::as_str)),
    }
}

/// A conflict policy as a message.
pub fn conflict_policy(policy: ConflictPolicy) -> federation::ConflictPolicy {
    match policy {
        ConflictPolicy::BackendWins => federation::ConflictPolicy::BackendWins,
        ConflictPolicy::LocalWins => federation::ConflictPolicy::LocalWins,
        ConflictPolicy::Manual => federation::ConflictPolicy::Manual,
    }
}

/// A conflict policy of a message; `None` if it says none.
///
/// # Errors
/// `invalid_config`, naming `pointer`.
pub fn parse_conflict_policy(pointer: &str, policy: i32) -> Result<Option<ConflictPolicy>, Error> {
    match federation::ConflictPolicy::try_from(policy) {
        Ok(federation::ConflictPolicy::Unspecified) => Ok(None),
        Ok(federation::ConflictPolicy::BackendWins) => Ok(Some(ConflictPolicy::BackendWins)),
        Ok(federation::ConflictPolicy::LocalWins) => Ok(Some(ConflictPolicy::LocalWins)),
        Ok(federation::ConflictPolicy::Manual) => Ok(Some(ConflictPolicy::Manual)),
        Err(_) => Err(none_of(pointer, ConflictPolicy::ALL, ConflictPolicy::as_str)),
    }
}

fn none_of<T: Copy>(pointer: &str, all: &[T], name: fn(T) -> &'static str) -> Error {
    let names: Vec<_> = all.iter().map(|one| name(*one)).collect();
    Error::field(Reason::InvalidConfig, pointer, format!("is `{}`", names.join("` or `")))
}

/// A rule as a message.
pub fn rule(rule: &GivenRule<'_>) -> federation::PathRule {
    let Overrides { mode, sync_interval, write_policy, conflict_policy } = rule.overrides;
    federation::PathRule {
        pattern: rule.pattern.to_owned(),
        template: rule.template.to_owned(),
        separator: rule.separator.to_owned(),
        mode: mode.map_or(federation::Mode::Unspecified, self::mode).into(),
        sync_interval: sync_interval.map(duration),
        write_policy: write_policy.map_or(federation::WritePolicy::Unspecified, self::write_policy).into(),
        conflict_policy: conflict_policy
            .map_or(federation::ConflictPolicy::Unspecified, self::conflict_policy)
            .into(),
    }
}

/// What the rule with this index in its mapping overrides.
///
/// # Errors
/// `invalid_config`, naming the field.
pub fn parse_overrides(index: usize, rule: &federation::PathRule) -> Result<Overrides, Error> {
    let at = |field: &str| format!("/path_mapping/{index}/{field}");
    let interval = rule.sync_interval.as_ref();
    Ok(Overrides {
        mode: parse_mode(&at("mode"), rule.mode)?,
        sync_interval: interval
            .map(|every| parse_duration(Reason::InvalidConfig, &at("sync_interval"), every))
            .transpose()?,
        write_policy: parse_write_policy(&at("write_policy"), rule.write_policy)?,
        conflict_policy: parse_conflict_policy(&at("conflict_policy"), rule.conflict_policy)?,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rule_overrides_survives_the_wire() {
        let some = Overrides {
            mode: Some(Mode::Sync),
            sync_interval: Some(Duration::from_millis(30_500)),
            write_policy: Some(WritePolicy::LocalOnly),
            conflict_policy: Some(ConflictPolicy::Manual),
        };
        for overrides in [some, Overrides::default()] {
            let message = rule(&GivenRule { pattern: "a/**", template: "b/**", separator: "", overrides });
            assert_eq!(parse_overrides(0, &message).unwrap(), overrides);
        }
    }

    #[test]
    fn every_name_survives_the_wire_and_a_later_one_is_named() {
        for each in Mode::ALL {
            assert_eq!(parse_mode("", mode(*each).into()).unwrap(), Some(*each));
        }
        for each in WritePolicy::ALL {
            assert_eq!(parse_write_policy("", write_policy(*each).into()).unwrap(), Some(*each));
        }
        for each in ConflictPolicy::ALL {
            assert_eq!(parse_conflict_policy("", conflict_policy(*each).into()).unwrap(), Some(*each));
        }
        let later = federation::PathRule { write_policy: 9, ..Default::default() };
        let refusal = parse_overrides(2, &later).unwrap_err();
        assert_eq!(refusal.violations[0].pointer, "/path_mapping/2/write_policy");
        assert!(parse_mode("/mode", -1).is_err() && parse_conflict_policy("", 9).is_err());
    }
}
