//! Secrets in JSON.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use scaivault_domain::{Error, Reason};
use scaivault_proto::secrets::v1 as proto;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::mapping::Ordered;
use super::{duration, millis, rfc3339};
use crate::error::problem;
use crate::rest::answer::fault;
use crate::rest::body::{self, Body};
use crate::rest::precondition::quoted;

/// What a value is.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::rest) enum SecretType {
    /// One JSON object; `data` is the object itself.
    #[default]
    Json,
    /// UTF-8; `data` is `{"value": "…"}`.
    Text,
    /// Any bytes; `data` is `{"value": "<base64>"}`.
    Binary,
}

/// How a binary value is written.
#[derive(Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::rest) enum Encoding {
    /// Standard base64 with padding.
    Base64,
}

/// A secret to write.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PutSecret)]
pub(in crate::rest) struct PutSecret<'a> {
    /// The value; its form follows from `secret_type`.
    #[serde(borrow)]
    #[schema(value_type = BTreeMap<String, serde_json::Value>)]
    data: &'a RawValue,
    /// What the value is.
    #[serde(default)]
    secret_type: SecretType,
    /// Custom metadata; replaces what was there.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    metadata: Ordered<String>,
    /// Kept with the value.
    #[serde(default)]
    content_type: String,
    /// For binary values only.
    #[serde(default)]
    encoding: Option<Encoding>,
}

impl PutSecret<'_> {
    /// The request to the service. A JSON value stays byte for byte as it was sent.
    pub(in crate::rest) fn into_wire(
        self,
        body: &Body,
        path: String,
        expected_version: Option<u64>,
    ) -> Result<proto::PutRequest, Error> {
        if self.encoding.is_some() && self.secret_type != SecretType::Binary {
            return Err(Error::invalid("/encoding", "is for values of type `binary`"));
        }
        let (secret_type, value) = match self.secret_type {
            SecretType::Json => (proto::SecretType::Json, body.slice(self.data.get())),
            SecretType::Text => (proto::SecretType::Text, text(self.data)?.into()),
            SecretType::Binary => {
                let bytes = STANDARD.decode(text(self.data)?);
                let bytes = bytes.map_err(|_| Error::invalid("/data/value", "is not base64 with padding"))?;
                (proto::SecretType::Binary, bytes.into())
            }
        };
        Ok(proto::PutRequest {
            path,
            value,
            secret_type: secret_type.into(),
            content_type: self.content_type,
            metadata: self.metadata.0.into_iter().collect::<HashMap<_, _>>(),
            expected_version,
        })
    }
}

/// The text of `{"value": "…"}`.
fn text(data: &RawValue) -> Result<String, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Value {
        value: String,
    }
    let Value { value } =
        body::parse(data.get().as_bytes()).map_err(|fault| fault.under("/data", Reason::InvalidRequest))?;
    Ok(value)
}

