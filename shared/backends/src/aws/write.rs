//! Writes: a new version is put beside the current one and made current only in place of the one that was expected.
//!
//! Sources: "Secret versions" in the user guide of AWS Secrets Manager; PutSecretValue, UpdateSecretVersionStage and
//! their errors in its API reference.

use aws_sdk_secretsmanager::Client;
use aws_sdk_secretsmanager::operation::describe_secret::DescribeSecretOutput;
use aws_sdk_secretsmanager::primitives::Blob;
use aws_sdk_secretsmanager::types::{Filter, FilterNameStringType, Tag};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State, check_metadata};
use sha2::{Digest, Sha256};

use super::answers::{CURRENT, PREVIOUS, check_asked, holder, is_arn, is_reserved, metadata};
use super::{AwsBackend, NO_JSON_OF_AWS, Shortcut, aws_failure, id_of, uuid};
use crate::error::BackendError;
use crate::{Expected, Lease, RemoteWrite, Written};

/// The largest value, in bytes, by PutSecretValue in the API reference.
const MOST_BYTES: usize = 65_536;
/// What a version is labelled with until it is current. Always the same one, which moves from write to write: a secret
/// has at most 20 labels.
const STAGED: &str = "scaivault-staged";

/// A value in the field that it is sent in.
enum Carrier {
    Text(String),
    Bytes(Blob),
}

impl Carrier {
    fn of(write: &RemoteWrite) -> Result<Self, BackendError> {
        let bytes = write.value.expose().to_vec();
        match write.kind {
            Kind::Binary => Ok(Carrier::Bytes(Blob::new(bytes))),
            Kind::Json | Kind::Text => String::from_utf8(bytes)
                .map(Carrier::Text)
                .map_err(|_| BackendError::Unsupported("bytes that are no text are no text")),
        }
    }

    fn fields(self) -> (Option<String>, Option<Blob>) {
        match self {
            Carrier::Text(text) => (Some(text), None),
            Carrier::Bytes(bytes) => (None, Some(bytes)),
        }
    }
}

/// One write on its way.
struct Put<'w> {
    lease: &'w Lease,
    client: Client,
    name: &'w RemoteName,
    write: &'w RemoteWrite,
    /// The version that must be current; `None`: none.
    base: Option<&'w str>,
}

