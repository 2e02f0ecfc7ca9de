//! Durable jobs: work that one runner at a time claims, and that survives every crash.
//!
//! Rows. A job is an ordinary row of the installation, claimed by compare-and-set over [`Store::commit`], so no engine
//! knows of jobs. Up to four rows belong to one:
//!
//! - `job/name`: when it is due, whether it is claimed, its payload. Written by schedule, claim and finish only, so
//!   its version stands still during a claim. That version is the *fence*.
//! - `beat/name`: who holds the claim and until when. Renewing a claim writes this row and no other.
//! - `ask/name`: what was asked of the job and no run has begun to do. An ask makes the job due at once and disturbs
//!   no running claim: it waits for the next one.
//! - `taken/name`: the ask that the current run does. A claim moves it here, finishing the run removes it. A run that
//!   crashes or is fenced off leaves it to the next, so no ask is lost, and none is done by two finished runs.
//!
//! Safety is the fence and nothing else: whatever a runner commits carries [`Claim::fence`], and once another has
//! claimed the job, or it was rescheduled or removed, no such commit happens. The clock only decides when a claim
//! counts as abandoned; a wrong clock makes work start too early or too late, never twice to its end.
//!
//! A runner: [`due`](Jobs::due), [`claim`](Jobs::claim), work under [`hold`](Jobs::hold), then one commit with the
//! results, the report, the event and [`finish`](Jobs::finish).
//!
//! [`Store::commit`]: super::Store::commit

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use scaivault_domain::time::{Clock, Timestamp};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{CommitError, Key, Owner, Records, RowVersion, Space, StoreError, Tx};

/// How long a claim lasts without renewal. A crashed runner's job is taken up after at most this time.
pub const CLAIM_TTL: Duration = Duration::from_secs(15);

/// How often a claim is renewed: two renewals may fail before it is lost.
pub const RENEW_EVERY: Duration = Duration::from_secs(5);

const MAX_NAME: usize = 1024;

const JOB: &str = "job/";
const BEAT: &str = "beat/";
const ASK: &str = "ask/";
const TAKEN: &str = "taken/";

/// The name of a job, e.g. `sync/acme/fed_…`: what kind of work, then on what. Unique in the installation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobName(String);

/// The text is no name of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name of a job is at most {MAX_NAME} bytes: segments between slashes, without control characters"
)]
pub struct InvalidJobName;

impl JobName {
    /// Parses a name.
    ///
    /// # Errors
    /// It is too long, has an empty segment or a control character.
    pub fn parse(text: &str) -> Result<Self, InvalidJobName> {
        let valid = text.len() <= MAX_NAME
            && !text.chars().any(char::is_control)
            && text.split('/').all(|s| !s.is_empty());
        if valid { Ok(JobName(text.to_owned())) } else { Err(InvalidJobName) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the job's own row is. Expect its version to change a job as it was read by [`Jobs::get`].
    pub fn key(&self) -> Key {
        self.row(JOB)
    }

    fn row(&self, part: &str) -> Key {
        Key::installation(Space::Job, format!("{part}{}", self.0))
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Serialize, Deserialize)]
struct JobRow<T> {
    due: Timestamp,
    /// Also of a claim that was abandoned: whether its holder lives, the beat tells.
    claimed: bool,
    attempt: u32,
    payload: T,
}

impl<T> JobRow<T> {
    fn scheduled(due: Timestamp, payload: T) -> Self {
        JobRow { due, claimed: false, attempt: 0, payload }
    }
}

/// One process.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Holder(u64);

#[derive(Clone, Copy, Serialize, Deserialize)]
struct BeatRow {
    holder: Holder,
    until: Timestamp,
}

impl BeatRow {
    fn is_live(self, now: Timestamp) -> bool {
        // An end far ahead was written before the clock was turned back. Waiting for it could take years; twice the
        // TTL leaves room for clocks that differ.
        now < self.until && self.until <= now.after(CLAIM_TTL * 2)
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// It waits to be due, or to be claimed.
    Waiting,
    /// A runner holds it.
    Claimed,
    /// A runner claimed it and has not been heard of since. It is due.
    Abandoned,
}

/// A job as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job<T> {
    /// Where it stands.
    pub state: JobState,
    /// When it is due, or was; an ask makes it due earlier.
    pub due: Timestamp,
    /// How often it was claimed since it was scheduled: more than once if runs were abandoned.
    pub attempt: u32,
    /// What it was scheduled with.
    pub payload: T,
}

/// What there is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Jobs that can be claimed now, the longest due first.
    pub jobs: Vec<JobName>,
    /// When the next of the other jobs can be claimed, unless its claim is renewed. Jobs that were scheduled or asked
    /// later are not in it: look again when the store wakes, too.
    pub next: Option<Timestamp>,
}

/// A job that this process holds. Dropping it abandons the job.
#[derive(Debug)]
pub struct Claim<T> {
    /// The job.
    pub name: JobName,
    /// The number of this attempt, from 1.
    pub attempt: u32,
    /// What the job was scheduled with.
    pub payload: T,
    version: RowVersion,
    taken: Instant,
}

impl<T> Claim<T> {
    /// Unique, and greater than that of every earlier claim of the job.
    pub fn epoch(&self) -> RowVersion {
        self.version
    }

