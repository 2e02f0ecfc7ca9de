//! A client of a metadata service: plain HTTP to one address that the operator named.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use reqwest::Client;
use reqwest::redirect::Policy;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use scaivault_domain::backend::Endpoint;
use scaivault_domain::{Error, Reason};
use zeroize::Zeroizing;

use crate::credentials::bearer::{MAX_ANSWER, invalid_answer};

/// Elsewhere than on a machine of the provider nothing answers at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Google's may wait for a token that is not there yet.
const TIMEOUT: Duration = Duration::from_secs(8);

/// An answer with a status below 500 that is not 429.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// A metadata service.
#[derive(Debug)]
pub(super) struct MetadataService {
    client: Client,
    base: String,
    name: &'static str,
    /// Sent with every request: a request that somebody was talked into making has no such header.
    header: (&'static str, &'static str),
}

impl MetadataService {
    pub(super) fn new(
        endpoint: &Endpoint,
        name: &'static str,
        header: (&'static str, &'static str),
    ) -> anyhow::Result<Self> {
        // There is no TLS to be had, so nothing is trusted; but a client wants to know.
        let tls = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(Policy::none())
            .no_proxy()
            .referer(false)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            .build()
            .with_context(|| format!("no client of {name} can be made"))?;
        Ok(MetadataService { client, base: endpoint.to_string(), name, header })
    }

    /// Asks for `path` with this query.
    ///
    /// # Errors
    /// If there is no answer, or none that is for the caller to understand.
    pub(super) async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Answer, Error> {
        let name = self.name;
        let unreachable = |what: &str| {
            Error::new(Reason::BackendUnreachable, format!("{name} {what}")).next(format!(
                "ask the operator whether the control plane runs where {name} is; its address is a setting"
            ))
        };
        let mut url = reqwest::Url::parse(&format!("{}{path}", self.base)).map_err(|_| Error::internal())?;
        url.query_pairs_mut().extend_pairs(query);
        let (header, value) = self.header;
        let request = self.client.get(url).header(header, HeaderValue::from_static(value));
        let mut response =
            request.send().await.map_err(|error| match error.is_timeout() && !error.is_connect() {
                true => Error::new(Reason::BackendTimeout, format!("{name} did not answer in time")),
                false => unreachable("cannot be reached"),
            })?;
        let status = response.status();
        if status == StatusCode::TOO_MANY_REQUESTS {
            let seconds = response.headers().get(header::RETRY_AFTER);
            let seconds = seconds.and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(1);
            return Err(Error::new(Reason::BackendThrottled, format!("{name} asked us to slow down"))
                .retry_after(Duration::from_secs(seconds)));
        }
        if status.is_server_error() {
            return Err(unreachable(&format!("answered with {}", status.as_u16())));
        }
        let headers = response.headers().clone();
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) = response.chunk().await.map_err(|_| unreachable("broke off its answer"))? {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(invalid_answer("the metadata service gave an answer that is too large"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, headers, body })
    }
}
