//! Writes and deletions.
//!
//! KV version 2 writes by check-and-set: a version is only ever added after the one that was expected. Version 1 has
//! neither versions nor conditions, so nothing is written there.
//!
//! Source: "KV secrets engine, version 2 (API)" in the documentation of HashiCorp Vault.

use std::collections::BTreeMap;

use reqwest::{Method, StatusCode};
use scaivault_domain::backend::KvVersion;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State, keep_within_limits};
use serde::Deserialize;
use serde_json::json;
use zeroize::Zeroizing;

use super::{
    Envelope, Life, NO_JSON_OF_VAULT, Question, READ_LIMIT, VaultBackend, path_of_secret, read_v2,
    token_header,
};
use crate::error::BackendError;
use crate::http::{Answer, Body};
use crate::mount::Mount;
use crate::{Expected, Lease, RemoteWrite, Written};

/// The largest entry of Vault's integrated storage, in bytes. Source: "Vault limits and maximums".
const MOST_BYTES: usize = 1024 * 1024;
const NO_CONDITIONS: BackendError =
    BackendError::Unsupported("KV version 1 cannot tell what a write would overwrite; upgrade the mount");
const OBJECTS_ONLY: BackendError =
    BackendError::Unsupported("its values are JSON objects without duplicate keys");
/// On reading, Vault takes values apart into 64-bit floats: `pathDataRead` in its KV engine.
const ROUNDED: BackendError = BackendError::Unsupported(
    "KV version 2 gives numbers back as 64-bit floats, which would change this one",
);
const UNFIT: BackendError = BackendError::Unsupported(
    "custom metadata has at most 64 keys of 1 to 128 bytes with values of at most 512 bytes",
);

/// What is said of a version that was just written.
#[derive(Deserialize)]
struct Made {
    version: u64,
    /// Left out by servers that do not tell it here.
    #[serde(default)]
    custom_metadata: Told,
}

#[derive(Default)]
enum Told {
    Metadata(Metadata),
    #[default]
    Nothing,
}

impl<'de> Deserialize<'de> for Told {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Told::Metadata(Option::<Metadata>::deserialize(deserializer)?.unwrap_or_default()))
    }
}

/// What is said of a secret without its value.
#[derive(Deserialize)]
struct Known {
    current_version: u64,
    #[serde(default)]
    versions: BTreeMap<u64, Life>,
    #[serde(default)]
    custom_metadata: Option<Metadata>,
}

/// The current version of a secret.
struct Current {
    number: u64,
    state: State,
}

