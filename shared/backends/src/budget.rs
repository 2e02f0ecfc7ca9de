//! How many calls a store's quotas leave us, and who may make the next one.
//!
//! There is one [`Budget`] per credential: a token bucket for each quota of the store. A call that somebody waits for
//! takes the next token, if need be one that is yet to come, and is refused at once if that would come too late. Work
//! that nobody waits for takes only what leaves a reserve, so a sync never uses up what reads need.
//!
//! The buckets know no clock: they are told the time.

pub(crate) mod extra;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use scaivault_domain::backend::Target;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};

pub use scaivault_domain::budget::Share;

use self::extra::Purse;

/// How much of a window's calls may be made at once; the rest comes evenly. Together they are the quota: no window of
/// the store's, wherever it begins, sees more.
const BURST: f64 = 0.1;
/// How much of a bucket is left for calls that somebody waits for.
const RESERVE: f64 = 0.2;
/// How often waiting background work looks again: its part may have grown meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// What rounding may take from a token.
const ROUNDING: f64 = 1e-6;

/// Which of a store's quotas a call uses up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quota {
    /// Reads of values.
    Values,
    /// What is asked of one secret without its value.
    Metadata,
    /// Listings, and probes, which are the shortest of them.
    Lists,
    /// Reads of many values with one call.
    Batches,
}

impl Quota {
    /// Every quota.
    pub const ALL: [Quota; 4] = [Quota::Values, Quota::Metadata, Quota::Lists, Quota::Batches];

    /// The name in status.
    pub fn as_str(self) -> &'static str {
        match self {
            Quota::Values => "values",
            Quota::Metadata => "metadata",
            Quota::Lists => "lists",
            Quota::Batches => "batches",
        }
    }
}

/// So many calls in so much time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    calls: f64,
    window: Duration,
}

impl Rate {
    /// `calls` in each `window`, whenever it begins.
    pub const fn per(calls: u32, window: Duration) -> Rate {
        Rate { calls: calls as f64, window }
    }

    fn part(self, share: Share) -> Rate {
        Rate { calls: self.calls * share.get(), ..self }
    }

    /// How many calls may be made at once. One always may, or there would never be any.
    fn burst(self) -> f64 {
        (self.calls * BURST).max(1.0)
    }

    /// How many come in a second. Less than two in a window cannot be kept exactly, with one at once.
    fn per_second(self) -> f64 {
        (self.calls - self.burst()).max(self.calls / 2.0) / self.window.as_secs_f64()
    }
}

/// What limits the calls of one quota.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Nothing.
    Unlimited,
    /// A rate of its own.
    Rate(Rate),
    /// The rate of another quota, with which it is counted together.
    With(Quota),
}

/// The quotas of a store.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quotas {
    /// Of [`Quota::Values`].
    pub values: Limit,
    /// Of [`Quota::Metadata`].
    pub metadata: Limit,
    /// Of [`Quota::Lists`].
    pub lists: Limit,
    /// Of [`Quota::Batches`]; unlimited where there are none.
    pub batches: Limit,
}

impl Quotas {
    /// AWS Secrets Manager, per account and region: `GetSecretValue` (with `DescribeSecret`) 10,000 a second,
    /// `ListSecretVersionIds` 50, `ListSecrets` and `BatchGetSecretValue` 100 each. Source: "AWS Secrets Manager quotas" in
    /// its user guide.
    pub const fn aws() -> Quotas {
        const SECOND: Duration = Duration::from_secs(1);
        Quotas {
            values: Limit::Rate(Rate::per(10_000, SECOND)),
            metadata: Limit::Rate(Rate::per(50, SECOND)),
            lists: Limit::Rate(Rate::per(100, SECOND)),
            batches: Limit::Rate(Rate::per(100, SECOND)),
        }
    }

    /// Azure Key Vault, per vault: 4,000 transactions of secrets in 10 seconds, of whatever kind. Source: "Azure Key Vault
    /// service limits".
    pub const fn azure() -> Quotas {
        Quotas {
            values: Limit::Rate(Rate::per(4000, Duration::from_secs(10))),
            metadata: Limit::With(Quota::Values),
            lists: Limit::With(Quota::Values),
            batches: Limit::Unlimited,
        }
    }

