//! Secrets and their versions: Secret Manager v1, and what an administrator does with them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::faults::Fault;
use super::requests::{Call, Operation, Permission};
use super::{Cloud, PROJECT_NUMBER, Refusal, State};

/// The most bytes of a payload.
const LARGEST_PAYLOAD: usize = 65_536;
/// The most bytes of all annotations of a secret, keys included.
const LARGEST_ANNOTATIONS: usize = 16 * 1024;

/// Where a secret is: bound to a location or not, and its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id {
    pub(super) location: Option<String>,
    pub(super) name: String,
}

impl Id {
    /// As answers have it.
    fn resource(&self) -> String {
        format!("{}/secrets/{}", parent(self.location.as_deref()), self.name)
    }
}

fn parent(location: Option<&str>) -> String {
    let place = location.map(|location| format!("/locations/{location}")).unwrap_or_default();
    format!("projects/{PROJECT_NUMBER}{place}")
}

#[derive(Debug)]
pub(super) struct Secret {
    sequence: u64,
    created: Timestamp,
    etag: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    /// Version 1 first.
    versions: Vec<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Enabled = 1,
    Disabled = 2,
    Destroyed = 3,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Enabled => "ENABLED",
            Status::Disabled => "DISABLED",
            Status::Destroyed => "DESTROYED",
        }
    }

    /// Google's libraries ask for the numbers of the protocol buffer instead of names.
    fn json(self, call: &Call) -> Value {
        if call.query("$alt").is_some_and(|alt| alt.contains("enum-encoding=int")) {
            json!(self as u8)
        } else {
            json!(self.name())
        }
    }
}

#[derive(Debug)]
struct Version {
    created: Timestamp,
    destroyed: Option<Timestamp>,
    status: Status,
    etag: String,
    payload: Vec<u8>,
    checked: bool,
}

/// What an administrator does with secrets, without asking the API.
#[derive(Debug)]
pub struct Secrets<'a> {
    cloud: &'a Cloud,
    location: Option<String>,
}

impl<'a> Secrets<'a> {
    pub(super) fn new(cloud: &'a Cloud, location: Option<String>) -> Self {
        Secrets { cloud, location }
    }

    fn id(&self, name: &str) -> Id {
        Id { location: self.location.clone(), name: name.to_owned() }
    }

    fn with<T>(&self, name: &str, with: impl FnOnce(&mut Secret) -> T) -> Result<T> {
        let mut state = self.cloud.state();
        state.secrets.get_mut(&self.id(name)).map(with).with_context(|| format!("no secret {name}"))
    }

    /// Creates a secret without a version.
    ///
    /// # Errors
    /// If it is there already, or the name is none.
    pub fn create(&self, name: &str) -> Result<()> {
        ensure!(is_secret_id(name), "{name} is no secret id");
        let mut state = self.cloud.state();
        ensure!(!state.secrets.contains_key(&self.id(name)), "{name} is there already");
        state.create(self.id(name), self.cloud.clock.now());
        Ok(())
    }

    /// Adds a version, and the secret if there is none. Returns the version's number.
    ///
    /// # Errors
    /// If the API would not take it.
    pub fn put(&self, name: &str, payload: impl AsRef<[u8]>) -> Result<usize> {
        ensure!(is_secret_id(name), "{name} is no secret id");
        let payload = payload.as_ref();
        ensure!((1..=LARGEST_PAYLOAD).contains(&payload.len()), "{} bytes are no payload", payload.len());
        let (now, id) = (self.cloud.clock.now(), self.id(name));
        let mut state = self.cloud.state();
        if !state.secrets.contains_key(&id) {
            state.create(id.clone(), now);
        }
        let secret = state.secrets.get_mut(&id).context("it was just made")?;
        secret.versions.push(Version::new(payload.to_vec(), now));
        Ok(secret.versions.len())
    }

