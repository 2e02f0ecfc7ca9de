//! The secrets of the vault, and what the REST API does with them.
//!
//! Written from Microsoft's reference of the secrets API (7.x) and "About Azure Key Vault secrets"; messages and the
//! shapes of bodies are those of recordings of the real service.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::faults::Fault;
use super::reply::{Asked, Reply};

/// The most items on a page, and how many there are if nothing is asked for.
const PAGE: usize = 25;
/// The most bytes of a value.
const LARGEST_VALUE: usize = 25 * 1024;
const MOST_TAGS: usize = 15;
const RECOVERABLE_DAYS: i64 = 90;
/// What `api-version` may be.
const API_VERSIONS: [&str; 9] = ["7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "2025-07-01", "2026-04-01"];

/// What a version is made from.
#[derive(Clone, Default)]
pub struct Draft {
    /// The value, at most 25 KiB.
    pub value: String,
    /// The content type.
    pub content_type: Option<String>,
    /// The tags.
    pub tags: BTreeMap<String, String>,
    /// Whether it is made disabled.
    pub disabled: bool,
    /// When it expires, in seconds since the Unix epoch. Azure serves expired secrets all the same.
    pub expires: Option<i64>,
    /// From when on it is meant to be used, likewise.
    pub not_before: Option<i64>,
}

impl Draft {
    /// An enabled version with this value and nothing else.
    pub fn of(value: impl Into<String>) -> Draft {
        Draft { value: value.into(), ..Draft::default() }
    }
}

/// All secrets, by their lower-case names: Azure's names do not differ by case.
#[derive(Default)]
pub(super) struct Vault {
    live: BTreeMap<String, Secret>,
    deleted: BTreeMap<String, (Secret, i64)>,
}

struct Secret {
    /// As it was spelled when it was made.
    name: String,
    /// The oldest first; never empty.
    versions: Vec<Version>,
}

struct Version {
    id: String,
    draft: Draft,
    has_tags: bool,
    created: i64,
    updated: i64,
}

impl Secret {
    fn current(&self) -> &Version {
        self.versions.last().expect("a secret is made with a version")
    }

    /// The version with this id; the current one for none.
    fn version(&self, id: Option<&str>) -> Option<&Version> {
        match id {
            None => Some(self.current()),
            Some(id) => self.versions.iter().find(|version| version.id == id),
        }
    }
}

impl Version {
    fn attributes(&self) -> Value {
        let mut attributes = json!({
            "enabled": !self.draft.disabled,
            "created": self.created,
            "updated": self.updated,
            "recoveryLevel": "Recoverable+Purgeable",
            "recoverableDays": RECOVERABLE_DAYS,
        });
        if let Some(expires) = self.draft.expires {
            attributes["exp"] = expires.into();
        }
        if let Some(not_before) = self.draft.not_before {
            attributes["nbf"] = not_before.into();
        }
        attributes
    }

    /// Everything but the value.
    fn describe(&self, id: String) -> Value {
        let mut described = json!({ "id": id, "attributes": self.attributes() });
        if let Some(content_type) = &self.draft.content_type {
            described["contentType"] = content_type.as_str().into();
        }
        if self.has_tags {
            described["tags"] = json!(self.draft.tags);
        }
        described
    }
}

#[derive(Deserialize)]
struct SetBody {
    value: Option<String>,
    #[serde(flatten)]
    properties: Properties,
}

#[derive(Default, Deserialize)]
struct Properties {
    #[serde(rename = "contentType")]
    content_type: Option<String>,
    tags: Option<BTreeMap<String, String>>,
    attributes: Option<Attributes>,
}

#[derive(Default, Deserialize)]
struct Attributes {
    enabled: Option<bool>,
    exp: Option<i64>,
    nbf: Option<i64>,
}

impl Properties {
    /// Changes what is named, and leaves the rest; tags are replaced as a whole.
    fn apply(self, version: &mut Version) {
        let attributes = self.attributes.unwrap_or_default();
        let draft = &mut version.draft;
        draft.content_type = self.content_type.or(draft.content_type.take());
        draft.disabled = attributes.enabled.map_or(draft.disabled, |enabled| !enabled);
        draft.expires = attributes.exp.or(draft.expires);
        draft.not_before = attributes.nbf.or(draft.not_before);
        if let Some(tags) = self.tags {
            draft.tags = tags;
            version.has_tags = true;
        }
    }
}

/// Whether the request names a version of the API.
pub(super) fn check_api_version(asked: &Asked) -> Result<(), Reply> {
    let Some(version) = asked.query("api-version").filter(|version| !version.is_empty()) else {
        return Err(bad_parameter("api-version must be specified"));
    };
    // Previews are named `7.4-preview.1`.
    let released = version.split_once("-preview").map_or(version, |(released, _)| released);
    if API_VERSIONS.contains(&released) {
        return Ok(());
    }
    let text = format!(
        "The specified version ({version}) is not recognized. Consider using the latest supported version (7.6)."
    );
    Err(bad_parameter(&text))
}

/// Whether this can be a secret's name.
pub(super) fn check_name(name: &str) -> Result<(), Reply> {
    let fits = (1..=127).contains(&name.len());
    if fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Ok(());
    }
    Err(bad_parameter(&format!("The request URI contains an invalid name: {name}")))
}

