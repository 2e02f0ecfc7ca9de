//! HashiCorp Vault and OpenBao: KV version 1 and 2.
//!
//! Plain `reqwest` and not `vaultrs`, because on this path go the credential and every proxied read: `vaultrs` follows
//! a redirect to another host with the token, has no timeout of its own, drops `Retry-After`, panics on a token with a
//! line break, drops `..` segments silently and takes defaults from `VAULT_*` of the process. A few GET requests are
//! less than what it would take to make that safe.

mod survey;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use moka::future::Cache;
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use scaivault_domain::backend::{KvVersion, VaultTarget};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::time::Timestamp;
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::Instant;

use crate::egress::Egress;
use crate::error::BackendError;
use crate::http::{Answer, Http, client, encode, encode_path};
use crate::mount::{Folder, Mount, literal_part};
use crate::survey::{Calls, Found, Step, Way, counted};
use crate::{
    EntryKind, Lease, Material, Page, PageToken, RemoteEntry, RemoteSecret, RemoteVersion, RemoteWrite,
    SecretBackend, Written,
};

const REQUEST: HeaderName = HeaderName::from_static("x-vault-request");
const NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
const TOKEN: HeaderName = HeaderName::from_static("x-vault-token");

/// Vault's own limit of a value is 1 MiB.
const READ_LIMIT: usize = 2 * 1024 * 1024;
/// For servers that list a whole folder at once.
const LIST_LIMIT: usize = 32 * 1024 * 1024;
/// For a scan, which gives a whole tree with its versions: some 400 bytes a secret.
const SCAN_LIMIT: usize = 128 * 1024 * 1024;
/// How many keys a server that knows pages is asked for.
const KEYS_PER_PAGE: usize = 1000;
/// The same in surveys. OpenBao goes through the whole folder for every page of it, so they are not to be small.
const KEYS_PER_SURVEY_PAGE: usize = 5000;

const MOUNT_IS_TRUSTED_FOR: Duration = Duration::from_secs(600);
const MOST_MOUNTS: u64 = 1024;
const MOST_WAYS: u64 = 4096;
/// A token is looked up this rarely, however many reads are forbidden. Not longer, because meanwhile one that is
/// revoked passes for one that may not read. A token that ended stays so.
const VALIDITY_IS_TRUSTED_FOR: Duration = Duration::from_secs(1);
const VERDICT_IS_KEPT_FOR: Duration = Duration::from_secs(60);
const MOST_VERDICTS: u64 = 256;

/// Vault counts versions of a secret from 1; so many are never written.
const NO_SUCH_VERSION: u64 = u32::MAX as u64;

/// One Vault or OpenBao, in one namespace.
#[derive(Debug)]
pub struct VaultBackend {
    http: Http,
    configured: Option<Arc<Mount>>,
    /// By the literal part of a name.
    mounts: Cache<String, Arc<Mount>>,
    /// By lease, what its token was found to be after a 403.
    verdicts: Cache<String, Verdict>,
    /// By folder, in which way it can be surveyed.
    ways: Cache<RemoteName, Way>,
}

#[derive(Clone, Debug)]
struct Verdict {
    token: Result<Token, BackendError>,
    at: Instant,
}

impl Verdict {
    fn is_stale(&self) -> bool {
        match self.token {
            Ok(Token::Invalid) => false,
            Ok(Token::Valid) => self.at.elapsed() >= VALIDITY_IS_TRUSTED_FOR,
            Err(_) => true,
        }
    }
}

/// What a token is, whatever it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Valid,
    Invalid,
}