impl AwsBackend {
    pub(super) async fn write_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        id_of(name)?;
        if write.value.len() > MOST_BYTES {
            return Err(BackendError::ValueTooLarge { most: MOST_BYTES });
        }
        // Both fields have at least one character or byte.
        if write.value.is_empty() {
            return Err(BackendError::Unsupported("it takes no empty value"));
        }
        let base = match &write.expected {
            Expected::Absent => None,
            Expected::Version(version) => Some(version.as_str()),
        };
        let put = Put { lease, client: self.client(lease)?, name, write, base };
        if base.is_none() {
            let created = match is_arn(name) {
                // The end of an ARN is AWS's choice, so none can be made of a given one.
                true => Err(BackendError::PreconditionLost),
                false => self.create(&put).await,
            };
            match created {
                // Somebody may have made it without a value, for others to fill in.
                Err(BackendError::PreconditionLost) => {}
                outcome => return outcome,
            }
            if version_at(&put.client, name, CURRENT).await?.is_some() {
                return Err(BackendError::PreconditionLost);
            }
        }
        let remote_version = match self.put(&put).await {
            Err(BackendError::NotFound | BackendError::NotActive(_)) => Err(BackendError::PreconditionLost),
            outcome => outcome,
        }?;
        let metadata = tag(&put.client, name, &write.metadata).await.err();
        Ok(Written { remote_version, metadata })
    }

    async fn create(&self, put: &Put<'_>) -> Result<Written, BackendError> {
        let (tags, unfit) = tags(&put.write.metadata);
        let tags = if tags.is_empty() { None } else { Some(tags) };
        let tagged = tags.is_some();
        match self.create_with(put, tags).await {
            // Tags need a permission of their own.
            Err(BackendError::Forbidden) if tagged => {
                let remote_version = self.create_with(put, None).await?;
                Ok(Written { remote_version, metadata: Some(BackendError::Forbidden) })
            }
            outcome => Ok(Written { remote_version: outcome?, metadata: unfit }),
        }
    }

    async fn create_with(&self, put: &Put<'_>, tags: Option<Vec<Tag>>) -> Result<String, BackendError> {
        let (text, bytes) = Carrier::of(put.write)?.fields();
        let call = put.client.create_secret().name(put.name.as_str()).set_tags(tags);
        let call = call.client_request_token(self.id_for("create", put));
        let answer = call.set_secret_string(text).set_secret_binary(bytes).send().await;
        answer.map_err(|error| aws_failure(&error))?.version_id.ok_or(NO_JSON_OF_AWS)
    }

    /// Puts the version and makes it current.
    async fn put(&self, put: &Put<'_>) -> Result<String, BackendError> {
        if !self.is_refused(Shortcut::Staging) {
            match self.put_staged(put).await {
                Err(BackendError::Forbidden) => {}
                outcome => return outcome,
            }
        }
        self.put_directly(put).await
    }

    async fn put_staged(&self, put: &Put<'_>) -> Result<String, BackendError> {
        let version = self.put_at(put, "staged", Some(STAGED)).await?;
        let call = put.client.update_secret_version_stage().secret_id(put.name.as_str());
        let call = call.version_stage(CURRENT).move_to_version_id(&version);
        let moved = call.set_remove_from_version_id(put.base.map(str::to_owned)).send().await;
        let error = match moved.map_err(|error| aws_failure(&error)) {
            Ok(_) => return Ok(version),
            Err(BackendError::Forbidden) => {
                self.note_refusal(put.lease, Shortcut::Staging);
                return Err(BackendError::Forbidden);
            }
            Err(error @ (BackendError::InvalidAnswer(_) | BackendError::NotFound)) => error,
            Err(error) => return Err(error),
        };
        // AWS takes it for a wrong parameter that the stage is elsewhere: at another version, or already at ours, as
        // after an attempt whose answer was lost.
        let current = version_at(&put.client, put.name, CURRENT).await?;
        if current.as_deref() == Some(&version) {
            return Ok(version);
        }
        if current.as_deref() == put.base {
            return Err(error);
        }
        let call = put.client.update_secret_version_stage().secret_id(put.name.as_str());
        // Only so that nothing is left lying about; the next write would take the label away too.
        let _ = call.version_stage(STAGED).remove_from_version_id(version).send().await;
        Err(BackendError::PreconditionLost)
    }

    /// For policies without UpdateSecretVersionStage: looks before and after. What came in between is noticed, and is
    /// kept as the previous version.
    async fn put_directly(&self, put: &Put<'_>) -> Result<String, BackendError> {
        let current = version_at(&put.client, put.name, CURRENT).await?;
        // It is ours after an attempt whose answer was lost.
        let ours = self.id_for("direct", put);
        if current.as_deref() != put.base && current.as_deref() != Some(&ours) {
            return Err(BackendError::PreconditionLost);
        }
        let version = self.put_at(put, "direct", None).await?;
        let previous = version_at(&put.client, put.name, PREVIOUS).await?;
        if previous.as_deref() == put.base { Ok(version) } else { Err(BackendError::PreconditionLost) }
    }

    async fn put_at(
        &self,
        put: &Put<'_>,
        purpose: &str,
        stage: Option<&str>,
    ) -> Result<String, BackendError> {
        let (text, bytes) = Carrier::of(put.write)?.fields();
        let call = put.client.put_secret_value().secret_id(put.name.as_str());
        let call = call.client_request_token(self.id_for(purpose, put));
        let call = call.set_version_stages(stage.map(|stage| vec![stage.to_owned()]));
        let answer = call.set_secret_string(text).set_secret_binary(bytes).send().await;
        let answer = answer.map_err(|error| aws_failure(&error))?;
        check_asked(put.name, answer.arn(), answer.name())?;
        answer.version_id.ok_or(NO_JSON_OF_AWS)
    }

    /// The id of the version that a write makes. An attempt that is made again has it again, and so makes no second
    /// version.
    fn id_for(&self, purpose: &str, put: &Put<'_>) -> String {
        let kind = put.write.kind.as_str();
        let base = put.base.unwrap_or("");
        let mut hash = Sha256::new();
        hash.update(*self.id_key);
        for part in [purpose, put.name.as_str(), base, kind].map(str::as_bytes) {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        hash.update(put.write.value.expose());
        let hash: [u8; 32] = hash.finalize().into();
        uuid(hash.first_chunk().expect("half of 32 bytes"))
    }

    pub(super) async fn delete_secret(
        &self,
        lease: &Lease,
        name: &RemoteName,
        expected: &str,
    ) -> Result<(), BackendError> {
        let (id, client) = (id_of(name)?, self.client(lease)?);
        let current = match describe(&client, name).await {
            Ok(secret) => {
                let current = stage_of(&secret, CURRENT);
                if secret.deleted_date().is_some() {
                    // Deleted by an attempt whose answer was lost, or by somebody who saw the same.
                    return match current.as_deref() == Some(expected) {
                        true => Ok(()),
                        false => Err(BackendError::NotActive(State::Deleted)),
                    };
                }
                current
            }
            Err(BackendError::Forbidden) => version_at(&client, name, CURRENT).await?,
            Err(error) => return Err(error),
        };
        if current.as_deref() != Some(expected) {
            return Err(BackendError::PreconditionLost);
        }
        // Without more words AWS keeps it for 30 days.
        let answer = client.delete_secret().secret_id(id).send().await;
        answer.map(|_| ()).map_err(|error| aws_failure(&error))
    }
}