impl Vault {
    /// A secret's value and properties.
    pub(super) fn get(&self, asked: &Asked, name: &str, id: Option<&str>) -> Result<Reply, Reply> {
        let secret = self.live.get(&name.to_ascii_lowercase()).ok_or_else(|| not_found(name, id))?;
        let version = secret.version(id).ok_or_else(|| not_found(name, id))?;
        if version.draft.disabled {
            let text = "Operation get is not allowed on a disabled secret.";
            return Err(Reply::inner_error(StatusCode::FORBIDDEN, "Forbidden", text, "SecretDisabled"));
        }
        Ok(Reply::ok(bundle(asked, secret, version)))
    }

    /// A page of secrets, without versions and values.
    pub(super) fn list(&self, asked: &Asked, fault: &Fault) -> Result<Reply, Reply> {
        let items = self.live.iter().map(|(key, secret)| {
            let describe = || secret.current().describe(format!("{}/secrets/{}", asked.base, secret.name));
            (key.clone(), describe)
        });
        let mut items: Vec<(String, Box<dyn Fn() -> Value + '_>)> =
            items.map(|(key, describe)| (key, Box::new(describe) as Box<dyn Fn() -> Value>)).collect();
        if let Fault::ListsAlso(name) = fault {
            let id = format!("{}/secrets/{name}", asked.base);
            // Before every name, so that it stands on the first page alone.
            let also = fresh(Draft::default(), asked.now).describe(id);
            items.insert(0, ("!".to_owned(), Box::new(move || also.clone())));
        }
        page(asked, "secrets", items, fault)
    }

    /// A page of a secret's versions. Their order is no order of time. An unknown secret has none: that is no error.
    pub(super) fn versions(&self, asked: &Asked, name: &str, fault: &Fault) -> Result<Reply, Reply> {
        let secret = self.live.get(&name.to_ascii_lowercase());
        let versions = secret.iter().flat_map(|secret| &secret.versions);
        let name = secret.map_or(name, |secret| &secret.name);
        let mut items: Vec<_> = versions
            .map(|version| {
                let describe =
                    move || version.describe(format!("{}/secrets/{name}/{}", asked.base, version.id));
                (version.id.clone(), describe)
            })
            .collect();
        items.sort_by(|(a, _), (b, _)| a.cmp(b));
        page(asked, &format!("secrets/{name}/versions"), items, fault)
    }

    /// A new version, of a new secret if need be.
    pub(super) fn set(&mut self, asked: &Asked, name: &str) -> Result<Reply, Reply> {
        let body: SetBody = parse(asked)?;
        let value = body.value.ok_or_else(|| bad_parameter("Property value is missing"))?;
        check(value.len() <= LARGEST_VALUE, "The secret value exceeds 25 KB")?;
        check_properties(&body.properties)?;
        let mut version = fresh(Draft::of(value), asked.now);
        body.properties.apply(&mut version);
        let secret = self.add(name, version)?;
        Ok(Reply::ok(bundle(asked, secret, secret.current())))
    }

    fn add(&mut self, name: &str, version: Version) -> Result<&Secret, Reply> {
        let key = name.to_ascii_lowercase();
        if self.deleted.contains_key(&key) {
            let text = format!(
                "Secret {name} is currently in a deleted but recoverable state, and its name cannot be reused; \
                 in this state, the secret can only be recovered or purged."
            );
            let inner = "ObjectIsDeletedButRecoverable";
            return Err(Reply::inner_error(StatusCode::CONFLICT, "Conflict", text, inner));
        }
        let secret = self.live.entry(key);
        let secret = secret.or_insert_with(|| Secret { name: name.to_owned(), versions: Vec::new() });
        secret.versions.push(version);
        Ok(secret)
    }

    /// Other properties of a version.
    pub(super) fn update(&mut self, asked: &Asked, name: &str, id: &str) -> Result<Reply, Reply> {
        let properties: Properties = parse(asked)?;
        check_properties(&properties)?;
        let missing = || not_found(name, Some(id));
        let secret = self.live.get_mut(&name.to_ascii_lowercase()).ok_or_else(missing)?;
        let version = secret.versions.iter_mut().find(|version| version.id == id).ok_or_else(missing)?;
        properties.apply(version);
        version.updated = asked.now;
        let id = format!("{}/secrets/{}/{}", asked.base, secret.name, version.id);
        Ok(Reply::ok(version.describe(id)))
    }

    /// Deletes a secret softly.
    pub(super) fn delete(&mut self, asked: &Asked, name: &str) -> Result<Reply, Reply> {
        let key = name.to_ascii_lowercase();
        let secret = self.live.remove(&key).ok_or_else(|| not_found(name, None))?;
        let deleted = self.deleted.entry(key).insert_entry((secret, asked.now));
        let (secret, at) = deleted.get();
        Ok(Reply::ok(deleted_bundle(asked, secret, *at, VersionInId::Shown)))
    }

    /// A deleted secret's properties.
    pub(super) fn get_deleted(&self, asked: &Asked, name: &str) -> Result<Reply, Reply> {
        let deleted = self.deleted.get(&name.to_ascii_lowercase());
        let (secret, at) = deleted.ok_or_else(|| deleted_not_found(name))?;
        Ok(Reply::ok(deleted_bundle(asked, secret, *at, VersionInId::Shown)))
    }

    /// A page of deleted secrets.
    pub(super) fn list_deleted(&self, asked: &Asked, fault: &Fault) -> Result<Reply, Reply> {
        let items = self.deleted.iter().map(|(key, (secret, at))| {
            (key.clone(), || deleted_bundle(asked, secret, *at, VersionInId::Left))
        });
        page(asked, "deletedsecrets", items.collect(), fault)
    }

    /// Brings a deleted secret back.
    pub(super) fn recover(&mut self, asked: &Asked, name: &str) -> Result<Reply, Reply> {
        let key = name.to_ascii_lowercase();
        let (secret, _) = self.deleted.remove(&key).ok_or_else(|| deleted_not_found(name))?;
        let secret = self.live.entry(key).insert_entry(secret);
        let (secret, version) = (secret.get(), secret.get().current());
        let id = format!("{}/secrets/{}/{}", asked.base, secret.name, version.id);
        Ok(Reply::ok(version.describe(id)))
    }

    /// For tests: a new version, and its id.
    pub(super) fn put(&mut self, name: &str, draft: Draft, now: i64) -> String {
        check_name(name).expect("the test names a secret as Azure allows");
        let mut version = fresh(draft, now);
        version.has_tags = !version.draft.tags.is_empty();
        let secret = self.add(name, version).expect("the test writes to a name that is not deleted");
        secret.current().id.clone()
    }

    /// For tests: changes the current version.
    pub(super) fn change(&mut self, name: &str, now: i64, change: impl FnOnce(&mut Draft)) {
        let secret = self.live.get_mut(&name.to_ascii_lowercase()).expect("the test names a secret there is");
        let version = secret.versions.last_mut().expect("a secret is made with a version");
        change(&mut version.draft);
        version.has_tags |= !version.draft.tags.is_empty();
        version.updated = now;
    }

    /// For tests: the current version as it is.
    pub(super) fn current(&self, name: &str) -> Option<(String, Draft)> {
        let version = self.live.get(&name.to_ascii_lowercase())?.current();
        Some((version.id.clone(), version.draft.clone()))
    }

    /// For tests: the ids of all versions, the oldest first.
    pub(super) fn ids(&self, name: &str) -> Vec<String> {
        let secret = self.live.get(&name.to_ascii_lowercase());
        secret.iter().flat_map(|secret| &secret.versions).map(|version| version.id.clone()).collect()
    }

    /// For tests: deletes softly.
    pub(super) fn remove(&mut self, name: &str, now: i64) {
        let key = name.to_ascii_lowercase();
        let secret = self.live.remove(&key).expect("the test deletes a secret there is");
        self.deleted.insert(key, (secret, now));
    }

    /// For tests: as if a deleted secret had been purged.
    pub(super) fn purge(&mut self, name: &str) {
        self.deleted.remove(&name.to_ascii_lowercase()).expect("the test purges a deleted secret");
    }

    /// For tests: brings a deleted secret back.
    pub(super) fn restore(&mut self, name: &str) {
        let key = name.to_ascii_lowercase();
        let (secret, _) = self.deleted.remove(&key).expect("the test recovers a deleted secret");
        self.live.insert(key, secret);
    }
}

fn fresh(draft: Draft, now: i64) -> Version {
    let id = format!("{:032x}", rand::random::<u128>());
    Version { id, draft, has_tags: false, created: now, updated: now }
}

fn bundle(asked: &Asked, secret: &Secret, version: &Version) -> Value {
    let mut bundle = version.describe(format!("{}/secrets/{}/{}", asked.base, secret.name, version.id));
    bundle["value"] = version.draft.value.as_str().into();
    bundle
}

/// A deleted secret tells its version where it stands alone, not in a list.
enum VersionInId {
    Shown,
    Left,
}

fn deleted_bundle(asked: &Asked, secret: &Secret, at: i64, in_id: VersionInId) -> Value {
    let version = secret.current();
    let id = match in_id {
        VersionInId::Shown => format!("{}/secrets/{}/{}", asked.base, secret.name, version.id),
        VersionInId::Left => format!("{}/secrets/{}", asked.base, secret.name),
    };
    let mut bundle = version.describe(id);
    bundle["recoveryId"] = format!("{}/deletedsecrets/{}", asked.base, secret.name).into();
    bundle["deletedDate"] = at.into();
    bundle["scheduledPurgeDate"] = (at + RECOVERABLE_DAYS * 24 * 60 * 60).into();
    bundle
}

/// Where the next page of a listing begins: what is in `$skiptoken`.
#[derive(Deserialize, Serialize)]
struct Marker {
    collection: String,
    /// The last key of the page before; empty at the beginning.
    after: String,
    /// How many pages were before this one.
    page: u64,
    /// Whether an empty page was given for this place.
    emptied: bool,
}

/// A page of `items`, of which only those on it are described: a vault of thousands has many pages.
fn page(
    asked: &Asked,
    collection: &str,
    items: Vec<(String, impl FnOnce() -> Value)>,
    fault: &Fault,
) -> Result<Reply, Reply> {
    let size = match asked.query("maxresults").map(str::parse::<usize>) {
        None => PAGE,
        Some(Ok(size @ 1..=PAGE)) => size,
        Some(_) => return Err(bad_parameter("invalid maxresults")),
    };
    let start = Marker { collection: collection.to_owned(), after: String::new(), page: 0, emptied: false };
    let here = match asked.query("$skiptoken") {
        None => start,
        Some(token) => marker(token)
            .filter(|marker| marker.collection == collection)
            .ok_or_else(|| bad_parameter("invalid skiptoken"))?,
    };
    let number = here.page;
    let next = Marker { page: number + 1, emptied: false, ..here };
    if *fault == Fault::EmptyPages && !here.emptied {
        return Ok(answer(asked, Vec::new(), Some(&Marker { emptied: true, ..next }), fault));
    }
    if *fault == Fault::EndlessPages {
        return Ok(answer(asked, invented(asked, collection, number, size), Some(&next), fault));
    }
    let after = if *fault == Fault::RepeatingPages { "" } else { next.after.as_str() };
    let mut rest = items.into_iter().filter(|(key, _)| key.as_str() > after);
    let shown: Vec<_> = rest.by_ref().take(size).collect();
    let last = shown.last().map(|(key, _)| key.clone()).unwrap_or_default();
    let next = match fault {
        Fault::RepeatingPages => Some(Marker { after: "again".into(), page: 0, ..next }),
        Fault::NextLinkTo(_) => Some(Marker { after: last, ..next }),
        _ => rest.next().map(|_| Marker { after: last, ..next }),
    };
    Ok(answer(asked, shown.into_iter().map(|(_, describe)| describe()).collect(), next.as_ref(), fault))
}

fn marker(token: &str) -> Option<Marker> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token).ok()?).ok()
}

