//! Work on a backend that nobody waits for: it goes behind proxied reads, waits out what would only delay it, and
//! counts its calls.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use scaivault_domain::Error;
use scaivault_domain::mapping::RemoteName;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::Instrument as _;

use crate::budget::Quota;
use crate::connection::{Connection, Effort, Leases};
use crate::guard::{Limits, Retry};
use crate::survey::{Calls, Found, Step, SurveyPage};
use crate::{BackendError, Class, Lease, Operation, RemoteSecret, RemoteVersion, SecretBackend as _};

/// Time for the pauses between attempts, whatever the attempts themselves may take.
const PAUSES: Duration = Duration::from_secs(60);
/// A listing may be long, and a store may take its time for it.
const SHORTEST_SURVEY_CALL: Duration = Duration::from_secs(30);
/// Steps of one survey at the same time.
const STEPS_AT_ONCE: usize = 16;
/// How long a read waits for others that are made with it, if none are under way.
const GATHERING: Duration = Duration::from_millis(2);
/// A listing may have empty pages, but not for ever.
const MOST_EMPTY_PAGES: usize = 1000;
/// What one survey may find. A store that has no end is not listed for ever.
const MOST_ENTRIES: usize = 2_000_000;

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{shown}")]
pub struct Failed {
    /// What happened, for those who decide by it.
    pub cause: BackendError,
    /// What happened, as people are told it.
    pub shown: Error,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Error {
        failed.shown
    }
}

/// What one run does with a backend.
pub struct Background<L> {
    connection: Arc<Connection<L>>,
    timeout: Duration,
    calls: Arc<Calls>,
    /// Reads that are made with one call.
    gathering: Arc<Mutex<Gathering>>,
}

/// Reads that wait until there are enough of them for a call. Fewer wait until no such call is under way, for its answers
/// make room for further ones, and then for a moment.
#[derive(Default)]
struct Gathering {
    waiting: Vec<Gathered>,
    under_way: usize,
    /// Whether somebody looks after the moment.
    is_looked_after: bool,
}

impl Gathering {
    /// Those that make a full call, if there are that many.
    fn full(&mut self, most: usize) -> Option<Vec<Gathered>> {
        (self.waiting.len() >= most).then(|| self.begin())
    }

    /// What waits after the moment, unless it is to wait for what is under way.
    fn rest(&mut self) -> Option<Vec<Gathered>> {
        self.is_looked_after = false;
        (self.under_way == 0 && !self.waiting.is_empty()).then(|| self.begin())
    }

    fn begin(&mut self) -> Vec<Gathered> {
        self.under_way += 1;
        std::mem::take(&mut self.waiting)
    }

    /// Whether somebody is to look after a moment, which is then counted on.
    fn needs_a_look(&mut self) -> bool {
        let needs = self.under_way == 0 && !self.waiting.is_empty() && !self.is_looked_after;
        self.is_looked_after |= needs;
        needs
    }
}

/// A read that waits for others to be made with.
struct Gathered {
    name: RemoteName,
    answer: oneshot::Sender<Result<RemoteSecret, Failed>>,
}

impl<L> Clone for Background<L> {
    fn clone(&self) -> Self {
        let Background { connection, timeout, calls, gathering } = self;
        Background {
            connection: connection.clone(),
            timeout: *timeout,
            calls: calls.clone(),
            gathering: gathering.clone(),
        }
    }
}

impl<L> fmt::Debug for Background<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background")
            .field("connection", &self.connection)
            .field("calls", &self.calls)
            .finish_non_exhaustive()
    }
}

impl<L: Leases> Background<L> {
    pub(crate) fn new(connection: Arc<Connection<L>>, timeout: Duration) -> Self {
        Background { connection, timeout, calls: Arc::default(), gathering: Arc::default() }
    }