async fn describe(client: &Client, name: &RemoteName) -> Result<DescribeSecretOutput, BackendError> {
    let answer = client.describe_secret().secret_id(name.as_str()).send().await;
    let secret = answer.map_err(|error| aws_failure(&error))?;
    check_asked(name, secret.arn(), secret.name())?;
    Ok(secret)
}

/// Whether a secret is marked for deletion; not, where descriptions are closed to us.
pub(super) async fn is_deleted(client: &Client, name: &RemoteName) -> Result<bool, BackendError> {
    match describe(client, name).await {
        Ok(secret) => Ok(secret.deleted_date().is_some()),
        Err(BackendError::Forbidden) => Ok(false),
        Err(error) => Err(error),
    }
}

fn stage_of(secret: &DescribeSecretOutput, stage: &str) -> Option<String> {
    secret.version_ids_to_stages().and_then(|versions| holder(versions, stage)).cloned()
}

/// The version that has `stage`. Where descriptions are closed to us a read tells as well.
async fn version_at(client: &Client, name: &RemoteName, stage: &str) -> Result<Option<String>, BackendError> {
    match describe(client, name).await {
        Ok(secret) if secret.deleted_date().is_some() => Err(BackendError::NotActive(State::Deleted)),
        Ok(secret) => Ok(stage_of(&secret, stage)),
        Err(BackendError::Forbidden) => {
            let read = client.get_secret_value().secret_id(name.as_str()).version_stage(stage).send().await;
            match read.map_err(|error| aws_failure(&error)) {
                Ok(value) => {
                    check_asked(name, value.arn(), value.name())?;
                    Ok(Some(value.version_id.ok_or(NO_JSON_OF_AWS)?))
                }
                Err(BackendError::NotFound) => Ok(None),
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// Gives the secret the tags of `wanted` and takes away what else a path's metadata could be.
async fn tag(client: &Client, name: &RemoteName, wanted: &Metadata) -> Result<(), BackendError> {
    let there = tags_of(client, name).await?;
    let (wanted_tags, unfit) = tags(wanted);
    let changed = |tag: &Tag| tag.key().and_then(|key| there.get(key)).map(String::as_str) != tag.value();
    let changed: Vec<Tag> = wanted_tags.into_iter().filter(changed).collect();
    if !changed.is_empty() {
        let call = client.tag_resource().secret_id(name.as_str()).set_tags(Some(changed));
        call.send().await.map_err(|error| aws_failure(&error))?;
    }
    // What metadata cannot hold was never a part of it.
    let held = |key: &String, value: &String| {
        check_metadata(&Metadata::from([(key.clone(), value.clone())])).is_ok()
    };
    let gone = there.into_iter().filter(|(key, value)| !wanted.contains_key(key) && held(key, value));
    let gone: Vec<String> = gone.map(|(key, _)| key).collect();
    if !gone.is_empty() {
        let call = client.untag_resource().secret_id(name.as_str()).set_tag_keys(Some(gone));
        call.send().await.map_err(|error| aws_failure(&error))?;
    }
    unfit.map_or(Ok(()), Err)
}

/// The tags that a secret has. Where descriptions are closed to us a listing tells as well, if a little late.
async fn tags_of(client: &Client, name: &RemoteName) -> Result<Metadata, BackendError> {
    match describe(client, name).await {
        Err(BackendError::Forbidden) => {}
        outcome => return Ok(metadata(outcome?.tags())),
    }
    let filter = Filter::builder().key(FilterNameStringType::Name).values(name.as_str()).build();
    let answer = client.list_secrets().filters(filter).max_results(100).send().await;
    let answer = answer.map_err(|error| aws_failure(&error))?;
    let found =
        answer.secret_list().iter().find(|entry| check_asked(name, entry.arn(), entry.name()).is_ok());
    found.map(|entry| metadata(entry.tags())).ok_or(BackendError::Forbidden)
}

/// Metadata as tags, and what to say of the rest.
fn tags(metadata: &Metadata) -> (Vec<Tag>, Option<BackendError>) {
    let fit = |(key, value): &(&String, &String)| can_be_tag(key, value);
    let tag = |(key, value): (&String, &String)| Tag::builder().key(key).value(value).build();
    let tags: Vec<Tag> = metadata.iter().filter(fit).map(tag).collect();
    let unfit = (tags.len() < metadata.len()).then_some(BackendError::Unsupported(
        "some of the metadata cannot be tags: `aws:` is reserved, and there are letters, digits, spaces and _.:/=+-@",
    ));
    (tags, unfit)
}

/// Source: Tag in the API reference.
fn can_be_tag(key: &str, value: &str) -> bool {
    let has = |text: &str, most| {
        text.chars().count() <= most
            && text.chars().all(|c| c.is_alphanumeric() || c == ' ' || "_.:/=+-@".contains(c))
    };
    !key.is_empty() && has(key, 128) && has(value, 256) && !is_reserved(key)
}
