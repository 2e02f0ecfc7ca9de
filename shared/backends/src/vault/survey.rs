//! Surveys of KV mounts.
//!
//! HashiCorp Vault has nothing but listings of names; OpenBao also has listings that tell versions and, where a policy
//! allows `scan`, gives a whole tree at once. Nothing says beforehand what server and policy allow, so the cheapest way
//! is tried first, and the way that worked is remembered for a while. Only what the dearest way says is final: a
//! refusal or an empty answer to one of the others may be a matter of that way.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use reqwest::StatusCode;
use scaivault_domain::backend::KvVersion;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::Metadata;
use scaivault_domain::time::Timestamp;
use serde::Deserialize;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{Envelope, KEYS_PER_SURVEY_PAGE, Life, Question, VaultBackend};
use crate::error::{BackendError, Class};
use crate::http::{Answer, encode_path};
use crate::mount::Folder;
use crate::survey::{Calls, Found, Seen, Step, SurveyPage, Surveyed, Way, counted};
use crate::{EntryKind, Lease, PageToken, RemoteEntry};

/// A tree that takes longer is listed folder by folder.
const SCAN_PATIENCE: Duration = Duration::from_secs(20);

/// Names beyond these can be no path's. They are told, so that they can be listed as skipped, but not asked about.
const LONGEST_NAME: usize = 4096;
const MOST_SEGMENTS: usize = 64;

impl VaultBackend {
    /// Here alone it is a failure if the folder may not be looked at: nothing would be left of the survey.
    pub(super) async fn survey_tree(
        &self,
        lease: &Lease,
        root: Option<&RemoteName>,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        let root = self.root(root)?;
        let way = match self.mount(lease, &root).await?.version {
            KvVersion::V1 => Way::Names,
            KvVersion::V2 => Way::Scan,
        };
        self.look(lease, &root, None, way, calls).await
    }

    pub(super) async fn survey_folder(
        &self,
        lease: &Lease,
        folder: &RemoteName,
        after: Option<&PageToken>,
        way: Way,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        match self.look(lease, folder, after, way, calls).await {
            Err(BackendError::Forbidden) => Ok(forbidden(folder, EntryKind::Folder)),
            outcome => outcome,
        }
    }

    pub(super) async fn survey_secret(
        &self,
        lease: &Lease,
        name: &RemoteName,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        calls.count("metadata");
        let answer = self.ask(lease, name, Question::Versions).await;
        let secret = match answer.and_then(|(_, answer)| Ok((data::<KeyInfo>(&answer)?, answer.date))) {
            Ok((info, date)) => info.surveyed(name.clone(), date),
            // What is closed is its metadata: whether its value is, a read tells.
            Err(BackendError::Forbidden) => Some(Surveyed { name: name.clone(), seen: None, metadata: None }),
            // Gone since it was listed.
            Err(BackendError::NotFound) => None,
            Err(BackendError::TooLarge) => Some(Surveyed { name: name.clone(), seen: None, metadata: None }),
            Err(error) => return Err(error),
        };
        let secrets = secret.into_iter().collect();
        Ok(Found { page: SurveyPage { secrets, ..SurveyPage::default() }, next: Vec::new() })
    }

    /// The folder itself, or the configured mount if it lies below.
    fn root(&self, root: Option<&RemoteName>) -> Result<RemoteName, BackendError> {
        let mut root = root.cloned();
        while let Some(mount) = &self.configured
            && let Folder::Above(next) = mount.folder(root.as_ref())?
        {
            root = Some(match root {
                Some(root) => root.child(&next),
                None => RemoteName::with_literal(next, 0),
            });
        }
        root.ok_or(BackendError::MountNotLiteral)
    }

    /// Looks in this way or, where it is declined, in the next one.
    async fn look(
        &self,
        lease: &Lease,
        folder: &RemoteName,
        after: Option<&PageToken>,
        way: Way,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        let mut way = self.ways.get(folder).await.unwrap_or(way);
        loop {
            let look = self.look_once(lease, folder, after, way, calls);
            let (outcome, next) = match way {
                Way::Scan => {
                    let outcome = timeout(SCAN_PATIENCE, look).await.unwrap_or(Err(BackendError::TooLarge));
                    (outcome, Way::Versions)
                }
                Way::Versions => (look.await, Way::Names),
                Way::Names => return look.await,
            };
            let error = match outcome {
                Err(error) if is_declined(&error) => error,
                outcome => return outcome,
            };
            // That nothing is there may change soon, and says nothing about the way.
            if error != BackendError::NotFound {
                self.ways.insert(folder.clone(), next).await;
            }
            way = next;
        }
    }

    async fn look_once(
        &self,
        lease: &Lease,
        folder: &RemoteName,
        after: Option<&PageToken>,
        way: Way,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        calls.count(if way == Way::Scan { "scan" } else { "list" });
        let (version, answer) = self.ask(lease, folder, Question::Survey { way, after }).await?;
        let (folder, after) = (folder.clone(), after.cloned());
        // There may be tens of thousands of secrets in it.
        let read = move || Listing::read(&answer, way)?.found(version, &folder, after, way, answer.date);
        spawn_blocking(read).await.unwrap_or(Err(BackendError::Unreachable("its answer was not read")))
    }
}