impl VaultBackend {
    pub(super) async fn put(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        let value = write.value.expose();
        if value.len() > MOST_BYTES {
            return Err(BackendError::ValueTooLarge { most: MOST_BYTES });
        }
        if write.kind != Kind::Json || Kind::of_text(value) != Kind::Json {
            return Err(OBJECTS_ONLY);
        }
        if !numbers(value).all(is_kept) {
            return Err(ROUNDED);
        }
        let mount = self.mount_of_versions(lease, name).await?;
        let base = match &write.expected {
            Expected::Absent => 0,
            // 0 would mean that there is none.
            Expected::Version(version) => match version.parse() {
                Ok(number @ 1..) => number,
                _ => return Err(BackendError::PreconditionLost),
            },
        };
        // Put together by hand: another serialiser would write the numbers its own way. In its whole length at once,
        // so that growing leaves no copies behind.
        let head = format!(r#"{{"options":{{"cas":{base}}},"data":"#);
        let mut body = Zeroizing::new(Vec::with_capacity(head.len() + value.len() + 1));
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(value);
        body.push(b'}');
        let path = path_of_secret(&mount, name, "data")?;
        let answer = self.send(lease, Method::POST, &path, Body::Json(body)).await?;
        let made: Made = match answer.status {
            StatusCode::OK => Envelope::of(&answer)?.data()?,
            StatusCode::BAD_REQUEST if says_check_and_set(&answer)? => {
                return Err(BackendError::PreconditionLost);
            }
            _ => return Err(unexpected(&answer)?),
        };
        if made.version != base + 1 {
            return Err(BackendError::InvalidAnswer("a version that does not follow the expected one"));
        }
        let metadata = self.write_metadata(lease, &mount, name, made.custom_metadata, &write.metadata).await;
        Ok(Written { remote_version: made.version.to_string(), metadata: metadata.err() })
    }

    /// Gives a secret the custom metadata `wanted`, and leaves alone what could not have been read from it.
    async fn write_metadata(
        &self,
        lease: &Lease,
        mount: &Mount,
        name: &RemoteName,
        told: Told,
        wanted: &Metadata,
    ) -> Result<(), BackendError> {
        let there = match told {
            Told::Metadata(metadata) => metadata,
            Told::Nothing => self.known(lease, name).await?.custom_metadata.unwrap_or_default(),
        };
        let fits = keep_within_limits(wanted.clone());
        let outcome = if fits.len() == wanted.len() { Ok(()) } else { Err(UNFIT) };
        let gone = keep_within_limits(there.clone());
        let gone = gone.keys().filter(|key| !wanted.contains_key(*key));
        let changed: BTreeMap<&String, Option<&String>> = gone
            .map(|key| (key, None))
            .chain(
                fits.iter().filter(|(key, value)| there.get(*key) != Some(value)).map(|(k, v)| (k, Some(v))),
            )
            .collect();
        if changed.is_empty() {
            return outcome;
        }
        let path = path_of_secret(mount, name, "metadata")?;
        let patch = json!({ "custom_metadata": changed }).to_string().into_bytes();
        match self.send(lease, Method::PATCH, &path, Body::MergePatch(patch)).await {
            Ok(answer) if answer.status.is_success() => return outcome,
            // Older servers have no PATCH, older policies no `patch`.
            Ok(answer) if matches!(answer.status.as_u16(), 404 | 405 | 415) => {}
            Err(BackendError::Forbidden) => {}
            Ok(answer) => return Err(unexpected(&answer)?),
            Err(error) => return Err(error),
        }
        // Nothing but `custom_metadata` is in it, so nothing else of the secret is set; but that is set as a whole.
        let mut whole: BTreeMap<&String, &String> = there.iter().collect();
        for (key, value) in changed {
            match value {
                Some(value) => whole.insert(key, value),
                None => whole.remove(key),
            };
        }
        let whole = Zeroizing::new(json!({ "custom_metadata": whole }).to_string().into_bytes());
        let answer = self.send(lease, Method::POST, &path, Body::Json(whole)).await?;
        if answer.status.is_success() { outcome } else { Err(unexpected(&answer)?) }
    }

    pub(super) async fn delete_softly(
        &self,
        lease: &Lease,
        name: &RemoteName,
        expected: &str,
    ) -> Result<(), BackendError> {
        let mount = self.mount_of_versions(lease, name).await?;
        let current = self.current(lease, name).await?;
        if current.number.to_string() != expected {
            return Err(BackendError::PreconditionLost);
        }
        if current.state != State::Active {
            return Ok(());
        }
        // This one and no other, unlike a DELETE, which takes whatever is the newest.
        let body = json!({ "versions": [current.number] }).to_string().into_bytes().into();
        let path = path_of_secret(&mount, name, "delete")?;
        let answer = self.send(lease, Method::POST, &path, Body::Json(body)).await?;
        if !answer.status.is_success() {
            return Err(unexpected(&answer)?);
        }
        // What was written meanwhile is what everybody reads now.
        match self.current(lease, name).await {
            Ok(now) if now.number != current.number => Err(BackendError::PreconditionLost),
            Ok(_) | Err(BackendError::NotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The current version, without its value where the policy allows that.
    async fn current(&self, lease: &Lease, name: &RemoteName) -> Result<Current, BackendError> {
        match self.known(lease, name).await {
            Ok(Known { current_version: 0, .. }) => Err(BackendError::NotFound),
            Ok(Known { current_version: number, versions, .. }) => {
                let life = versions.get(&number).ok_or(NO_JSON_OF_VAULT)?;
                Ok(Current { number, state: life.state(None) })
            }
            Err(BackendError::Forbidden) => self.current_by_value(lease, name).await,
            Err(error) => Err(error),
        }
    }

    async fn current_by_value(&self, lease: &Lease, name: &RemoteName) -> Result<Current, BackendError> {
        let (_, answer) = self.ask(lease, name, Question::Value).await?;
        let state = match read_v2(&answer) {
            Ok(_) => State::Active,
            Err(BackendError::NotActive(state)) => state,
            Err(error) => return Err(error),
        };
        let super::Versioned { metadata, .. } = Envelope::of(&answer)?.data()?;
        Ok(Current { number: metadata.version, state })
    }

    async fn known(&self, lease: &Lease, name: &RemoteName) -> Result<Known, BackendError> {
        let (_, answer) = self.ask(lease, name, Question::Versions).await?;
        let envelope = Envelope::of(&answer)?;
        if answer.status == StatusCode::OK { envelope.data() } else { Err(envelope.absence()) }
    }

    /// Asks what the token may do, which the policy `default` allows every token.
    pub(super) async fn may_read_v1(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        #[derive(Deserialize)]
        struct Capabilities {
            capabilities: Vec<String>,
        }
        let mount = self.mount(lease, name).await?;
        let segments: Vec<&str> = mount.segments().chain(mount.path_of(name)?).collect();
        // The same names are refused as in a read.
        path_of_secret(&mount, name, "")?;
        let body = json!({ "paths": [segments.join("/")] }).to_string().into_bytes().into();
        let answer = self.send(lease, Method::POST, "/sys/capabilities-self", Body::Json(body)).await?;
        if answer.status != StatusCode::OK {
            return Err(unexpected(&answer)?);
        }
        let Capabilities { capabilities } = Envelope::of(&answer)?.data()?;
        let is_open = capabilities.iter().any(|one| matches!(&**one, "read" | "root"));
        if is_open { Ok(()) } else { Err(BackendError::Forbidden) }
    }

    async fn mount_of_versions(
        &self,
        lease: &Lease,
        name: &RemoteName,
    ) -> Result<std::sync::Arc<Mount>, BackendError> {
        let mount = self.mount(lease, name).await?;
        if mount.version == KvVersion::V1 { Err(NO_CONDITIONS) } else { Ok(mount) }
    }

    /// A request that changes something; its answer is neither 401 nor 403.
    async fn send(
        &self,
        lease: &Lease,
        method: Method,
        path: &str,
        body: Body<'_>,
    ) -> Result<Answer, BackendError> {
        let headers = token_header(lease)?;
        let answer = self.http.send(method, &format!("/v1{path}"), headers, Some(body), READ_LIMIT).await?;
        match answer.status.as_u16() {
            401 => Err(BackendError::LoginExpired),
            403 => Err(self.refusal(lease).await),
            status @ (412 | 472 | 473) => Err(BackendError::Server { status }),
            413 => Err(BackendError::ValueTooLarge { most: MOST_BYTES }),
            _ => Ok(answer),
        }
    }
}

/// The numbers in a JSON text, as they are written.
fn numbers(json: &[u8]) -> impl Iterator<Item = &str> {
    let mut rest = json;
    std::iter::from_fn(move || {
        let mut is_text = false;
        let mut at = 0;
        while let Some(byte) = rest.get(at) {
            match byte {
                b'\\' => at += 1,
                b'"' => is_text = !is_text,
                b'-' | b'0'..=b'9' if !is_text => {
                    let number = &rest[at..];
                    let is_part = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
                    let end = number.iter().position(|byte| !is_part(byte)).unwrap_or(number.len());
                    rest = &number[end..];
                    return str::from_utf8(&number[..end]).ok();
                }
                _ => {}
            }
            at += 1;
        }
        None
    })
}

/// Whether a number is the same after it was a 64-bit float, however it is then written.
fn is_kept(number: &str) -> bool {
    let float: f64 = number.parse().unwrap_or(f64::INFINITY);
    float.is_finite() && decimal(number) == decimal(&float.to_string())
}

/// The digits of a number from its first to its last one that is not 0, and the power of ten that they are multiplied by.
fn decimal(number: &str) -> Option<(bool, String, i64)> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent = exponent.parse::<i64>().ok()?.checked_sub(i64::try_from(fraction.len()).ok()?)?;
    let digits = format!("{}{fraction}", whole.trim_start_matches('-'));
    let significant = digits.trim_end_matches('0');
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    match significant.trim_start_matches('0') {
        "" => Some((false, String::new(), 0)),
        significant => Some((whole.starts_with('-'), significant.to_owned(), exponent.checked_add(zeros)?)),
    }
}

/// Only its words tell a condition that is not met from another malformed request.
fn says_check_and_set(answer: &Answer) -> Result<bool, BackendError> {
    let errors = Envelope::of(answer)?.errors.unwrap_or_default();
    Ok(errors.iter().any(|error| error.contains("check-and-set parameter did not match")))
}

/// What a status means that is no success.
fn unexpected(answer: &Answer) -> Result<BackendError, BackendError> {
    Ok(match answer.status.as_u16() {
        404 => Envelope::of(answer)?.absence(),
        400 => BackendError::InvalidAnswer("it takes the request for malformed"),
        405 => BackendError::Unsupported("the mount takes no such request"),
        _ => BackendError::InvalidAnswer("a status that this request cannot have"),
    })
}

#[cfg(test)]
mod tests;
