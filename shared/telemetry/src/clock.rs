//! The wall clock of the machine.

use std::time::{SystemTime, UNIX_EPOCH};

use scaivault_domain::time::{Clock, Timestamp};

/// The machine's clock: what every binary gives to whoever takes a [`Clock`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::default().after(since_epoch)
    }
}