    /// Refuses the transaction once the claim is lost, before any other precondition is looked at.
    #[must_use]
    pub fn fence(&self, tx: Tx) -> Tx {
        tx.expect_first(self.name.key(), self.version)
    }

    /// Whether a commit was refused because the claim is lost: somebody else has the job, or it was rescheduled or
    /// removed. Stop, and leave everything as it is.
    pub fn is_fenced(&self, error: &CommitError) -> bool {
        matches!(error, CommitError::Precondition(key) if *key == self.name.key())
    }

    /// Whether a job could not be finished for good because something was asked of it meanwhile: finish it with a
    /// next time instead.
    pub fn is_asked_again(&self, error: &CommitError) -> bool {
        matches!(error, CommitError::Precondition(key) if *key == self.name.row(ASK))
    }
}

/// How a renewal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The claim lasts for another [`CLAIM_TTL`].
    Held,
    /// The claim is lost for good.
    Lost,
}

/// The jobs of a store. One per process; clones are the same holder.
#[derive(Clone)]
pub struct Jobs {
    records: Records,
    clock: Arc<dyn Clock>,
    holder: Holder,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

/// What the rows say about one job, for a change that expects them to be so.
struct Found<T> {
    row: JobRow<T>,
    version: RowVersion,
    beat: Option<RowVersion>,
    state: JobState,
}

impl Jobs {
    /// The jobs in `records`, held by this process.
    pub fn new(records: Records, clock: Arc<dyn Clock>) -> Self {
        let mut random = [0; 8];
        getrandom::fill(&mut random).expect("without the system's randomness nothing could be sealed either");
        Jobs { records, clock, holder: Holder(u64::from_be_bytes(random)) }
    }

    /// Schedules a job in the caller's transaction. Takes the place of a job of this name, and **fences off its running
    /// claim**. What was asked of it and not finished stays asked.
    #[must_use]
    pub fn schedule<T: Serialize>(&self, tx: Tx, name: &JobName, due: Timestamp, payload: &T) -> Tx {
        self.put_job(tx, name, &JobRow::scheduled(due, payload)).delete(name.row(BEAT))
    }

    /// Removes a job and all that was asked of it in the caller's transaction, and fences off its running claim.
    #[must_use]
    pub fn unschedule(&self, tx: Tx, name: &JobName) -> Tx {
        [JOB, BEAT, ASK, TAKEN].into_iter().fold(tx, |tx, part| tx.delete(name.row(part)))
    }

    /// The job, and the version of its row.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn get<T: DeserializeOwned>(
        &self,
        name: &JobName,
    ) -> Result<Option<(Job<T>, RowVersion)>, StoreError> {
        Ok(self.find(name).await?.map(|Found { row, version, state, .. }| {
            (Job { state, due: row.due, attempt: row.attempt, payload: row.payload }, version)
        }))
    }

