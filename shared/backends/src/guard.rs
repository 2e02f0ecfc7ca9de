//! What stands between callers and a store: a bulkhead that follows what the store takes, a circuit breaker, retries and
//! one deadline.
//!
//! There is one [`Guard`] per backend and credential. The decisions are pure (the breaker, the pace, the pauses); what is
//! left is waiting.

mod pace;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use scaivault_telemetry::Flow;
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use self::pace::{Pace, Place, Places};
use crate::budget::{Cost, Paid, Quota, Urgency};
use crate::error::BackendError;

/// Failures in a row that open the breaker.
const FAILURES_TO_OPEN: u32 = 5;
const SHORTEST_HOLD: Duration = Duration::from_secs(1);
const LONGEST_HOLD: Duration = Duration::from_secs(30);
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(20);
/// A store that asks for more than this is asked again anyway; one wrong header must not silence a backend for good.
const LONGEST_THROTTLE: Duration = Duration::from_secs(300);

/// How often a call is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    attempts: u32,
    manner: Manner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Takes any place at the store, and hears at once when there is none.
    Prompt,
    /// Takes one of the few places for work that nobody waits for. Where it is asked to slow down, or refused, it waits
    /// until its deadline; that costs no attempt.
    Patient,
}

impl Manner {
    fn urgency(self) -> Urgency {
        match self {
            Manner::Prompt => Urgency::Prompt,
            Manner::Patient => Urgency::Background,
        }
    }

    /// Until when a call may wait for its turn. One that is made with nothing left of its deadline can only time out,
    /// and five of them would pass for an outage of a store that is well.
    fn start_by(self, now: Instant, deadline: Instant) -> Instant {
        let left = deadline.saturating_duration_since(now);
        now + match self {
            Manner::Prompt => left / 2,
            Manner::Patient => left / 4 * 3,
        }
    }
}

impl Retry {
    /// Not again.
    pub const NEVER: Retry = Retry::attempts(1);
    /// Somebody waits for the answer: once more at most.
    pub const PROXIED_READ: Retry = Retry::attempts(2);
    /// Nobody waits for the answer: behind the reads that somebody waits for, and patient with a busy store.
    pub const BACKGROUND: Retry = Retry { attempts: 4, manner: Manner::Patient };

    /// `attempts` in all, at least one.
    pub const fn attempts(attempts: u32) -> Retry {
        Retry { attempts, manner: Manner::Prompt }
    }
}

/// The bulkhead's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most calls at the store, as long as it does not ask to be called less.
    pub in_flight: usize,
    /// Calls that wait for one of them to end. Any more are refused.
    pub waiting: usize,
    /// Most calls at the store that nobody waits for. The others wait without being refused.
    pub background: usize,
}

/// How a store is called now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flowing {
    /// Calls at once.
    pub concurrency: usize,
    /// Calls at once if it did not ask to be called less.
    pub most: usize,
    /// It is not called before that, if it asked for a pause.
    pub throttled_until: Option<Instant>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { in_flight: 64, waiting: 256, background: 16 }
    }
}

/// What the circuit breaker does with calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Lets them through.
    Closed,
    /// Refuses them.
    Open {
        /// When the store was given up.
        since: Instant,
        /// When one call is let through to try it.
        retry_at: Instant,
    },
    /// One call tries the store; the others are refused.
    HalfOpen {
        /// When the store was given up.
        since: Instant,
    },
}

impl BreakerState {
    /// Since when the store has been given up, if it is.
    pub fn open_since(self) -> Option<Instant> {
        match self {
            BreakerState::Closed => None,
            BreakerState::Open { since, .. } | BreakerState::HalfOpen { since } => Some(since),
        }
    }
}

/// How a call that was let through ended, as far as the breaker is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The store answered something, if only a refusal.
    Answered,
    Failed,
    /// The caller went away, or the store was not asked after all.
    Unknown,
}

/// In which role a call was let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Ordinary,
    Trial,
}

/// The circuit breaker as a state machine: no clock and no chance of its own.
#[derive(Debug)]
struct Breaker {
    state: BreakerState,
    failures: u32,
    hold: Duration,
}

impl Breaker {
    const fn new() -> Self {
        Breaker { state: BreakerState::Closed, failures: 0, hold: SHORTEST_HOLD }
    }

