//! AWS Secrets Manager, by the official SDK over our own HTTP client.
//!
//! Everything that the SDK would take from the process is given to it: no environment, no profiles, no retries and no
//! timeouts (those are the guard's), no cache of identities (a lease is one), no correction of its clock by what a
//! server says. Each lease has a client of its own; they share connections.

mod answers;
mod fault;
mod survey;
mod transport;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_credential_types::Credentials;
use aws_sdk_secretsmanager::config::retry::RetryConfig;
use aws_sdk_secretsmanager::config::timeout::TimeoutConfig;
use aws_sdk_secretsmanager::config::{
    BehaviorVersion, IdentityCache, Region, SharedAsyncSleep, StalledStreamProtectionConfig,
};
use aws_sdk_secretsmanager::{Client, Config};
use aws_smithy_async::rt::sleep::TokioSleep;
use aws_smithy_async::time::SystemTimeSource;
use scaivault_domain::backend::{AwsTarget, Naming};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::State;
use secrecy::ExposeSecret;
use tokio::time::Instant;
use zeroize::Zeroizing;

use self::answers::{CURRENT, PREVIOUS, Value, check_asked, history};
use self::fault::{NO_JSON_OF_AWS, meaning};
use self::write::is_deleted;
use crate::budget::{Quota, extra};
use crate::egress::Egress;
use crate::error::BackendError;
use crate::survey::{Calls, Found, Step};
use crate::{
    Lease, Material, Page, PageToken, RemoteSecret, RemoteVersion, RemoteWrite, SecretBackend, Written,
};

pub use self::fault::aws_failure;
pub use self::transport::aws_http_client;

/// The most that BatchGetSecretValue takes.
const MOST_AT_ONCE: usize = 20;
const NOT_AMONG_THEM: BackendError =
    BackendError::InvalidAnswer("one of several secrets is not in their answer");
/// How long a call that a policy forbids is not tried again.
const REFUSAL_IS_TRUSTED_FOR: Duration = Duration::from_secs(600);
/// Most pages of the versions of one secret, of which only those with stages are asked for: there are 20 stages.
const MOST_VERSION_PAGES: usize = 10;
/// The lengths of a version's id, by GetSecretValue in the API reference.
const VERSION_ID: std::ops::RangeInclusive<usize> = 32..=64;

/// The secrets of one account in one region.
pub struct AwsBackend {
    config: Box<Config>,
    newest: Mutex<Option<Session>>,
    /// Makes the ids of versions that are written, so that nobody can tell from an id what was written.
    id_key: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for AwsBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsBackend").field("region", &self.config.region()).finish_non_exhaustive()
    }
}

/// What is kept for a lease.
struct Session {
    lease: String,
    client: Client,
    refused: HashMap<Shortcut, Instant>,
}

/// A call that saves others, and that a policy may well not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Shortcut {
    /// BatchGetSecretValue.
    Batch,
    /// UpdateSecretVersionStage.
    Staging,
}