    /// At most `limit` jobs whose names begin with `prefix` and that can be claimed. Another may be faster: only
    /// [`claim`](Self::claim) decides. Reads all jobs of the prefix.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn due(&self, prefix: &str, limit: usize) -> Result<Due, StoreError> {
        let now = self.clock.now();
        let asked = self.asked_of(prefix).await?;
        let (mut jobs, mut next) = (Vec::new(), None::<Timestamp>);
        for (name, row, _) in self.rows::<JobRow<IgnoredAny>>(JOB, prefix).await? {
            let name = JobName(name);
            let beat = if row.claimed { self.beat(&name).await? } else { None };
            let ready = match beat {
                Some((beat, _)) if beat.is_live(now) => beat.until,
                _ if row.claimed || asked.contains(name.as_str()) => row.due.min(now),
                _ => row.due,
            };
            if ready <= now {
                jobs.push((ready, name));
            } else {
                next = Some(next.map_or(ready, |next| next.min(ready)));
            }
        }
        jobs.sort();
        Ok(Due { jobs: jobs.into_iter().map(|(_, name)| name).take(limit).collect(), next })
    }

    /// Claims a job that is due or abandoned. Of all who try at once, one gets it. `None` if it cannot be claimed now.
    ///
    /// # Errors
    /// It is unknown whether the job was claimed. If it was, that claim is abandoned.
    pub async fn claim<T: Serialize + DeserializeOwned>(
        &self,
        name: &JobName,
    ) -> Result<Option<Claim<T>>, StoreError> {
        loop {
            let Some(Found { row, version, beat, state }) = self.find::<T>(name).await? else {
                return Ok(None);
            };
            let store = self.records.store();
            let (ask, taken) = (name.row(ASK), name.row(TAKEN));
            let waiting = store.get(&ask).await?;
            let left_over = store.get(&taken).await?.is_some();
            let can_be_claimed = match state {
                JobState::Claimed => false,
                JobState::Abandoned => true,
                JobState::Waiting => row.due <= self.clock.now() || waiting.is_some() || left_over,
            };
            if !can_be_claimed {
                return Ok(None);
            }

            let row = JobRow { claimed: true, attempt: row.attempt.saturating_add(1), ..row };
            let mut tx = Tx::new()
                .expect(name.key(), version)
                .expect_as_found(name.row(BEAT), beat)
                .expect_as_found(ask.clone(), waiting.as_ref().map(|row| row.version));
            tx = self.put_beat(self.put_job(tx, name, &row), name);
            if let Some(waiting) = waiting
                && !left_over
            {
                let plain = self.records.open_bytes(&ask, &waiting.value)?;
                let sealed = self.records.seal_bytes(&taken, plain.expose());
                tx = tx.delete(ask.clone()).put(taken, sealed);
            }
            let now = Instant::now();
            match store.commit(tx).await {
                Ok(version) => {
                    let JobRow { attempt, payload, .. } = row;
                    return Ok(Some(Claim { name: name.clone(), attempt, payload, version, taken: now }));
                }
                // Asked meanwhile, and still claimable.
                Err(CommitError::Precondition(key)) if key == ask => {}
                Err(CommitError::Precondition(_)) => return Ok(None),
                Err(CommitError::Unavailable(error)) => return Err(error),
            }
        }
    }

    /// Makes the claim last for another [`CLAIM_TTL`].
    ///
    /// # Errors
    /// When the store does not answer. The claim may still be held.
    pub async fn renew<T>(&self, claim: &Claim<T>) -> Result<Renewal, StoreError> {
        let tx = self.put_beat(claim.fence(Tx::new()), &claim.name);
        match self.records.store().commit(tx).await {
            Ok(_) => Ok(Renewal::Held),
            Err(CommitError::Precondition(_)) => Ok(Renewal::Lost),
            Err(CommitError::Unavailable(error)) => Err(error),
        }
    }

    /// Does the work and renews the claim all the while. `None` once the claim is lost, or could not be renewed for so
    /// long that another may have it; the work is then dropped where it waits. Finish the job after this, not within.
    pub async fn hold<T, W: Future>(&self, claim: &Claim<T>, work: W) -> Option<W::Output> {
        tokio::select! {
            biased;
            output = work => Some(output),
            () = self.lost(claim) => None,
        }
    }

    /// Ends the claim in the caller's transaction: with a next time and payload, or for good. Fenced, and done with
    /// the ask that the run took. What was asked during the run stays, and makes the job due at once; a job of which
    /// something was asked does not end for good (see [`Claim::is_asked_again`]).
    #[must_use]
    pub fn finish<T, N: Serialize>(&self, tx: Tx, claim: &Claim<T>, next: Option<(Timestamp, &N)>) -> Tx {
        let name = &claim.name;
        let tx = claim.fence(tx).delete(name.row(BEAT)).delete(name.row(TAKEN));
        match next {
            Some((due, payload)) => self.put_job(tx, name, &JobRow::scheduled(due, payload)),
            None => tx.expect_absent(name.row(ASK)).delete(name.key()),
        }
    }

    /// Asks for a run at once, or after the running one, in the caller's transaction. `change` is given what is asked
    /// already and no run has begun to do, else the default. `None` if there is no such job.
    ///
    /// Two asks, or an ask and a claim, may meet: if the commit is refused, ask again.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn ask<A: Default + Serialize + DeserializeOwned>(
        &self,
        tx: Tx,
        name: &JobName,
        change: impl FnOnce(&mut A),
    ) -> Result<Option<Tx>, StoreError> {
        let (job, at) = (name.key(), name.row(ASK));
        let Some(row) = self.records.store().get(&job).await? else {
            return Ok(None);
        };
        let (mut ask, found) = match self.records.get::<A>(&at).await? {
            Some((ask, version)) => (ask, Some(version)),
            None => (A::default(), None),
        };
        change(&mut ask);
        let sealed = self.records.seal(&at, &ask);
        Ok(Some(tx.expect(job, row.version).expect_as_found(at.clone(), found).put(at, sealed)))
    }

    /// What was asked of the run that this claim is for. The same for every attempt at it.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn asked<T, A: DeserializeOwned>(&self, claim: &Claim<T>) -> Result<Option<A>, StoreError> {
        Ok(self.records.get(&claim.name.row(TAKEN)).await?.map(|(ask, _)| ask))
    }

    /// Gives up the claims of earlier processes at once instead of after their TTL; how many. Nothing in a store that
    /// other processes may be using: their claims may be alive.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn release_abandoned(&self) -> Result<usize, StoreError> {
        let mut released = 0;
        if !self.records.store().is_exclusive() {
            return Ok(released);
        }
        for (name, beat, version) in self.rows::<BeatRow>(BEAT, "").await? {
            if beat.holder == self.holder {
                continue;
            }
            let at = JobName(name).row(BEAT);
            match self.records.store().commit(Tx::new().expect(at.clone(), version).delete(at)).await {
                Ok(_) => released += 1,
                // Rescheduled, or claimed by us, since it was read.
                Err(CommitError::Precondition(_)) => {}
                Err(CommitError::Unavailable(error)) => return Err(error),
            }
        }
        Ok(released)
    }

    async fn find<T: DeserializeOwned>(&self, name: &JobName) -> Result<Option<Found<T>>, StoreError> {
        let Some((row, version)) = self.records.get::<JobRow<T>>(&name.key()).await? else {
            return Ok(None);
        };
        let beat = self.beat(name).await?;
        let state = match beat {
            _ if !row.claimed => JobState::Waiting,
            Some((beat, _)) if beat.is_live(self.clock.now()) => JobState::Claimed,
            _ => JobState::Abandoned,
        };
        Ok(Some(Found { row, version, beat: beat.map(|(_, version)| version), state }))
    }

    async fn beat(&self, name: &JobName) -> Result<Option<(BeatRow, RowVersion)>, StoreError> {
        self.records.get(&name.row(BEAT)).await
    }

    /// One part of all jobs with this prefix, by the names of the jobs.
    async fn rows<R: DeserializeOwned>(
        &self,
        part: &str,
        prefix: &str,
    ) -> Result<Vec<(String, R, RowVersion)>, StoreError> {
        let mut rows =
            self.records.scan_all(&Owner::Installation, Space::Job, &format!("{part}{prefix}")).await?;
        for (name, ..) in &mut rows {
            name.drain(..part.len());
        }
        Ok(rows)
    }

    /// The jobs of which something is asked, or was and is not finished.
    async fn asked_of(&self, prefix: &str) -> Result<HashSet<String>, StoreError> {
        let mut asked = HashSet::new();
        for part in [ASK, TAKEN] {
            asked.extend(self.rows::<IgnoredAny>(part, prefix).await?.into_iter().map(|(name, ..)| name));
        }
        Ok(asked)
    }

    fn put_job<T: Serialize>(&self, tx: Tx, name: &JobName, row: &JobRow<T>) -> Tx {
        let key = name.key();
        let sealed = self.records.seal(&key, row);
        tx.put(key, sealed)
    }

    fn put_beat(&self, tx: Tx, name: &JobName) -> Tx {
        let key = name.row(BEAT);
        let beat = BeatRow { holder: self.holder, until: self.clock.now().after(CLAIM_TTL) };
        let sealed = self.records.seal(&key, &beat);
        tx.put(key, sealed)
    }

    /// Renews until the claim is lost, or may be.
    async fn lost<T>(&self, claim: &Claim<T>) {
        let mut end = claim.taken + CLAIM_TTL;
        let mut next = claim.taken + RENEW_EVERY;
        loop {
            tokio::time::sleep_until(next).await;
            let asked = Instant::now();
            match tokio::time::timeout_at(end, self.renew(claim)).await {
                Ok(Ok(Renewal::Held)) => end = asked + CLAIM_TTL,
                Ok(Ok(Renewal::Lost)) | Err(_) => return,
                Ok(Err(_)) if asked >= end => return,
                Ok(Err(error)) => {
                    tracing::warn!(job = %claim.name, %error, "a claim could not be renewed; trying again");
                }
            }
            next = asked + RENEW_EVERY;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicI64, Ordering};

    use scaivault_seal::Keyring;

    use super::super::conformance::conformance;
    use super::super::{Depth, Entry, RedbStore, Revision, Store};
    use super::*;

    conformance! {
        every_job_is_done_exactly_once_by_16_workers,
        one_of_many_gets_a_job,
        a_late_holder_is_refused_and_told_so,
        a_renewed_claim_is_not_abandoned,
        scheduling_again_fences_off_a_running_claim,
        a_removed_job_leaves_nothing_behind,
        a_job_ends_with_its_results_or_not_at_all,
        what_is_asked_during_a_run_is_done_by_the_next,
        an_ask_makes_a_job_due_at_once,
        an_ask_outlives_the_runs_that_do_not_finish,
        every_ask_is_done_once_whatever_it_races_with,
        a_job_with_an_ask_does_not_end_for_good,
        an_ask_meets_a_job_that_is_there,
        the_longest_due_comes_first,
        claims_of_an_earlier_process_are_given_up_at_once,
        a_clock_that_is_turned_back_does_not_strand_a_claim,
        work_goes_on_while_the_claim_is_renewed,
        work_ends_with_its_claim,
    }

    type Engine = Arc<dyn Store>;

    const BEGIN: Timestamp = Timestamp::from_millis(1_767_225_600_000);
    const MINUTE: Duration = Duration::from_secs(60);

    struct TurnedClock(AtomicI64);

    impl Clock for TurnedClock {
        fn now(&self) -> Timestamp {
            Timestamp::from_millis(self.0.load(Ordering::SeqCst))
        }
    }

    #[derive(Clone)]
    struct Bench {
        jobs: Jobs,
        clock: Arc<TurnedClock>,
    }

    impl Bench {
        fn new(store: Engine) -> Self {
            let clock = Arc::new(TurnedClock(AtomicI64::new(BEGIN.as_millis())));
            Bench {
                jobs: Jobs::new(Records::new(store, Arc::new(Keyring::generate())), clock.clone()),
                clock,
            }
        }

        /// The same store, used by another process.
        fn other_process(&self) -> Jobs {
            Jobs::new(self.jobs.records.clone(), self.clock.clone())
        }

        fn turn_clock(&self, by: Duration) {
            self.clock.0.fetch_add(i64::try_from(by.as_millis()).unwrap(), Ordering::SeqCst);
        }

        async fn commit(&self, tx: Tx) -> Result<Revision, CommitError> {
            self.jobs.records.store().commit(tx).await
        }

        async fn schedule(&self, text: &str, due: Timestamp) -> JobName {
            let name = name(text);
            self.commit(self.jobs.schedule(Tx::new(), &name, due, &text)).await.unwrap();
            name
        }

        async fn claim(&self, name: &JobName) -> Option<Claim<String>> {
            self.jobs.claim(name).await.unwrap()
        }

        async fn finish(
            &self,
            claim: &Claim<String>,
            next: Option<Timestamp>,
        ) -> Result<Revision, CommitError> {
            let next = next.map(|due| (due, &claim.payload));
            self.commit(self.jobs.finish(Tx::new(), claim, next)).await
        }

        async fn ask(&self, name: &JobName, what: &str) {
            let change = |asked: &mut Vec<String>| asked.push(what.to_owned());
            let tx = self.jobs.ask(Tx::new(), name, change).await.unwrap().expect("the job is there");
            self.commit(tx).await.unwrap();
        }

        async fn asked(&self, claim: &Claim<String>) -> Option<Vec<String>> {
            self.jobs.asked(claim).await.unwrap()
        }

        async fn due(&self) -> Vec<String> {
            let due = self.jobs.due("sync/", 100).await.unwrap();
            due.jobs.into_iter().map(|JobName(name)| name).collect()
        }

        async fn state(&self, name: &JobName) -> JobState {
            self.jobs.get::<String>(name).await.unwrap().unwrap().0.state
        }

        /// The names of all rows of an installation's space.
        async fn names(&self, space: Space) -> Vec<String> {
            let store = self.jobs.records.store();
            let rows = store.scan(&Owner::Installation, space, "", Depth::All, None, 10_000).await.unwrap();
            rows.iter().map(|entry: &Entry| entry.name().to_owned()).collect()
        }
    }

    fn name(text: &str) -> JobName {
        JobName::parse(text).unwrap()
    }

    fn trace(name: &str) -> Key {
        Key::installation(Space::Setting, name)
    }

    type Late = Arc<Mutex<HashMap<JobName, Claim<String>>>>;

    /// Does what is due, and leaves a trace for every job that it finished. Crashes over the first claim of every fifth
    /// job; that claim comes back when the job is held by another.
    async fn work(bench: Bench, late: Late) {
        let done = |claim: &Claim<String>| {
            let tx = Tx::new().put(trace(&format!("{}@{}", claim.name, claim.epoch())), "done".into());
            bench.jobs.finish::<_, String>(tx, claim, None)
        };
        loop {
            let due = bench.jobs.due("sync/", 16).await.unwrap().jobs;
            if due.is_empty() {
                return;
            }
            for name in due {
                let Some(claim) = bench.claim(&name).await else { continue };
                if claim.attempt == 1 && name.as_str().ends_with(['3', '7']) {
                    late.lock().unwrap().insert(name, claim);
                    continue;
                }
                let stale = late.lock().unwrap().remove(&name);
                if let Some(stale) = stale {
                    assert!(stale.is_fenced(&bench.commit(done(&stale)).await.unwrap_err()));
                }
                bench.commit(done(&claim)).await.unwrap();
            }
        }
    }

    async fn every_job_is_done_exactly_once_by_16_workers(store: Engine) {
        let bench = Bench::new(store);
        let names: Vec<JobName> = (0..200).map(|n| name(&format!("sync/{n}"))).collect();
        let tx = names.iter().fold(Tx::new(), |tx, name| bench.jobs.schedule(tx, name, BEGIN, &"payload"));
        bench.commit(tx).await.unwrap();

        let late = Late::default();
        for crashed in [40, 0] {
            let workers: Vec<_> = (0..16).map(|_| tokio::spawn(work(bench.clone(), late.clone()))).collect();
            for worker in workers {
                worker.await.unwrap();
            }
            assert_eq!(late.lock().unwrap().len(), crashed);
            bench.turn_clock(CLAIM_TTL);
        }
        let mut done = bench.names(Space::Setting).await;
        assert_eq!(done.len(), names.len(), "no job was done twice");
        done.dedup_by_key(|trace| trace.split('@').next().unwrap().to_owned());
        assert_eq!(done.len(), names.len(), "every job was done");
        assert_eq!(bench.names(Space::Job).await, [""; 0]);
    }

    async fn one_of_many_gets_a_job(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let claims: Vec<_> = (0..16)
            .map(|_| {
                let (bench, name) = (bench.clone(), name.clone());
                tokio::spawn(async move { bench.claim(&name).await.is_some() })
            })
            .collect();
        let mut got_it = 0;
        for claim in claims {
            got_it += usize::from(claim.await.unwrap());
        }
        assert_eq!(got_it, 1);
    }

    async fn a_late_holder_is_refused_and_told_so(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let late = bench.claim(&name).await.unwrap();
        assert!(bench.claim(&name).await.is_none());
        bench.turn_clock(CLAIM_TTL);
        assert_eq!(bench.state(&name).await, JobState::Abandoned);
        let current = bench.claim(&name).await.unwrap();
        assert_eq!((late.attempt, current.attempt), (1, 2));
        assert!(late.epoch() < current.epoch());

        // Told so even where it would be refused for another reason, too: else it would read again and try again.
        let hopeless = Tx::new().put(trace("late"), "x".into()).expect(trace("missing"), late.epoch());
        let error = bench.commit(late.fence(hopeless)).await.unwrap_err();
        assert!(matches!(&error, CommitError::Precondition(key) if *key == name.key()));
        assert!(late.is_fenced(&error));
        assert!(late.is_fenced(&bench.finish(&late, None).await.unwrap_err()));
        assert_eq!(bench.jobs.renew(&late).await.unwrap(), Renewal::Lost);
        assert_eq!(bench.names(Space::Setting).await, [""; 0]);

        bench.commit(current.fence(Tx::new().put(trace("current"), "x".into()))).await.unwrap();
        assert_eq!(bench.jobs.renew(&current).await.unwrap(), Renewal::Held);
        bench.finish(&current, None).await.unwrap();
    }

    async fn a_renewed_claim_is_not_abandoned(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let claim = bench.claim(&name).await.unwrap();
        for _ in 0..4 {
            bench.turn_clock(RENEW_EVERY * 2);
            assert_eq!(bench.jobs.renew(&claim).await.unwrap(), Renewal::Held);
            assert_eq!(bench.state(&name).await, JobState::Claimed);
            let again = bench.clock.now().after(CLAIM_TTL);
            assert_eq!(
                bench.jobs.due("sync/", 10).await.unwrap(),
                Due { jobs: Vec::new(), next: Some(again) }
            );
        }
        assert!(bench.claim(&name).await.is_none());
        bench.turn_clock(CLAIM_TTL);
        assert_eq!(bench.due().await, ["sync/a"]);
        assert_eq!(bench.jobs.renew(&claim).await.unwrap(), Renewal::Held, "late, but nobody else has it");
        assert!(bench.claim(&name).await.is_none());
    }

    async fn scheduling_again_fences_off_a_running_claim(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let claim = bench.claim(&name).await.unwrap();
        let later = BEGIN.after(MINUTE);
        let version = bench.commit(bench.jobs.schedule(Tx::new(), &name, later, &"new")).await.unwrap();

        assert!(claim.is_fenced(&bench.commit(claim.fence(Tx::new())).await.unwrap_err()));
        assert!(claim.is_fenced(&bench.finish(&claim, None).await.unwrap_err()));
        assert_eq!(bench.jobs.renew(&claim).await.unwrap(), Renewal::Lost);
        let job = Job { state: JobState::Waiting, due: later, attempt: 0, payload: "new".to_owned() };
        assert_eq!(bench.jobs.get(&name).await.unwrap(), Some((job, version)));
        assert!(bench.claim(&name).await.is_none());
        bench.turn_clock(MINUTE);
        assert_eq!(bench.claim(&name).await.unwrap().payload, "new");
    }

    async fn a_removed_job_leaves_nothing_behind(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        bench.ask(&name, "taken").await;
        let claim = bench.claim(&name).await.unwrap();
        bench.ask(&name, "waiting").await;
        bench.commit(bench.jobs.unschedule(Tx::new(), &name)).await.unwrap();
        assert_eq!(bench.names(Space::Job).await, [""; 0]);
        assert!(claim.is_fenced(&bench.finish(&claim, Some(BEGIN)).await.unwrap_err()));
        assert!(bench.jobs.get::<String>(&name).await.unwrap().is_none());
        assert!(bench.claim(&name).await.is_none());
    }

    async fn a_job_ends_with_its_results_or_not_at_all(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let claim = bench.claim(&name).await.unwrap();
        bench.commit(Tx::new().put(trace("taken"), "x".into())).await.unwrap();
        let next = BEGIN.after(MINUTE);
        let end = |at: &str| {
            let results = Tx::new().expect_absent(trace(at)).put(trace(at), "done".into());
            bench.jobs.finish(results, &claim, Some((next, &claim.payload)))
        };
        let error = bench.commit(end("taken")).await.unwrap_err();
        assert!(!claim.is_fenced(&error) && !claim.is_asked_again(&error));
        assert_eq!(bench.state(&name).await, JobState::Claimed);

        bench.commit(end("free")).await.unwrap();
        assert_eq!(bench.names(Space::Setting).await, ["free", "taken"]);
        assert_eq!(bench.jobs.due("sync/", 10).await.unwrap(), Due { jobs: Vec::new(), next: Some(next) });
        assert!(claim.is_fenced(&bench.finish(&claim, None).await.unwrap_err()), "it ends once");
    }

    async fn what_is_asked_during_a_run_is_done_by_the_next(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let claim = bench.claim(&name).await.unwrap();
        bench.ask(&name, "more").await;
        bench.ask(&name, "and more").await;
        bench.commit(claim.fence(Tx::new())).await.expect("an ask fences nobody off");
        assert_eq!(bench.asked(&claim).await, None);
        assert_eq!(bench.due().await, [""; 0]);
        bench.finish(&claim, Some(BEGIN.after(MINUTE))).await.unwrap();

        assert_eq!(bench.due().await, ["sync/a"]);
        let claim = bench.claim(&name).await.unwrap();
        assert_eq!(bench.asked(&claim).await.unwrap(), ["more", "and more"]);
        bench.finish(&claim, Some(BEGIN.after(MINUTE))).await.unwrap();
        assert_eq!(bench.due().await, [""; 0]);
        assert!(bench.claim(&name).await.is_none());
    }

    async fn an_ask_makes_a_job_due_at_once(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN.after(MINUTE)).await;
        assert!(bench.claim(&name).await.is_none());
        bench.ask(&name, "now").await;
        assert_eq!(bench.due().await, ["sync/a"]);
        let claim = bench.claim(&name).await.unwrap();
        assert_eq!(bench.asked(&claim).await.unwrap(), ["now"]);
    }

    async fn an_ask_outlives_the_runs_that_do_not_finish(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        bench.ask(&name, "first").await;
        let fenced_off = bench.claim(&name).await.unwrap();
        assert_eq!(bench.asked(&fenced_off).await.unwrap(), ["first"]);
        let far = BEGIN.after(MINUTE * 60);
        bench.schedule("sync/a", far).await;
        assert_eq!(bench.due().await, ["sync/a"]);

        let crashed = bench.claim(&name).await.unwrap();
        assert_eq!(bench.asked(&crashed).await.unwrap(), ["first"]);
        bench.ask(&name, "second").await;
        bench.turn_clock(CLAIM_TTL);
        for ask in ["first", "second"] {
            assert_eq!(bench.due().await, ["sync/a"]);
            let claim = bench.claim(&name).await.unwrap();
            assert_eq!(bench.asked(&claim).await.unwrap(), [ask]);
            bench.finish(&claim, Some(far)).await.unwrap();
        }
        assert_eq!(bench.due().await, [""; 0]);
    }

    async fn every_ask_is_done_once_whatever_it_races_with(store: Engine) {
        const ASKERS: usize = 8;
        const ASKS: usize = 20;

        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN.after(MINUTE)).await;
        let askers: Vec<_> = (0..ASKERS)
            .map(|asker| {
                let (bench, name) = (bench.clone(), name.clone());
                tokio::spawn(async move {
                    for n in 0..ASKS {
                        let what = format!("{asker}/{n}");
                        let ask = |asked: &mut Vec<String>| asked.push(what.clone());
                        loop {
                            let tx = bench.jobs.ask(Tx::new(), &name, ask).await.unwrap().unwrap();
                            match bench.commit(tx).await {
                                Ok(_) => break,
                                Err(CommitError::Precondition(_)) => {}
                                Err(other) => panic!("{other}"),
                            }
                        }
                    }
                })
            })
            .collect();
        let mut done = Vec::new();
        while done.len() < ASKERS * ASKS {
            let Some(claim) = bench.claim(&name).await else {
                let lost = askers.iter().all(|asker| asker.is_finished()) && bench.due().await.is_empty();
                assert!(!lost, "only {} asks were done", done.len());
                tokio::task::yield_now().await;
                continue;
            };
            done.extend(bench.asked(&claim).await.unwrap());
            bench.finish(&claim, Some(BEGIN.after(MINUTE))).await.unwrap();
        }
        assert_eq!(done.iter().collect::<HashSet<_>>().len(), ASKERS * ASKS);
        assert_eq!(bench.due().await, [""; 0]);
    }

    async fn a_job_with_an_ask_does_not_end_for_good(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let claim = bench.claim(&name).await.unwrap();
        bench.ask(&name, "more").await;
        let error = bench.finish(&claim, None).await.unwrap_err();
        assert!(claim.is_asked_again(&error) && !claim.is_fenced(&error));
        bench.finish(&claim, Some(BEGIN)).await.unwrap();
        let claim = bench.claim(&name).await.unwrap();
        assert_eq!(bench.asked(&claim).await.unwrap(), ["more"]);
        bench.finish(&claim, None).await.unwrap();
        assert_eq!(bench.names(Space::Job).await, [""; 0]);
    }

    async fn an_ask_meets_a_job_that_is_there(store: Engine) {
        let bench = Bench::new(store);
        let ask = |name| bench.jobs.ask(Tx::new(), name, |asked: &mut Vec<String>| asked.push("x".into()));
        let name = name("sync/a");
        assert!(ask(&name).await.unwrap().is_none());
        bench.schedule("sync/a", BEGIN).await;
        let staged = ask(&name).await.unwrap().unwrap();
        bench.commit(bench.jobs.unschedule(Tx::new(), &name)).await.unwrap();
        assert!(matches!(bench.commit(staged).await, Err(CommitError::Precondition(_))));
        assert_eq!(bench.names(Space::Job).await, [""; 0]);
    }

    async fn the_longest_due_comes_first(store: Engine) {
        let bench = Bench::new(store);
        for (name, due) in [("sync/a", 30), ("sync/b", 10), ("sync/c", 20), ("sync/d", 90), ("purge/a", 0)] {
            bench.schedule(name, BEGIN.after(Duration::from_secs(due))).await;
        }
        let first = BEGIN.after(Duration::from_secs(10));
        assert_eq!(bench.jobs.due("sync/", 10).await.unwrap(), Due { jobs: Vec::new(), next: Some(first) });
        bench.turn_clock(MINUTE);
        let next = Some(BEGIN.after(Duration::from_secs(90)));
        assert_eq!(
            bench.jobs.due("sync/", 2).await.unwrap(),
            Due { jobs: vec![name("sync/b"), name("sync/c")], next }
        );
        assert_eq!(bench.due().await, ["sync/b", "sync/c", "sync/a"]);
        assert_eq!(bench.jobs.due("", 1).await.unwrap().jobs, [name("purge/a")]);
    }

    async fn claims_of_an_earlier_process_are_given_up_at_once(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let crashed = bench.claim(&name).await.unwrap();
        assert_eq!(bench.jobs.release_abandoned().await.unwrap(), 0, "its own claims are alive");

        let later = Bench { jobs: bench.other_process(), ..bench };
        assert!(later.claim(&name).await.is_none());
        assert_eq!(later.jobs.release_abandoned().await.unwrap(), 1);
        assert_eq!(later.due().await, ["sync/a"]);
        let claim = later.claim(&name).await.unwrap();
        assert!(crashed.is_fenced(&later.finish(&crashed, None).await.unwrap_err()));
        later.finish(&claim, None).await.unwrap();
    }

    async fn a_clock_that_is_turned_back_does_not_strand_a_claim(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        bench.turn_clock(MINUTE * 60);
        let _crashed = bench.claim(&name).await.unwrap();
        bench.clock.0.store(BEGIN.as_millis(), Ordering::SeqCst);
        assert_eq!(bench.due().await, ["sync/a"]);
        assert!(bench.claim(&name).await.is_some());
    }

    async fn work_goes_on_while_the_claim_is_renewed(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let mut claim = bench.claim(&name).await.unwrap();
        claim.taken -= RENEW_EVERY;
        bench.turn_clock(CLAIM_TTL);
        let until_renewed = async {
            while bench.state(&name).await == JobState::Abandoned {
                tokio::task::yield_now().await;
            }
            "done"
        };
        assert_eq!(bench.jobs.hold(&claim, until_renewed).await, Some("done"));
        bench.finish(&claim, None).await.unwrap();
    }

    async fn work_ends_with_its_claim(store: Engine) {
        let bench = Bench::new(store);
        let name = bench.schedule("sync/a", BEGIN).await;
        let mut claim = bench.claim(&name).await.unwrap();
        claim.taken -= RENEW_EVERY;
        bench.commit(bench.jobs.unschedule(Tx::new(), &name)).await.unwrap();
        assert_eq!(bench.jobs.hold(&claim, std::future::pending::<()>()).await, None);
    }

    #[tokio::test]
    async fn a_job_outlives_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let keyring = Arc::new(Keyring::generate());
        let clock = Arc::new(TurnedClock(AtomicI64::new(BEGIN.as_millis())));
        let open = || {
            let store = Arc::new(RedbStore::open(&dir.path().join("store")).unwrap());
            let jobs = Jobs::new(Records::new(store, keyring.clone()), clock.clone());
            Bench { jobs, clock: clock.clone() }
        };

        let bench = open();
        let name = bench.schedule("sync/a", BEGIN).await;
        bench.ask(&name, "first").await;
        bench.claim(&name).await.unwrap();
        bench.ask(&name, "second").await;
        drop(bench);

        let bench = open();
        assert_eq!(bench.state(&name).await, JobState::Claimed);
        assert_eq!(bench.jobs.release_abandoned().await.unwrap(), 1);
        for ask in ["first", "second"] {
            let claim = bench.claim(&name).await.unwrap();
            assert_eq!(
                (claim.payload.as_str(), bench.asked(&claim).await.unwrap()),
                ("sync/a", vec![ask.into()])
            );
            bench.finish(&claim, Some(BEGIN.after(MINUTE))).await.unwrap();
        }
        assert_eq!(bench.state(&name).await, JobState::Waiting);
    }

    #[test]
    fn names_are_segments_between_slashes() {
        for valid in ["sync/acme/fed_abcdefgh", "purge", "erase/acme/a/b@1"] {
            assert_eq!(name(valid).to_string(), valid);
        }
        for invalid in ["", "/", "a/", "/a", "a//b", "a\n", &"a".repeat(1025)] {
            assert_eq!(JobName::parse(invalid), Err(InvalidJobName));
        }
    }
}
