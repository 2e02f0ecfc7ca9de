//! The one place of fakes, and named as fakes: what no real server gives at a test's price.
//!
//! They are written from the providers' references and from recordings of the real services, not from what our adapters
//! need, and they check what they are given: a credential that the provider would refuse is refused here. Each has
//! switches for faults. They run in this process, on loopback, and are gone when they are dropped. Where a real server
//! exists, [`crate::servers`] starts that one instead.

pub mod aws_sessions;
pub mod azure;
pub mod clock;
pub mod gcp;
pub mod keys;
pub mod kubernetes;
pub mod serving;
pub mod vault_logins;
