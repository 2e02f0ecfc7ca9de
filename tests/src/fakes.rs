//! The one place of fakes, and named as fakes: stand-ins for services that no registry carries a server of.
//!
//! They are written from the providers' references and from recordings of the real services, not from what our
//! adapters need, and they check what they are given: a credential that the provider would refuse is refused here. Each
//! has fault switches. They run in this process, on loopback, and are gone when they are dropped.

pub mod azure;
mod listen;
