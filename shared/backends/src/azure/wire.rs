//! What Key Vault says, and what it means. Pure.
//!
//! Source: "Secrets" in the Azure Key Vault REST API reference, "About Azure Key Vault secrets" and "Azure Key Vault REST
//! API error codes".

use std::borrow::Cow;
use std::cmp::Ordering;
use std::time::Duration;

use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::BackendError;
use crate::http::Answer;
use crate::survey::{Seen, Surveyed};
use crate::{RemoteSecret, RemoteVersion};

/// The longest name of a secret.
const LONGEST_NAME: usize = 127;
/// Versions are named by the service, with this many letters and digits.
const VERSION_LENGTH: usize = 32;
/// The time of a change is told in whole seconds. Within this time of it there may still come another one that looks
/// the same.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

const NOT_KEY_VAULT: BackendError = BackendError::InvalidAnswer("JSON that is not Key Vault's");

/// Whether Key Vault can have a secret of this name.
pub(super) fn is_name(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Whether Key Vault can have a version of this name. `versions`, which is asked for in the same place, is none.
pub(super) fn is_version(version: &str) -> bool {
    version.len() == VERSION_LENGTH && version.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// The media type of a value that has none.
pub(super) fn default_content_type(kind: Kind) -> &'static str {
    match kind {
        Kind::Json => "application/json",
        Kind::Text => "text/plain",
        Kind::Binary => "application/octet-stream",
    }
}

/// A value as it comes out of JSON, so that it lies nowhere else.
#[derive(Deserialize)]
#[serde(from = "String")]
struct Value(SecretValue);

impl From<String> for Value {
    fn from(text: String) -> Self {
        Value(SecretValue::new(text.into_bytes()))
    }
}

/// What all answers about secrets are made of: a `SecretBundle` has a value, a `SecretItem` has none.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Item {
    id: String,
    value: Option<Value>,
    content_type: Option<String>,
    attributes: Attributes,
    tags: Option<Metadata>,
}

/// Times are in seconds since the Unix epoch; very old secrets lack some.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attributes {
    enabled: Option<bool>,
    created: Option<i64>,
    updated: Option<i64>,
    exp: Option<i64>,
    nbf: Option<i64>,
    recovery_level: Option<String>,
}

fn moment(seconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds.saturating_mul(1000))
}

impl Attributes {
    /// By the server's clock. Key Vault itself gives values before `nbf` and after `exp`, and leaves it to its callers
    /// not to use them.
    fn state(&self, now: Option<Timestamp>) -> State {
        if self.enabled == Some(false) {
            return State::Disabled;
        }
        match now {
            Some(now) if self.exp.is_some_and(|exp| moment(exp) <= now) => State::Expired,
            Some(now) if self.nbf.is_some_and(|nbf| moment(nbf) > now) => State::Disabled,
            _ => State::Active,
        }
    }
}

impl Item {
    pub(super) fn of(answer: &Answer) -> Result<Self, BackendError> {
        serde_json::from_slice(&answer.body).map_err(|_| NOT_KEY_VAULT)
    }

    /// The name in an `id` that names no version: `https://acme.vault.azure.net/secrets/NAME`.
    fn name(&self) -> Result<&str, BackendError> {
        match self.id.rsplit('/').collect::<Vec<_>>()[..] {
            [name, "secrets", _, ..] if is_name(name) => Ok(name),
            _ => Err(NOT_KEY_VAULT),
        }
    }

    /// The version in the `id`: `https://acme.vault.azure.net/secrets/NAME/VERSION`.
    ///
    /// # Errors
    /// `InvalidAnswer`, if it is of another secret than `asked`. Names do not differ by case.
    pub(super) fn version_of(&self, asked: &str) -> Result<&str, BackendError> {
        match self.id.rsplit('/').collect::<Vec<_>>()[..] {
            [version, name, "secrets", _, ..] if is_version(version) && is_name(name) => {
                if name.eq_ignore_ascii_case(asked) {
                    Ok(version)
                } else {
                    Err(BackendError::InvalidAnswer("another secret than was asked for"))
                }
            }
            _ => Err(NOT_KEY_VAULT),
        }
    }

    /// What tells this version from others in a listing, which names no versions; `None` if another one may look the
    /// same.
    fn stamp(&self, now: Option<Timestamp>) -> Option<String> {
        let updated = self.attributes.updated?;
        if now?.since(moment(updated)) < SETTLED_AFTER {
            return None;
        }
        Some(format!("{updated}.{}", self.content_type.as_deref().unwrap_or_default()))
    }

    pub(super) fn secret(self, asked: &str, now: Option<Timestamp>) -> Result<RemoteSecret, BackendError> {
        let remote_version = self.version_of(asked)?.to_owned();
        match self.attributes.state(now) {
            State::Active => {}
            state => return Err(BackendError::NotActive(state)),
        }
        let stamp = self.stamp(now);
        let Value(value) = self.value.ok_or(NOT_KEY_VAULT)?;
        let kind = Kind::of_text(value.expose());
        let content_type = match self.content_type {
            Some(content_type) if !content_type.is_empty() => Cow::Owned(content_type),
            _ => Cow::Borrowed(default_content_type(kind)),
        };
        Ok(RemoteSecret {
            value,
            kind,
            content_type,
            metadata: Some(self.tags.unwrap_or_default()),
            remote_version,
            created: self.attributes.created.map(moment),
            stamp,
        })
    }

