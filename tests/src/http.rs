//! The testbed's own HTTP client.

use std::time::Duration;

use anyhow::Result;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client};

/// A client that takes no proxy and follows no redirect, and trusts `ca` (PEM) alone if one is given.
///
/// # Errors
/// If `ca` is no certificate.
pub fn client(ca: Option<&str>) -> Result<Client> {
    // Whoever is first in this process installs it.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    let mut client = Client::builder().no_proxy().redirect(Policy::none()).timeout(Duration::from_secs(30));
    if let Some(ca) = ca {
        client = client.tls_certs_only([Certificate::from_pem(ca.as_bytes())?]);
    }
    Ok(client.build()?)
}
