//! The promises of the delta protocol.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod cached;
mod fixtures;
mod lanes;
mod malformed;
mod model;
mod secrets;
mod shelf;
mod stream;
mod wire;
