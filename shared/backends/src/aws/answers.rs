//! What the answers of AWS Secrets Manager hold.

use std::collections::HashMap;

use aws_sdk_secretsmanager::operation::get_secret_value::GetSecretValueOutput;
use aws_sdk_secretsmanager::primitives::{Blob, DateTime};
use aws_sdk_secretsmanager::types::{SecretListEntry, SecretValueEntry, SecretVersionsListEntry, Tag};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::time::Timestamp;

use super::fault::NO_JSON_OF_AWS;
use crate::error::BackendError;
use crate::survey::{Seen, Surveyed};
use crate::{RemoteSecret, RemoteVersion};

pub(super) const CURRENT: &str = "AWSCURRENT";
pub(super) const PREVIOUS: &str = "AWSPREVIOUS";

/// A value with what is told of it.
pub(super) struct Value {
    pub(super) arn: Option<String>,
    pub(super) name: Option<String>,
    pub(super) version: Option<String>,
    pub(super) stages: Vec<String>,
    text: Option<String>,
    binary: Option<Blob>,
    created: Option<DateTime>,
}

impl From<GetSecretValueOutput> for Value {
    fn from(answer: GetSecretValueOutput) -> Self {
        Value {
            arn: answer.arn,
            name: answer.name,
            version: answer.version_id,
            stages: answer.version_stages.unwrap_or_default(),
            text: answer.secret_string,
            binary: answer.secret_binary,
            created: answer.created_date,
        }
    }
}

impl From<SecretValueEntry> for Value {
    fn from(entry: SecretValueEntry) -> Self {
        Value {
            arn: entry.arn,
            name: entry.name,
            version: entry.version_id,
            stages: entry.version_stages.unwrap_or_default(),
            text: entry.secret_string,
            binary: entry.secret_binary,
            created: entry.created_date,
        }
    }
}

impl Value {
    pub(super) fn secret(self, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        check_asked(name, self.arn.as_deref(), self.name.as_deref())?;
        let remote_version = self.version.ok_or(NO_JSON_OF_AWS)?;
        let (value, kind, content_type) = match (self.text, self.binary) {
            (Some(text), _) => {
                let kind = Kind::of_text(text.as_bytes());
                let media_type = if kind == Kind::Json { "application/json" } else { "text/plain" };
                (text.into_bytes(), kind, media_type)
            }
            (None, Some(bytes)) => (bytes.into_inner(), Kind::Binary, "application/octet-stream"),
            (None, None) => return Err(NO_JSON_OF_AWS),
        };
        Ok(RemoteSecret {
            value: SecretValue::new(value),
            kind,
            content_type: content_type.into(),
            metadata: None,
            stamp: Some(remote_version.clone()),
            remote_version,
            created: self.created.and_then(timestamp),
        })
    }
}

/// Whether an answer is about the secret that was asked for. What looks like the end of an ARN may be left out of it,
/// so AWS can answer with another secret than the one of this name.
pub(super) fn check_asked(
    asked: &RemoteName,
    arn: Option<&str>,
    name: Option<&str>,
) -> Result<(), BackendError> {
    let answered = if is_arn(asked) { arn } else { name };
    if answered.ok_or(NO_JSON_OF_AWS)? == asked.as_str() { Ok(()) } else { Err(BackendError::NotFound) }
}

/// A secret of another account has to be named by its ARN; no other name has a colon.
pub(super) fn is_arn(name: &RemoteName) -> bool {
    name.as_str().starts_with("arn:")
}

/// The version that has `stage`.
pub(super) fn holder<'v>(
    versions: impl IntoIterator<Item = (&'v String, &'v Vec<String>)>,
    stage: &str,
) -> Option<&'v String> {
    let held =
        |(version, stages): (_, &Vec<String>)| stages.iter().any(|held| held == stage).then_some(version);
    // A stage has one version. Should one have more, it is the same one each time.
    versions.into_iter().filter_map(held).min()
}

/// A secret as a listing shows it, if it has a current version.
pub(super) fn surveyed(name: RemoteName, entry: &SecretListEntry) -> Option<Surveyed> {
    if entry.deleted_date().is_some() {
        return None;
    }
    // Without a map it has no versions: somebody made it for others to fill in.
    let versions = entry.secret_versions_to_stages()?;
    seen(name, versions, entry.tags())
}

/// A secret of these versions, if one of them is current.
pub(super) fn seen(
    name: RemoteName,
    versions: &HashMap<String, Vec<String>>,
    tags: &[Tag],
) -> Option<Surveyed> {
    let version = holder(versions, CURRENT)?;
    let metadata = metadata(tags);
    let seen = Seen::new(version.clone(), State::Active, version, &metadata);
    Some(Surveyed { name, seen: Some(seen), metadata: Some(metadata) })
}

/// Tags as metadata. Those of `aws:` are AWS's own, and nobody else can write them.
pub(super) fn metadata(tags: &[Tag]) -> Metadata {
    let pair = |tag: &Tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or("").to_owned()));
    tags.iter().filter_map(pair).filter(|(key, _)| !is_reserved(key)).collect()
}

/// Source: "Tag naming and usage conventions" in the AWS Tagging Guide.
pub(super) fn is_reserved(key: &str) -> bool {
    key.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("aws:"))
}

/// The versions that are or were current, oldest first. What is pending was never valid, and what lost its stages may
/// be gone at any time.
pub(super) fn history(entries: &[SecretVersionsListEntry]) -> Result<Vec<RemoteVersion>, BackendError> {
    let holds =
        |entry: &&SecretVersionsListEntry, stage| entry.version_stages().iter().any(|held| held == stage);
    let version = |entry: &SecretVersionsListEntry| {
        Ok(RemoteVersion {
            remote_version: entry.version_id().ok_or(NO_JSON_OF_AWS)?.to_owned(),
            state: State::Active,
            created: entry.created_date().copied().and_then(timestamp),
        })
    };
    let current = entries.iter().find(|entry| holds(entry, CURRENT));
    let previous = entries.iter().find(|entry| holds(entry, PREVIOUS) && !holds(entry, CURRENT));
    previous.into_iter().chain(current).map(version).collect()
}

fn timestamp(date: DateTime) -> Option<Timestamp> {
    date.to_millis().ok().map(Timestamp::from_millis)
}