/// Whether another way may get an answer where this one got none.
fn is_declined(error: &BackendError) -> bool {
    matches!(error.class(), Class::Forbidden | Class::NotFound | Class::Invalid)
        && !matches!(error, BackendError::EndpointRefused(_))
}

fn forbidden(name: &RemoteName, kind: EntryKind) -> Found {
    let forbidden = vec![RemoteEntry { name: name.clone(), kind }];
    Found { page: SurveyPage { forbidden, ..SurveyPage::default() }, next: Vec::new() }
}

fn data<T: for<'a> Deserialize<'a>>(answer: &Answer) -> Result<T, BackendError> {
    let envelope = Envelope::of(answer)?;
    if answer.status == StatusCode::OK { envelope.data() } else { Err(envelope.absence()) }
}

/// Whether Vault can be asked about what a listing of it named.
fn is_askable(name: &RemoteName) -> bool {
    name.as_str().len() <= LONGEST_NAME
        && name.segments().count() <= MOST_SEGMENTS
        && encode_path(name.segments()).is_some()
}

/// What stands in every key's metadata, and in a detailed listing for each of its keys; nothing at all for a folder.
#[derive(Deserialize)]
struct KeyInfo {
    current_version: Option<u64>,
    #[serde(default)]
    versions: BTreeMap<u64, Life>,
    #[serde(default)]
    custom_metadata: Option<Metadata>,
}

impl KeyInfo {
    fn surveyed(self, name: RemoteName, now: Option<Timestamp>) -> Option<Surveyed> {
        let KeyInfo { current_version, versions, custom_metadata } = self;
        // There is metadata, but no version was ever written: to a read there is nothing.
        if current_version == Some(0) {
            return None;
        }
        let seen = current_version.and_then(|number| {
            let life = versions.get(&number)?;
            let created = Timestamp::parse(&life.created_time);
            let metadata = custom_metadata.unwrap_or_default();
            Some(Seen::new(
                number.to_string(),
                life.state(now),
                &counted(&number.to_string(), created),
                &metadata,
            ))
        });
        Some(Surveyed { name, seen, metadata: None })
    }
}

#[derive(Default, Deserialize)]
struct Listing {
    #[serde(default)]
    keys: Vec<String>,
    /// By key. What it says of a folder is meant for the secret of the same name.
    #[serde(default)]
    key_info: HashMap<String, Option<KeyInfo>>,
}

impl Listing {
    fn read(answer: &Answer, way: Way) -> Result<Self, BackendError> {
        match data::<Listing>(answer) {
            Err(BackendError::NotFound) if way == Way::Names => Ok(Listing::default()),
            Ok(listing) if listing.keys.is_empty() && way != Way::Names => Err(BackendError::NotFound),
            listing => listing,
        }
    }

    fn found(
        self,
        version: KvVersion,
        folder: &RemoteName,
        after: Option<PageToken>,
        way: Way,
        now: Option<Timestamp>,
    ) -> Result<Found, BackendError> {
        let Listing { mut keys, mut key_info } = self;
        keys.sort_unstable();
        if keys.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(BackendError::InvalidAnswer("a listing that names something twice"));
        }
        let is_full = version == KvVersion::V2 && way != Way::Scan && keys.len() == KEYS_PER_SURVEY_PAGE;
        if let Some(PageToken(after)) = after {
            // Vault, unlike OpenBao, knows no pages: it gave everything the first time and gives it again.
            let is_repeated = keys.binary_search(&after).is_ok();
            keys.retain(|key| *key > after);
            if is_full && keys.is_empty() && !is_repeated {
                return Err(BackendError::InvalidAnswer("a listing that goes back"));
            }
        }
        let mut found = Found::default();
        // The last step is taken first: what a page led to comes before the next page, so that few steps wait.
        if let Some(last) = keys.last().filter(|_| is_full) {
            let after = Some(PageToken(last.clone()));
            found.next.push(Step::Folder { name: folder.clone(), after, way });
        }
        for key in keys {
            let name = folder.child(&key);
            if let Some(child) = key.strip_suffix('/') {
                let child = folder.child(child);
                match way {
                    // Its secrets are named themselves.
                    Way::Scan => {}
                    _ if is_askable(&child) => {
                        found.next.push(Step::Folder { name: child, after: None, way })
                    }
                    _ => found.page.secrets.push(Surveyed { name, seen: None, metadata: None }),
                }
                continue;
            }
            match key_info.remove(&key).flatten() {
                Some(info) => found.page.secrets.extend(info.surveyed(name, now)),
                None if way == Way::Names && version == KvVersion::V2 && is_askable(&name) => {
                    found.next.push(Step::Secret(name));
                }
                None => found.page.secrets.push(Surveyed { name, seen: None, metadata: None }),
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