impl AwsBackend {
    /// Prepares the connections; calls nobody yet.
    ///
    /// # Errors
    /// `InvalidConfig`, if the CA certificate is unusable.
    pub fn connect(target: &AwsTarget, egress: &Egress) -> Result<Self, BackendError> {
        let endpoint = target.endpoint();
        let config = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(target.region.as_str().to_owned()))
            .endpoint_url(endpoint.to_string())
            .http_client(aws_http_client(&endpoint, &target.tls, egress)?)
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .identity_cache(IdentityCache::no_cache())
            // A server that could move it would get requests signed for later.
            .disable_clock_skew_correction(true)
            .sleep_impl(SharedAsyncSleep::new(TokioSleep::new()))
            .time_source(SystemTimeSource::new())
            .build();
        Ok(AwsBackend {
            config: Box::new(config),
            newest: Mutex::default(),
            id_key: Zeroizing::new(rand::random()),
        })
    }

    fn newest(&self) -> MutexGuard<'_, Option<Session>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client that signs with the lease's keys.
    fn client(&self, lease: &Lease) -> Result<Client, BackendError> {
        let mut newest = self.newest();
        if let Some(session) = &*newest
            && session.lease == lease.id
        {
            return Ok(session.client.clone());
        }
        let config = self.config.to_builder().credentials_provider(credentials(lease)?).build();
        let client = Client::from_conf(config);
        let (lease, refused) = (lease.id.clone(), HashMap::new());
        *newest = Some(Session { lease, client: client.clone(), refused });
        Ok(client)
    }

    /// Whether the policies of the newest lease were found not to allow `call`.
    fn is_refused(&self, call: Shortcut) -> bool {
        let newest = self.newest();
        let at = newest.as_ref().and_then(|session| session.refused.get(&call));
        at.is_some_and(|at| at.elapsed() < REFUSAL_IS_TRUSTED_FOR)
    }

    fn note_refusal(&self, lease: &Lease, call: Shortcut) {
        if let Some(session) = &mut *self.newest()
            && session.lease == lease.id
        {
            session.refused.insert(call, Instant::now());
        }
    }

    async fn read_batch(
        &self,
        lease: &Lease,
        names: &[RemoteName],
    ) -> Result<Vec<Result<RemoteSecret, BackendError>>, BackendError> {
        let ids = names.iter().filter(|name| id_of(name).is_ok()).map(|name| name.as_str().to_owned());
        let call = self.client(lease)?.batch_get_secret_value().set_secret_id_list(Some(ids.collect()));
        let answer = call.send().await.map_err(|error| aws_failure(&error))?;
        let mut found: HashMap<String, Value> = HashMap::new();
        for entry in answer.secret_values.unwrap_or_default() {
            // Asked for by its ARN or by its name.
            let (arn, name) = (entry.arn().map(str::to_owned), entry.name().map(str::to_owned));
            let asked = |id: &Option<String>| names.iter().any(|name| id.as_deref() == Some(name.as_str()));
            if let Some(id) = Some(arn).filter(asked).or_else(|| Some(name).filter(asked)).flatten() {
                found.insert(id, entry.into());
            }
        }
        let refused: HashMap<&str, BackendError> = answer
            .errors
            .iter()
            .flatten()
            .filter_map(|error| {
                let (code, message) = (error.error_code().unwrap_or(""), error.message().unwrap_or(""));
                Some((error.secret_id()?, meaning(400, code, message, None)))
            })
            .collect();
        let mut secrets = Vec::with_capacity(names.len());
        for name in names {
            secrets.push(match (found.remove(name.as_str()), refused.get(name.as_str())) {
                (Some(value), _) if value.stages.iter().any(|stage| stage == CURRENT) => value.secret(name),
                (None, Some(error)) => Err(error.clone()),
                _ if id_of(name).is_err() => Err(BackendError::Unrepresentable),
                // Named twice, too much for one answer, or not the current version: a call of its own tells. That is
                // not made here, for there can be as many as names, and there is one deadline and one token for all.
                _ => Err(NOT_AMONG_THEM),
            });
        }
        Ok(secrets)
    }
}

/// The keys of a lease.
fn credentials(lease: &Lease) -> Result<Credentials, BackendError> {
    let Material::AwsKeys { access_key_id, secret_access_key, session_token } = &lease.material else {
        return Err(BackendError::FOREIGN_LEASE);
    };
    let session_token = session_token.as_ref().map(ExposeSecret::expose_secret);
    let parts = [access_key_id.as_str(), secret_access_key.expose_secret(), session_token.unwrap_or("-")];
    if parts.iter().any(|part| part.is_empty() || !part.bytes().all(|b| b.is_ascii_graphic())) {
        return Err(BackendError::InvalidConfig(
            "the keys are empty, or hold characters that no key has, such as a line break",
        ));
    }
    let session_token = session_token.map(str::to_owned);
    Ok(Credentials::new(parts[0], parts[1], session_token, None, "scaivault lease"))
}

/// A name as an id in a request.
fn id_of(name: &RemoteName) -> Result<&str, BackendError> {
    if Naming::Aws.has(name) { Ok(name.as_str()) } else { Err(BackendError::Unrepresentable) }
}

/// Where a list goes on. Emulators write the end of one as an empty token.
fn next_token(token: Option<String>) -> Option<String> {
    token.filter(|token| !token.is_empty())
}

/// A version's id that no version has.
fn unused_version() -> String {
    uuid(&rand::random())
}

/// As AWS recommends ids to be.
fn uuid(bytes: &[u8; 16]) -> String {
    let mut id: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    for at in [20, 16, 12, 8] {
        id.insert(at, '-');
    }
    id
}

impl SecretBackend for AwsBackend {
    async fn read(&self, lease: &Lease, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        // AWS reads the same without a stage; policies may well have a condition on it.
        let call = self.client(lease)?.get_secret_value().secret_id(id_of(name)?).version_stage(CURRENT);
        let answer = call.send().await.map_err(|error| aws_failure(&error))?;
        Value::from(answer).secret(name)
    }