/// What is asked of a name.
#[derive(Clone, Copy)]
enum Question<'a> {
    Value,
    Version(NonZeroU64),
    Versions,
    Keys { after: Option<&'a PageToken> },
    Survey { way: Way, after: Option<&'a PageToken> },
}

impl Question<'_> {
    /// Where version 2 answers it.
    fn infix(self) -> &'static str {
        match self {
            Question::Value | Question::Version(_) => "data",
            Question::Versions | Question::Keys { .. } | Question::Survey { way: Way::Names, .. } => {
                "metadata"
            }
            Question::Survey { way: Way::Scan | Way::Versions, .. } => "detailed-metadata",
        }
    }

    fn query(self, version: KvVersion) -> String {
        let (after, most) = match self {
            Question::Value | Question::Versions => return String::new(),
            Question::Version(number) => return format!("?version={number}"),
            Question::Survey { way: Way::Scan, .. } => return "?scan=true".to_owned(),
            Question::Survey { after, .. } => (after, KEYS_PER_SURVEY_PAGE),
            Question::Keys { after } => (after, KEYS_PER_PAGE),
        };
        let mut query = "?list=true".to_owned();
        if version == KvVersion::V2 {
            query.push_str(&format!("&limit={most}"));
        }
        if let Some(PageToken(after)) = after {
            query.push_str(&format!("&after={}", encode(after)));
        }
        query
    }

    /// Whether it is asked of a folder, so that it can be asked of a whole mount.
    fn is_about_a_folder(self) -> bool {
        matches!(self, Question::Keys { .. } | Question::Survey { .. })
    }
}

/// The HTTP client for logins: as careful with the credential as the adapter's own.
///
/// # Errors
/// `InvalidConfig`, if the CA certificate is unusable; `EndpointRefused`, if `egress` refuses the endpoint's address.
pub fn vault_client(target: &VaultTarget, egress: &Egress) -> Result<reqwest::Client, BackendError> {
    client(&target.endpoint, &target.tls, HeaderMap::new(), egress)
}

