//! What Secret Manager's answers say.
//!
//! Sources: the REST reference of Secret Manager v1 (`projects.secrets`, `projects.secrets.versions`, `SecretPayload`),
//! the JSON mapping of protocol buffers (bytes in either base64, 64-bit integers as text, defaults left out), and
//! AIP-193 for errors.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use reqwest::StatusCode;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, SecretValue, State};
use scaivault_domain::time::Timestamp;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor};
use serde_json::Value;
use zeroize::Zeroizing;

use super::metadata::Fields;
use crate::error::BackendError;
use crate::http::Answer;
use crate::{PageToken, RemoteSecret, RemoteVersion};

const FOREIGN: BackendError = BackendError::InvalidAnswer("JSON that is not Secret Manager's");
/// Google's tokens have some hundred bytes; they become a part of the next URL.
const LONGEST_PAGE_TOKEN: usize = 4096;

/// An answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// `PERMISSION_DENIED`: Google knows who asks.
    Denied,
    /// `FAILED_PRECONDITION`, or `ABORTED`: the state of the resource, or its etag, is in the way.
    Precondition,
    /// `ALREADY_EXISTS`.
    AlreadyExists,
    /// What means the same for every call.
    Error(BackendError),
}

impl From<BackendError> for Refusal {
    fn from(error: BackendError) -> Refusal {
        Refusal::Error(error)
    }
}

impl From<Refusal> for BackendError {
    fn from(refusal: Refusal) -> BackendError {
        match refusal {
            Refusal::Denied => BackendError::Forbidden,
            Refusal::Precondition | Refusal::AlreadyExists => BackendError::PreconditionLost,
            Refusal::Error(error) => error,
        }
    }
}

#[derive(Deserialize)]
struct Failure {
    error: Status,
}

#[derive(Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    details: Value,
}

impl Status {
    /// Whether `google.rpc.ErrorInfo` names this reason.
    fn has_reason(&self, reason: &str) -> bool {
        self.details.as_array().into_iter().flatten().any(|detail| detail["reason"] == reason)
    }
}

/// The answer, if it is a success.
pub(super) fn success(answer: Answer) -> Result<Answer, Refusal> {
    if answer.status == StatusCode::OK {
        return Ok(answer);
    }
    let status = answer.status.as_u16();
    let Ok(Failure { error }) = serde_json::from_slice(&answer.body) else {
        // In front of Google stands something that says no in JSON of its own. It must not pass for "not found".
        return Err(Refusal::Error(match status {
            401 => BackendError::LoginExpired,
            403 => BackendError::Forbidden,
            _ => FOREIGN,
        }));
    };
    // AIP-193 has one status for each code; an answer in which they disagree is nobody's "not found".
    Err(match (status, &*error.status) {
        (401, _) => Refusal::Error(BackendError::LoginExpired),
        (403, _) if error.has_reason("SERVICE_DISABLED") => Refusal::Error(BackendError::InvalidConfig(
            "the Secret Manager API is not enabled in the project",
        )),
        (403, _) if error.has_reason("ACCESS_TOKEN_SCOPE_INSUFFICIENT") => {
            Refusal::Error(BackendError::InvalidConfig("the login's token lacks the scope `cloud-platform`"))
        }
        (403, _) => Refusal::Denied,
        (404, "NOT_FOUND") => Refusal::Error(BackendError::NotFound),
        (409, "ALREADY_EXISTS") => Refusal::AlreadyExists,
        (400, "FAILED_PRECONDITION") | (409, "ABORTED") => Refusal::Precondition,
        (_, "RESOURCE_EXHAUSTED") => Refusal::Error(BackendError::Throttled { retry_after: None }),
        (499, _) => Refusal::Error(BackendError::Server { status }),
        (400, "INVALID_ARGUMENT") => {
            Refusal::Error(BackendError::InvalidAnswer("it takes the request for malformed"))
        }
        _ => Refusal::Error(BackendError::InvalidAnswer("a status that this request cannot have")),
    })
}

fn parse<'a, T: Deserialize<'a>>(answer: &'a Answer) -> Result<T, BackendError> {
    serde_json::from_slice(&answer.body).map_err(|_| FOREIGN)
}