    /// As an item of a listing of the vault.
    pub(super) fn surveyed(self, now: Option<Timestamp>) -> Result<Surveyed, BackendError> {
        let name = self.listed()?;
        let state = self.attributes.state(now);
        let stamp = self.stamp(now);
        let tags = self.tags.unwrap_or_default();
        let seen = stamp.map(|stamp| Seen::new(String::new(), state, &stamp, &tags));
        Ok(Surveyed { name, seen, metadata: None })
    }

    /// The name alone, as an item of a listing of the vault.
    pub(super) fn listed(&self) -> Result<RemoteName, BackendError> {
        // What of it is literal, only a template can say.
        self.name().map(|name| RemoteName::with_literal(name, 0))
    }

    /// As an item of a listing of the versions of `asked`.
    pub(super) fn version(&self, asked: &str, now: Option<Timestamp>) -> Result<RemoteVersion, BackendError> {
        Ok(RemoteVersion {
            remote_version: self.version_of(asked)?.to_owned(),
            state: self.attributes.state(now),
            created: self.attributes.created.map(moment),
        })
    }

    /// The media type that was set.
    pub(super) fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref().filter(|content_type| !content_type.is_empty())
    }

    pub(super) fn into_tags(self) -> Metadata {
        self.tags.unwrap_or_default()
    }

    /// Whether a deletion would be for good. That vaults without soft-delete are left is not known, but they were there.
    pub(super) fn is_deleted_for_good(&self) -> bool {
        self.attributes.recovery_level.as_deref() == Some("Purgeable")
    }
}

/// The oldest first; Key Vault's own order has no meaning.
pub(super) fn by_age(a: &RemoteVersion, b: &RemoteVersion) -> Ordering {
    a.created.cmp(&b.created)
}

/// A part of a listing, of secrets or of versions.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Items {
    value: Option<Vec<Item>>,
    next_link: Option<String>,
}

impl Items {
    pub(super) fn of(answer: &Answer) -> Result<Self, BackendError> {
        serde_json::from_slice(&answer.body).map_err(|_| NOT_KEY_VAULT)
    }

    /// The items, and the link to the next part.
    pub(super) fn into_parts(self) -> Result<(Vec<Item>, Option<String>), BackendError> {
        let items = self.value.ok_or(NOT_KEY_VAULT)?;
        Ok((items, self.next_link.filter(|link| !link.is_empty())))
    }
}

/// The body that sets a secret.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Put<'a> {
    pub(super) value: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content_type: Option<&'a str>,
    pub(super) tags: &'a Metadata,
    pub(super) attributes: PutAttributes,
}

#[derive(Serialize)]
pub(super) struct PutAttributes {
    pub(super) enabled: bool,
}

#[derive(Deserialize)]
struct Failure {
    error: Fault,
}

#[derive(Deserialize)]
struct Fault {
    code: String,
    innererror: Option<Inner>,
}

#[derive(Deserialize)]
struct Inner {
    code: Option<String>,
}

/// What a 403 is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The secret, or the version of it, is switched off.
    Disabled,
    /// The credential was understood, but no role or access policy allows it this.
    Rights,
    /// Something else, such as the firewall of the vault.
    Other,
}

impl Refusal {
    pub(super) fn of(answer: &Answer) -> Self {
        let fault = serde_json::from_slice::<Failure>(&answer.body).ok().map(|failure| failure.error);
        let inner = fault.and_then(|fault| fault.innererror).and_then(|inner| inner.code);
        match inner.as_deref() {
            Some("SecretDisabled") => Refusal::Disabled,
            Some("ForbiddenByRbac" | "ForbiddenByPolicy" | "AccessDenied") => Refusal::Rights,
            _ => Refusal::Other,
        }
    }
}

/// What an answer means that is not 200.
pub(super) fn failure(answer: &Answer) -> BackendError {
    match answer.status.as_u16() {
        401 => BackendError::LoginExpired,
        403 if Refusal::of(answer) == Refusal::Disabled => BackendError::NotActive(State::Disabled),
        403 => BackendError::Forbidden,
        // Deletions are believed because of it, so it must be said of the secret and not of some page.
        404 => match serde_json::from_slice::<Failure>(&answer.body) {
            Ok(Failure { error }) if error.code == "SecretNotFound" => BackendError::NotFound,
            _ => BackendError::InvalidAnswer("nothing is there, but it does not say that of the secret"),
        },
        // It is deleted and could be brought back, or is just being deleted, brought back or written.
        409 => BackendError::PreconditionLost,
        400 => BackendError::InvalidAnswer("it takes the request for malformed"),
        _ => BackendError::InvalidAnswer("a status that this request cannot have"),
    }
}