fn answer(asked: &Asked, items: Vec<Value>, next: Option<&Marker>, fault: &Fault) -> Reply {
    let base = match fault {
        Fault::NextLinkTo(base) => base,
        _ => &asked.base,
    };
    let link = next.map(|next| {
        let token = serde_json::to_vec(next).expect("a marker has nothing that JSON cannot carry");
        let version = asked.query("api-version").unwrap_or_default();
        let size = asked.query("maxresults").map_or(PAGE.to_string(), str::to_owned);
        let (collection, token) = (&next.collection, URL_SAFE_NO_PAD.encode(token));
        format!("{base}/{collection}?api-version={version}&$skiptoken={token}&maxresults={size}")
    });
    Reply::ok(json!({ "value": items, "nextLink": link }))
}

fn invented(asked: &Asked, collection: &str, number: u64, size: usize) -> Vec<Value> {
    let item = |index: usize| {
        let id = match collection.strip_suffix("/versions") {
            Some(secret) => format!("{}/{secret}/{number:016x}{index:016x}", asked.base),
            None => format!("{}/secrets/endless-{number}-{index}", asked.base),
        };
        fresh(Draft::default(), asked.now).describe(id)
    };
    (0..size).map(item).collect()
}

fn parse<T: for<'de> Deserialize<'de>>(asked: &Asked) -> Result<T, Reply> {
    serde_json::from_slice(&asked.body).map_err(|_| bad_parameter("The request body is not what is expected"))
}