/// The secret's id in `projects/P/secrets/ID` or `projects/P/locations/L/secrets/ID`.
fn id_in(resource: &str) -> Option<&str> {
    match resource.split('/').collect::<Vec<_>>()[..] {
        ["projects", _, "secrets", id] | ["projects", _, "locations", _, "secrets", id] if !id.is_empty() => {
            Some(id)
        }
        _ => None,
    }
}

/// The number in the name of a version of `name`. Google writes the project as its number, however it was asked for.
fn number_in(resource: &str, name: &RemoteName) -> Result<u64, BackendError> {
    let (secret, number) = resource.rsplit_once("/versions/").ok_or(FOREIGN)?;
    if id_in(secret) != Some(name.as_str()) {
        return Err(BackendError::InvalidAnswer("another secret than was asked for"));
    }
    number_of(number).ok_or(FOREIGN)
}

/// A version's number as Google writes it: from 1, without a sign or leading zeros.
pub(super) fn number_of(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number: &u64| *number > 0 && number.to_string() == text)
}

#[derive(Deserialize)]
struct Accessed<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    payload: Payload,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payload {
    #[serde(default)]
    data: Option<Bytes>,
    #[serde(default)]
    data_crc32c: Option<Crc32c>,
}

/// Either base64, padded or not. Decoded where it lies, so that there is no second copy to wipe.
struct Bytes(Zeroizing<Vec<u8>>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const CONFIG: GeneralPurposeConfig =
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, CONFIG);
        const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, CONFIG);
        struct Base64;

        impl Visitor<'_> for Base64 {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Bytes, E> {
                let engine = if text.contains(['-', '_']) { URL_SAFE } else { STANDARD };
                engine.decode(text).map(|bytes| Bytes(bytes.into())).map_err(|_| E::custom("no base64"))
            }
        }

        deserializer.deserialize_str(Base64)
    }
}

/// A 64-bit integer that never needs more than 32.
struct Crc32c(u32);

impl<'de> Deserialize<'de> for Crc32c {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = match Value::deserialize(deserializer)? {
            Value::String(text) => text.parse().ok(),
            Value::Number(number) => number.as_u64().and_then(|number| u32::try_from(number).ok()),
            _ => None,
        };
        number.map(Crc32c).ok_or_else(|| D::Error::custom("no CRC32C"))
    }
}