    /// Whether a call would be let through now; if not, when to ask again.
    fn check(&self, now: Instant) -> Result<Role, Duration> {
        match self.state {
            BreakerState::Closed => Ok(Role::Ordinary),
            BreakerState::Open { retry_at, .. } if retry_at <= now => Ok(Role::Trial),
            BreakerState::Open { retry_at, .. } => Err(retry_at - now),
            BreakerState::HalfOpen { .. } => Err(self.hold),
        }
    }

    /// Lets a call through, which then must be settled.
    fn admit(&mut self, now: Instant) -> Result<Role, Duration> {
        let role = self.check(now)?;
        if let (Role::Trial, Some(since)) = (role, self.state.open_since()) {
            self.state = BreakerState::HalfOpen { since };
        }
        Ok(role)
    }

    /// Takes note of how a call ended. `chance` is uniform in 0..1.
    fn settle(&mut self, role: Role, verdict: Verdict, now: Instant, chance: f64) {
        match (self.state, role, verdict) {
            (BreakerState::Closed, _, Verdict::Answered) => self.failures = 0,
            (BreakerState::Closed, _, Verdict::Failed) => {
                self.failures += 1;
                if self.failures >= FAILURES_TO_OPEN {
                    self.open(now, SHORTEST_HOLD, now, chance);
                }
            }
            (BreakerState::HalfOpen { .. }, Role::Trial, Verdict::Answered) => *self = Breaker::new(),
            (BreakerState::HalfOpen { since }, Role::Trial, Verdict::Failed) => {
                self.open(since, (self.hold * 2).min(LONGEST_HOLD), now, chance);
            }
            (BreakerState::HalfOpen { since }, Role::Trial, Verdict::Unknown) => {
                self.state = BreakerState::Open { since, retry_at: now };
            }
            // Calls from before the breaker opened end late and decide nothing.
            _ => {}
        }
    }

    fn open(&mut self, since: Instant, hold: Duration, now: Instant, chance: f64) {
        self.hold = hold;
        let retry_at = now + hold.mul_f64(0.5 + chance / 2.0);
        self.state = BreakerState::Open { since, retry_at };
    }
}

/// How long to wait after the `attempt`-th attempt failed: full jitter, but never before the store wants to be asked.
fn pause(attempt: u32, retry_after: Option<Duration>, chance: f64) -> Duration {
    match retry_after {
        // A store may name any number; only so much can be added to a time.
        Some(after) => after.min(LONGEST_THROTTLE) + RETRY_BASE.mul_f64(chance),
        None => {
            let most = RETRY_BASE.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(RETRY_CAP);
            most.mul_f64(chance)
        }
    }
}

/// Whether asking the same again may help.
fn is_retried(error: &BackendError) -> bool {
    error.is_outage() || matches!(error, BackendError::Throttled { .. })
}

/// The guard of one backend and credential.
pub struct Guard {
    in_flight: Places,
    waiting: Semaphore,
    background: Places,
    inner: Mutex<Inner>,
    published: watch::Sender<BreakerState>,
    flow: Arc<Flow>,
}

struct Inner {
    breaker: Breaker,
    pace: Pace,
    /// The store asked to be left alone until then.
    throttled_until: Option<Instant>,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("breaker", &self.state()).finish_non_exhaustive()
    }
}

impl Guard {
    /// A guard that has seen no failure yet.
    pub fn new(limits: Limits) -> Self {
        let pace = Pace::new(limits.in_flight, limits.background);
        let (concurrency, background) = pace.places();
        Guard {
            in_flight: Places::new(concurrency),
            waiting: Semaphore::new(limits.waiting),
            background: Places::new(background),
            inner: Mutex::new(Inner { breaker: Breaker::new(), pace, throttled_until: None }),
            published: watch::Sender::new(BreakerState::Closed),
            flow: Arc::new(Flow::new(concurrency as u64)),
        }
    }

    /// How the store is called now.
    pub fn flowing(&self) -> Flowing {
        let inner = self.lock();
        let now = Instant::now();
        Flowing {
            concurrency: inner.pace.places().0,
            most: inner.pace.most(),
            throttled_until: inner.throttled_until.filter(|until| *until > now),
        }
    }

    /// [`flowing`](Self::flowing) for metrics, kept up to date.
    pub fn flow(&self) -> Arc<Flow> {
        self.flow.clone()
    }

    /// What the breaker does now.
    pub fn state(&self) -> BreakerState {
        *self.published.borrow()
    }

    /// Follows what the breaker does.
    pub fn subscribe(&self) -> watch::Receiver<BreakerState> {
        self.published.subscribe()
    }

