//! Waiting for a condition instead of sleeping.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// How long a server may take for anything before it counts as stuck, on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks again and again until `condition` gives a value.
///
/// # Errors
/// Names `what` after [`PATIENCE`], or passes on an error of the condition.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("waited {PATIENCE:?} in vain until {what}");
        }
        sleep(Duration::from_millis(10)).await;
    }
}