impl VaultBackend {
    /// Prepares the connections; calls nobody yet.
    ///
    /// # Errors
    /// `InvalidConfig`, if the CA certificate or the namespace is unusable; `EndpointRefused`, if `egress` refuses the
    /// endpoint's address.
    pub fn connect(target: &VaultTarget, egress: &Egress) -> Result<Self, BackendError> {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST, HeaderValue::from_static("true"));
        if let Some(namespace) = &target.namespace {
            let value = HeaderValue::from_str(namespace)
                .map_err(|_| BackendError::InvalidConfig("`namespace` is no text that a header can carry"))?;
            headers.insert(NAMESPACE, value);
        }
        Ok(VaultBackend {
            http: Http::new(&target.endpoint, &target.tls, headers, egress)?,
            configured: target.kv.as_ref().map(|kv| Arc::new(Mount::configured(kv))),
            mounts: Cache::builder().max_capacity(MOST_MOUNTS).time_to_live(MOUNT_IS_TRUSTED_FOR).build(),
            verdicts: Cache::builder().max_capacity(MOST_VERDICTS).time_to_live(VERDICT_IS_KEPT_FOR).build(),
            ways: Cache::builder().max_capacity(MOST_WAYS).time_to_live(MOUNT_IS_TRUSTED_FOR).build(),
        })
    }

    /// One request below `/v1`. An answer is 200, 403 or 404.
    async fn get(&self, lease: &Lease, path: &str, limit: usize) -> Result<Answer, BackendError> {
        let answer = self.http.get_json(&format!("/v1{path}"), token_header(lease)?, limit).await?;
        match answer.status.as_u16() {
            200 | 403 | 404 => Ok(answer),
            401 => Err(BackendError::LoginExpired),
            // Not caught up yet, or a secondary that serves nobody: another node may answer.
            status @ (412 | 472 | 473) => Err(BackendError::Server { status }),
            400 => Err(BackendError::InvalidAnswer("it takes the request for malformed")),
            _ => Err(BackendError::InvalidAnswer("a status that this request cannot have")),
        }
    }

    async fn ask(
        &self,
        lease: &Lease,
        name: &RemoteName,
        question: Question<'_>,
    ) -> Result<(KvVersion, Answer), BackendError> {
        let mount = self.mount(lease, name).await?;
        let answer = self.ask_mount(&mount, lease, name, question).await?;
        if mount.version == KvVersion::V2 || !Envelope::of(&answer)?.says_versioned() {
            return Ok((mount.version, answer));
        }
        // The mount was upgraded since it was looked up.
        self.mounts.invalidate(&literal_part(name)?.join("/")).await;
        let mount = self.mount(lease, name).await?;
        if mount.version == KvVersion::V1 {
            return Err(BackendError::InvalidConfig("the KV mount is of version 2, not 1"));
        }
        Ok((mount.version, self.ask_mount(&mount, lease, name, question).await?))
    }

    async fn ask_mount(
        &self,
        mount: &Mount,
        lease: &Lease,
        name: &RemoteName,
        question: Question<'_>,
    ) -> Result<Answer, BackendError> {
        let mut path = match question.is_about_a_folder() {
            true => path_in(mount, name, question.infix())?,
            false => path_of_secret(mount, name, question.infix())?,
        };
        path.push_str(&question.query(mount.version));
        let limit = match question {
            Question::Survey { way: Way::Scan, .. } => SCAN_LIMIT,
            question if question.is_about_a_folder() => LIST_LIMIT,
            _ => READ_LIMIT,
        };
        let answer = self.get(lease, &path, limit).await?;
        if answer.status == StatusCode::FORBIDDEN {
            return Err(self.refusal(lease).await);
        }
        Ok(answer)
    }

    async fn mount(&self, lease: &Lease, name: &RemoteName) -> Result<Arc<Mount>, BackendError> {
        if let Some(mount) = &self.configured {
            return Ok(mount.clone());
        }
        let literal = literal_part(name)?;
        let looked_up = self.mounts.try_get_with(literal.join("/"), self.look_up_mount(lease, &literal));
        looked_up.await.map_err(|error| (*error).clone())
    }

    async fn look_up_mount(&self, lease: &Lease, literal: &[&str]) -> Result<Arc<Mount>, BackendError> {
        let below = encode_path(literal.iter().copied()).ok_or(BackendError::Unrepresentable)?;
        let answer = self.get(lease, &format!("/sys/internal/ui/mounts{below}"), READ_LIMIT).await?;
        match answer.status {
            StatusCode::OK => {}
            StatusCode::FORBIDDEN => {
                return Err(match self.refusal(lease).await {
                    BackendError::Forbidden => BackendError::MountLookupForbidden,
                    error => error,
                });
            }
            _ => {
                return Err(BackendError::InvalidConfig("no such namespace, or the endpoint is no Vault"));
            }
        }
        let mount: MountAnswer = Envelope::of(&answer)?.data()?;
        if !matches!(&*mount.kind, "kv" | "generic") {
            return Err(BackendError::InvalidConfig("the template names a mount that is no KV store"));
        }
        let version = mount.options.unwrap_or_default().get("version").map_or("", String::as_str) == "2";
        let version = if version { KvVersion::V2 } else { KvVersion::V1 };
        Ok(Arc::new(Mount::looked_up(&mount.path, version)))
    }

    /// The segments of the mount of `name`, its version, and the segments in it; `None` if that is not known.
    pub(crate) async fn place(
        &self,
        lease: &Lease,
        name: &RemoteName,
    ) -> Option<(Vec<String>, KvVersion, Vec<String>)> {
        let mount = self.mount(lease, name).await.ok()?;
        let below = mount.path_of(name).ok()?.into_iter().map(str::to_owned).collect();
        Some((mount.segments().map(str::to_owned).collect(), mount.version, below))
    }

    /// Vault says 403 to a token that ended as well as to one that may not read the name.
    async fn refusal(&self, lease: &Lease) -> BackendError {
        let look_up = async { Verdict { token: self.look_up_token(lease).await, at: Instant::now() } };
        let verdict =
            self.verdicts.entry_by_ref(&lease.id).or_insert_with_if(look_up, Verdict::is_stale).await;
        match verdict.into_value().token {
            Ok(Token::Valid) => BackendError::Forbidden,
            Ok(Token::Invalid) => BackendError::LoginExpired,
            Err(error) => error,
        }
    }

    async fn look_up_token(&self, lease: &Lease) -> Result<Token, BackendError> {
        let answer = self.get(lease, "/auth/token/lookup-self", READ_LIMIT).await?;
        match answer.status {
            // Whatever stands in front of Vault may say 200 to anything.
            StatusCode::OK => Envelope::of(&answer)?.data.map(|_| Token::Valid).ok_or(NO_JSON_OF_VAULT),
            StatusCode::FORBIDDEN => {
                // A token without the default policy may not even look itself up. Only the verdict of a policy is
                // written as a list of one; taking that for an ended token would log in again for every such read.
                let refused_by_policy = "1 error occurred:\n\t* permission denied";
                let errors = Envelope::of(&answer)?.errors.unwrap_or_default();
                let valid = errors.iter().any(|error| error.starts_with(refused_by_policy));
                Ok(if valid { Token::Valid } else { Token::Invalid })
            }
            _ => Err(BackendError::InvalidConfig("no such namespace, or the endpoint is no Vault")),
        }
    }
}