/// The value of a version of `name`.
pub(super) fn value(answer: &Answer, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
    let Accessed { name: resource, payload } = parse(answer)?;
    let number = number_in(&resource, name)?;
    let mut bytes = payload.data.map(|data| data.0).unwrap_or_default();
    if payload.data_crc32c.is_some_and(|Crc32c(sum)| sum != crc32c::crc32c(&bytes)) {
        return Err(BackendError::Checksum);
    }
    let (kind, content_type) = match std::str::from_utf8(&bytes) {
        Err(_) => (Kind::Binary, "application/octet-stream"),
        Ok(_) => match Kind::of_text(&bytes) {
            Kind::Json => (Kind::Json, "application/json"),
            kind => (kind, "text/plain"),
        },
    };
    Ok(RemoteSecret {
        value: SecretValue::new(std::mem::take(&mut *bytes)),
        kind,
        content_type: content_type.into(),
        metadata: None,
        remote_version: number.to_string(),
        created: None,
        stamp: None,
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VersionAnswer<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    state: Life,
    #[serde(default, borrow)]
    create_time: Option<Cow<'a, str>>,
    #[serde(default)]
    scheduled_destroy_time: Option<String>,
    #[serde(default)]
    etag: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Life {
    Enabled,
    Disabled,
    Destroyed,
}

/// A version without its value.
#[derive(Debug)]
pub(super) struct Version {
    pub(super) number: u64,
    pub(super) state: State,
    pub(super) etag: Option<String>,
    created: Option<Timestamp>,
}

impl VersionAnswer<'_> {
    fn read(self, name: &RemoteName) -> Result<Version, BackendError> {
        let state = match self.state {
            Life::Enabled => State::Active,
            // Somebody destroyed it, and has some time left to regret it.
            Life::Disabled if self.scheduled_destroy_time.is_some() => State::Deleted,
            Life::Disabled => State::Disabled,
            Life::Destroyed => State::Destroyed,
        };
        let created = self.create_time.as_deref().and_then(Timestamp::parse);
        Ok(Version { number: number_in(&self.name, name)?, state, etag: self.etag, created })
    }
}

impl Version {
    /// One that was just read, so that its state is known.
    pub(super) fn enabled(number: u64) -> Self {
        Version { number, state: State::Active, etag: None, created: None }
    }
}

impl From<Version> for RemoteVersion {
    fn from(version: Version) -> RemoteVersion {
        let Version { number, state, created, .. } = version;
        RemoteVersion { remote_version: number.to_string(), state, created }
    }
}

/// One version of `name`.
pub(super) fn version(answer: &Answer, name: &RemoteName) -> Result<Version, BackendError> {
    parse::<VersionAnswer<'_>>(answer)?.read(name)
}

/// The number of a version of `name` that was just added.
pub(super) fn added(answer: &Answer, name: &RemoteName) -> Result<u64, BackendError> {
    #[derive(Deserialize)]
    struct Added<'a> {
        #[serde(borrow)]
        name: Cow<'a, str>,
    }
    number_in(&parse::<Added<'_>>(answer)?.name, name)
}

/// A part of a listing.
#[derive(Debug)]
pub(super) struct Part<T> {
    pub(super) items: Vec<T>,
    pub(super) next: Option<PageToken>,
}

impl<T> Part<T> {
    fn new(items: Vec<T>, next: Option<String>) -> Result<Self, BackendError> {
        let next = next.filter(|token| !token.is_empty());
        if next.as_ref().is_some_and(|token| token.len() > LONGEST_PAGE_TOKEN) {
            return Err(FOREIGN);
        }
        Ok(Part { items, next: next.map(PageToken) })
    }
}

/// A part of the versions of `name`.
pub(super) fn versions(answer: &Answer, name: &RemoteName) -> Result<Part<Version>, BackendError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions<'a> {
        #[serde(default, borrow)]
        versions: Vec<VersionAnswer<'a>>,
        #[serde(default)]
        next_page_token: Option<String>,
    }
    let Versions { versions, next_page_token } = parse(answer)?;
    let versions: Result<_, BackendError> = versions.into_iter().map(|version| version.read(name)).collect();
    Part::new(versions?, next_page_token)
}

/// A secret without its versions.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Secret {
    name: String,
    #[serde(flatten)]
    pub(super) fields: Fields,
    #[serde(default)]
    expire_time: Option<String>,
    #[serde(default)]
    pub(super) etag: Option<String>,
}

impl Secret {
    /// Its id, exactly as the store has it.
    pub(super) fn id(&self) -> Result<RemoteName, BackendError> {
        // What of it is literal, only a template can say.
        id_in(&self.name).map(|id| RemoteName::with_literal(id, 0)).ok_or(FOREIGN)
    }

    /// Whether it is gone, though it is still listed: "expired secrets are irreversibly deleted".
    pub(super) fn is_expired(&self, now: Option<Timestamp>) -> bool {
        let expiry = self.expire_time.as_deref().and_then(Timestamp::parse);
        expiry.zip(now).is_some_and(|(expiry, now)| expiry <= now)
    }
}

/// A part of the secrets of a project.
pub(super) fn secrets(answer: &Answer) -> Result<Part<Secret>, BackendError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Secrets {
        #[serde(default)]
        secrets: Vec<Secret>,
        #[serde(default)]
        next_page_token: Option<String>,
    }
    let Secrets { secrets, next_page_token } = parse(answer)?;
    Part::new(secrets, next_page_token)
}

/// The secret `name`.
pub(super) fn secret(answer: &Answer, name: &RemoteName) -> Result<Secret, BackendError> {
    let secret: Secret = parse(answer)?;
    if secret.id()?.as_str() != name.as_str() {
        return Err(BackendError::InvalidAnswer("another secret than was asked for"));
    }
    Ok(secret)
}
