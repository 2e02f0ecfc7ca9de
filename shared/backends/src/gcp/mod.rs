//! GCP Secret Manager, over REST v1.
//!
//! Plain requests: a handful of calls is all it takes, and the credential goes through the same careful client as
//! Vault's. Written from Google's REST reference, the guides to etags, quotas and access control, and AIP-193.
//!
//! Listings do not tell versions, and Google allows 600 calls a minute that read metadata but 90,000 that read values.
//! So every value is read and compared, and metadata comes with the listing alone.

mod metadata;
mod wire;
mod write;

use reqwest::Method;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use scaivault_domain::backend::{GcpTarget, Naming};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::State;
use secrecy::ExposeSecret;
use zeroize::Zeroizing;

use crate::budget::{Quota, extra};
use crate::egress::Egress;
use crate::error::BackendError;
use crate::gcp::wire::{Part, Refusal, Secret, Version, number_of};
use crate::http::{Answer, Body, Http, encode, encode_path};
use crate::survey::{Calls, Found, Step, SurveyPage, Surveyed};
use crate::{
    EntryKind, Lease, Material, Page, PageToken, RemoteEntry, RemoteSecret, RemoteVersion, RemoteWrite,
    SecretBackend, Written,
};

/// A value has at most 64 KiB, as much metadata can stand beside it, and base64 takes a third more.
const READ_LIMIT: usize = 256 * 1024;
/// A secret is some hundred bytes in a listing, and at most about 32 KiB.
const LIST_LIMIT: usize = 32 * 1024 * 1024;
/// Google allows 25,000; with their metadata that could be too much for one answer.
const ITEMS_PER_PAGE: usize = 1000;
/// A page may be empty though others follow. Google's are not; a store that gives only such pages has no end.
const MOST_EMPTY_PAGES: usize = 8;
/// The newest ones, of secrets with more versions than anybody looks at.
const MOST_VERSIONS: usize = 10_000;
/// The newest version, whatever its state.
const LATEST: &str = "latest";
/// No secret ever gets so many versions.
const NO_SUCH_VERSION: &str = "2147483647";

/// The secrets of one project, either the global ones or those of one location.
#[derive(Debug)]
pub struct GcpBackend {
    http: Http,
    /// The encoded path of the resource that secrets lie in.
    parent: String,
    /// Whether the secrets are those of one location, which they never leave.
    is_regional: bool,
}

impl GcpBackend {
    /// Prepares the connections; calls nobody yet.
    ///
    /// # Errors
    /// `InvalidConfig`, if the CA certificate is unusable; `EndpointRefused`, if `egress` refuses the address.
    pub fn connect(target: &GcpTarget, egress: &Egress) -> Result<Self, BackendError> {
        let parent = target.parent();
        let segments = ["v1"].into_iter().chain(parent.split('/'));
        let parent =
            encode_path(segments).ok_or(BackendError::InvalidConfig("`project_id` is no project id"))?;
        let http = Http::new(&target.endpoint(), &target.tls, HeaderMap::new(), egress)?;
        Ok(GcpBackend { http, parent, is_regional: target.location.is_some() })
    }

    /// The path of a secret. Only names that Secret Manager can have make one, so nothing needs to be encoded.
    fn secret_path(&self, name: &RemoteName) -> Result<String, BackendError> {
        if !Naming::Gcp.has(name) {
            return Err(BackendError::Unrepresentable);
        }
        Ok(format!("{}/secrets/{}", self.parent, name.as_str()))
    }

    fn version_path(&self, name: &RemoteName, version: &str) -> Result<String, BackendError> {
        Ok(format!("{}/versions/{version}", self.secret_path(name)?))
    }

    async fn get(&self, lease: &Lease, path: &str, limit: usize) -> Result<Answer, Refusal> {
        wire::success(self.http.get_json(path, bearer(lease)?, limit).await?)
    }

    async fn send(
        &self,
        method: Method,
        lease: &Lease,
        path: &str,
        json: Zeroizing<Vec<u8>>,
    ) -> Result<Answer, Refusal> {
        let body = Some(Body::Json(json));
        wire::success(self.http.send(method, path, bearer(lease)?, body, READ_LIMIT).await?)
    }

