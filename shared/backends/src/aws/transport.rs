//! Our HTTP client under the AWS SDK, so that what holds for the other stores holds for its calls: one endpoint, its CA,
//! no redirects, no proxy, bounded answers, traces that go on.

use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use hyper::body::Bytes;
use reqwest::header::{CONTENT_ENCODING, HeaderMap};
use reqwest::{Client, Url};
use scaivault_domain::backend::{Endpoint, Tls};
use scaivault_telemetry::trace::inject;
use zeroize::Zeroizing;

use crate::egress::Egress;
use crate::error::BackendError;
use crate::http::{client, fault, read_body};

/// A value has at most 64 KiB, each byte of it up to six in JSON.
const ANSWER_LIMIT: usize = 1024 * 1024;
/// For 100 secrets with their tags and versions, or the values of 20.
const LIST_LIMIT: usize = 16 * 1024 * 1024;
const TARGET: &str = "x-amz-target";

/// The HTTP client for a service of AWS at `endpoint`: for the adapter, and for logins at STS.
///
/// It has no deadline to set: the timeouts of the SDK's configuration do nothing.
///
/// # Errors
/// `InvalidConfig`, if the CA certificate is unusable.
pub fn aws_http_client(
    endpoint: &Endpoint,
    tls: &Tls,
    egress: &Egress,
) -> Result<SharedHttpClient, BackendError> {
    let client = client(endpoint, tls, HeaderMap::new(), egress)?;
    let connector = Connector { client, base: endpoint.url().clone() };
    Ok(SharedHttpClient::new(OneServer(SharedHttpConnector::new(connector))))
}

#[derive(Debug)]
struct OneServer(SharedHttpConnector);

impl HttpClient for OneServer {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        self.0.clone()
    }
}

#[derive(Clone, Debug)]
struct Connector {
    client: Client,
    base: Url,
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let connector = self.clone();
        HttpConnectorFuture::new(async move {
            let answer = connector.exchange(request).await;
            // `aws_failure` finds our error in it again.
            answer.map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

impl Connector {
    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, BackendError> {
        const UNSENDABLE: BackendError = BackendError::InvalidConfig("a request that cannot be sent");
        let url = Url::parse(request.uri()).map_err(|_| UNSENDABLE)?;
        if url.origin() != self.base.origin() {
            return Err(BackendError::InvalidConfig("a request to another host than the endpoint"));
        }
        let (head, body) = request.try_into_http1x().map_err(|_| UNSENDABLE)?.into_parts();
        // Wiped, for it may be a value that is written.
        let body = Bytes::from_owner(Zeroizing::new(body.bytes().ok_or(UNSENDABLE)?.to_vec()));
        let mut headers = head.headers;
        let limit = match headers.get(TARGET).map(|target| target.as_bytes()) {
            Some(b"secretsmanager.ListSecrets" | b"secretsmanager.BatchGetSecretValue") => LIST_LIMIT,
            _ => ANSWER_LIMIT,
        };
        inject(&mut headers);
        let request = self.client.request(head.method, url).headers(headers).body(body);
        let response = request.send().await.map_err(|error| fault(&error))?;
        let status = response.status();
        if status.is_redirection() {
            return Err(BackendError::InvalidAnswer(
                "a redirect, which is not followed with a credential; name the final address as endpoint",
            ));
        }
        let headers = response.headers().clone();
        if headers.contains_key(CONTENT_ENCODING) {
            return Err(BackendError::InvalidAnswer("an encoding that was not asked for"));
        }
        let status = status.as_u16().try_into().map_err(|_| BackendError::InvalidAnswer("no HTTP"))?;
        let body = read_body(response, limit).await?;
        let mut answer = HttpResponse::new(status, SdkBody::from(Bytes::from_owner(body)));
        for (name, value) in &headers {
            if let Ok(value) = value.to_str() {
                answer.headers_mut().append(name.as_str().to_owned(), value.to_owned());
            }
        }
        Ok(answer)
    }
}
