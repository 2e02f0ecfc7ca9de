//! Writes and deletions.
//!
//! Key Vault has no conditions for either. So a write looks first, and looks again afterwards: whatever came in between
//! stays as a version, and so can be told and be brought back.

use std::time::Duration;

use reqwest::Method;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, keep_within_limits};
use tokio::time::sleep;
use zeroize::Zeroizing;

use super::wire::{Item, Put, PutAttributes, default_content_type};
use super::{API_VERSION, AzureBackend, path_of};
use crate::error::BackendError;
use crate::http::Body;
use crate::{Expected, Lease, RemoteVersion, RemoteWrite, Written};

/// The limits of a secret. Source: "About Azure Key Vault secrets".
const MOST_BYTES: usize = 25 * 1024;
const LONGEST_CONTENT_TYPE: usize = 255;
const MOST_TAGS: usize = 15;
const LONGEST_TAG: usize = 512;

pub(super) const TEXTS_ONLY: BackendError =
    BackendError::Unsupported("its values are texts, and this one is bytes");

/// How often it is asked what a write came after.
const LOOKS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl AzureBackend {
    pub(super) async fn put(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        let value = carried(write)?;
        // That versions may be listed is found out before anything is written.
        let before = self.versions(lease, name).await?;
        let current = self.expected(lease, name, &write.expected).await?;
        let content_type = content_type(write, current.as_ref())?;
        let (tags, metadata) = tags(current.map(Item::into_tags).unwrap_or_default(), &write.metadata);
        let attributes = PutAttributes { enabled: true };
        let body = Put { value, content_type, tags: &tags, attributes };
        // Room for all of it, so that no part of it is left behind where it grew.
        let mut json = Zeroizing::new(Vec::with_capacity(6 * MOST_BYTES));
        serde_json::to_writer(&mut *json, &body).expect("texts are JSON");
        let path = format!("{}?{API_VERSION}", path_of(name, None)?);
        let answer = self.ask(lease, Method::PUT, &path, Some(Body::Json(json))).await?;
        let remote_version = Item::of(&answer)?.version_of(name.as_str())?.to_owned();
        let after = self.after(lease, name, &remote_version).await?;
        if came_first(&before, &after, &remote_version, &write.expected) {
            Ok(Written { remote_version, metadata })
        } else {
            Err(BackendError::PreconditionLost)
        }
    }

    /// What is there now, if it is what was expected.
    async fn expected(
        &self,
        lease: &Lease,
        name: &RemoteName,
        expected: &Expected,
    ) -> Result<Option<Item>, BackendError> {
        match (expected, self.current(lease, name).await) {
            (Expected::Absent, Err(BackendError::NotFound)) => Ok(None),
            (Expected::Version(version), Ok((item, _))) if item.version_of(name.as_str())? == version => {
                Ok(Some(item))
            }
            // One that is switched off was not expected either: what is written would switch it on.
            (_, Ok(_) | Err(BackendError::NotFound | BackendError::NotActive(_))) => {
                Err(BackendError::PreconditionLost)
            }
            (_, Err(error)) => Err(error),
        }
    }

    /// The versions, with `written` among them.
    ///
    /// # Errors
    /// `Timeout`, whatever stands in the way: the write is done, and what it came after is not known.
    async fn after(
        &self,
        lease: &Lease,
        name: &RemoteName,
        written: &str,
    ) -> Result<Vec<RemoteVersion>, BackendError> {
        for look in 1..=LOOKS {
            let pause = match self.versions(lease, name).await {
                Ok(versions) if versions.iter().any(|version| version.remote_version == written) => {
                    return Ok(versions);
                }
                Ok(_) => PAUSE,
                Err(error) => error.retry_after().unwrap_or(PAUSE),
            };
            if look < LOOKS {
                sleep(pause.min(LONGEST_PAUSE)).await;
            }
        }
        Err(BackendError::Timeout)
    }

    pub(super) async fn delete_softly(
        &self,
        lease: &Lease,
        name: &RemoteName,
        expected: &str,
    ) -> Result<(), BackendError> {
        let item = match self.current(lease, name).await {
            Ok((item, _)) => item,
            Err(BackendError::NotActive(_)) => return Err(BackendError::PreconditionLost),
            Err(error) => return Err(error),
        };
        if item.version_of(name.as_str())? != expected {
            return Err(BackendError::PreconditionLost);
        }
        if item.is_deleted_for_good() {
            return Err(BackendError::InvalidConfig(
                "the vault has no soft-delete, so what is deleted there could not be brought back",
            ));
        }
        let path = format!("{}?{API_VERSION}", path_of(name, None)?);
        let answer = self.ask(lease, Method::DELETE, &path, None).await?;
        // What came in between is deleted as well, and can be brought back with the rest.
        match Item::of(&answer)?.version_of(name.as_str())? == expected {
            true => Ok(()),
            false => Err(BackendError::PreconditionLost),
        }
    }
}

/// The value as Key Vault carries it.
fn carried(write: &RemoteWrite) -> Result<&str, BackendError> {
    let bytes = write.value.expose();
    if bytes.len() > MOST_BYTES {
        return Err(BackendError::ValueTooLarge { most: MOST_BYTES });
    }
    match write.kind {
        Kind::Json | Kind::Text => std::str::from_utf8(bytes).map_err(|_| TEXTS_ONLY),
        // It would come back as text.
        Kind::Binary => Err(TEXTS_ONLY),
    }
}

/// The media type to set; none where there was none and nothing else is meant.
fn content_type<'w>(write: &'w RemoteWrite, current: Option<&Item>) -> Result<Option<&'w str>, BackendError> {
    let content_type = &*write.content_type;
    if content_type.chars().count() > LONGEST_CONTENT_TYPE {
        return Err(BackendError::Unsupported("its media types have at most 255 characters"));
    }
    let was_set = current.is_some_and(|current| current.content_type().is_some());
    let is_default = content_type == default_content_type(write.kind);
    Ok(Some(content_type).filter(|content_type| !content_type.is_empty() && (was_set || !is_default)))
}

/// The tags to set, and why they are not all of `metadata`. Tags that ScaiVault does not keep stay as they are.
fn tags(current: Metadata, metadata: &Metadata) -> (Metadata, Option<BackendError>) {
    let known = keep_within_limits(current.clone());
    let mut tags = current;
    tags.retain(|key, _| !known.contains_key(key));
    let mut dropped = None;
    for (key, value) in metadata {
        let fits = key.chars().count() <= LONGEST_TAG && value.chars().count() <= LONGEST_TAG;
        if fits && (tags.len() < MOST_TAGS || tags.contains_key(key)) {
            tags.insert(key.clone(), value.clone());
        } else {
            dropped = Some(BackendError::Unsupported("a secret has at most 15 tags of 512 + 512 characters"));
        }
    }
    (tags, dropped)
}

/// Whether `written` came right after what was expected. What is not known from `before` came since, and counts as
/// lost unless it is surely later: times are in seconds.
fn came_first(before: &[RemoteVersion], after: &[RemoteVersion], written: &str, expected: &Expected) -> bool {
    let is_known = |version: &RemoteVersion| {
        version.remote_version == written
            || matches!(expected, Expected::Version(expected) if *expected == version.remote_version)
            || before.iter().any(|known| known.remote_version == version.remote_version)
    };
    let created =
        after.iter().find(|version| version.remote_version == written).and_then(|ours| ours.created);
    after.iter().filter(|version| !is_known(version)).all(|other| match (other.created, created) {
        (Some(other), Some(ours)) => other > ours,
        _ => false,
    })
}
