//! The promises of the delta protocol.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod fixtures;
mod lanes;
mod malformed;
mod model;
mod stream;
mod wire;
