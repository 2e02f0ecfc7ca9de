//! A data-plane node: verifies, authorises, routes, proxies.

pub mod api;
pub mod app;
pub mod cache;
pub mod config;
pub mod forward;
pub mod known;
pub mod run;
pub mod service;
pub mod upstream;

pub use scaivault_journal::SyncPolicy;
