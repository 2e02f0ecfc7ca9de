//! Pure types and decisions: no async, no I/O, no clock.
//!
//! Input is parsed once, at the edge, into the types of this crate; behind it everything trusts them.

pub mod access;
pub mod audit;
pub mod backend;
pub mod budget;
pub mod error;
pub mod event;
pub mod lease;
pub mod mapping;
pub mod path;
pub mod pattern;
pub mod replica;
pub mod secret;
pub mod sync;
pub mod tenant;
pub mod time;
pub mod token;
pub mod view;

pub use error::{Error, Reason};
