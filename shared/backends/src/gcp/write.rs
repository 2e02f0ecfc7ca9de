//! Writing to Secret Manager, which has no conditional write of values: versions are only ever added.
//!
//! The number of the new version says what was there before it. If that is not what was expected, somebody else wrote
//! at the same moment; both values are there as versions, and the caller has a conflict to decide.

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Metadata, SecretValue, State};
use serde_json::json;
use zeroize::Zeroizing;

use super::metadata::{Changed, Fields};
use super::wire::{self, Refusal, Version, number_of};
use super::{GcpBackend, LATEST, READ_LIMIT};
use crate::error::BackendError;
use crate::{Expected, Lease, RemoteWrite, Written};

/// Source: "Quotas and limits" in the documentation of Secret Manager.
const MOST_BYTES: usize = 64 * 1024;

const UNFIT: &str = "some of the metadata can be neither annotation nor label";

/// What a new version comes after.
enum Base {
    /// Nothing: the secret was just made.
    Made {
        /// Whether it has all of its metadata.
        left_out: bool,
    },
    /// This version; 0 if the secret has none.
    Newest(u64),
    /// Perhaps a secret without versions. There is none if it cannot be added to, and we must not make it.
    PerhapsEmpty,
}

impl GcpBackend {
    /// Adds a version if the newest one is what was expected.
    pub(super) async fn put(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        let path = self.secret_path(name)?;
        if write.value.len() > MOST_BYTES {
            return Err(BackendError::ValueTooLarge { most: MOST_BYTES });
        }
        if write.value.is_empty() {
            return Err(BackendError::Unsupported("it takes no empty value"));
        }
        let base = match &write.expected {
            Expected::Absent => self.make(lease, name, &path, &write.metadata).await?,
            Expected::Version(expected) => {
                let expected = number_of(expected).ok_or(BackendError::PreconditionLost)?;
                match self.newest(lease, name).await {
                    // Its state does not matter: a disabled version stays as it is, below the new one.
                    Ok(newest) if newest.number == expected => Base::Newest(expected),
                    Ok(_) | Err(BackendError::NotFound | BackendError::NotActive(_)) => {
                        return Err(BackendError::PreconditionLost);
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        let added = match (self.add(lease, name, &path, &write.value).await, &base) {
            (Err(BackendError::NotFound), Base::PerhapsEmpty) => return Err(BackendError::Forbidden),
            (Err(BackendError::NotFound), _) => return Err(BackendError::PreconditionLost),
            (added, _) => added?,
        };
        let before = if let Base::Newest(number) = base { number } else { 0 };
        if added != before + 1 {
            return Err(BackendError::PreconditionLost);
        }
        let metadata = match base {
            Base::Made { left_out } => if_complete(left_out),
            Base::Newest(_) | Base::PerhapsEmpty => {
                self.write_metadata(lease, name, &path, &write.metadata).await
            }
        };
        Ok(Written { remote_version: added.to_string(), metadata: metadata.err() })
    }

    /// Takes the value of the newest version away so that it can be given back, if that is `expected`.
    ///
    /// Secret Manager has no deletion of secrets that can be undone.
    pub(super) async fn disable(
        &self,
        lease: &Lease,
        name: &RemoteName,
        expected: &str,
    ) -> Result<(), BackendError> {
        let newest = self.newest(lease, name).await?;
        if newest.number.to_string() != expected {
            return Err(BackendError::PreconditionLost);
        }
        if newest.state != State::Active {
            return Ok(());
        }
        let path = format!("{}:disable", self.version_path(name, expected)?);
        let body = newest.etag.map_or_else(|| json!({}), |etag| json!({ "etag": etag }));
        self.send(Method::POST, lease, &path, body.to_string().into_bytes().into()).await?;
        // One that was added meanwhile is what everybody reads now.
        match self.newest(lease, name).await {
            Ok(now) if now.number > newest.number => Err(BackendError::PreconditionLost),
            Ok(_) | Err(BackendError::NotFound | BackendError::NotActive(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The newest version.
    async fn newest(&self, lease: &Lease, name: &RemoteName) -> Result<Version, BackendError> {
        match self.get(lease, &self.version_path(name, LATEST)?, READ_LIMIT).await {
            Ok(answer) => wire::version(&answer, name),
            // Whoever may read values and no metadata learns the number from the value.
            Err(Refusal::Denied) => {
                let secret = match self.value(lease, name, LATEST).await {
                    Ok(secret) => secret,
                    // Why it is closed is metadata as well.
                    Err(Refusal::Precondition) => return Err(BackendError::NotActive(State::Disabled)),
                    Err(refusal) => return Err(refusal.into()),
                };
                let number = number_of(&secret.remote_version).expect("it was made of a number");
                Ok(Version::enabled(number))
            }
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Makes a secret without versions. One that has no version yet, or whose newest one is destroyed, is as good.
    async fn make(
        &self,
        lease: &Lease,
        name: &RemoteName,
        path: &str,
        metadata: &Metadata,
    ) -> Result<Base, BackendError> {
        let Changed { fields, left_out } = Fields::default().with(metadata);
        let mut secret = json!({ "annotations": fields.annotations });
        // Secrets of a location have no replication to choose.
        if !self.is_regional {
            secret["replication"] = json!({ "automatic": {} });
        }
        let create = format!("{}/secrets?secretId={}", self.parent, name.as_str());
        let is_there =
            match self.send(Method::POST, lease, &create, secret.to_string().into_bytes().into()).await {
                Ok(_) => return Ok(Base::Made { left_out }),
                Err(Refusal::AlreadyExists) => true,
                // Often somebody else makes the secrets, and we may only fill them.
                Err(Refusal::Denied) => false,
                Err(refusal) => return Err(refusal.into()),
            };
        // Not by `newest`: there is no value to learn a number from, and none is to be read.
        match self.get(lease, &format!("{path}/versions/{LATEST}"), READ_LIMIT).await {
            Ok(answer) => match wire::version(&answer, name)? {
                Version { number, state: State::Destroyed, .. } => Ok(Base::Newest(number)),
                _ => Err(BackendError::PreconditionLost),
            },
            Err(Refusal::Error(BackendError::NotFound)) if is_there => Ok(Base::Newest(0)),
            Err(Refusal::Error(BackendError::NotFound)) => Ok(Base::PerhapsEmpty),
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Adds a version and returns its number.
    async fn add(
        &self,
        lease: &Lease,
        name: &RemoteName,
        path: &str,
        value: &SecretValue,
    ) -> Result<u64, BackendError> {
        let bytes = value.expose();
        let data = Zeroizing::new(STANDARD.encode(bytes));
        // Made at once in its whole length, so that growing leaves no copies behind.
        let mut body = Zeroizing::new(Vec::with_capacity(data.len() + 64));
        let sum = crc32c::crc32c(bytes);
        write!(body, r#"{{"payload":{{"data":"{}","dataCrc32c":"{sum}"}}}}"#, *data)
            .expect("a vector takes everything");
        let answer = self.send(Method::POST, lease, &format!("{path}:addVersion"), body).await?;
        wire::added(&answer, name)
    }

    async fn write_metadata(
        &self,
        lease: &Lease,
        name: &RemoteName,
        path: &str,
        wanted: &Metadata,
    ) -> Result<(), BackendError> {
        let mut tries = 2;
        loop {
            tries -= 1;
            let secret = match self.get(lease, path, READ_LIMIT).await {
                Ok(answer) => wire::secret(&answer, name)?,
                // Whoever may only add versions has nothing to say here, and mostly nothing is to be said.
                Err(Refusal::Denied) if wanted.is_empty() => return Ok(()),
                Err(refusal) => return Err(refusal.into()),
            };
            let Changed { fields, left_out } = secret.fields.with(wanted);
            if fields == secret.fields {
                return if_complete(left_out);
            }
            let mask = match (
                fields.labels == secret.fields.labels,
                fields.annotations == secret.fields.annotations,
            ) {
                (true, _) => "annotations",
                (_, true) => "labels",
                _ => "labels,annotations",
            };
            let patch = json!({
                "labels": fields.labels,
                "annotations": fields.annotations,
                "etag": secret.etag.unwrap_or_default(),
            });
            let path = format!("{path}?updateMask={mask}");
            match self.send(Method::PATCH, lease, &path, patch.to_string().into_bytes().into()).await {
                Ok(_) => return if_complete(left_out),
                // Somebody changed it since it was read.
                Err(Refusal::Precondition) if tries > 0 => {}
                Err(refusal) => return Err(refusal.into()),
            }
        }
    }
}

fn if_complete(left_out: bool) -> Result<(), BackendError> {
    if left_out { Err(BackendError::Unsupported(UNFIT)) } else { Ok(()) }
}