    /// Makes `call`, again if that may help, and never for longer than `deadline` in all. Each attempt costs `cost`.
    ///
    /// # Errors
    /// The last failure of the call; `Timeout` at the deadline; `Open`, `Busy` or `Throttled` without a call if the
    /// store is not to be asked now, or not that often.
    pub async fn call<T, F>(
        &self,
        retry: Retry,
        cost: Cost<'_>,
        deadline: Duration,
        mut call: impl FnMut() -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<T, BackendError>>,
    {
        let deadline = Instant::now() + deadline;
        let is_patient = retry.manner == Manner::Patient;
        let (mut calls, mut failures) = (0, 0);
        let mut told = None;
        loop {
            let (error, again) = match self.attempt(retry.manner, cost, deadline, &mut call).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => {
                    calls += 1;
                    let is_asked_to_wait = is_patient && matches!(error, BackendError::Throttled { .. });
                    failures += u32::from(!is_asked_to_wait);
                    told = Some(error.clone());
                    let again = is_retried(&error) && failures < retry.attempts;
                    (error, again)
                }
                Err(Refused(error)) => (error, is_patient),
            };
            let wake_at = Instant::now() + pause(calls.max(1), error.retry_after(), rand::random());
            // A store that named no time may have been given one.
            let wake_at = wake_at.max(self.lock().throttled_until.unwrap_or(wake_at));
            if !again || wake_at >= deadline {
                // Why the store was to be asked again says more than why it was not.
                return Err(told.unwrap_or(error));
            }
            sleep_until(wake_at).await;
        }
    }

    /// Counts a failure that was seen elsewhere, as if a call had ended with it.
    pub async fn count(&self, failure: BackendError) {
        let ended = || std::future::ready(Err::<(), _>(failure.clone()));
        // Whether the call was made or refused, the state is what it should be.
        let _ = self.call(Retry::NEVER, Cost::FREE, Duration::from_secs(1), ended).await;
    }

    async fn attempt<T, F>(
        &self,
        manner: Manner,
        cost: Cost<'_>,
        deadline: Instant,
        call: &mut impl FnMut() -> F,
    ) -> Result<Result<T, BackendError>, Refused>
    where
        F: Future<Output = Result<T, BackendError>>,
    {
        let start_by = || manner.start_by(Instant::now(), deadline);
        let urgency = manner.urgency();
        let _turn = match manner {
            Manner::Prompt => None,
            Manner::Patient => {
                Some(self.background.place(acquire(self.background.free(), start_by()).await?))
            }
        };
        let mut further = None;
        loop {
            // Asked twice: callers must not queue up for a store that is given up, and it may be while they queue.
            self.lock().check()?;
            let by = start_by();
            // Before the place: whoever waits for the budget must not keep one from those who need not.
            let paid = cost.pay(urgency, by).await.map_err(Refused::over_budget)?;
            let place = self.place(by).await?;
            let passage = self.admit(place)?;
            paid.spend();
            let further_paid = further.take().map(|(quota, paid): (Quota, Paid<'_>)| {
                paid.spend();
                quota
            });
            let purse = Arc::new(cost.purse(urgency, further_paid));
            let outcome = timeout_at(deadline, purse.around(call())).await;
            let Some(quota) = purse.unpaid() else {
                let outcome = outcome.unwrap_or(Err(BackendError::Timeout));
                passage.settle(outcome.as_ref().err());
                return Ok(outcome);
            };
            // The store did answer; what it is to be asked besides has to wait.
            passage.settle(None);
            let paid = cost.of(quota).pay(urgency, start_by()).await.map_err(Refused::over_budget)?;
            further = Some((quota, paid));
        }
    }

