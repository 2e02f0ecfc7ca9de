//! The HTTP client of an adapter and of a login: one per server, built so that a credential goes nowhere but to its endpoint.
//!
//! No redirects, no proxy from the environment, no process-wide configuration, no address that [`Egress`] refuses. Answers are bounded: no compression is
//! asked for and none is taken, so the limit holds for what would be parsed.

use std::io;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, DATE, HeaderMap, HeaderName, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, Response, StatusCode};
use rustls::ClientConfig;
use scaivault_domain::backend::{Endpoint, Tls};
use scaivault_domain::time::Timestamp;
use scaivault_telemetry::trace::inject;
use zeroize::Zeroizing;

use crate::egress::{Egress, causes, refusal_in};
use crate::error::BackendError;
use crate::tls::{Trust, client_config};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For calls without a deadline of their own; no configured deadline is longer.
const LONGEST_CALL: Duration = Duration::from_secs(60);
/// A connection whose other end vanished is noticed this fast, not when the kernel gives up.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Segments as one path, each encoded by itself; `None` if one of them would not arrive as it is.
pub(crate) fn encode_path<'a>(segments: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let mut path = String::new();
    for segment in segments {
        // URL parsers remove the dots even where they are encoded.
        if matches!(segment, "" | "." | "..") {
            return None;
        }
        path.push('/');
        path.extend(utf8_percent_encode(segment, PLAIN));
    }
    Some(path)
}

/// Text for a query.
pub(crate) fn encode(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

/// An answer whose status its reader understands, read to its end.
pub struct Answer {
    /// Its status: no redirection, no 429 and none above.
    pub status: StatusCode,
    /// The server's clock.
    pub date: Option<Timestamp>,
    /// JSON; empty only with 204.
    pub body: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("status", &self.status).finish_non_exhaustive()
    }
}

/// What a request brings along.
pub enum Body<'a> {
    /// JSON.
    Json(Zeroizing<Vec<u8>>),
    /// What is to be changed of a resource, by RFC 7396.
    MergePatch(Vec<u8>),
    /// The fields of a form.
    Form(&'a [(&'a str, &'a str)]),
}

impl std::fmt::Debug for Body<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Http {
    client: Client,
    base: String,
}

/// The TLS side of a client for `endpoint`.
fn tls_config(endpoint: &Endpoint, tls: &Tls) -> Result<ClientConfig, BackendError> {
    // Without TLS there is nothing to verify, and perhaps no system roots either.
    client_config(if endpoint.is_https() { Trust::of(tls) } else { Trust::Anything })
}

/// A client that sends a credential nowhere but to `endpoint`, and connects to no address that `egress` refuses. For
/// adapters, logins and the token endpoints of providers. It is for URLs that begin
/// with this endpoint: other names do not resolve, but an address in a URL that a server sent would be connected to.
///
/// # Errors
/// `EndpointRefused`, if the endpoint is an address that `egress` refuses; `InvalidConfig`, if the certificates of
/// `tls` are unusable. A request fails with a [`Refusal`](crate::egress::Refusal) behind it if the endpoint's name
/// leads to a refused address; see [`refusal_in`].
pub fn client(
    endpoint: &Endpoint,
    tls: &Tls,
    headers: HeaderMap,
    egress: &Egress,
) -> Result<Client, BackendError> {
    egress.check_endpoint(endpoint)?;
    Client::builder()
        .tls_backend_preconfigured(tls_config(endpoint, tls)?)
        .redirect(Policy::none())
        .no_proxy()
        .dns_resolver(egress.resolver(endpoint)?)
        .referer(false)
        .default_headers(headers)
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(LONGEST_CALL)
        .http2_keep_alive_interval(PING_EVERY)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build()
        .map_err(|_| BackendError::InvalidConfig("no HTTP client can be made of it"))
}

impl Http {
    /// A client of the server at `endpoint`, which is sent `headers` with every request.
    ///
    /// # Errors
    /// `InvalidConfig`, if the CA certificate is unusable; `EndpointRefused`, if `egress` refuses the address.
    pub fn new(
        endpoint: &Endpoint,
        tls: &Tls,
        headers: HeaderMap,
        egress: &Egress,
    ) -> Result<Self, BackendError> {
        let client = client(endpoint, tls, headers, egress)?;
        Ok(Http { client, base: endpoint.to_string() })
    }

