//! What the product promises, tried with real servers and real processes. One module per kind of promise.

mod audit;
mod backend_faults;
mod cached;
mod canary;
mod cli;
mod configuring;
mod crashes;
mod demo;
mod dev_vault;
mod discovery;
mod documents;
mod fakes;
mod flipping;
mod journal;
mod mapping;
mod nodes;
mod outages;
mod poisoned;
mod reading;
mod refusing;
mod resuming;
mod servers;
mod syncing;
mod tenants;
mod tracing;
mod writing;