    async fn place(&self, deadline: Instant) -> Result<Place<'_>, Refused> {
        if let Ok(permit) = self.in_flight.free().try_acquire() {
            return Ok(self.in_flight.place(permit));
        }
        let _waiting = self.waiting.try_acquire().map_err(|_| Refused(BackendError::Busy))?;
        Ok(self.in_flight.place(acquire(self.in_flight.free(), deadline).await?))
    }

    fn admit<'g>(&'g self, place: Place<'g>) -> Result<Passage<'g>, Refused> {
        let mut inner = self.lock();
        inner.check()?;
        let began = Instant::now();
        let role = inner.breaker.admit(began).map_err(Refused::open)?;
        self.publish(&inner);
        Ok(Passage { guard: self, role, began, answer: Answer::Unknown, _place: place })
    }

    /// Makes as many places as the pace allows, if that has changed since `before`.
    fn resize(&self, before: (usize, usize), inner: &Inner) {
        let after = inner.pace.places();
        if after != before {
            self.in_flight.resize(before.0, after.0);
            self.background.resize(before.1, after.1);
            self.flow.limit(after.0 as u64);
        }
    }

    fn publish(&self, inner: &Inner) {
        self.published.send_if_modified(|published| {
            let changed = *published != inner.breaker.state;
            *published = inner.breaker.state;
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn acquire(places: &Semaphore, deadline: Instant) -> Result<SemaphorePermit<'_>, Refused> {
    let permit = timeout_at(deadline, places.acquire()).await.map_err(|_| Refused(BackendError::Busy))?;
    Ok(permit.expect("the semaphore is never closed"))
}

/// A call that was not made.
struct Refused(BackendError);

impl Refused {
    fn open(retry_after: Duration) -> Self {
        Refused(BackendError::Open { retry_after })
    }

    fn over_budget(retry_after: Duration) -> Self {
        Refused(BackendError::Throttled { retry_after: Some(retry_after) })
    }
}

impl Inner {
    fn check(&self) -> Result<(), Refused> {
        let now = Instant::now();
        if let Some(wait) = self.throttled_until.and_then(|until| until.checked_duration_since(now))
            && !wait.is_zero()
        {
            return Err(Refused(BackendError::Throttled { retry_after: Some(wait) }));
        }
        self.breaker.check(now).map(drop).map_err(Refused::open)
    }
}

/// How a call that was let through ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The store answered something, if only a refusal.
    Answered,
    /// It asked us to slow down.
    Throttled {
        retry_after: Option<Duration>,
    },
    Failed,
    /// The caller went away, or the store was not asked after all.
    Unknown,
}

impl Answer {
    /// Throttling slows, and never opens the breaker: it is an answer.
    fn verdict(self) -> Verdict {
        match self {
            Answer::Answered | Answer::Throttled { .. } => Verdict::Answered,
            Answer::Failed => Verdict::Failed,
            Answer::Unknown => Verdict::Unknown,
        }
    }
}

/// A call that was let through. It is settled in any case, also when its caller goes away: a trial that nobody ends
/// would keep the breaker half open for ever.
struct Passage<'g> {
    guard: &'g Guard,
    role: Role,
    began: Instant,
    answer: Answer,
    /// Given back last, when the number of places is right.
    _place: Place<'g>,
}