    async fn access(
        &self,
        lease: &Lease,
        name: &RemoteName,
        version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        match self.value(lease, name, version).await {
            Ok(secret) => Ok(secret),
            Err(Refusal::Precondition) => {
                Err(self.why_closed(lease, name, &self.version_path(name, version)?).await)
            }
            Err(refusal) => Err(refusal.into()),
        }
    }

    async fn value(&self, lease: &Lease, name: &RemoteName, version: &str) -> Result<RemoteSecret, Refusal> {
        let path = format!("{}:access", self.version_path(name, version)?);
        Ok(wire::value(&self.get(lease, &path, READ_LIMIT).await?, name)?)
    }

    /// Why the version at `path` does not give its value. The refusal says so only in words, which may change.
    ///
    /// It takes a call of a quota that is a hundredth of that of values: a thousand disabled secrets, read as fast as
    /// values may be, would use it up many times over.
    async fn why_closed(&self, lease: &Lease, name: &RemoteName, path: &str) -> BackendError {
        if let Err(unpaid) = extra::ask(Quota::Metadata) {
            return unpaid;
        }
        let version = match self.get(lease, path, READ_LIMIT).await {
            Ok(answer) => wire::version(&answer, name),
            // The accessor's role alone does not show states. Of the possible ones this is the one that nothing is
            // deleted for.
            Err(Refusal::Denied) => return BackendError::NotActive(State::Disabled),
            Err(refusal) => return refusal.into(),
        };
        match version {
            Ok(Version { state: State::Active, .. }) => BackendError::InvalidAnswer(
                "it keeps back an enabled version; see whether its KMS key is enabled",
            ),
            Ok(Version { state, .. }) => BackendError::NotActive(state),
            Err(error) => error,
        }
    }

    /// The next part of a listing that is not empty, or the last one.
    async fn part<T>(
        &self,
        lease: &Lease,
        path: &str,
        after: Option<&PageToken>,
        read: impl Fn(Answer) -> Result<Part<T>, BackendError>,
    ) -> Result<Part<T>, Refusal> {
        let mut after = after.cloned();
        for page in 0..MOST_EMPTY_PAGES {
            if page > 0 {
                extra::note(Quota::Lists);
            }
            let mut path = format!("{path}?pageSize={ITEMS_PER_PAGE}");
            if let Some(PageToken(token)) = &after {
                path.push_str(&format!("&pageToken={}", encode(token)));
            }
            let part = read(self.get(lease, &path, LIST_LIMIT).await?)?;
            if part.next.is_some() && part.next == after {
                return Err(BackendError::InvalidAnswer("a page of a listing that leads to itself").into());
            }
            if !part.items.is_empty() || part.next.is_none() {
                return Ok(part);
            }
            after = part.next;
        }
        Err(BackendError::InvalidAnswer("a listing of empty pages").into())
    }

    /// A part of the project's secrets, and where the next one begins.
    async fn secrets(
        &self,
        lease: &Lease,
        after: Option<&PageToken>,
        count: impl Fn() + Send + Sync,
    ) -> Result<(Vec<(RemoteName, Secret)>, Option<PageToken>), BackendError> {
        let read = |answer: Answer| {
            count();
            let Part { items, next } = wire::secrets(&answer)?;
            // An item that is expired is still one: a page that has only such ones is not empty.
            Ok(Part { items: items.into_iter().map(|secret| (secret, answer.date)).collect(), next })
        };
        let part = self.part(lease, &format!("{}/secrets", self.parent), after, read).await;
        let Part { items, next } = part.map_err(|refusal| match BackendError::from(refusal) {
            // Not the same as a project without secrets.
            BackendError::NotFound => BackendError::InvalidConfig("no such project or location"),
            error => error,
        })?;
        let there = items.into_iter().filter(|(secret, now)| !secret.is_expired(*now));
        let named: Result<_, BackendError> = there.map(|(secret, _)| Ok((secret.id()?, secret))).collect();
        Ok((named?, next))
    }
}

