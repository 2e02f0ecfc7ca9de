//! Azure Key Vault, its secrets alone.
//!
//! Plain REST and not Microsoft's crates, see `docs/decisions/0024-rest-for-azure-and-gcp.md`. Source of what is asked
//! and answered: the "Azure Key Vault REST API reference".
//!
//! Names do not differ by case. A path stands for the lower-case form, and only that is asked for; an answer may spell it
//! otherwise. Listings spell it as whoever made it did.

mod pages;
mod wire;
mod write;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use scaivault_domain::backend::{AzureTarget, Naming};
use scaivault_domain::mapping::RemoteName;
use secrecy::ExposeSecret as _;

use crate::budget::{Quota, extra};
use crate::egress::Egress;
use crate::error::BackendError;
use crate::http::{Answer, Body, Http, encode_path};
use crate::survey::{Calls, Found, Step, SurveyPage};
use crate::{
    EntryKind, Lease, Material, Page, PageToken, RemoteEntry, RemoteSecret, RemoteVersion, RemoteWrite,
    SecretBackend, Written,
};

use self::pages::Cursor;
use self::wire::{Item, Items, Refusal, by_age, failure, is_version};

/// Newer versions (7.5, 7.6, 2025-07-01, 2026-04-01) say the same of secrets, apart from certificates behind them;
/// this one is known in every cloud.
const API_VERSION: &str = "api-version=7.4";

/// A value has 25 KB, six times that if every byte of it is escaped; then there are the tags.
const READ_LIMIT: usize = 512 * 1024;
/// 25 items, each with 15 tags of 512 + 512 characters, escaped.
const LIST_LIMIT: usize = 4 * 1024 * 1024;
/// The most items that a part of a listing can have.
const ITEMS_PER_PAGE: usize = 25;
/// 10,000 versions of a secret. Key Vault sets no limit, but makes no backup of more than 500.
const MOST_VERSION_PAGES: usize = 400;
/// Named as no version is: versions are random.
const NO_VERSION: &str = "00000000000000000000000000000000";

/// One vault of Azure Key Vault.
#[derive(Debug)]
pub struct AzureBackend {
    http: Http,
    /// Where links to further pages must lead.
    vault: Url,
}

impl AzureBackend {
    /// Prepares the connections; calls nobody yet.
    ///
    /// # Errors
    /// `InvalidConfig`, if the CA certificate is unusable.
    pub fn connect(target: &AzureTarget, egress: &Egress) -> Result<Self, BackendError> {
        let http = Http::new(&target.vault, &target.tls, HeaderMap::new(), egress)?;
        Ok(AzureBackend { http, vault: target.vault.url().clone() })
    }

    /// One request, whatever its answer is.
    async fn send(
        &self,
        lease: &Lease,
        method: Method,
        path: &str,
        body: Option<Body<'_>>,
        limit: usize,
    ) -> Result<Answer, BackendError> {
        self.http.send(method, path, bearer(lease)?, body, limit).await
    }

    /// One request; the answer is 200.
    async fn ask(
        &self,
        lease: &Lease,
        method: Method,
        path: &str,
        body: Option<Body<'_>>,
    ) -> Result<Answer, BackendError> {
        let answer = self.send(lease, method, path, body, READ_LIMIT).await?;
        if answer.status == StatusCode::OK { Ok(answer) } else { Err(failure(&answer)) }
    }

    /// A part of the listing at `path`, and where it goes on.
    async fn page(
        &self,
        lease: &Lease,
        path: &str,
        after: Option<&Cursor>,
    ) -> Result<(Listed, Option<Cursor>), BackendError> {
        let path = match after {
            None => format!("{path}?maxresults={ITEMS_PER_PAGE}&{API_VERSION}"),
            Some(after) => format!("{path}?{}", after.query()),
        };
        let answer = self.send(lease, Method::GET, &path, None, LIST_LIMIT).await?;
        if answer.status != StatusCode::OK {
            return Err(failure(&answer));
        }
        let (items, link) = Items::of(&answer)?.into_parts()?;
        let next = link.map(|link| Cursor::after(after, items.len(), &link, &self.vault)).transpose()?;
        Ok((Listed { items, answer }, next))
    }

    /// The current version, whatever its state; only one that is switched off cannot be had.
    async fn current(&self, lease: &Lease, name: &RemoteName) -> Result<(Item, Answer), BackendError> {
        let path = format!("{}?{API_VERSION}", path_of(name, None)?);
        let answer = self.ask(lease, Method::GET, &path, None).await?;
        Ok((Item::of(&answer)?, answer))
    }

    /// All versions, oldest first; none if there is no such secret.
    async fn versions(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        let path = path_of(name, Some("versions"))?;
        let mut versions = Vec::new();
        let mut after = None;
        for page in 0..MOST_VERSION_PAGES {
            if page > 0 {
                extra::note(Quota::Metadata);
            }
            let (Listed { items, answer }, next) = match self.page(lease, &path, after.as_ref()).await {
                Err(BackendError::NotFound) if after.is_none() => return Ok(Vec::new()),
                page => page?,
            };
            for item in items {
                versions.push(item.version(name.as_str(), answer.date)?);
            }
            after = next;
            if after.is_none() {
                versions.sort_by(by_age);
                return Ok(versions);
            }
        }
        Err(BackendError::TooLarge)
    }