    /// Disables a version.
    ///
    /// # Errors
    /// If there is none, or it is destroyed.
    pub fn disable(&self, name: &str, version: usize) -> Result<()> {
        self.set(name, version, Status::Disabled)
    }

    /// Enables a version.
    ///
    /// # Errors
    /// If there is none, or it is destroyed.
    pub fn enable(&self, name: &str, version: usize) -> Result<()> {
        self.set(name, version, Status::Enabled)
    }

    /// Destroys a version for good.
    ///
    /// # Errors
    /// If there is none, or it is destroyed.
    pub fn destroy(&self, name: &str, version: usize) -> Result<()> {
        self.set(name, version, Status::Destroyed)
    }

    fn set(&self, name: &str, version: usize, status: Status) -> Result<()> {
        let now = self.cloud.clock.now();
        let index = version.checked_sub(1).context("versions begin with 1")?;
        let set =
            self.with(name, |secret| secret.versions.get_mut(index).map(|found| found.set(status, now)))?;
        ensure!(set == Some(true), "{name} has no version {version} that is not destroyed");
        Ok(())
    }

    /// Deletes a secret with its versions.
    ///
    /// # Errors
    /// If there is none.
    pub fn delete(&self, name: &str) -> Result<()> {
        let removed = self.cloud.state().secrets.remove(&self.id(name));
        removed.map(drop).with_context(|| format!("no secret {name}"))
    }

    /// Replaces the labels.
    ///
    /// # Errors
    /// If there is no such secret.
    pub fn set_labels(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        self.with(name, |secret| {
            secret.labels = owned(labels);
            secret.etag = etag();
        })
    }

    /// Replaces the annotations.
    ///
    /// # Errors
    /// If there is no such secret.
    pub fn set_annotations(&self, name: &str, annotations: &[(&str, &str)]) -> Result<()> {
        self.with(name, |secret| {
            secret.annotations = owned(annotations);
            secret.etag = etag();
        })
    }

    /// The labels.
    ///
    /// # Errors
    /// If there is no such secret.
    pub fn labels(&self, name: &str) -> Result<BTreeMap<String, String>> {
        self.with(name, |secret| secret.labels.clone())
    }

    /// The annotations.
    ///
    /// # Errors
    /// If there is no such secret.
    pub fn annotations(&self, name: &str) -> Result<BTreeMap<String, String>> {
        self.with(name, |secret| secret.annotations.clone())
    }

    /// The payload of every version, the first one in front; nothing for a destroyed one.
    ///
    /// # Errors
    /// If there is no such secret.
    pub fn payloads(&self, name: &str) -> Result<Vec<Vec<u8>>> {
        self.with(name, |secret| secret.versions.iter().map(|version| version.payload.clone()).collect())
    }

    /// Nobody may do anything with this secret, though it is listed.
    pub fn forbid(&self, name: &str) {
        self.cloud.state().forbidden.insert(self.id(name));
    }

    /// Ends [`Secrets::forbid`].
    pub fn permit(&self, name: &str) {
        self.cloud.state().forbidden.remove(&self.id(name));
    }
}