impl SecretBackend for VaultBackend {
    async fn read(&self, lease: &Lease, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        match self.ask(lease, name, Question::Value).await? {
            (KvVersion::V1, answer) => read_v1(&answer),
            (KvVersion::V2, answer) => read_v2(&answer),
        }
    }

    async fn history(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        match self.ask(lease, name, Question::Versions).await? {
            (KvVersion::V1, answer) => {
                let RemoteSecret { remote_version, created, .. } = read_v1(&answer)?;
                Ok(vec![RemoteVersion { remote_version, state: State::Active, created }])
            }
            (KvVersion::V2, answer) => versions(&answer),
        }
    }

    async fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        // To Vault, 0 is whatever is current.
        let number = remote_version.parse().map_err(|_| BackendError::NotFound)?;
        let secret = match self.ask(lease, name, Question::Version(number)).await? {
            (KvVersion::V1, _) => return Err(BackendError::NotFound),
            (KvVersion::V2, answer) => read_v2(&answer)?,
        };
        if secret.remote_version != number.to_string() {
            return Err(BackendError::InvalidAnswer("another version than was asked for"));
        }
        Ok(secret)
    }

    async fn list(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        if let Some(mount) = &self.configured
            && let Folder::Above(next) = mount.folder(folder)?
        {
            let name =
                folder.map_or_else(|| RemoteName::with_literal(&*next, 0), |folder| folder.child(&next));
            return Ok(Page { entries: vec![RemoteEntry { name, kind: EntryKind::Folder }], next: None });
        }
        let folder = folder.ok_or(BackendError::MountNotLiteral)?;
        let (version, answer) = self.ask(lease, folder, Question::Keys { after }).await?;
        keys(&answer, version, folder, after)
    }

    async fn survey(&self, lease: &Lease, step: &Step, calls: &Calls) -> Result<Found, BackendError> {
        match step {
            Step::Tree(root) => self.survey_tree(lease, root.as_ref(), calls).await,
            Step::Folder { name, after, way } => {
                self.survey_folder(lease, name, after.as_ref(), *way, calls).await
            }
            Step::Secret(name) => self.survey_secret(lease, name, calls).await,
            Step::More { .. } => Err(BackendError::InvalidConfig("a listing of another kind of store")),
        }
    }

    async fn write(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        self.put(lease, name, write).await
    }

    async fn delete(&self, lease: &Lease, name: &RemoteName, expected: &str) -> Result<(), BackendError> {
        self.delete_softly(lease, name, expected).await
    }

    async fn may_read(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        let version = NonZeroU64::new(NO_SUCH_VERSION).expect("it is not 0");
        match self.mount(lease, name).await?.version {
            // Whoever may read is told that there is no such version; nobody else is.
            KvVersion::V2 => match self.ask(lease, name, Question::Version(version)).await {
                Ok((KvVersion::V2, answer)) => match read_v2(&answer) {
                    Err(BackendError::NotFound | BackendError::NotActive(_)) => Ok(()),
                    Ok(_) => Err(BackendError::InvalidAnswer("a version that nobody can have made")),
                    Err(error) => Err(error),
                },
                Ok((KvVersion::V1, _)) => {
                    Err(BackendError::InvalidConfig("the KV mount is of version 1, not 2"))
                }
                Err(error) => Err(error),
            },
            // Without versions, every read gives the value.
            KvVersion::V1 => self.may_read_v1(lease, name).await,
        }
    }

    async fn may_list_versions(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        // What version 1 tells of a secret it tells along with the value.
        if self.mount(lease, name).await?.version == KvVersion::V1 {
            return Ok(());
        }
        self.history(lease, name).await.map(drop)
    }

    /// A token that was found valid is trusted to be for a second.
    fn may_mistake_refusals(&self) -> bool {
        true
    }

    async fn probe(&self, lease: &Lease) -> Result<(), BackendError> {
        match self.look_up_token(lease).await? {
            Token::Valid => Ok(()),
            Token::Invalid => Err(BackendError::LoginExpired),
        }
    }
}