    /// The calls made so far, by operation; its clones count with it. What an adapter asks about mounts and about its
    /// token is not counted: it is rare, and not for one run alone.
    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        self.calls.snapshot()
    }

    /// The current value of `name`, asked for now: an answer to somebody who asked earlier is not taken for it.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub async fn read(&self, name: &RemoteName) -> Result<RemoteSecret, Failed> {
        let most = self.connection.backend().most_at_once();
        if most == 1 {
            return self.read_alone(name).await;
        }
        let (answer, answered) = oneshot::channel();
        let full = {
            let mut gathering = self.gathering();
            gathering.waiting.push(Gathered { name: name.clone(), answer });
            gathering.full(most)
        };
        match full {
            Some(full) => drop(tokio::spawn(self.clone().read_together(full).in_current_span())),
            None => self.look_after_a_moment(),
        }
        answered.await.unwrap_or_else(|_| Err(self.connection.failed(ENDED, None)))
    }

    /// How many reads at the same time keep as many calls under way as the store gets at most.
    pub fn most_reads_at_once(&self) -> usize {
        Limits::default().background * self.connection.backend().most_at_once()
    }

    fn gathering(&self) -> MutexGuard<'_, Gathering> {
        self.gathering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_after_a_moment(&self) {
        if self.gathering().needs_a_look() {
            let run = self.clone();
            let rest = async move {
                sleep(GATHERING).await;
                let rest = run.gathering().rest();
                if let Some(rest) = rest {
                    run.read_together(rest).await;
                }
            };
            tokio::spawn(rest.in_current_span());
        }
    }

    /// Boxed, for it may lead to itself.
    fn read_together(self, gathered: Vec<Gathered>) -> BoxFuture<'static, ()> {
        async move {
            let names: Arc<[RemoteName]> = gathered.iter().map(|one| one.name.clone()).collect();
            let secrets = if names.len() > 1 {
                // In a task of its own: whatever becomes of it, others must not wait for it for ever.
                let run = self.clone();
                let reading = async move { run.read_many(names).await };
                tokio::spawn(reading.in_current_span()).await.unwrap_or_default()
            } else {
                Vec::new()
            };
            self.gathering().under_way -= 1;
            self.tell(gathered, secrets);
            self.look_after_a_moment();
        }
        .boxed()
    }

    /// Gives everybody their answer; who has none is read alone.
    fn tell(&self, gathered: Vec<Gathered>, secrets: Vec<Result<RemoteSecret, BackendError>>) {
        let mut secrets = secrets.into_iter();
        for Gathered { name, answer } in gathered {
            let told = match secrets.next() {
                Some(Ok(secret)) => Ok(secret),
                Some(Err(cause)) if cause.class() == Class::NotFound => {
                    Err(self.connection.failed(cause, Some(Operation::Read)))
                }
                // A fault of one of many says little: by itself it is tried again, with another login if need be. So is
                // a refusal, for a policy may allow the read and not the batch.
                Some(Err(_)) | None => {
                    let run = self.clone();
                    let alone = async move {
                        // Whoever asked may have gone.
                        let _ = answer.send(run.read_alone(&name).await);
                    };
                    tokio::spawn(alone.in_current_span());
                    continue;
                }
            };
            let _ = answer.send(told);
        }
    }

    /// What came of each, or nothing, if they cannot be read together.
    async fn read_many(&self, names: Arc<[RemoteName]>) -> Vec<Result<RemoteSecret, BackendError>> {
        let call = |lease: Arc<Lease>| {
            let (run, names) = (self.clone(), names.clone());
            async move {
                run.calls.count("batch");
                run.connection.backend().read_many(&lease, &names).await
            }
        };
        let effort = self.effort("read", Operation::ReadMany, Quota::Batches, self.timeout);
        self.connection.guarded(effort, call).await.unwrap_or_default()
    }

    async fn read_alone(&self, name: &RemoteName) -> Result<RemoteSecret, Failed> {
        let call = |lease: Arc<Lease>| {
            let (run, name) = (self.clone(), name.clone());
            async move {
                run.calls.count("read");
                let answer = run.connection.backend().read(&lease, &name).await;
                run.certain(&lease, answer).await
            }
        };
        self.connection.guarded(self.effort("read", Operation::Read, Quota::Values, self.timeout), call).await
    }

    /// The value of a version of `name`.
    ///
    /// # Errors
    /// What the backend did wrong; `NotFound` if it no longer has the version, `NotActive` if that has no value.
    pub async fn read_version(
        &self,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, Failed> {
        let call = |lease: Arc<Lease>| {
            let (run, name, version) = (self.clone(), name.clone(), remote_version.to_owned());
            async move {
                run.calls.count("read");
                let answer = run.connection.backend().read_version(&lease, &name, &version).await;
                run.certain(&lease, answer).await
            }
        };
        self.connection.guarded(self.effort("read", Operation::Read, Quota::Values, self.timeout), call).await
    }

    /// The versions that the backend still knows of, oldest first.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub async fn history(&self, name: &RemoteName) -> Result<Vec<RemoteVersion>, Failed> {
        let call = |lease: Arc<Lease>| {
            let (run, name) = (self.clone(), name.clone());
            async move {
                run.calls.count("metadata");
                let answer = run.connection.backend().history(&lease, &name).await;
                run.certain(&lease, answer).await
            }
        };
        self.connection
            .guarded(self.effort("history", Operation::History, Quota::Metadata, self.timeout), call)
            .await
    }

    /// Begins to look at every secret below `root` (`None`: in the whole store).
    pub fn survey(&self, root: Option<&RemoteName>) -> Survey<L> {
        let open = vec![Step::Tree(root.cloned())];
        let seen = HashSet::new();
        Survey { run: self.clone(), open, taken: JoinSet::new(), entries: 0, empty: 0, seen, failed: None }
    }

    async fn step(self, step: Step) -> Result<Found, Failed> {
        let step = Arc::new(step);
        let call = |lease: Arc<Lease>| {
            let (run, step) = (self.clone(), step.clone());
            async move { run.connection.backend().survey(&lease, &step, &run.calls).await }
        };
        let quota = self.connection.backend().step_quota(&step);
        let effort = self.effort("list", Operation::List, quota, self.timeout.max(SHORTEST_SURVEY_CALL));
        let found = self.connection.guarded(effort, call).await;
        self.calls.debit(&self.connection.budget());
        found
    }

    /// Asks once more before a name counts as closed to us, for it does until the next run: a token that was revoked a
    /// moment ago may still pass for one that may not read.
    async fn certain<T>(&self, lease: &Lease, answer: Result<T, BackendError>) -> Result<T, BackendError> {
        if matches!(answer, Err(BackendError::Forbidden)) && self.connection.backend().may_mistake_refusals()
        {
            self.connection.budget().debit(Quota::Lists, 1);
            self.connection.backend().probe(lease).await?;
        }
        answer
    }

    fn effort(&self, operation: &'static str, needs: Operation, quota: Quota, attempt: Duration) -> Effort {
        let needs = Some(needs);
        Effort { operation, needs, quota, retry: Retry::BACKGROUND, attempt, whole: attempt * 4 + PAUSES }
    }
}

