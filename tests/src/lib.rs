//! The testbed: real servers as processes, and the faults between them.
//!
//! Nothing started here outlives its owner: every process is killed when its handle is dropped, and also when the
//! process that holds the handle dies first. Everything listens on loopback only.

pub mod authority;
pub mod collector;
pub mod fakes;
pub mod faults;
pub mod http;
pub mod http_faults;
pub mod planes;
pub mod ports;
pub mod process;
pub mod servers;
pub mod stores;
pub mod wait;
