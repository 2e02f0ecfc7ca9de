//! The one place of fakes: what no real server gives at a test's price, written from the providers' references.
//!
//! A fake listens on loopback like the real thing, checks what it is given as the real thing does, and has switches for
//! faults. Where a real server exists, [`crate::servers`] starts that one instead.

pub mod clock;
pub mod gcp;
pub mod keys;
pub mod kubernetes;
pub mod serving;
pub mod vault_logins;
