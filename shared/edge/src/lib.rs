//! The front that both planes serve: REST, gRPC, errors, authentication, limits, TLS.
//!
//! The generated tonic traits are the API. A plane implements them, gives them to a [`Front`], and [`serve`]s the router
//! that comes of it: gRPC, grpc-web, REST, reflection, health, metrics and OpenAPI on one port.

pub mod auth;
mod context;
pub mod error;
mod frame;
mod front;
mod health;
mod openapi;
mod rest;
mod serve;
mod tls;
pub mod wire;

#[cfg(test)]
mod tests;

pub use context::{REQUEST_ID, RequestContext};
pub use frame::refusal;
pub use front::Front;
pub use health::Readiness;
pub use rest::json;
pub use serve::{Limits, PeerCertificates, serve};
pub use tls::{ClientCertificates, TlsError, TlsSource};
