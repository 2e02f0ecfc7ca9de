//! Whether a server can be reached at all.

use std::time::Duration;

use reqwest::header::HeaderMap;
use scaivault_domain::backend::{Endpoint, Tls};
use tokio::time::timeout;

use crate::egress::Egress;
use crate::error::BackendError;
use crate::http::{client, fault};

/// Connects to `endpoint` as an adapter would, and shows no credential. Whatever an HTTP server answers is good enough.
///
/// # Errors
/// What is in the way: the address, the network, the certificate, or that there is no HTTP.
pub async fn reach(
    endpoint: &Endpoint,
    tls: &Tls,
    egress: &Egress,
    within: Duration,
) -> Result<(), BackendError> {
    let client = client(endpoint, tls, HeaderMap::new(), egress)?;
    match timeout(within, client.head(endpoint.url().clone()).send()).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(fault(&error)),
        Err(_) => Err(BackendError::Timeout),
    }
}