    async fn history(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        let client = self.client(lease)?;
        let mut after: Option<String> = None;
        let mut versions = Vec::new();
        for page in 0..MOST_VERSION_PAGES {
            if page > 0 {
                extra::note(Quota::Metadata);
            }
            let call = client.list_secret_version_ids().secret_id(id_of(name)?).max_results(100);
            let call = call.include_deprecated(false).set_next_token(after.clone());
            let answer = call.send().await.map_err(|error| aws_failure(&error))?;
            check_asked(name, answer.arn(), answer.name())?;
            versions.extend(answer.versions.unwrap_or_default());
            match next_token(answer.next_token) {
                None => {
                    let mut versions = history(&versions)?;
                    // The versions of a deleted secret are listed as if nothing had happened to it.
                    extra::note(Quota::Values);
                    if is_deleted(&client, name).await? {
                        versions.iter_mut().for_each(|version| version.state = State::Deleted);
                    }
                    return Ok(versions);
                }
                repeated if repeated == after => break,
                next => after = next,
            }
        }
        Err(BackendError::InvalidAnswer("versions without an end"))
    }

    async fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        if !VERSION_ID.contains(&remote_version.len())
            || !remote_version.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(BackendError::NotFound);
        }
        let call = self.client(lease)?.get_secret_value().secret_id(id_of(name)?).version_id(remote_version);
        let value = Value::from(call.send().await.map_err(|error| aws_failure(&error))?);
        if value.version.as_deref() != Some(remote_version) {
            return Err(BackendError::InvalidAnswer("another version than was asked for"));
        }
        if !value.stages.iter().any(|stage| matches!(&**stage, CURRENT | PREVIOUS)) {
            // Pending, or out of use: nothing that the secret's readers were ever sure to get.
            return Err(BackendError::NotFound);
        }
        value.secret(name)
    }

    async fn list(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        self.list_page(lease, folder, after).await
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

    fn most_at_once(&self) -> usize {
        if self.is_refused(Shortcut::Batch) { 1 } else { MOST_AT_ONCE }
    }

    async fn read_many(
        &self,
        lease: &Lease,
        names: &[RemoteName],
    ) -> Result<Vec<Result<RemoteSecret, BackendError>>, BackendError> {
        if names.iter().filter(|name| id_of(name).is_ok()).count() > 1 {
            // Of a new lease nothing is known yet.
            self.client(lease)?;
            if self.is_refused(Shortcut::Batch) {
                return Err(BackendError::Forbidden);
            }
            match self.read_batch(lease, names).await {
                Err(BackendError::Forbidden) => {
                    self.note_refusal(lease, Shortcut::Batch);
                    return Err(BackendError::Forbidden);
                }
                outcome => return outcome,
            }
        }
        // One of them at most is asked for.
        let mut secrets = Vec::with_capacity(names.len());
        for name in names {
            secrets.push(self.read(lease, name).await);
        }
        Ok(secrets)
    }

    async fn write(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        self.write_version(lease, name, write).await
    }

    async fn delete(&self, lease: &Lease, name: &RemoteName, expected: &str) -> Result<(), BackendError> {
        self.delete_secret(lease, name, expected).await
    }

    /// That the key of KMS is open to us it does not tell.
    async fn may_read(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        let call =
            self.client(lease)?.get_secret_value().secret_id(id_of(name)?).version_id(unused_version());
        match call.send().await.map_err(|error| aws_failure(&error)) {
            // Policies come first: to somebody who may not read, AWS does not even say that there is nothing.
            Ok(_) | Err(BackendError::NotFound | BackendError::NotActive(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn may_read_many(&self, lease: &Lease) -> Option<Result<(), BackendError>> {
        let client = match self.client(lease) {
            Ok(client) => client,
            Err(error) => return Some(Err(error)),
        };
        // Of a name that nobody can have given: what is said of the names comes after what is said of the call.
        let call = client.batch_get_secret_value().secret_id_list(format!("scaivault-{}", unused_version()));
        Some(match call.send().await.map_err(|error| aws_failure(&error)) {
            Ok(_) | Err(BackendError::NotFound | BackendError::NotActive(_)) => Ok(()),
            Err(error) => Err(error),
        })
    }

    async fn probe(&self, lease: &Lease) -> Result<(), BackendError> {
        let answer = self.client(lease)?.list_secrets().max_results(1).send().await;
        match answer.map_err(|error| aws_failure(&error)) {
            // Who is told that it may not is known there: reading by name needs no listing.
            Ok(_) | Err(BackendError::Forbidden) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