    /// Asks for the JSON at `path`, which begins with a slash and is encoded.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn get_json(
        &self,
        path: &str,
        headers: HeaderMap,
        limit: usize,
    ) -> Result<Answer, BackendError> {
        self.send(Method::GET, path, headers, None, limit).await
    }

    /// Sends a request to `path`, which begins with a slash and is encoded; the answer has at most `limit` bytes.
    ///
    /// # Errors
    /// Statuses that mean the same for every store are errors already; the others are for the reader.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        mut headers: HeaderMap,
        body: Option<Body<'_>>,
        limit: usize,
    ) -> Result<Answer, BackendError> {
        inject(&mut headers);
        let request = self.client.request(method, format!("{}{path}", self.base)).headers(headers);
        let request = match body {
            None => request,
            Some(Body::Json(json)) => {
                request.header(CONTENT_TYPE, "application/json").body(json.as_slice().to_vec())
            }
            Some(Body::MergePatch(json)) => {
                request.header(CONTENT_TYPE, "application/merge-patch+json").body(json)
            }
            Some(Body::Form(fields)) => request.form(fields),
        };
        let response = request.send().await.map_err(|error| fault(&error))?;
        let status = response.status();
        if status.is_redirection() {
            return Err(BackendError::InvalidAnswer(
                "a redirect, which is not followed with a credential; name the final address as endpoint",
            ));
        }
        let date = header(&response, DATE).and_then(parse_date);
        if status == StatusCode::TOO_MANY_REQUESTS {
            let retry_after = header(&response, RETRY_AFTER).and_then(|text| parse_retry_after(text, date));
            return Err(BackendError::Throttled { retry_after });
        }
        if status.is_server_error() {
            return Err(BackendError::Server { status: status.as_u16() });
        }
        if status == StatusCode::NO_CONTENT {
            return Ok(Answer { status, date, body: Zeroizing::default() });
        }
        // Something in front of the store may say no in a language of its own.
        let is_json = |media_type: &str| media_type.trim().eq_ignore_ascii_case("application/json");
        let media_type = header(&response, CONTENT_TYPE).unwrap_or("").split(';').next().unwrap_or("");
        if !is_json(media_type) && status == StatusCode::FORBIDDEN {
            return Err(BackendError::Forbidden);
        }
        if !is_json(media_type) {
            return Err(BackendError::InvalidAnswer("no JSON"));
        }
        if response.headers().contains_key(CONTENT_ENCODING) {
            return Err(BackendError::InvalidAnswer("an encoding that was not asked for"));
        }
        Ok(Answer { status, date, body: read_body(response, limit).await? })
    }
}

pub(crate) fn header(response: &Response, name: HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

pub(crate) async fn read_body(
    mut response: Response,
    limit: usize,
) -> Result<Zeroizing<Vec<u8>>, BackendError> {
    let announced = response.content_length().unwrap_or(0);
    let announced = usize::try_from(announced).unwrap_or(usize::MAX);
    if announced > limit {
        return Err(BackendError::TooLarge);
    }
    let mut body = Zeroizing::new(Vec::with_capacity(announced));
    while let Some(chunk) = response.chunk().await.map_err(|error| fault(&error))? {
        if body.len() + chunk.len() > limit {
            return Err(BackendError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What a failed exchange means. The error itself is dropped: it prints the URL.
pub(crate) fn fault(error: &reqwest::Error) -> BackendError {
    if let Some(refusal) = refusal_in(error) {
        return refusal.into();
    }
    if error.is_connect() {
        return BackendError::Unreachable(connect_fault(error));
    }
    if error.is_timeout() {
        return BackendError::Timeout;
    }
    if error.is_body() || error.is_decode() {
        return BackendError::InvalidAnswer("it ended early");
    }
    if causes(error).any(|cause| cause.downcast_ref().is_some_and(hyper::Error::is_parse)) {
        return BackendError::InvalidAnswer("no HTTP");
    }
    BackendError::Unreachable("the connection broke")
}

fn connect_fault(error: &reqwest::Error) -> &'static str {
    if error.is_timeout() {
        return "nothing accepts connections there";
    }
    for cause in causes(error) {
        match cause.downcast_ref() {
            Some(rustls::Error::InvalidCertificate(_)) => return "its certificate is not trusted",
            Some(_) => return "the TLS handshake failed",
            None => {}
        }
        if cause.downcast_ref().is_some_and(|io: &io::Error| io.kind() == io::ErrorKind::ConnectionRefused) {
            return "the connection was refused";
        }
        if cause.to_string() == "dns error" {
            return "its name does not resolve";
        }
    }
    "no connection could be made"
}

pub(crate) fn parse_date(text: &str) -> Option<Timestamp> {
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(Timestamp::from_millis(date.timestamp().as_millisecond()))
}

/// Seconds, or a moment by the server's own clock, which need not be ours.
pub(crate) fn parse_retry_after(text: &str, now: Option<Timestamp>) -> Option<Duration> {
    match text.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(parse_date(text)?.since(now?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_arrive_as_they_are() {
        assert_eq!(encode_path(["a b", "ä/%", "x.y_z~-"]).as_deref(), Some("/a%20b/%C3%A4%2F%25/x.y_z~-"));
        for segment in ["", ".", ".."] {
            assert_eq!(encode_path(["a", segment, "b"]), None);
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = parse_date("Sun, 06 Nov 1994 08:49:37 GMT");
        assert!(now.is_some());
        let after = |text| parse_retry_after(text, now);
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:57 GMT"), Some(Duration::from_secs(20)));
        assert_eq!(after("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(after("soon"), None);
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:49:57 GMT", None), None);
    }
}
