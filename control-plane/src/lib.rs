//! The control plane: configuration, credentials, the store, discovery.

pub mod api;
pub mod app;
pub mod audit;
pub mod bootstrap;
pub mod config;
pub mod connections;
pub mod credentials;
pub mod model;
pub mod monitor;
pub mod nodes;
pub mod publishing;
pub mod run;
pub mod service;
pub mod store;
pub mod sync;

pub use scaivault_seal::RootKey;

/// The tenant that an installation begins with, and that the operator's first token belongs to.
pub const DEFAULT_TENANT: &str = "default";