/// A survey on its way. Dropping it ends its calls.
pub struct Survey<L> {
    run: Background<L>,
    /// The last one is taken first, so that few wait.
    open: Vec<Step>,
    /// In tasks of their own: what holds a place at the store must not stand still because nobody asks for a page.
    taken: JoinSet<Result<Found, Failed>>,
    entries: usize,
    /// Pages in a row that had nothing in them.
    empty: usize,
    /// Hashes of where pages went on.
    seen: HashSet<u64>,
    failed: Option<Failed>,
}

impl<L> fmt::Debug for Survey<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Survey")
            .field("open", &self.open.len())
            .field("taken", &self.taken.len())
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl<L: Leases> Survey<L> {
    /// The next part, in no order. `None` says that there is no more, and is said only if everything was looked at.
    ///
    /// A store that keeps to its protocol has no secret given twice. The call may be dropped and made again.
    ///
    /// # Errors
    /// What the backend did wrong, again and again: half a survey never looks like a whole one.
    pub async fn next(&mut self) -> Result<Option<SurveyPage>, Failed> {
        loop {
            if let Some(failed) = &self.failed {
                return Err(failed.clone());
            }
            while self.taken.len() < STEPS_AT_ONCE
                && let Some(step) = self.open.pop()
            {
                self.taken.spawn(self.run.clone().step(step).in_current_span());
            }
            let Some(taken) = self.taken.join_next().await else { return Ok(None) };
            match self.take(taken.unwrap_or_else(|_| Err(self.run.connection.failed(ENDED, None)))) {
                Ok(page) if page == SurveyPage::default() => {}
                Ok(page) => return Ok(Some(page)),
                Err(failed) => {
                    self.taken.abort_all();
                    self.failed = Some(failed);
                }
            }
        }
    }

    fn take(&mut self, found: Result<Found, Failed>) -> Result<SurveyPage, Failed> {
        let Found { page, next } = found?;
        let is_empty = page == SurveyPage::default();
        for step in &next {
            if let Step::More { after, .. } = step {
                self.empty = if is_empty { self.empty + 1 } else { 0 };
                let goes_back = !self.seen.insert(hash(after));
                if goes_back || self.empty > MOST_EMPTY_PAGES {
                    let fault = BackendError::InvalidAnswer("a listing that does not come to its end");
                    return Err(self.run.connection.failed(fault, None));
                }
            }
        }
        self.entries += page.secrets.len() + page.forbidden.len() + next.len();
        if self.entries > MOST_ENTRIES {
            return Err(self.run.connection.failed(BackendError::TooLarge, None));
        }
        self.open.extend(next);
        Ok(page)
    }
}

fn hash(token: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    token.hash(&mut hasher);
    hasher.finish()
}

/// The step's task panicked, or the runtime is going down.
const ENDED: BackendError = BackendError::Unreachable("the call was ended before its answer came");

#[cfg(test)]
mod tests;
