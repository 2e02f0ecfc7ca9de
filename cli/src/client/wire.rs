//! Between the types of the wire and what is printed.

use std::time::Duration;

use scaivault_domain::time::Timestamp;
use tonic::Status;

use crate::failure::Failure;

/// How many entries a page has.
pub(super) const PAGE: i32 = 1000;

/// A time as it is printed.
pub(super) fn time(time: Option<prost_types::Timestamp>) -> Option<String> {
    let time = time?;
    let millis = time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos) / 1_000_000);
    Some(Timestamp::from_millis(millis).to_string())
}

/// A time as it is sent.
pub(super) fn to_time(time: Timestamp) -> prost_types::Timestamp {
    let millis = time.as_millis();
    let nanos = i32::try_from(millis.rem_euclid(1000)).expect("less than 1000") * 1_000_000;
    prost_types::Timestamp { seconds: millis.div_euclid(1000), nanos }
}

/// A duration that was sent.
pub(super) fn duration(duration: Option<prost_types::Duration>) -> Option<Duration> {
    duration?.try_into().ok()
}

/// A duration as it is sent.
pub(super) fn to_duration(duration: Duration) -> Result<prost_types::Duration, Failure> {
    duration.try_into().map_err(|_| Failure::usage("the duration is too long", "ask for a shorter one"))
}

/// What `page` gives for every page, in order. `page` takes the token of a page and gives that of the next.
pub(super) async fn all<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), Status>,
) -> Result<Vec<T>, Failure> {
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let (mut entries, next) = page(token).await?;
        found.append(&mut entries);
        if next.is_empty() {
            return Ok(found);
        }
        token = next;
    }
}
