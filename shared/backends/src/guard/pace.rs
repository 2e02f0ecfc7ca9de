//! How many calls at once a store takes, learnt from its answers: additive increase, multiplicative decrease.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::{RETRY_BASE, RETRY_CAP};

/// The limit is halved at most once in this time: the answers to one burst are one piece of news.
const BETWEEN_CUTS: Duration = Duration::from_secs(1);

/// The limit as a state machine: no clock of its own.
#[derive(Debug)]
pub(super) struct Pace {
    most: usize,
    most_background: usize,
    /// Between 1 and `most`; whole numbers of it count.
    limit: f64,
    cut_at: Option<Instant>,
    /// Throttled answers in a row to calls that were made one at a time.
    throttled_alone: u32,
}

impl Pace {
    pub(super) fn new(most: usize, most_background: usize) -> Self {
        let most = most.max(1);
        Pace { most, most_background, limit: most as f64, cut_at: None, throttled_alone: 0 }
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Places at the store, and how many of them are for work that nobody waits for.
    pub(super) fn places(&self) -> (usize, usize) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is in 1..=most")]
        let all = (self.limit as usize).clamp(1, self.most);
        (all, (all * self.most_background / self.most).max(1))
    }

    /// The store answered: one place more after as many answers as there are places.
    pub(super) fn answered(&mut self) {
        self.limit = (self.limit + 1.0 / self.limit).min(self.most as f64);
        self.throttled_alone = 0;
    }

    /// The store asked a call that began at `began` to slow down: half the places. A store that says so even if it is asked
    /// one thing at a time is left alone for the time that is returned.
    pub(super) fn throttled(&mut self, began: Instant, now: Instant) -> Option<Duration> {
        // What was asked before the last cut says nothing of the pace since.
        if self.cut_at.is_some_and(|cut| began < cut) {
            return None;
        }
        if self.places().0 == 1 {
            self.limit = 1.0;
            self.throttled_alone += 1;
            return Some(RETRY_BASE.saturating_mul(1 << self.throttled_alone.min(16)).min(RETRY_CAP));
        }
        if self.cut_at.is_none_or(|cut| now >= cut + BETWEEN_CUTS) {
            self.limit = (self.limit / 2.0).max(1.0);
            self.cut_at = Some(now);
        }
        None
    }
}

/// A number of places that can change while they are taken.
#[derive(Debug)]
pub(super) struct Places {
    free: Semaphore,
    /// Places that are still taken and are no longer there when they are given back.
    owed: AtomicUsize,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        Places { free: Semaphore::new(count), owed: AtomicUsize::new(0) }
    }

    pub(super) fn free(&self) -> &Semaphore {
        &self.free
    }

    pub(super) fn place<'p>(&'p self, permit: SemaphorePermit<'p>) -> Place<'p> {
        Place { places: self, permit: Some(permit) }
    }

    /// Only one at a time may call this.
    pub(super) fn resize(&self, before: usize, after: usize) {
        if after > before {
            let more = (before..after).filter(|_| !self.settle_one()).count();
            self.free.add_permits(more);
        } else {
            let fewer = before - after;
            self.owed.fetch_add(fewer - self.free.forget_permits(fewer), Ordering::Relaxed);
        }
    }

    /// Whether there was a place owed, which now is not any more.
    fn settle_one(&self) -> bool {
        let less = |owed: usize| owed.checked_sub(1);
        self.owed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct Place<'p> {
    places: &'p Places,
    permit: Option<SemaphorePermit<'p>>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.places.settle_one()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn answer(pace: &mut Pace, times: usize) {
        (0..times).for_each(|_| pace.answered());
    }

    #[test]
    fn a_throttled_answer_halves_the_limit_once_for_all_calls_of_a_burst() {
        let (mut pace, start) = (Pace::new(64, 16), Instant::now());
        for _ in 0..64 {
            assert_eq!(pace.throttled(start, start + SECOND / 10), None);
        }
        assert_eq!(pace.places(), (32, 8));
        assert_eq!(pace.throttled(start + SECOND / 5, start + SECOND / 4), None);
        assert_eq!(pace.places(), (32, 8), "not again within the second");
        assert_eq!(pace.throttled(start, start + 5 * SECOND), None);
        assert_eq!(pace.places(), (32, 8), "nor for a call from before it");
        assert_eq!(pace.throttled(start + 4 * SECOND, start + 5 * SECOND), None);
        assert_eq!(pace.places(), (16, 4));
    }

    #[test]
    fn the_limit_is_never_below_one_nor_above_the_bulkhead() {
        let (mut pace, start) = (Pace::new(64, 16), Instant::now());
        for second in (1..20).map(|second| start + second * SECOND) {
            pace.throttled(second, second);
        }
        assert_eq!(pace.places(), (1, 1));
        answer(&mut pace, 10_000);
        assert_eq!(pace.places(), (64, 16));
    }

    #[test]
    fn as_many_answers_as_places_make_one_place_more() {
        let (mut pace, start) = (Pace::new(64, 16), Instant::now());
        pace.throttled(start, start);
        answer(&mut pace, 31);
        assert_eq!(pace.places().0, 32);
        answer(&mut pace, 2);
        assert_eq!(pace.places().0, 33);
    }

    #[test]
    fn a_store_that_throttles_one_call_at_a_time_gets_longer_and_longer_pauses() {
        let (mut pace, now) = (Pace::new(1, 1), Instant::now());
        let pauses: Vec<_> = (0..9).filter_map(|_| pace.throttled(now, now)).collect();
        assert_eq!(pauses[..3], [RETRY_BASE * 2, RETRY_BASE * 4, RETRY_BASE * 8]);
        assert_eq!(pauses[8], RETRY_CAP);
        answer(&mut pace, 1);
        assert_eq!(pace.throttled(now, now), Some(RETRY_BASE * 2), "an answer ends the row");
    }

    #[tokio::test]
    async fn places_that_are_taken_go_when_they_are_given_back() {
        let places = Places::new(4);
        let taken: Vec<_> =
            (0..3).map(|_| places.place(places.free().try_acquire().expect("a place"))).collect();
        places.resize(4, 1);
        assert_eq!(places.free().available_permits(), 0);
        places.resize(1, 2);
        drop(taken);
        assert_eq!(places.free().available_permits(), 2);
    }
}