impl SecretBackend for GcpBackend {
    async fn read(&self, lease: &Lease, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        self.access(lease, name, LATEST).await
    }

    async fn history(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        let path = format!("{}/versions", self.secret_path(name)?);
        let mut versions: Vec<Version> = Vec::new();
        let mut after = None;
        loop {
            let read = |answer| wire::versions(&answer, name);
            let Part { items, next } = self.part(lease, &path, after.as_ref(), read).await?;
            versions.extend(items);
            after = next;
            if after.is_none() || versions.len() >= MOST_VERSIONS {
                break;
            }
            extra::note(Quota::Metadata);
        }
        // Google gives the newest first; not everything that speaks its protocol does.
        versions.sort_unstable_by_key(|version| version.number);
        Ok(versions.into_iter().map(RemoteVersion::from).collect())
    }

    async fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        // Aliases are no versions: what they stand for can change.
        number_of(remote_version).ok_or(BackendError::NotFound)?;
        let secret = self.access(lease, name, remote_version).await?;
        if secret.remote_version != remote_version {
            return Err(BackendError::InvalidAnswer("another version than was asked for"));
        }
        Ok(secret)
    }

    async fn list(
        &self,
        lease: &Lease,
        _folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        let (secrets, next) = self.secrets(lease, after, || {}).await?;
        let entry = |(name, _)| RemoteEntry { name, kind: EntryKind::Secret };
        Ok(Page { entries: secrets.into_iter().map(entry).collect(), next })
    }

    async fn survey(&self, lease: &Lease, step: &Step, calls: &Calls) -> Result<Found, BackendError> {
        let (root, after) = match step {
            Step::Tree(root) => (root, None),
            Step::More { root, after } => (root, Some(after)),
            Step::Folder { .. } | Step::Secret(_) => {
                return Err(BackendError::InvalidConfig("a listing of another kind of store"));
            }
        };
        let (secrets, next) = self.secrets(lease, after, || calls.count("list")).await?;
        let surveyed = |(name, secret): (RemoteName, Secret)| Surveyed {
            name,
            seen: None,
            metadata: Some(secret.fields.merged()),
        };
        let secrets = secrets.into_iter().map(surveyed).collect();
        let next = next.map(|after| Step::More { root: root.clone(), after });
        Ok(Found { page: SurveyPage { secrets, forbidden: Vec::new() }, next: next.into_iter().collect() })
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
        self.disable(lease, name, expected).await
    }

    async fn may_read(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        let path = self.version_path(name, NO_SUCH_VERSION)?;
        match self.get(lease, &format!("{path}:access"), READ_LIMIT).await {
            Err(Refusal::Precondition | Refusal::Error(BackendError::NotFound)) => Ok(()),
            Ok(_) => Err(BackendError::InvalidAnswer("a version that nobody can have made")),
            Err(refusal) => Err(refusal.into()),
        }
    }

    async fn probe(&self, lease: &Lease) -> Result<(), BackendError> {
        match self.get(lease, &format!("{}/secrets?pageSize=1", self.parent), LIST_LIMIT).await {
            // Google says so only to somebody whom it knows; an accessor need not list.
            Ok(answer) => wire::secrets(&answer).map(drop),
            Err(Refusal::Denied) => Ok(()),
            Err(Refusal::Error(BackendError::NotFound)) => {
                Err(BackendError::InvalidConfig("no such project or location"))
            }
            Err(refusal) => Err(refusal.into()),
        }
    }
}

fn bearer(lease: &Lease) -> Result<HeaderMap, BackendError> {
    let Material::Bearer(token) = &lease.material else { return Err(BackendError::FOREIGN_LEASE) };
    let text = Zeroizing::new(format!("Bearer {}", token.expose_secret()));
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| BackendError::InvalidConfig("the token holds characters that no token has"))?;
    value.set_sensitive(true);
    Ok(HeaderMap::from_iter([(AUTHORIZATION, value)]))
}

#[cfg(test)]
mod tests;