    /// Google Secret Manager, per project: 90,000 accesses a minute and 600 reads of anything else, listings among them.
    /// Source: "Quotas and limits" of Secret Manager.
    pub const fn gcp() -> Quotas {
        const MINUTE: Duration = Duration::from_secs(60);
        Quotas {
            values: Limit::Rate(Rate::per(90_000, MINUTE)),
            metadata: Limit::Rate(Rate::per(600, MINUTE)),
            lists: Limit::With(Quota::Metadata),
            batches: Limit::Unlimited,
        }
    }

    /// A store without quotas of its own, such as Vault: what it can take is learnt from its answers.
    pub const fn unlimited() -> Quotas {
        Quotas {
            values: Limit::Unlimited,
            metadata: Limit::Unlimited,
            lists: Limit::Unlimited,
            batches: Limit::Unlimited,
        }
    }

    /// The quotas of a store.
    pub const fn of(target: &Target) -> Quotas {
        match target {
            Target::HashicorpVault(_) => Quotas::unlimited(),
            Target::AwsSecretsManager(_) => Quotas::aws(),
            Target::AzureKeyVault(_) => Quotas::azure(),
            Target::GoogleSecretManager(_) => Quotas::gcp(),
        }
    }

    fn limit(&self, quota: Quota) -> Limit {
        match quota {
            Quota::Values => self.values,
            Quota::Metadata => self.metadata,
            Quota::Lists => self.lists,
            Quota::Batches => self.batches,
        }
    }
}

/// Whether somebody waits for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody does: it takes any token.
    Prompt,
    /// Nobody does: it leaves the reserve.
    Background,
}

/// How much is left of a quota.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remaining {
    /// Of which.
    pub quota: Quota,
    /// Calls a second that can be kept up.
    pub per_second: f64,
    /// Calls that could be made at once after a pause.
    pub burst: f64,
    /// Calls that can be made at once now.
    pub now: f64,
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    whole: Rate,
    rate: Rate,
    /// Below zero, these tokens are promised to calls that wait for them.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Bucket { whole: rate, rate, tokens: rate.burst(), filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate.per_second()).min(self.rate.burst());
        self.filled = self.filled.max(now);
    }

    fn scale(&mut self, share: Share, now: Instant) {
        self.fill(now);
        self.rate = self.whole.part(share);
        self.tokens = self.tokens.min(self.rate.burst());
    }

    /// How long until there are `tokens`.
    fn wait(&self, tokens: f64) -> Duration {
        let missing = tokens - self.tokens;
        if missing <= ROUNDING {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(missing / self.rate.per_second()).unwrap_or(Duration::MAX)
    }

    /// Takes the next token and says how long until it is there, unless that is longer than `patience`.
    fn take(&mut self, now: Instant, patience: Duration) -> Result<Duration, Duration> {
        self.fill(now);
        let wait = self.wait(1.0);
        if wait > patience {
            return Err(wait);
        }
        self.tokens -= 1.0;
        Ok(wait)
    }

    /// Takes a token beyond the reserve, or says when to look again.
    fn take_spare(&mut self, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        // The smallest bucket has room for one token and no reserve.
        let reserve = (self.rate.burst() * RESERVE).min(self.rate.burst() - 1.0);
        let wait = self.wait(1.0 + reserve);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.tokens -= 1.0;
        Ok(())
    }
}

struct Pool {
    bucket: Mutex<Bucket>,
    /// Background work waits one behind the other, so that nobody is passed over.
    turn: Semaphore,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a token that somebody waits for.
    async fn prompt(&self, deadline: Instant) -> Result<Paid<'_>, Duration> {
        let now = Instant::now();
        let wait = self.lock().take(now, deadline.saturating_duration_since(now))?;
        // Whoever stops waiting gives the token back.
        let paid = Paid(Some(self));
        if !wait.is_zero() {
            sleep(wait).await;
        }
        Ok(paid)
    }

    /// Takes a token that is there now and that nobody waits for.
    fn at_once(&self, urgency: Urgency) -> bool {
        let now = Instant::now();
        match urgency {
            Urgency::Prompt => self.lock().take(now, Duration::ZERO).is_ok(),
            Urgency::Background => {
                let Ok(_turn) = self.turn.try_acquire() else { return false };
                self.lock().take_spare(now).is_ok()
            }
        }
    }

    /// Waits for a token that leaves the reserve.
    async fn background(&self, deadline: Instant) -> Result<Paid<'_>, Duration> {
        let turn = timeout_at(deadline, self.turn.acquire()).await;
        let Ok(_turn) = turn else { return Err(self.lock().wait(1.0)) };
        loop {
            let now = Instant::now();
            let Err(wait) = self.lock().take_spare(now) else { return Ok(Paid(Some(self))) };
            if wait > deadline.saturating_duration_since(now) {
                return Err(wait);
            }
            sleep(wait.min(LOOK_AGAIN)).await;
        }
    }
}