impl Passage<'_> {
    fn settle(mut self, error: Option<&BackendError>) {
        self.answer = match error {
            Some(BackendError::Throttled { retry_after }) => Answer::Throttled { retry_after: *retry_after },
            Some(error) if error.is_outage() => Answer::Failed,
            Some(error) if error.is_refusal() => Answer::Unknown,
            _ => Answer::Answered,
        };
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut inner = self.guard.lock();
        inner.breaker.settle(self.role, self.answer.verdict(), now, rand::random());
        self.guard.publish(&inner);
        let before = inner.pace.places();
        match self.answer {
            Answer::Answered => inner.pace.answered(),
            Answer::Throttled { retry_after } => {
                self.guard.flow.throttled();
                let pause = inner.pace.throttled(self.began, now);
                let pause = retry_after.map(|after| after.min(LONGEST_THROTTLE)).or(pause);
                inner.throttled_until = inner.throttled_until.max(pause.map(|pause| now + pause));
            }
            Answer::Failed | Answer::Unknown => {}
        }
        self.guard.resize(before, &inner);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::budget::{Budget, Limit, Quotas, Rate, extra};

    const SECOND: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(600);

    fn guard() -> Guard {
        Guard::new(Limits::default())
    }

    async fn one(guard: &Guard, outcome: Result<(), BackendError>) -> Result<(), BackendError> {
        guard.call(Retry::NEVER, Cost::FREE, SECOND, || std::future::ready(outcome.clone())).await
    }

    async fn fail(guard: &Guard, times: u32) {
        for _ in 0..times {
            assert_eq!(one(guard, Err(BackendError::Timeout)).await, Err(BackendError::Timeout));
        }
    }

    fn is_open(guard: &Guard) -> bool {
        matches!(guard.state(), BreakerState::Open { .. })
    }

    #[tokio::test(start_paused = true)]
    async fn five_failures_in_a_row_open_the_breaker() {
        let guard = guard();
        fail(&guard, 4).await;
        let answered = one(&guard, Err(BackendError::Forbidden)).await;
        assert_eq!(answered, Err(BackendError::Forbidden));
        fail(&guard, 4).await;
        assert_eq!(guard.state(), BreakerState::Closed);
        fail(&guard, 1).await;
        assert_eq!(guard.state().open_since(), Some(Instant::now()));
        assert!(matches!(one(&guard, Ok(())).await, Err(BackendError::Open { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn throttling_never_opens_it() {
        let guard = guard();
        for _ in 0..20 {
            let throttled = BackendError::Throttled { retry_after: None };
            assert!(one(&guard, Err(throttled)).await.is_err());
        }
        assert_eq!(guard.state(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn one_call_tries_a_given_up_store_and_its_success_closes_the_breaker() {
        let guard = guard();
        fail(&guard, 5).await;
        tokio::time::advance(SECOND).await;
        let trial = guard.call(Retry::NEVER, Cost::FREE, SECOND, async || {
            assert!(matches!(guard.state(), BreakerState::HalfOpen { .. }));
            assert!(matches!(one(&guard, Ok(())).await, Err(BackendError::Open { .. })));
            Ok(())
        });
        assert_eq!(trial.await, Ok(()));
        assert_eq!(guard.state(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn each_failed_trial_doubles_the_pause_up_to_thirty_seconds() {
        let (guard, start) = (guard(), Instant::now());
        fail(&guard, 5).await;
        for most in [1, 2, 4, 8, 16, 30, 30].map(Duration::from_secs) {
            let BreakerState::Open { since, retry_at } = guard.state() else { panic!("not open") };
            assert_eq!(since, start);
            let hold = retry_at - Instant::now();
            assert!(most / 2 <= hold && hold <= most, "{hold:?} of {most:?}");
            tokio::time::advance(hold).await;
            fail(&guard, 1).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_trial_whose_caller_goes_away_frees_its_place() {
        let guard = guard();
        fail(&guard, 5).await;
        tokio::time::advance(SECOND).await;
        let gone = guard.call(Retry::NEVER, Cost::FREE, LONG, std::future::pending::<Result<(), _>>);
        assert!(tokio::time::timeout(SECOND, gone).await.is_err());
        assert!(is_open(&guard));
        assert_eq!(one(&guard, Ok(())).await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn subscribers_see_the_breaker_open_and_close() {
        let guard = guard();
        let mut states = guard.subscribe();
        fail(&guard, 5).await;
        assert!(states.borrow_and_update().open_since().is_some());
        tokio::time::advance(SECOND).await;
        one(&guard, Ok(())).await.expect("a trial that succeeds");
        assert_eq!(*states.borrow_and_update(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_may_heal_is_tried_again() {
        for (error, calls) in [
            (BackendError::Unreachable("refused"), 2),
            (BackendError::Server { status: 503 }, 2),
            (BackendError::Throttled { retry_after: None }, 2),
            (BackendError::Forbidden, 1),
            (BackendError::NotFound, 1),
            (BackendError::InvalidAnswer("garbage"), 1),
        ] {
            let (guard, made) = (guard(), AtomicUsize::new(0));
            let outcome = guard.call(Retry::PROXIED_READ, Cost::FREE, LONG, || {
                made.fetch_add(1, Ordering::SeqCst);
                std::future::ready(Err::<(), _>(error.clone()))
            });
            assert_eq!(outcome.await, Err(error.clone()));
            assert_eq!(made.load(Ordering::SeqCst), calls, "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_holds_for_all_attempts_together() {
        let (guard, start) = (guard(), Instant::now());
        let slow = guard.call(Retry::attempts(9), Cost::FREE, 5 * SECOND, async || {
            tokio::time::sleep(2 * SECOND).await;
            Err::<(), _>(BackendError::Unreachable("broke"))
        });
        assert!(slow.await.is_err());
        assert!(start.elapsed() <= 5 * SECOND);
        let stuck =
            guard.call(Retry::PROXIED_READ, Cost::FREE, SECOND, std::future::pending::<Result<(), _>>);
        assert_eq!(stuck.await, Err(BackendError::Timeout));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_asks_for_a_pause_gets_it() {
        let (guard, start) = (guard(), Instant::now());
        let throttled = BackendError::Throttled { retry_after: Some(2 * SECOND) };
        let mut answers = vec![Ok(()), Err(throttled.clone())];
        let retried = guard.call(Retry::PROXIED_READ, Cost::FREE, LONG, || {
            std::future::ready(answers.pop().expect("two calls at most"))
        });
        assert_eq!(retried.await, Ok(()));
        assert!((2 * SECOND..3 * SECOND).contains(&start.elapsed()));

        assert_eq!(one(&guard, Err(throttled.clone())).await, Err(throttled.clone()));
        let refused = guard
            .call(Retry::PROXIED_READ, Cost::FREE, LONG, async || -> Result<(), _> { panic!("was called") });
        assert_eq!(refused.await, Err(throttled));
        tokio::time::advance(2 * SECOND).await;
        assert_eq!(one(&guard, Ok(())).await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_bulkhead_refuses_at_once_and_waiters_get_their_turn() {
        let guard = Arc::new(Guard::new(Limits { in_flight: 1, waiting: 1, background: 1 }));
        let call = || {
            let guard = guard.clone();
            tokio::spawn(async move {
                guard
                    .call(Retry::NEVER, Cost::FREE, LONG, async || {
                        tokio::time::sleep(SECOND).await;
                        Ok(())
                    })
                    .await
            })
        };
        let (first, second) = (call(), call());
        tokio::task::yield_now().await;
        assert_eq!(one(&guard, Ok(())).await, Err(BackendError::Busy));
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (Ok(()), Ok(())));
    }

    #[test]
    fn pauses_grow_up_to_the_cap_with_full_jitter() {
        let most = |attempt| pause(attempt, None, 1.0);
        assert_eq!(most(1), RETRY_BASE);
        assert_eq!(most(2), 2 * RETRY_BASE);
        assert_eq!(most(40), RETRY_CAP);
        assert_eq!(pause(3, None, 0.0), Duration::ZERO);
        assert_eq!(pause(1, Some(SECOND), 0.0), SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_never_fills_the_bulkhead() {
        let guard = Arc::new(Guard::new(Limits { in_flight: 4, waiting: 0, background: 2 }));
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let (guard, running, most) = (guard.clone(), running.clone(), most.clone());
            calls.spawn(async move {
                let call = async || {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    tokio::time::sleep(SECOND).await;
                    running.fetch_sub(1, Ordering::SeqCst);
                    Ok(())
                };
                guard.call(Retry::BACKGROUND, Cost::FREE, LONG, call).await
            });
        }
        tokio::task::yield_now().await;
        assert_eq!(one(&guard, Ok(())).await, Ok(()), "a proxied read finds a place");
        while let Some(outcome) = calls.join_next().await {
            assert_eq!(outcome.expect("no panic"), Ok(()));
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_waits_out_a_pause_and_a_busy_store() {
        let guard = guard();
        fail(&guard, 5).await;
        assert_eq!(guard.call(Retry::BACKGROUND, Cost::FREE, LONG, async || Ok(())).await, Ok(()));
        let asked = AtomicUsize::new(0);
        let throttled = guard.call(Retry::BACKGROUND, Cost::FREE, LONG, async || {
            match asked.fetch_add(1, Ordering::SeqCst) {
                0..10 => Err(BackendError::Throttled { retry_after: None }),
                _ => Ok(()),
            }
        });
        assert_eq!(throttled.await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_gives_up_after_a_few_failures_or_at_its_deadline() {
        let guard = guard();
        let asked = AtomicUsize::new(0);
        let broken = guard.call(Retry::BACKGROUND, Cost::FREE, LONG, async || {
            asked.fetch_add(1, Ordering::SeqCst);
            Err::<(), _>(BackendError::Timeout)
        });
        assert_eq!(broken.await, Err(BackendError::Timeout));
        assert_eq!(asked.load(Ordering::SeqCst), 4);
        let start = Instant::now();
        let throttled = BackendError::Throttled { retry_after: Some(SECOND) };
        let busy =
            guard.call(Retry::BACKGROUND, Cost::FREE, SECOND * 9, async || Err::<(), _>(throttled.clone()));
        assert_eq!(busy.await, Err(throttled.clone()));
        assert!(start.elapsed() < SECOND * 9);
    }

    fn budget(calls: u32) -> Arc<Budget> {
        let rate = Limit::Rate(Rate::per(calls, SECOND));
        Arc::new(Budget::new(Quotas { values: rate, ..Quotas::unlimited() }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_herd_on_a_thousand_names_stays_under_the_rate() {
        let (guard, budget, start) = (Arc::new(guard()), budget(100), Instant::now());
        let (made, refused) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let mut herd = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let (guard, budget, made, refused) =
                (guard.clone(), budget.clone(), made.clone(), refused.clone());
            herd.spawn(async move {
                let call = async || {
                    made.lock().expect("no panic").push(start.elapsed());
                    Ok(())
                };
                let cost = Cost::one(&budget, Quota::Values);
                match guard.call(Retry::PROXIED_READ, cost, 10 * SECOND, call).await {
                    Err(BackendError::Throttled { retry_after: Some(_) }) => {
                        assert_eq!(start.elapsed(), Duration::ZERO, "who cannot be served hears so at once");
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                    outcome => assert_eq!(outcome, Ok(())),
                }
            });
        }
        herd.join_all().await;
        let made = made.lock().expect("no panic").clone();
        assert_eq!(made.len() + refused.load(Ordering::SeqCst), 1000);
        assert!(made.len() > 400, "the budget is used: {}", made.len());
        for first in &made {
            let second = made.iter().filter(|time| (*first..*first + SECOND).contains(*time)).count();
            assert!(second <= 100, "{second} calls in the second after {first:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_the_budget_has_time_left_for_the_answer() {
        let (guard, budget, start) = (Arc::new(guard()), budget(10), Instant::now());
        let mut herd = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let (guard, budget) = (guard.clone(), budget.clone());
            herd.spawn(async move {
                let call = async || {
                    tokio::time::sleep(SECOND / 3).await;
                    Ok(())
                };
                let outcome =
                    guard.call(Retry::PROXIED_READ, Cost::one(&budget, Quota::Values), SECOND, call);
                (outcome.await, start.elapsed())
            });
        }
        let (served, refused): (Vec<_>, Vec<_>) =
            herd.join_all().await.into_iter().partition(|(outcome, _)| outcome.is_ok());
        assert!(served.len() >= 5, "{}", served.len());
        for (outcome, after) in refused {
            assert!(matches!(outcome, Err(BackendError::Throttled { retry_after: Some(_) })), "{outcome:?}");
            assert_eq!(after, Duration::ZERO, "who cannot be served in time hears so at once");
        }
        assert_eq!(guard.state(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_a_place_has_time_left_for_the_answer() {
        let guard = Arc::new(Guard::new(Limits { in_flight: 1, waiting: 64, background: 1 }));
        let mut herd = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let guard = guard.clone();
            herd.spawn(async move {
                let call = async || {
                    tokio::time::sleep(SECOND / 3).await;
                    Ok(())
                };
                guard.call(Retry::NEVER, Cost::FREE, SECOND, call).await
            });
        }
        let outcomes = herd.join_all().await;
        assert!(
            outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(BackendError::Busy))),
            "{outcomes:?}"
        );
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_calls_that_take_a_further_one_keep_to_its_quota_and_end() {
        let (guard, budget) = (Arc::new(guard()), Arc::new(Budget::new(Quotas::gcp())));
        let further = Arc::new(Mutex::new(Vec::new()));
        let mut sync = tokio::task::JoinSet::new();
        for _ in 0..64 {
            let (guard, budget, further) = (guard.clone(), budget.clone(), further.clone());
            sync.spawn(async move {
                for _ in 0..16 {
                    let call = async || {
                        extra::ask(Quota::Metadata)?;
                        further.lock().expect("no panic").push(Instant::now());
                        Err::<(), _>(BackendError::NotFound)
                    };
                    let cost = Cost::one(&budget, Quota::Values);
                    let outcome = guard.call(Retry::BACKGROUND, cost, 80 * SECOND, call).await;
                    assert_eq!(outcome, Err(BackendError::NotFound));
                }
            });
        }
        sync.join_all().await;
        let further = further.lock().expect("no panic").clone();
        assert_eq!(further.len(), 64 * 16);
        for (index, first) in further.iter().enumerate() {
            let minute = further[index..].iter().take_while(|time| **time < *first + 60 * SECOND).count();
            assert!(minute <= 600, "{minute} in a minute");
        }
        assert_eq!(guard.flowing(), Flowing { concurrency: 64, most: 64, throttled_until: None });
    }

    #[tokio::test(start_paused = true)]
    async fn a_prompt_call_waits_for_its_further_one_only_if_there_is_time() {
        let (guard, budget) = (guard(), Arc::new(Budget::new(Quotas::gcp())));
        budget.debit(Quota::Metadata, 60);
        let asked = AtomicUsize::new(0);
        let call = async || {
            asked.fetch_add(1, Ordering::SeqCst);
            extra::ask(Quota::Metadata)
        };
        let cost = Cost::one(&budget, Quota::Values);
        assert_eq!(guard.call(Retry::PROXIED_READ, cost, SECOND, call).await, Ok(()));
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        assert!(budget.remaining()[1].now < 1.0, "it is counted");
        let refused = guard.call(Retry::PROXIED_READ, cost, SECOND / 10, call).await;
        assert!(matches!(refused, Err(BackendError::Throttled { retry_after: Some(_) })), "{refused:?}");
        assert_eq!(guard.state(), BreakerState::Closed);
        assert_eq!(guard.flowing().concurrency, 64, "the store asked for nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_sync_at_full_speed_leaves_reads_their_reserve() {
        let (guard, budget) = (Arc::new(guard()), budget(1000));
        let mut sync = tokio::task::JoinSet::new();
        for _ in 0..500 {
            let (guard, budget) = (guard.clone(), budget.clone());
            let call = async move {
                let cost = Cost::one(&budget, Quota::Values);
                guard.call(Retry::BACKGROUND, cost, LONG, async || Ok(())).await
            };
            sync.spawn(call);
        }
        tokio::time::sleep(SECOND / 10).await;
        let start = Instant::now();
        for _ in 0..20 {
            let cost = Cost::one(&budget, Quota::Values);
            assert_eq!(guard.call(Retry::PROXIED_READ, cost, SECOND, async || Ok(())).await, Ok(()));
        }
        assert_eq!(start.elapsed(), Duration::ZERO, "no read has waited");
        assert!(sync.join_all().await.into_iter().all(|call| call.is_ok()), "and the sync gets done");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_was_not_made_costs_nothing() {
        let (guard, budget) = (guard(), budget(100));
        fail(&guard, 5).await;
        let cost = Cost::one(&budget, Quota::Values);
        let refused = guard.call(Retry::PROXIED_READ, cost, SECOND, async || Ok(())).await;
        assert!(matches!(refused, Err(BackendError::Open { .. })));
        assert_eq!(budget.remaining()[0].now, 10.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_throttling_store_is_called_less_and_then_as_much_as_before() {
        let guard = guard();
        let throttled = BackendError::Throttled { retry_after: None };
        let seen: Vec<_> = [32, 16, 8, 4, 2, 1].into();
        for expected in seen {
            assert!(one(&guard, Err(throttled.clone())).await.is_err());
            assert_eq!(guard.flowing().concurrency, expected);
            tokio::time::advance(SECOND).await;
        }
        assert!(one(&guard, Err(throttled.clone())).await.is_err());
        let until = guard.flowing().throttled_until.expect("even one at a time is too much");
        let refused = guard.call(Retry::PROXIED_READ, Cost::FREE, SECOND, async || -> Result<(), _> {
            panic!("was called")
        });
        assert_eq!(refused.await, Err(BackendError::Throttled { retry_after: Some(until - Instant::now()) }));
        assert_eq!(guard.state(), BreakerState::Closed, "throttling is no outage");
        tokio::time::advance(SECOND).await;
        for _ in 0..3000 {
            assert_eq!(one(&guard, Ok(())).await, Ok(()));
        }
        assert_eq!(guard.flowing(), Flowing { concurrency: 64, most: 64, throttled_until: None });
    }

    #[tokio::test(start_paused = true)]
    async fn calls_at_once_keep_to_the_lowered_limit() {
        let guard = Arc::new(guard());
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let herd = |calls: usize, outcome: Result<(), BackendError>| {
            let (guard, running, most) = (guard.clone(), running.clone(), most.clone());
            async move {
                most.store(0, Ordering::SeqCst);
                let mut herd = tokio::task::JoinSet::new();
                for _ in 0..calls {
                    let (guard, running, most, outcome) =
                        (guard.clone(), running.clone(), most.clone(), outcome.clone());
                    herd.spawn(async move {
                        let call = async || {
                            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            tokio::time::sleep(SECOND / 10).await;
                            running.fetch_sub(1, Ordering::SeqCst);
                            outcome.clone()
                        };
                        guard.call(Retry::NEVER, Cost::FREE, LONG, call).await
                    });
                }
                herd.join_all().await;
                most.load(Ordering::SeqCst)
            }
        };
        assert_eq!(herd(64, Err(BackendError::Throttled { retry_after: None })).await, 64);
        assert_eq!(herd(40, Err(BackendError::NotFound)).await, 32);
        let recovering = herd(300, Ok(())).await;
        assert!((33..64).contains(&recovering), "{recovering}");
    }
}