fn owned(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

impl State {
    fn create(&mut self, id: Id, now: Timestamp) -> &mut Secret {
        self.created += 1;
        let secret = Secret {
            sequence: self.created,
            created: now,
            etag: etag(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            versions: Vec::new(),
        };
        self.secrets.entry(id).insert_entry(secret).into_mut()
    }
}

impl Version {
    fn new(payload: Vec<u8>, now: Timestamp) -> Version {
        let checked = false;
        Version { created: now, destroyed: None, status: Status::Enabled, etag: etag(), payload, checked }
    }

    /// Whether it could be done: what is destroyed stays so.
    fn set(&mut self, status: Status, now: Timestamp) -> bool {
        if self.status == Status::Destroyed {
            return false;
        }
        self.status = status;
        self.etag = etag();
        if status == Status::Destroyed {
            self.destroyed = Some(now);
            self.payload.clear();
        }
        true
    }

    fn json(&self, id: &Id, number: usize, call: &Call) -> Value {
        let mut json = json!({
            "name": format!("{}/versions/{number}", id.resource()),
            "createTime": format!("{:.6}", self.created),
            "state": self.status.json(call),
            "etag": self.etag,
        });
        if id.location.is_none() {
            json["replicationStatus"] = json!({ "automatic": {} });
        }
        if let Some(destroyed) = self.destroyed {
            json["destroyTime"] = json!(format!("{destroyed:.6}"));
        }
        if self.checked {
            json["clientSpecifiedPayloadChecksum"] = json!(true);
        }
        json
    }
}

impl Secret {
    fn json(&self, id: &Id) -> Value {
        let mut json = json!({
            "name": id.resource(),
            "createTime": format!("{:.6}", self.created),
            "etag": self.etag,
        });
        // Fields that are empty are left out, as in every JSON made of a protocol buffer.
        if !self.labels.is_empty() {
            json["labels"] = json!(self.labels);
        }
        if !self.annotations.is_empty() {
            json["annotations"] = json!(self.annotations);
        }
        if id.location.is_none() {
            json["replication"] = json!({ "automatic": {} });
        }
        json
    }
}

/// Quotes are part of an etag (AIP-154).
fn etag() -> String {
    format!("\"{:014x}\"", rand::random::<u64>() >> 8)
}

fn is_secret_id(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

impl Cloud {
    /// Answers a call of Secret Manager.
    pub(super) fn secret_manager(&self, call: &Call, fault: Option<&Fault>) -> Result<Value, Refusal> {
        let principal = self.authenticate(call)?;
        let now = self.clock.now();
        let mut state = self.state();
        if let Some(permission) = call.operation.permission() {
            state.authorize(&principal, permission, call)?;
        }
        let most = state.page_size;
        let Some(id) = call.secret() else {
            return if call.operation == Operation::CreateSecret {
                state.create_secret(call, now)
            } else {
                state.list_secrets(call, fault)
            };
        };
        let secret = state.secrets.get_mut(&id);
        let missing = || Refusal::not_found(format!("Secret [{}] not found.", id.resource()));
        match call.operation {
            Operation::GetSecret => Ok(secret.ok_or_else(missing)?.json(&id)),
            Operation::UpdateSecret => secret.ok_or_else(missing)?.update(call, &id),
            Operation::DeleteSecret => {
                matches_etag(call.query("etag"), &secret.ok_or_else(missing)?.etag)?;
                state.secrets.remove(&id);
                Ok(json!({}))
            }
            Operation::AddVersion => secret.ok_or_else(missing)?.add_version(call, &id, now),
            Operation::ListVersions => secret.ok_or_else(missing)?.list_versions(call, &id, most, fault),
            operation => {
                let none = || {
                    Refusal::not_found(format!("Secret [{}] not found or has no versions.", id.resource()))
                };
                secret.ok_or_else(none)?.version(operation, call, &id, now, fault)
            }
        }
    }
}

impl State {
    fn authorize(&self, principal: &str, permission: Permission, call: &Call) -> Result<(), Refusal> {
        let granted = self.permissions.get(principal).is_some_and(|granted| granted.contains(&permission));
        let forbidden = call.secret().is_some_and(|id| self.forbidden.contains(&id));
        if granted && !forbidden && call.knows_project() {
            return Ok(());
        }
        let (permission, resource) = (permission.name(), call.resource());
        let message =
            format!("Permission '{permission}' denied for resource '{resource}' (or it may not exist).");
        Err(Refusal::denied(message))
    }

    fn list_secrets(&self, call: &Call, fault: Option<&Fault>) -> Result<Value, Refusal> {
        let location = call.location();
        let mut found = Vec::new();
        for (id, secret) in self.secrets.iter().filter(|(id, _)| id.location == location) {
            let field = |field: &str| match field.strip_prefix("labels.") {
                Some(label) => Some(secret.labels.get(label).cloned()),
                None => (field == "name").then(|| Some(id.name.clone())),
            };
            if filtered(call, field)? {
                found.push((secret.sequence, secret.json(id)));
            }
        }
        page("secrets", found, call, self.page_size, fault)
    }

    fn create_secret(&mut self, call: &Call, now: Timestamp) -> Result<Value, Refusal> {
        let name = call.query("secretId").unwrap_or_default();
        if !is_secret_id(name) {
            let message = "Secret ids must match [a-zA-Z0-9_-]{1,255} and be at most 255 characters.";
            return Err(Refusal::invalid(message));
        }
        let id = Id { location: call.location(), name: name.to_owned() };
        let body = call.json()?;
        match (&id.location, body["replication"].is_null()) {
            (None, true) => return Err(Refusal::invalid("Field [secret.replication] is required.")),
            (Some(_), false) => {
                return Err(Refusal::invalid(
                    "Field [secret.replication] must not be set on a regional secret.",
                ));
            }
            _ => {}
        }
        if id.location.is_none() && !body["replication"]["automatic"].is_object() {
            return Err(Refusal::invalid("This fake knows automatic replication only."));
        }
        let (labels, annotations) = (labels(&body["labels"])?, annotations(&body["annotations"])?);
        if self.secrets.contains_key(&id) {
            return Err(Refusal::exists(format!("Secret [{}] already exists.", id.resource())));
        }
        let secret = self.create(id.clone(), now);
        (secret.labels, secret.annotations) = (labels, annotations);
        Ok(secret.json(&id))
    }
}

impl Secret {
    fn update(&mut self, call: &Call, id: &Id) -> Result<Value, Refusal> {
        let body = call.json()?;
        matches_etag(body["etag"].as_str(), &self.etag)?;
        let mask =
            call.query("updateMask").ok_or_else(|| Refusal::invalid("Field [update_mask] is required."))?;
        let (mut new_labels, mut new_annotations) = (None, None);
        for field in mask.split(',') {
            match field {
                "labels" => new_labels = Some(labels(&body["labels"])?),
                "annotations" => new_annotations = Some(annotations(&body["annotations"])?),
                _ => {
                    return Err(Refusal::invalid(format!(
                        "Update mask field [{field}] is unknown or immutable."
                    )));
                }
            }
        }
        self.labels = new_labels.unwrap_or_else(|| self.labels.clone());
        self.annotations = new_annotations.unwrap_or_else(|| self.annotations.clone());
        self.etag = etag();
        Ok(self.json(id))
    }

    fn add_version(&mut self, call: &Call, id: &Id, now: Timestamp) -> Result<Value, Refusal> {
        let body = call.json()?;
        let payload = &body["payload"];
        if !payload.is_object() {
            return Err(Refusal::invalid("Field [payload] is required."));
        }
        let bytes = decoded(payload["data"].as_str().unwrap_or_default())?;
        if bytes.is_empty() {
            return Err(Refusal::invalid("Secret Payload cannot be empty."));
        }
        if bytes.len() > LARGEST_PAYLOAD {
            let message = format!("The payload size exceeds the maximum of {LARGEST_PAYLOAD} bytes.");
            return Err(Refusal::invalid(message));
        }
        // An int64 may be a string or a number in the JSON of a protocol buffer.
        let checksum = match &payload["dataCrc32c"] {
            Value::Null => None,
            Value::String(text) => Some(text.parse().ok()),
            number => Some(number.as_i64()),
        };
        if checksum.is_some_and(|checksum| checksum != Some(i64::from(crc32c::crc32c(&bytes)))) {
            return Err(Refusal::invalid("The provided payload checksum does not match the payload."));
        }
        self.versions.push(Version { checked: checksum.is_some(), ..Version::new(bytes, now) });
        let number = self.versions.len();
        Ok(self.versions[number - 1].json(id, number, call))
    }

    fn list_versions(
        &self,
        call: &Call,
        id: &Id,
        most: usize,
        fault: Option<&Fault>,
    ) -> Result<Value, Refusal> {
        let mut found = Vec::new();
        for (version, number) in self.versions.iter().zip(1_usize..) {
            if filtered(call, |field| (field == "state").then(|| Some(version.status.name().to_owned())))? {
                found.push((number as u64, version.json(id, number, call)));
            }
        }
        page("versions", found, call, most, fault)
    }

    fn version(
        &mut self,
        operation: Operation,
        call: &Call,
        id: &Id,
        now: Timestamp,
        fault: Option<&Fault>,
    ) -> Result<Value, Refusal> {
        let number = match call.version() {
            // The newest, whatever its state.
            "latest" if self.versions.is_empty() => {
                let message = format!("Secret [{}] not found or has no versions.", id.resource());
                return Err(Refusal::not_found(message));
            }
            "latest" => self.versions.len(),
            text => text.parse().map_err(|_| {
                Refusal::invalid(format!(
                    "The provided Secret Version ID [{text}] is neither a number nor latest."
                ))
            })?,
        };
        let name = format!("{}/versions/{number}", id.resource());
        let version = number.checked_sub(1).and_then(|index| self.versions.get_mut(index));
        let version =
            version.ok_or_else(|| Refusal::not_found(format!("Secret Version [{name}] not found.")))?;
        let inactive = |status: Status| {
            Refusal::precondition(format!("Secret Version [{name}] is in {} state.", status.name()))
        };
        let status = match operation {
            Operation::GetVersion => return Ok(version.json(id, number, call)),
            Operation::AccessVersion if version.status != Status::Enabled => {
                return Err(inactive(version.status));
            }
            Operation::AccessVersion => {
                let wrong = u32::from(fault == Some(&Fault::WrongChecksum));
                let checksum = crc32c::crc32c(&version.payload) ^ wrong;
                let data = STANDARD.encode(&version.payload);
                let payload = json!({ "data": data, "dataCrc32c": checksum.to_string() });
                return Ok(json!({ "name": name, "payload": payload }));
            }
            Operation::DisableVersion => Status::Disabled,
            Operation::EnableVersion => Status::Enabled,
            _ => Status::Destroyed,
        };
        matches_etag(call.json()?["etag"].as_str(), &version.etag)?;
        if !version.set(status, now) {
            return Err(inactive(Status::Destroyed));
        }
        Ok(version.json(id, number, call))
    }
}

/// A write may say which state of things it is meant for.
fn matches_etag(given: Option<&str>, current: &str) -> Result<(), Refusal> {
    match given {
        Some(given) if !given.is_empty() && given != current => {
            let message =
                format!("The etag provided in the request [{given}] does not match the current etag.");
            Err(Refusal::precondition(message))
        }
        _ => Ok(()),
    }
}

/// One page of what was found, the newest in front.
fn page(
    kind: &str,
    mut found: Vec<(u64, Value)>,
    call: &Call,
    most: usize,
    fault: Option<&Fault>,
) -> Result<Value, Refusal> {
    let size = match call.query("pageSize") {
        None => 0,
        Some(text) => {
            text.parse().map_err(|_| Refusal::invalid("Field [page_size] must not be negative."))?
        }
    };
    let size = if size == 0 { most } else { most.min(size) };
    let total = found.len();
    found.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
    let never_ending = match fault {
        Some(Fault::EndlessPages) => Some(rand::random()),
        Some(Fault::RepeatedPageToken) => Some(u64::MAX),
        _ => None,
    };
    if let Some(token) = call.query("pageToken").filter(|_| never_ending.is_none()) {
        let after =
            URL_SAFE.decode(token).ok().and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let after = after.ok_or_else(|| Refusal::invalid("The page token is invalid."))?;
        found.retain(|(sequence, _)| *sequence < after);
    }
    let more = found.len() > size;
    found.truncate(size);
    let next = never_ending.or_else(|| found.last().filter(|_| more).map(|(sequence, _)| *sequence));
    let mut page = json!({});
    if !found.is_empty() {
        page[kind] = found.into_iter().map(|(_, item)| item).collect();
    }
    // Google does not count what a filter leaves.
    if total > 0 && call.query("filter").is_none() {
        page["totalSize"] = json!(total);
    }
    if let Some(next) = next {
        page["nextPageToken"] = json!(URL_SAFE.encode(next.to_be_bytes()));
    }
    Ok(page)
}

/// Whether something passes the request's filter: `name:part`, `labels.key=value` and the like, joined with `AND` and
/// `OR`, of which `OR` binds closer (AIP-160). `field` gives nothing for a field that there is not, and `Some(None)` for
/// one that is not set.
fn filtered(call: &Call, field: impl Fn(&str) -> Option<Option<String>>) -> Result<bool, Refusal> {
    let Some(filter) = call.query("filter") else { return Ok(true) };
    let term = |term: &str| {
        let unknown = || Refusal::invalid(format!("This fake does not know the filter [{term}]."));
        let at = term.find([':', '=']).ok_or_else(unknown)?;
        let (name, wanted) = (term[..at].trim(), term[at + 1..].trim().trim_matches('"'));
        let found = field(name).ok_or_else(unknown)?;
        Ok(found.is_some_and(
            |found| if term[at..].starts_with('=') { found == wanted } else { has(&found, wanted) },
        ))
    };
    for clause in filter.split(" AND ") {
        let mut passes = false;
        for alternative in clause.split(" OR ") {
            passes |= term(alternative.trim())?;
        }
        if !passes {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the parts of a pattern, with `*` between them, stand in a text one after the other.
fn has(text: &str, pattern: &str) -> bool {
    let mut rest = text;
    pattern.split('*').all(|part| {
        let found = rest.find(part);
        rest = found.map_or("", |at| &rest[at + part.len()..]);
        found.is_some()
    })
}

/// Bytes in the JSON of a protocol buffer: either alphabet, with padding or without.
fn decoded(text: &str) -> Result<Vec<u8>, Refusal> {
    let standard = text.trim_end_matches('=').replace('-', "+").replace('_', "/");
    let decoded = STANDARD_NO_PAD.decode(standard);
    decoded.map_err(|_| {
        Refusal::invalid("Invalid value at 'payload.data' (TYPE_BYTES), Base64 decoding failed.")
    })
}

fn texts(value: &Value) -> Result<BTreeMap<String, String>, Refusal> {
    if value.is_null() {
        return Ok(BTreeMap::new());
    }
    serde_json::from_value(value.clone()).map_err(|_| Refusal::invalid("Invalid JSON payload received."))
}

fn labels(value: &Value) -> Result<BTreeMap<String, String>, Refusal> {
    let labels = texts(value)?;
    let allowed = |letter: char| {
        letter.is_numeric()
            || letter == '_'
            || letter == '-'
            || letter.is_alphabetic() && !letter.is_uppercase()
    };
    let fits = |text: &str| text.chars().count() <= 63 && text.chars().all(allowed);
    let key_fits = |key: &str| fits(key) && key.starts_with(char::is_alphabetic);
    if labels.len() > 64 || !labels.iter().all(|(key, value)| key_fits(key) && fits(value)) {
        return Err(Refusal::invalid("The labels do not match the expected format."));
    }
    Ok(labels)
}

fn annotations(value: &Value) -> Result<BTreeMap<String, String>, Refusal> {
    let annotations = texts(value)?;
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let fits = |key: &str| {
        key.len() <= 63 && key.bytes().all(inner) && edge(key.bytes().next()) && edge(key.bytes().last())
    };
    let size: usize = annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > LARGEST_ANNOTATIONS || !annotations.keys().all(|key| fits(key)) {
        return Err(Refusal::invalid("The annotations do not match the expected format."));
    }
    Ok(annotations)
}
