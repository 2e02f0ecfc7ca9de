//! The one error in its two forms on the wire. Both matches are exhaustive, so a new reason breaks the build here.

pub mod grpc;
pub mod problem;

pub(crate) use problem::Refusal;

#[cfg(test)]
mod tests;