fn check_properties(properties: &Properties) -> Result<(), Reply> {
    let tags = properties.tags.as_ref();
    check(tags.is_none_or(|tags| tags.len() <= MOST_TAGS), "The secret has more than 15 tags")?;
    let short = |(name, value): (&String, &String)| name.len() <= 512 && value.len() <= 512;
    check(tags.is_none_or(|tags| tags.iter().all(short)), "A tag exceeds 512 characters")?;
    let content_type = properties.content_type.as_ref();
    check(content_type.is_none_or(|text| text.len() <= 255), "The content type exceeds 255 characters")
}

fn check(holds: bool, otherwise: &str) -> Result<(), Reply> {
    if holds { Ok(()) } else { Err(bad_parameter(otherwise)) }
}

fn bad_parameter(message: &str) -> Reply {
    Reply::error(StatusCode::BAD_REQUEST, "BadParameter", message)
}

fn not_found(name: &str, id: Option<&str>) -> Reply {
    let name = id.map_or(name.to_owned(), |id| format!("{name}/{id}"));
    let text = format!(
        "A secret with (name/id) {name} was not found in this key vault. If you recently deleted this secret you may \
         be able to recover it using the correct recovery command. For help resolving this issue, please see \
         https://go.microsoft.com/fwlink/?linkid=2125182"
    );
    Reply::error(StatusCode::NOT_FOUND, "SecretNotFound", text)
}

fn deleted_not_found(name: &str) -> Reply {
    Reply::error(StatusCode::NOT_FOUND, "SecretNotFound", format!("Deleted Secret not found: {name}"))
}
