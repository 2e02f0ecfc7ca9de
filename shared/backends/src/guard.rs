//! What stands between callers and a store: a bulkhead, a circuit breaker, retries and one deadline.
//!
//! There is one [`Guard`] per backend and credential. The decisions are pure (the breaker, the pauses); what is left is
//! waiting.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

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
    /// Calls at the store.
    pub in_flight: usize,
    /// Calls that wait for one of them to end. Any more are refused.
    pub waiting: usize,
    /// Calls at the store that nobody waits for. The others wait without being refused.
    pub background: usize,
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
    in_flight: Semaphore,
    waiting: Semaphore,
    background: Semaphore,
    inner: Mutex<Inner>,
    published: watch::Sender<BreakerState>,
}

struct Inner {
    breaker: Breaker,
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
        Guard {
            in_flight: Semaphore::new(limits.in_flight),
            waiting: Semaphore::new(limits.waiting),
            background: Semaphore::new(limits.background),
            inner: Mutex::new(Inner { breaker: Breaker::new(), throttled_until: None }),
            published: watch::Sender::new(BreakerState::Closed),
        }
    }

    /// What the breaker does now.
    pub fn state(&self) -> BreakerState {
        *self.published.borrow()
    }

    /// Follows what the breaker does.
    pub fn subscribe(&self) -> watch::Receiver<BreakerState> {
        self.published.subscribe()
    }

    /// Makes `call`, again if that may help, and never for longer than `deadline` in all.
    ///
    /// # Errors
    /// The last failure of the call; `Timeout` at the deadline; `Open`, `Busy` or `Throttled` without a call if the
    /// store is not to be asked now.
    pub async fn call<T, F>(
        &self,
        retry: Retry,
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
            let (error, again) = match self.attempt(retry.manner, deadline, &mut call).await {
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
        let _ = self.call(Retry::NEVER, Duration::from_secs(1), ended).await;
    }

    async fn attempt<T, F>(
        &self,
        manner: Manner,
        deadline: Instant,
        call: &mut impl FnMut() -> F,
    ) -> Result<Result<T, BackendError>, Refused>
    where
        F: Future<Output = Result<T, BackendError>>,
    {
        let _turn = match manner {
            Manner::Prompt => None,
            Manner::Patient => Some(acquire(&self.background, deadline).await?),
        };
        // Asked twice: callers must not queue up for a store that is given up, and it may be while they queue.
        self.lock().check()?;
        let _permit = self.permit(deadline).await?;
        let passage = self.admit()?;
        let outcome = timeout_at(deadline, call()).await.unwrap_or(Err(BackendError::Timeout));
        passage.settle(outcome.as_ref().err());
        Ok(outcome)
    }

    async fn permit(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, Refused> {
        if let Ok(permit) = self.in_flight.try_acquire() {
            return Ok(permit);
        }
        let _place = self.waiting.try_acquire().map_err(|_| Refused(BackendError::Busy))?;
        acquire(&self.in_flight, deadline).await
    }

    fn admit(&self) -> Result<Passage<'_>, Refused> {
        let mut inner = self.lock();
        inner.check()?;
        let role = inner.breaker.admit(Instant::now()).map_err(Refused::open)?;
        self.publish(&inner);
        Ok(Passage { guard: self, role, verdict: Verdict::Unknown })
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

/// A call that was let through. It is settled in any case, also when its caller goes away: a trial that nobody ends
/// would keep the breaker half open for ever.
struct Passage<'g> {
    guard: &'g Guard,
    role: Role,
    verdict: Verdict,
}

impl Passage<'_> {
    fn settle(mut self, error: Option<&BackendError>) {
        self.verdict = match error {
            Some(error) if error.is_outage() => Verdict::Failed,
            Some(error) if error.is_refusal() => Verdict::Unknown,
            _ => Verdict::Answered,
        };
        if let Some(BackendError::Throttled { retry_after: Some(after) }) = error {
            let until = Instant::now() + (*after).min(LONGEST_THROTTLE);
            let mut inner = self.guard.lock();
            inner.throttled_until = inner.throttled_until.max(Some(until));
        }
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let mut inner = self.guard.lock();
        inner.breaker.settle(self.role, self.verdict, Instant::now(), rand::random());
        self.guard.publish(&inner);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(600);

    fn guard() -> Guard {
        Guard::new(Limits::default())
    }

    async fn one(guard: &Guard, outcome: Result<(), BackendError>) -> Result<(), BackendError> {
        guard.call(Retry::NEVER, SECOND, || std::future::ready(outcome.clone())).await
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
        let trial = guard.call(Retry::NEVER, SECOND, async || {
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
        let gone = guard.call(Retry::NEVER, LONG, std::future::pending::<Result<(), _>>);
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
            let outcome = guard.call(Retry::PROXIED_READ, LONG, || {
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
        let slow = guard.call(Retry::attempts(9), 5 * SECOND, async || {
            tokio::time::sleep(2 * SECOND).await;
            Err::<(), _>(BackendError::Unreachable("broke"))
        });
        assert!(slow.await.is_err());
        assert!(start.elapsed() <= 5 * SECOND);
        let stuck = guard.call(Retry::PROXIED_READ, SECOND, std::future::pending::<Result<(), _>>);
        assert_eq!(stuck.await, Err(BackendError::Timeout));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_asks_for_a_pause_gets_it() {
        let (guard, start) = (guard(), Instant::now());
        let throttled = BackendError::Throttled { retry_after: Some(2 * SECOND) };
        let mut answers = vec![Ok(()), Err(throttled.clone())];
        let retried = guard.call(Retry::PROXIED_READ, LONG, || {
            std::future::ready(answers.pop().expect("two calls at most"))
        });
        assert_eq!(retried.await, Ok(()));
        assert!((2 * SECOND..3 * SECOND).contains(&start.elapsed()));

        assert_eq!(one(&guard, Err(throttled.clone())).await, Err(throttled.clone()));
        let refused =
            guard.call(Retry::PROXIED_READ, LONG, async || -> Result<(), _> { panic!("was called") });
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
                    .call(Retry::NEVER, LONG, async || {
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
                guard.call(Retry::BACKGROUND, LONG, call).await
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
        assert_eq!(guard.call(Retry::BACKGROUND, LONG, async || Ok(())).await, Ok(()));
        let asked = AtomicUsize::new(0);
        let throttled =
            guard.call(Retry::BACKGROUND, LONG, async || match asked.fetch_add(1, Ordering::SeqCst) {
                0..10 => Err(BackendError::Throttled { retry_after: None }),
                _ => Ok(()),
            });
        assert_eq!(throttled.await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_gives_up_after_a_few_failures_or_at_its_deadline() {
        let guard = guard();
        let asked = AtomicUsize::new(0);
        let broken = guard.call(Retry::BACKGROUND, LONG, async || {
            asked.fetch_add(1, Ordering::SeqCst);
            Err::<(), _>(BackendError::Timeout)
        });
        assert_eq!(broken.await, Err(BackendError::Timeout));
        assert_eq!(asked.load(Ordering::SeqCst), 4);
        let start = Instant::now();
        let throttled = BackendError::Throttled { retry_after: Some(SECOND) };
        let busy = guard.call(Retry::BACKGROUND, SECOND * 9, async || Err::<(), _>(throttled.clone()));
        assert_eq!(busy.await, Err(throttled.clone()));
        assert!(start.elapsed() < SECOND * 9);
    }
}