/// The path of a secret: that of the mount itself is none.
fn path_of_secret(mount: &Mount, name: &RemoteName, infix: &str) -> Result<String, BackendError> {
    if mount.path_of(name)?.is_empty() {
        return Err(BackendError::Unrepresentable);
    }
    path_in(mount, name, infix)
}

/// The encoded path of `name` below `/v1`, on version 2 with the infix of what is asked.
fn path_in(mount: &Mount, name: &RemoteName, infix: &str) -> Result<String, BackendError> {
    let infix = (mount.version == KvVersion::V2).then_some(infix);
    let segments = mount.segments().chain(infix).chain(mount.path_of(name)?);
    encode_path(segments).ok_or(BackendError::Unrepresentable)
}

fn token_header(lease: &Lease) -> Result<HeaderMap, BackendError> {
    let Material::VaultToken(token) = &lease.material else { return Err(BackendError::FOREIGN_LEASE) };
    let token = token.expose_secret();
    let unusable =
        BackendError::InvalidConfig("the token holds characters that no token has, such as a line break");
    if token.chars().any(char::is_control) {
        return Err(unusable);
    }
    let mut value = HeaderValue::from_str(token).map_err(|_| unusable)?;
    value.set_sensitive(true);
    Ok(HeaderMap::from_iter([(TOKEN, value)]))
}

/// What every answer of Vault is wrapped in.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    errors: Option<Vec<String>>,
    #[serde(default)]
    warnings: Option<Vec<String>>,
}

const NO_JSON_OF_VAULT: BackendError = BackendError::InvalidAnswer("JSON that is not Vault's");

fn parse<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T, BackendError> {
    serde_json::from_str(json).map_err(|_| NO_JSON_OF_VAULT)
}

impl<'a> Envelope<'a> {
    fn of(answer: &'a Answer) -> Result<Self, BackendError> {
        serde_json::from_slice(&answer.body).map_err(|_| NO_JSON_OF_VAULT)
    }

    fn data<T: Deserialize<'a>>(&self) -> Result<T, BackendError> {
        parse(self.data.ok_or(NO_JSON_OF_VAULT)?.get())
    }

    /// What a version 2 mount says to a version 1 request.
    fn says_versioned(&self) -> bool {
        self.warnings.iter().flatten().any(|warning| warning.contains("versioned K/V"))
    }

    /// What a 404 means that says nothing about a version. A mount that vanished is not a secret that was deleted.
    fn absence(&self) -> BackendError {
        match &self.errors {
            Some(errors) if errors.is_empty() => BackendError::NotFound,
            Some(_) => BackendError::InvalidConfig("no such mount or namespace"),
            None => NO_JSON_OF_VAULT,
        }
    }
}

#[derive(Deserialize)]
struct MountAnswer {
    path: String,
    #[serde(rename = "type")]
    kind: String,
    options: Option<HashMap<String, String>>,
}

#[derive(Deserialize)]
struct Versioned<'a> {
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    metadata: Current,
}

#[derive(Deserialize)]
struct Current {
    version: u64,
    #[serde(flatten)]
    life: Life,
    #[serde(default)]
    custom_metadata: Option<Metadata>,
}

#[derive(Deserialize)]
struct Life {
    created_time: String,
    deletion_time: String,
    destroyed: bool,
}

#[derive(Deserialize)]
struct Versions {
    versions: BTreeMap<u64, Life>,
}

#[derive(Deserialize)]
struct Keys {
    keys: Vec<String>,
}

