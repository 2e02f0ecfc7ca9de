//! Listings and surveys: pages of ListSecrets, which tells the current version and the tags of each secret.

use aws_sdk_secretsmanager::types::{Filter, FilterNameStringType, SecretListEntry};
use scaivault_domain::backend::Naming;
use scaivault_domain::mapping::RemoteName;

use super::answers::{check_asked, is_arn, seen, surveyed};
use super::fault::NO_JSON_OF_AWS;
use super::{AwsBackend, aws_failure, id_of, next_token};
use crate::budget::{Quota, extra};
use crate::error::BackendError;
use crate::survey::{Calls, Found, Step, SurveyPage, Surveyed};
use crate::{EntryKind, Lease, Page, PageToken, RemoteEntry};

/// The most that ListSecrets gives at once.
const SECRETS_PER_PAGE: i32 = 100;
/// Empty pages in a row. With a filter AWS gives some before it finds something.
const MOST_EMPTY_PAGES: usize = 50;

/// A page that has something in it, unless it is the last one.
struct Listed {
    secrets: Vec<(RemoteName, SecretListEntry)>,
    next: Option<PageToken>,
}

impl AwsBackend {
    pub(super) async fn list_page(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        let Listed { secrets, next } = self.listed(lease, folder, after, &Calls::default()).await?;
        let there = secrets.into_iter().filter_map(|(name, entry)| surveyed(name, &entry));
        let entries = there.map(|secret| RemoteEntry { name: secret.name, kind: EntryKind::Secret });
        Ok(Page { entries: entries.collect(), next })
    }

    pub(super) async fn survey_page(
        &self,
        lease: &Lease,
        root: Option<&RemoteName>,
        after: Option<&PageToken>,
        calls: &Calls,
    ) -> Result<Found, BackendError> {
        if let Some(arn) = root.filter(|root| is_arn(root)) {
            calls.count("metadata");
            let secrets = self.described(lease, arn).await?.into_iter().collect();
            return Ok(Found { page: SurveyPage { secrets, ..SurveyPage::default() }, next: Vec::new() });
        }
        let Listed { secrets, next } = self.listed(lease, root, after, calls).await?;
        let secrets = secrets.into_iter().filter_map(|(name, entry)| surveyed(name, &entry)).collect();
        let next = next.map(|after| Step::More { root: root.cloned(), after });
        Ok(Found { page: SurveyPage { secrets, ..SurveyPage::default() }, next: next.into_iter().collect() })
    }

    /// A secret that a mapping names by its ARN. Listings show the secrets of our own account alone.
    async fn described(&self, lease: &Lease, arn: &RemoteName) -> Result<Option<Surveyed>, BackendError> {
        let call = self.client(lease)?.describe_secret().secret_id(id_of(arn)?);
        match call.send().await.map_err(|error| aws_failure(&error)) {
            Ok(secret) if secret.deleted_date().is_some() => Ok(None),
            Ok(secret) => match check_asked(arn, secret.arn(), secret.name()) {
                Ok(()) => {
                    let versions = secret.version_ids_to_stages();
                    Ok(versions.and_then(|versions| seen(arn.clone(), versions, secret.tags())))
                }
                Err(BackendError::NotFound) => Ok(None),
                Err(error) => Err(error),
            },
            Err(BackendError::NotFound) => Ok(None),
            // What is closed is its description: whether its value is, a read tells.
            Err(BackendError::Forbidden) => {
                Ok(Some(Surveyed { name: arn.clone(), seen: None, metadata: None }))
            }
            Err(error) => Err(error),
        }
    }

    async fn listed(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
        calls: &Calls,
    ) -> Result<Listed, BackendError> {
        if folder.is_some_and(|folder| is_arn(folder) || !Naming::Aws.has(folder)) {
            return Ok(Listed { secrets: Vec::new(), next: None });
        }
        let client = self.client(lease)?;
        let prefix = folder.map(|folder| format!("{}/", folder.as_str()));
        let filter = prefix
            .as_ref()
            .map(|prefix| vec![Filter::builder().key(FilterNameStringType::Name).values(prefix).build()]);
        let mut after = after.map(|PageToken(after)| after.clone());
        for page in 0..MOST_EMPTY_PAGES {
            if page > 0 {
                extra::note(Quota::Lists);
            }
            calls.count("list");
            let call = client.list_secrets().max_results(SECRETS_PER_PAGE);
            let call = call.set_filters(filter.clone()).set_next_token(after.clone());
            let answer = call.send().await.map_err(|error| aws_failure(&error))?;
            let next = next_token(answer.next_token);
            if next.is_some() && next == after {
                return Err(BackendError::InvalidAnswer("a listing that goes in a circle"));
            }
            // Without a list it is the answer of something else, and would pass for an empty store.
            let entries = answer.secret_list.ok_or(NO_JSON_OF_AWS)?;
            if !entries.is_empty() || next.is_none() {
                let named = |entry: SecretListEntry| Some((entry.name()?.to_owned(), entry));
                let secrets = entries.into_iter().map(|entry| named(entry).ok_or(NO_JSON_OF_AWS));
                let secrets = secrets.collect::<Result<Vec<_>, _>>()?;
                let below = |(name, entry): (String, _)| Some((below(folder, &name)?, entry));
                let secrets = secrets.into_iter().filter_map(below).collect();
                return Ok(Listed { secrets, next: next.map(PageToken) });
            }
            after = next;
        }
        Err(BackendError::InvalidAnswer("empty pages without an end"))
    }
}

/// The name of a secret below `folder`, split as the folder's is; `None`: it is not there, whatever the filter let
/// through.
fn below(folder: Option<&RemoteName>, name: &str) -> Option<RemoteName> {
    let Some(folder) = folder else { return Some(RemoteName::with_literal(name, 0)) };
    let child = name.strip_prefix(folder.as_str())?.strip_prefix('/')?;
    Some(folder.child(child))
}
