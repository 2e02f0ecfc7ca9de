//! The fakes' wall clock, which a test can put forward.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::Timestamp;

/// The machine's clock plus what a test has added. Clones show the same time.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    seconds_ahead: Arc<AtomicI64>,
}

impl Clock {
    /// The time now.
    pub fn now(&self) -> Timestamp {
        let ahead = Duration::from_secs(self.seconds_ahead.load(Ordering::Relaxed).unsigned_abs());
        Timestamp::now().saturating_add(ahead).unwrap_or(Timestamp::MAX)
    }

    /// The time now, in seconds since the Unix epoch, as tokens have it.
    pub fn seconds(&self) -> i64 {
        self.now().as_second()
    }

    /// Puts the clock forward by whole seconds.
    pub fn advance(&self, by: Duration) {
        self.seconds_ahead.fetch_add(seconds(by), Ordering::Relaxed);
    }
}

/// Whole seconds, as tokens count them.
pub(super) fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}