/// What a credential may ask of its store. Everybody who uses the credential shares it.
pub struct Budget {
    /// Which pool each quota is taken from.
    taken_from: [Option<Quota>; Quota::ALL.len()],
    pools: [Option<Pool>; Quota::ALL.len()],
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("taken_from", &self.taken_from).finish_non_exhaustive()
    }
}

impl Budget {
    /// All of `quotas`.
    pub fn new(quotas: Quotas) -> Self {
        let now = Instant::now();
        Budget {
            taken_from: Quota::ALL.map(|quota| match quotas.limit(quota) {
                Limit::Unlimited => None,
                Limit::Rate(_) => Some(quota),
                Limit::With(other) => Some(other),
            }),
            pools: Quota::ALL.map(|quota| match quotas.limit(quota) {
                Limit::Rate(rate) => {
                    Some(Pool { bucket: Mutex::new(Bucket::new(rate, now)), turn: Semaphore::new(1) })
                }
                Limit::Unlimited | Limit::With(_) => None,
            }),
        }
    }

    /// Whether there is nothing to share and nothing to wait for.
    pub fn is_unlimited(&self) -> bool {
        self.pools.iter().all(Option::is_none)
    }

    /// Leaves `share` of every quota.
    pub fn scale(&self, share: Share) {
        self.pools.iter().flatten().for_each(|pool| pool.lock().scale(share, Instant::now()));
    }

    /// Leaves `share` of what reads of values are counted with, and all of the rest: for whoever shares with those who
    /// only read values.
    pub fn scale_values(&self, share: Share) {
        if let Some(pool) = self.pool(Quota::Values) {
            pool.lock().scale(share, Instant::now());
        }
    }

    /// Counts calls that were made without asking first, e.g. the second and third call of one step. Those who ask next
    /// wait the longer for it, background work first.
    pub fn debit(&self, quota: Quota, calls: u32) {
        if let Some(pool) = self.pool(quota) {
            let mut bucket = pool.lock();
            bucket.fill(Instant::now());
            bucket.tokens -= f64::from(calls);
        }
    }

    /// How much is left of each quota that is limited.
    pub fn remaining(&self) -> Vec<Remaining> {
        let of = |quota| {
            let mut bucket = self.pool(quota)?.lock();
            bucket.fill(Instant::now());
            let (per_second, burst) = (bucket.rate.per_second(), bucket.rate.burst());
            Some(Remaining { quota, per_second, burst, now: bucket.tokens.max(0.0) })
        };
        Quota::ALL.into_iter().filter_map(of).collect()
    }

    /// Waits until a call of `quota` may be made; the call is counted unless [`Paid`] is dropped.
    ///
    /// # Errors
    /// When to ask again, at once, if a token came only after `deadline`.
    pub async fn pay(&self, quota: Quota, urgency: Urgency, deadline: Instant) -> Result<Paid<'_>, Duration> {
        match (self.pool(quota), urgency) {
            (None, _) => Ok(Paid(None)),
            (Some(pool), Urgency::Prompt) => pool.prompt(deadline).await,
            (Some(pool), Urgency::Background) => pool.background(deadline).await,
        }
    }

    fn pool(&self, quota: Quota) -> Option<&Pool> {
        let from = self.taken_from[quota as usize]?;
        self.pools[from as usize].as_ref()
    }
}

/// A token that was taken. Dropping it gives it back.
#[must_use = "a token that is dropped is given back"]
pub struct Paid<'b>(Option<&'b Pool>);

impl fmt::Debug for Paid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paid").finish_non_exhaustive()
    }
}

impl Paid<'_> {
    /// The call is made.
    pub fn spend(mut self) {
        self.0 = None;
    }
}

impl Drop for Paid<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.0 {
            pool.lock().tokens += 1.0;
        }
    }
}

/// What a call takes from a budget.
#[derive(Clone, Copy, Debug)]
pub struct Cost<'b>(Option<(&'b Arc<Budget>, Quota)>);