/// A secret with its value.
#[derive(Serialize, ToSchema)]
#[schema(as = Secret)]
pub(in crate::rest) struct Secret<'a> {
    /// The path.
    path: &'a str,
    /// ScaiVault's version; null for a proxied read, which has none.
    #[schema(required)]
    version: Option<u64>,
    /// What the value is.
    secret_type: SecretType,
    /// The value; its form follows from `secret_type`.
    #[schema(value_type = BTreeMap<String, serde_json::Value>)]
    data: Data<'a>,
    /// How a binary value is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<Encoding>,
    /// Kept with the value, if there is one.
    #[serde(skip_serializing_if = "str::is_empty")]
    #[schema(required = false)]
    content_type: &'a str,
    /// Custom metadata.
    metadata: BTreeMap<&'a str, &'a str>,
    /// Always `active` where there is a value.
    state: &'static str,
    /// `proxy`, `sync` or `local`.
    source: &'static str,
    /// The version in the backend, as the backend names it.
    #[schema(required)]
    remote_version: Option<&'a str>,
    /// Seconds since the value was verified against its backend.
    age: u64,
    /// Of copies only: whether the age is beyond the period of the backend's sync.
    #[serde(skip_serializing_if = "Option::is_none")]
    stale: Option<bool>,
    /// When this version was made, if the store tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Data<'a> {
    Json(&'a RawValue),
    Value { value: Cow<'a, str> },
}

impl<'a> Secret<'a> {
    /// The secret as the service gave it.
    ///
    /// # Errors
    /// `internal` if the value is not what its type says: it must not become a part of our own JSON unseen.
    pub(in crate::rest) fn from_wire(secret: &'a proto::Secret) -> Result<Self, Error> {
        let bytes = secret.value.as_ref();
        let not_its_type = || fault("a value is not what its type says");
        let (secret_type, data) = match secret.secret_type() {
            proto::SecretType::Json | proto::SecretType::Unspecified => {
                (SecretType::Json, Data::Json(serde_json::from_slice(bytes).map_err(|_| not_its_type())?))
            }
            proto::SecretType::Text => (
                SecretType::Text,
                Data::Value { value: std::str::from_utf8(bytes).map_err(|_| not_its_type())?.into() },
            ),
            proto::SecretType::Binary => {
                (SecretType::Binary, Data::Value { value: STANDARD.encode(bytes).into() })
            }
        };
        Ok(Secret {
            path: &secret.path,
            version: (secret.version > 0).then_some(secret.version),
            secret_type,
            data,
            encoding: (secret_type == SecretType::Binary).then_some(Encoding::Base64),
            content_type: &secret.content_type,
            metadata: secret.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect(),
            state: state(secret.state()),
            source: match secret.source() {
                proto::SecretSource::Proxy => "proxy",
                proto::SecretSource::Sync => "sync",
                proto::SecretSource::Local | proto::SecretSource::Unspecified => "local",
            },
            remote_version: Some(secret.remote_version.as_str()).filter(|version| !version.is_empty()),
            age: age(secret),
            stale: (secret.source() == proto::SecretSource::Sync).then_some(secret.stale),
            created_at: rfc3339(secret.create_time.as_ref()),
        })
    }

    /// One field of the value.
    pub(in crate::rest) fn field(&'a self, field: &'a str) -> Option<SecretField<'a>> {
        let value = match &self.data {
            Data::Json(object) => Cow::Borrowed(crate::rest::field::pick(object, field)?),
            Data::Value { value } if field == "value" => {
                Cow::Owned(serde_json::value::to_raw_value(value).expect("a string is JSON"))
            }
            Data::Value { .. } => return None,
        };
        Some(SecretField { path: self.path, version: self.version, field, value })
    }
}

/// Seconds since the value was verified against its backend.
pub(in crate::rest) fn age(secret: &proto::Secret) -> u64 {
    duration(secret.age.as_ref()).unwrap_or_default().as_secs()
}

/// The entity tag of a secret: our version, or the backend's and its time, since a backend may begin again at 1.
pub(in crate::rest) fn etag(secret: &proto::Secret) -> Option<HeaderValue> {
    if secret.version > 0 {
        return quoted(&format!("v{}", secret.version));
    }
    if secret.remote_version.is_empty() {
        return None;
    }
    match &secret.create_time {
        Some(time) => quoted(&format!("r{}-{}", secret.remote_version, millis(time))),
        None => quoted(&format!("r{}", secret.remote_version)),
    }
}

fn state(state: proto::SecretState) -> &'static str {
    match state {
        proto::SecretState::Active | proto::SecretState::Unspecified => "active",
        proto::SecretState::Disabled => "disabled",
        proto::SecretState::Deleted => "deleted",
        proto::SecretState::Destroyed => "destroyed",
        proto::SecretState::Expired => "expired",
    }
}

/// One field of a secret's value.
#[derive(Serialize, ToSchema)]
#[schema(as = SecretField)]
pub(in crate::rest) struct SecretField<'a> {
    /// The path.
    path: &'a str,
    /// ScaiVault's version; null for a proxied read.
    #[schema(required)]
    version: Option<u64>,
    /// The field as it was asked.
    field: &'a str,
    /// Its value exactly as it is written.
    #[schema(value_type = serde_json::Value)]
    value: Cow<'a, RawValue>,
}

/// The children of a folder.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct SecretList {
    /// Names of the children in order; folders end in `/`.
    pub(in crate::rest) keys: Vec<String>,
    /// Empty on the last page.
    pub(in crate::rest) next_page_token: String,
}