    async fn survey_page(
        &self,
        lease: &Lease,
        root: Option<&RemoteName>,
        after: Option<&PageToken>,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        let after = after.map(Cursor::parse).transpose()?;
        calls.count("list");
        let (Listed { items, answer }, next) = self.page(lease, "/secrets", after.as_ref()).await?;
        let secrets = items.into_iter().map(|item| item.surveyed(answer.date));
        let secrets = secrets.collect::<Result<Vec<_>, _>>()?;
        let next = next.map(|next| Step::More { root: root.cloned(), after: next.token() });
        Ok(Found { page: SurveyPage { secrets, ..SurveyPage::default() }, next: next.into_iter().collect() })
    }
}

/// A part of a listing.
struct Listed {
    items: Vec<Item>,
    /// What it came with.
    answer: Answer,
}

impl SecretBackend for AzureBackend {
    async fn read(&self, lease: &Lease, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        let (item, answer) = self.current(lease, name).await?;
        item.secret(name.as_str(), answer.date)
    }

    async fn history(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        let versions = self.versions(lease, name).await?;
        if versions.is_empty() { Err(BackendError::NotFound) } else { Ok(versions) }
    }

    async fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        if !is_version(remote_version) {
            return Err(BackendError::NotFound);
        }
        let path = format!("{}?{API_VERSION}", path_of(name, Some(remote_version))?);
        let answer = self.ask(lease, Method::GET, &path, None).await?;
        let secret = Item::of(&answer)?.secret(name.as_str(), answer.date)?;
        if secret.remote_version != remote_version {
            return Err(BackendError::InvalidAnswer("another version than was asked for"));
        }
        Ok(secret)
    }

    /// The whole vault, whatever the folder: names have no slashes.
    async fn list(
        &self,
        lease: &Lease,
        _folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        let after = after.map(Cursor::parse).transpose()?;
        let (Listed { items, .. }, next) = self.page(lease, "/secrets", after.as_ref()).await?;
        let entry = |item: &Item| Ok(RemoteEntry { name: item.listed()?, kind: EntryKind::Secret });
        let entries = items.iter().map(entry).collect::<Result<Vec<_>, BackendError>>()?;
        Ok(Page { entries, next: next.map(|next| next.token()) })
    }

    async fn survey(&self, lease: &Lease, step: &Step, calls: &Calls) -> Result<Found, BackendError> {
        match step {
            Step::Tree(root) => self.survey_page(lease, root.as_ref(), None, calls).await,
            Step::More { root, after } => self.survey_page(lease, root.as_ref(), Some(after), calls).await,
            Step::Folder { .. } | Step::Secret(_) => {
                Err(BackendError::InvalidConfig("a listing of another kind of store"))
            }
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
        let path = format!("{}?{API_VERSION}", path_of(name, Some(NO_VERSION))?);
        match self.ask(lease, Method::GET, &path, None).await {
            Err(BackendError::NotFound | BackendError::NotActive(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(BackendError::InvalidAnswer("a version that nobody can have made")),
        }
    }

    async fn probe(&self, lease: &Lease) -> Result<(), BackendError> {
        let path = format!("/secrets?maxresults=1&{API_VERSION}");
        let answer = self.send(lease, Method::GET, &path, None, LIST_LIMIT).await?;
        match answer.status {
            StatusCode::OK => Items::of(&answer)?.into_parts().map(drop),
            // Whom it refuses this for want of a role, it knows: who only reads need not list.
            StatusCode::FORBIDDEN if Refusal::of(&answer) == Refusal::Rights => Ok(()),
            _ => Err(failure(&answer)),
        }
    }
}

/// The path of a secret, or of what is `below` it. A name stands for one path here, so it is asked for in one spelling.
fn path_of(name: &RemoteName, below: Option<&str>) -> Result<String, BackendError> {
    if !Naming::Azure.has(name) {
        return Err(BackendError::Unrepresentable);
    }
    let segments = ["secrets", name.as_str()].into_iter().chain(below);
    encode_path(segments).ok_or(BackendError::Unrepresentable)
}

fn bearer(lease: &Lease) -> Result<HeaderMap, BackendError> {
    let Material::Bearer(token) = &lease.material else { return Err(BackendError::FOREIGN_LEASE) };
    let value = format!("Bearer {}", token.expose_secret());
    let unusable =
        BackendError::InvalidConfig("the token holds characters that no token has, such as a line break");
    if value.chars().any(char::is_control) {
        return Err(unusable);
    }
    let mut value = HeaderValue::from_str(&value).map_err(|_| unusable)?;
    value.set_sensitive(true);
    Ok(HeaderMap::from_iter([(AUTHORIZATION, value)]))
}

#[cfg(test)]
mod tests;