impl<'b> Cost<'b> {
    /// Nothing: no call is made, or nobody counts it.
    pub const FREE: Cost<'static> = Cost(None);

    /// One call of `quota`.
    pub const fn one(budget: &'b Arc<Budget>, quota: Quota) -> Cost<'b> {
        Cost(Some((budget, quota)))
    }

    /// A call of another quota from the same budget.
    pub(crate) fn of(self, quota: Quota) -> Cost<'b> {
        Cost(self.0.map(|(budget, _)| (budget, quota)))
    }

    /// What the calls behind this one are paid from.
    pub(crate) fn purse(self, urgency: Urgency, paid: Option<Quota>) -> Purse {
        Purse::new(self.0.map(|(budget, _)| budget.clone()), urgency, paid)
    }

    pub(crate) async fn pay(self, urgency: Urgency, deadline: Instant) -> Result<Paid<'b>, Duration> {
        match self.0 {
            Some((budget, quota)) => budget.pay(quota, urgency, deadline).await,
            None => Ok(Paid(None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_secs(60);

    fn budget(calls: u32) -> Arc<Budget> {
        Arc::new(Budget::new(Quotas { values: Limit::Rate(Rate::per(calls, SECOND)), ..Quotas::unlimited() }))
    }

    async fn pay(budget: &Budget, urgency: Urgency, within: Duration) -> Result<(), Duration> {
        budget.pay(Quota::Values, urgency, Instant::now() + within).await.map(Paid::spend)
    }

    fn left(budget: &Budget) -> f64 {
        budget.remaining()[0].now
    }

    #[test]
    fn no_window_sees_more_calls_than_the_quota_allows() {
        for (calls, window) in [(100, SECOND), (4000, 10 * SECOND), (600, MINUTE), (2, SECOND)] {
            let start = Instant::now();
            let mut bucket = Bucket::new(Rate::per(calls, window), start);
            // Whoever takes whatever there is: all at once, then evenly.
            let mut waits = Vec::new();
            for _ in 0..3 * calls {
                waits.push(bucket.take(start, Duration::MAX).expect("endless patience"));
            }
            let times: Vec<_> = waits.iter().map(|wait| start + *wait).collect();
            for (index, first) in times.iter().enumerate() {
                let in_window = times[index..].iter().take_while(|time| **time < *first + window).count();
                assert!(in_window <= calls as usize, "{in_window} calls of {calls} in {window:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_prompt_calls_keep_to_the_rate() {
        let (budget, start) = (budget(100), Instant::now());
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let budget = budget.clone();
            calls.spawn(async move { pay(&budget, Urgency::Prompt, MINUTE).await.map(|()| start.elapsed()) });
        }
        let mut times: Vec<_> =
            calls.join_all().await.into_iter().map(|time| time.expect("it waited")).collect();
        times.sort();
        for second in 0..11 {
            let second = SECOND * second;
            let made = times.iter().filter(|time| (second..second + SECOND).contains(*time)).count();
            assert!(made <= 100, "{made} calls in the second after {second:?}");
        }
        assert!(times[999] <= 11 * SECOND + SECOND / 5, "and no slower than that: {:?}", times[999]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_prompt_call_that_would_come_too_late_hears_so_at_once() {
        let (budget, start) = (budget(10), Instant::now());
        assert_eq!(pay(&budget, Urgency::Prompt, SECOND).await, Ok(()));
        let refused = pay(&budget, Urgency::Prompt, Duration::from_millis(10)).await;
        let after = refused.expect_err("the next token is a ninth of a second away");
        assert!(Duration::from_millis(100) < after && after < Duration::from_millis(120), "{after:?}");
        assert_eq!(start.elapsed(), Duration::ZERO);
        tokio::time::sleep(after).await;
        assert_eq!(pay(&budget, Urgency::Prompt, Duration::ZERO).await, Ok(()), "the refused took nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_leaves_the_reserve() {
        let budget = budget(1000);
        for _ in 0..80 {
            assert_eq!(pay(&budget, Urgency::Background, Duration::ZERO).await, Ok(()));
        }
        assert!(pay(&budget, Urgency::Background, Duration::ZERO).await.is_err());
        for _ in 0..20 {
            assert_eq!(pay(&budget, Urgency::Prompt, Duration::ZERO).await, Ok(()));
        }
        assert!(pay(&budget, Urgency::Prompt, Duration::ZERO).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn prompt_calls_go_before_background_work_when_both_wait() {
        let budget = budget(10);
        pay(&budget, Urgency::Prompt, SECOND).await.expect("the first token");
        let sync = tokio::spawn({
            let budget = budget.clone();
            async move { pay(&budget, Urgency::Background, MINUTE).await.map(|()| Instant::now()) }
        });
        tokio::task::yield_now().await;
        let mut last_read = Instant::now();
        for _ in 0..20 {
            pay(&budget, Urgency::Prompt, MINUTE).await.expect("it waits for its turn");
            last_read = Instant::now();
        }
        let synced = sync.await.expect("no panic").expect("it waits, and then it is its turn");
        assert!(synced > last_read);
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_waits_one_behind_the_other_and_all_of_it_gets_through() {
        let budget = budget(100);
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let budget = budget.clone();
            calls.spawn(async move { pay(&budget, Urgency::Background, MINUTE).await });
        }
        assert!(calls.join_all().await.into_iter().all(|call| call.is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_stops_waiting_gives_the_token_back() {
        let budget = budget(10);
        pay(&budget, Urgency::Prompt, SECOND).await.expect("the first token");
        let gone = tokio::time::timeout(Duration::from_millis(1), pay(&budget, Urgency::Prompt, SECOND));
        assert!(gone.await.is_err());
        tokio::time::sleep(SECOND).await;
        assert_eq!(left(&budget), 1.0);
        drop(budget.pay(Quota::Values, Urgency::Prompt, Instant::now()).await.expect("a token"));
        assert_eq!(left(&budget), 1.0, "a call that was not made costs nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn parts_add_up_to_the_whole() {
        let (whole, part) = (budget(1000), budget(1000));
        part.scale(Share::among(4));
        let (whole, part) = (whole.remaining()[0], part.remaining()[0]);
        assert_eq!((part.per_second * 4.0, part.burst * 4.0), (whole.per_second, whole.burst));
        assert_eq!(part.now, part.burst);
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_that_grows_is_not_filled_at_once() {
        let budget = budget(1000);
        budget.scale(Share::among(10));
        assert_eq!(left(&budget), 10.0);
        budget.scale(Share::WHOLE);
        assert_eq!(left(&budget), 10.0);
        tokio::time::sleep(SECOND).await;
        assert_eq!(left(&budget), 100.0);
    }

    #[tokio::test(start_paused = true)]
    async fn even_the_smallest_part_lets_everybody_through_in_the_end() {
        let budget = budget(10);
        budget.scale(Share::among(1000));
        for urgency in [Urgency::Prompt, Urgency::Background] {
            assert_eq!(pay(&budget, urgency, 2 * 600 * SECOND).await, Ok(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_were_not_asked_for_make_the_next_wait() {
        let budget = budget(100);
        budget.debit(Quota::Values, 100);
        assert_eq!(left(&budget), 0.0);
        let after = pay(&budget, Urgency::Prompt, Duration::ZERO).await.expect_err("ninety are owed");
        assert!(after > SECOND, "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn quotas_that_a_store_counts_together_are_one() {
        let azure = Budget::new(Quotas::azure());
        azure.debit(Quota::Lists, 100);
        let left: Vec<_> = azure.remaining().iter().map(|remaining| remaining.now).collect();
        assert_eq!(left, [300.0, 300.0, 300.0]);
        let gcp = Budget::new(Quotas::gcp());
        gcp.debit(Quota::Lists, 60);
        let left: Vec<_> = gcp.remaining().iter().map(|remaining| remaining.now).collect();
        assert_eq!(left, [9000.0, 0.0, 0.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_shares_with_readers_keeps_all_of_the_rest() {
        let aws = Budget::new(Quotas::aws());
        aws.scale_values(Share::among(2));
        let bursts: Vec<_> = aws.remaining().iter().map(|remaining| remaining.burst).collect();
        assert_eq!(bursts, [500.0, 5.0, 10.0, 10.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_without_quotas_is_never_waited_for() {
        let budget = Budget::new(Quotas::unlimited());
        assert!(budget.is_unlimited() && budget.remaining().is_empty());
        for quota in Quota::ALL {
            for urgency in [Urgency::Prompt, Urgency::Background] {
                budget.pay(quota, urgency, Instant::now()).await.expect("no limit").spend();
            }
        }
    }
}