/// The versions of a secret.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct SecretVersions {
    /// Newest first.
    versions: Vec<SecretVersion>,
}

/// One version of a secret.
#[derive(Serialize, ToSchema)]
struct SecretVersion {
    /// ScaiVault's version; null for versions that only the backend has.
    #[schema(required)]
    version: Option<u64>,
    /// The version in the backend.
    #[schema(required)]
    remote_version: Option<String>,
    /// `active`, `disabled`, `deleted`, `destroyed` or `expired`.
    state: &'static str,
    /// When it was made, if the store tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
}

impl SecretVersions {
    /// The versions as the service gave them.
    pub(in crate::rest) fn from_wire(answer: proto::ListVersionsResponse) -> Self {
        let versions = answer.versions.into_iter().map(|version| SecretVersion {
            state: state(version.state()),
            version: (version.version > 0).then_some(version.version),
            created_at: rfc3339(version.create_time.as_ref()),
            remote_version: Some(version.remote_version).filter(|version| !version.is_empty()),
        });
        SecretVersions { versions: versions.collect() }
    }
}

/// What a GET of a path answers, depending on the query.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only describes the answers")]
pub(in crate::rest) enum SecretRead<'a> {
    /// Without parameters, or with `version`.
    Secret(Secret<'a>),
    /// With `field`.
    Field(SecretField<'a>),
    /// With `list=true`.
    List(SecretList),
    /// With `versions=true`.
    Versions(SecretVersions),
}

/// A version that was written.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Written<'a> {
    path: &'a str,
    /// The version that was written.
    version: u64,
    /// When.
    #[schema(required)]
    created_at: Option<String>,
}

impl<'a> Written<'a> {
    /// What the service says it wrote at `path`.
    pub(in crate::rest) fn from_wire(path: &'a str, answer: &proto::PutResponse) -> Self {
        Written { path, version: answer.version, created_at: rfc3339(answer.create_time.as_ref()) }
    }
}

/// Paths to read.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct Batch {
    /// At most 100.
    pub(in crate::rest) paths: Vec<String>,
}

/// What became of the paths.
#[derive(Serialize, ToSchema)]
#[schema(as = BatchResults)]
pub(in crate::rest) struct BatchResults<'a> {
    /// One a path, in the order of the request.
    results: Vec<BatchResult<'a>>,
}

/// What became of one path: `secret` or `error`.
#[derive(Serialize, ToSchema)]
#[schema(as = BatchResult)]
struct BatchResult<'a> {
    /// The path as it was asked.
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<Secret<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<BatchError<'a>>,
}

/// Why one path was not read.
#[derive(Serialize, ToSchema)]
#[schema(as = BatchError)]
struct BatchError<'a> {
    /// As in a problem.
    code: &'static str,
    /// One sentence.
    detail: Cow<'a, str>,
    /// The HTTP status that a GET of the path would have had.
    status: u16,
}

impl<'a> BatchError<'a> {
    fn new(reason: Reason, detail: impl Into<Cow<'a, str>>) -> Self {
        BatchError { code: reason.code(), detail: detail.into(), status: problem::status(reason).as_u16() }
    }
}

impl<'a> BatchResults<'a> {
    /// The results as the service gave them.
    pub(in crate::rest) fn from_wire(answer: &'a proto::BatchGetResponse) -> Self {
        use proto::batch_get_result::Outcome;
        let results = answer.results.iter().map(|result| {
            let outcome = match &result.outcome {
                Some(Outcome::Secret(secret)) => {
                    Secret::from_wire(secret).map_err(|fault| BatchError::new(fault.reason, fault.message))
                }
                Some(Outcome::Error(error)) => {
                    let reason = Reason::from_code(&error.reason).unwrap_or(Reason::Internal);
                    Err(BatchError::new(reason, error.message.as_str()))
                }
                None => Err(BatchError::new(Reason::Internal, Error::internal().message)),
            };
            let (secret, error) = match outcome {
                Ok(secret) => (Some(secret), None),
                Err(error) => (None, Some(error)),
            };
            BatchResult { path: &result.path, secret, error }
        });
        BatchResults { results: results.collect() }
    }
}