impl Life {
    /// By the server's clock: a deletion may be planned for later.
    fn state(&self, now: Option<Timestamp>) -> State {
        // `Date` has whole seconds, so the moment may be up to one later.
        let now = now.map(|date| date.after(Duration::from_secs(1)));
        match Timestamp::parse(&self.deletion_time) {
            _ if self.destroyed => State::Destroyed,
            _ if self.deletion_time.is_empty() => State::Active,
            Some(deletion) if now.is_some_and(|now| deletion > now) => State::Active,
            _ => State::Deleted,
        }
    }
}

/// The value as Vault sent it, byte for byte.
fn secret(raw: &RawValue) -> Result<RemoteSecret, BackendError> {
    let text = raw.get();
    if !text.starts_with('{') {
        return Err(BackendError::InvalidAnswer("the value is no JSON object"));
    }
    Ok(RemoteSecret {
        value: SecretValue::new(text.as_bytes().to_vec()),
        kind: Kind::of_text(text.as_bytes()),
        content_type: "application/json".into(),
        metadata: Some(Metadata::new()),
        remote_version: String::new(),
        created: None,
        stamp: None,
    })
}

fn read_v1(answer: &Answer) -> Result<RemoteSecret, BackendError> {
    let envelope = Envelope::of(answer)?;
    if answer.status != StatusCode::OK {
        return Err(envelope.absence());
    }
    secret(envelope.data.ok_or(NO_JSON_OF_VAULT)?)
}

fn read_v2(answer: &Answer) -> Result<RemoteSecret, BackendError> {
    let envelope = Envelope::of(answer)?;
    if answer.status != StatusCode::OK {
        let Some(data) = envelope.data else { return Err(envelope.absence()) };
        return match parse::<Versioned<'_>>(data.get())?.metadata.life.state(None) {
            State::Active => Err(NO_JSON_OF_VAULT),
            state => Err(BackendError::NotActive(state)),
        };
    }
    let Versioned { data, metadata } = envelope.data()?;
    let secret = match data {
        Some(data) => secret(data)?,
        // A version written without keys, which Vault shows as an empty one.
        None => secret(parse("{}")?)?,
    };
    let remote_version = metadata.version.to_string();
    let created = Timestamp::parse(&metadata.life.created_time);
    Ok(RemoteSecret {
        metadata: Some(metadata.custom_metadata.unwrap_or_default()),
        stamp: Some(counted(&remote_version, created)),
        remote_version,
        created,
        ..secret
    })
}

fn versions(answer: &Answer) -> Result<Vec<RemoteVersion>, BackendError> {
    let envelope = Envelope::of(answer)?;
    if answer.status != StatusCode::OK {
        return Err(envelope.absence());
    }
    let Versions { versions } = envelope.data()?;
    let version = |(number, life): (u64, Life)| RemoteVersion {
        remote_version: number.to_string(),
        state: life.state(answer.date),
        created: Timestamp::parse(&life.created_time),
    };
    Ok(versions.into_iter().map(version).collect())
}

fn keys(
    answer: &Answer,
    version: KvVersion,
    folder: &RemoteName,
    after: Option<&PageToken>,
) -> Result<Page, BackendError> {
    let envelope = Envelope::of(answer)?;
    if answer.status != StatusCode::OK {
        return match envelope.absence() {
            BackendError::NotFound => Ok(Page { entries: Vec::new(), next: None }),
            error => Err(error),
        };
    }
    let Keys { keys } = envelope.data()?;
    // Vault, unlike OpenBao, knows no pages: it gave everything the first time and gives it again.
    if after.is_some_and(|PageToken(after)| keys.contains(after)) {
        return Ok(Page { entries: Vec::new(), next: None });
    }
    let full = version == KvVersion::V2 && keys.len() == KEYS_PER_PAGE;
    let next = keys.last().filter(|_| full).map(|last| PageToken(last.clone()));
    let entry = |key: &String| match key.strip_suffix('/') {
        Some(child) => RemoteEntry { name: folder.child(child), kind: EntryKind::Folder },
        None => RemoteEntry { name: folder.child(key), kind: EntryKind::Secret },
    };
    Ok(Page { entries: keys.iter().map(entry).collect(), next })
}

#[cfg(test)]
mod tests;
