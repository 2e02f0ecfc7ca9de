//! What the fake can be told to do instead of answering as Azure would.

use std::io;

use axum::body::Body;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use serde_json::json;

use super::reply::Reply;

/// Which half of the fake a fault is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The key vault.
    Vault,
    /// The token endpoint of Entra ID, and that of managed identities.
    Tokens,
}

/// A way to misbehave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None: it answers.
    Pass,
    /// Requests are taken and never answered.
    Hang,
    /// Every request is answered with this status and an error body, e.g. 503.
    Status(u16),
    /// Every request is answered with 429.
    Throttled {
        /// The seconds in `Retry-After`, if there is one.
        retry_after: Option<u32>,
    },
    /// Half of the right body is sent, then the connection breaks.
    Truncated,
    /// 200 and JSON, says the header; the body is none.
    Garbage,
    /// 200 and a page of HTML, as a captive portal sends.
    WrongContentType,
    /// 200 and a JSON string of so many bytes, of no announced length.
    HugeBody(u64),
    /// Listings never end: after each page of invented names there is another one.
    EndlessPages,
    /// Each page of a listing is the first one, with the same link to the next.
    RepeatingPages,
    /// An empty page with a link comes before each page. The real vault does this too, so it is no error.
    EmptyPages,
    /// Links to next pages lead to this address, e.g. `http://127.0.0.1:1`, even after the last page.
    NextLinkTo(String),
    /// The first page of the vault's listing has one more secret, of this name. Two spellings of one name are what the
    /// real vault cannot have, and what a client must not be fooled by.
    ListsAlso(String),
    /// Reading or changing the secret with this name is forbidden, as when rights are granted secret by secret.
    ForbidName(String),
    /// Listing is forbidden.
    ForbidList,
}

impl Fault {
    /// The answer in place of whatever was asked; none if the request has to be looked at.
    pub(super) fn instead(&self, side: Side) -> Option<Response> {
        Some(match self {
            Fault::Status(status) => {
                failure(side, *status, ["InternalServerError", "temporarily_unavailable"]).into()
            }
            Fault::Throttled { retry_after } => {
                let mut response =
                    Response::from(failure(side, 429, ["Throttled", "temporarily_unavailable"]));
                if let Some(seconds) = retry_after {
                    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(*seconds));
                }
                response
            }
            Fault::Garbage => with_type("application/json; charset=utf-8", Body::from(vec![0xfe; 512])),
            Fault::WrongContentType => {
                with_type("text/html; charset=utf-8", Body::from("<html><body>Please sign in</body></html>"))
            }
            Fault::HugeBody(length) => with_type("application/json; charset=utf-8", endless_text(*length)),
            _ => return None,
        })
    }
}

fn failure(side: Side, status: u16, [vault, tokens]: [&str; 2]) -> Reply {
    let status = StatusCode::from_u16(status).expect("a fault has a status between 100 and 999");
    match side {
        Side::Vault => Reply::error(status, vault, "The service cannot process the request."),
        Side::Tokens => Reply::json(
            status,
            json!({
                "error": tokens,
                "error_description": "AADSTS90033: A transient error has occurred. Please try again.",
                "error_codes": [90033],
            }),
        ),
    }
}

fn with_type(content_type: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// `{"value":"AAAA…"}`, made while it is sent.
fn endless_text(length: u64) -> Body {
    const CHUNK: usize = 64 * 1024;
    let chunk = Bytes::from(vec![b'A'; CHUNK]);
    let rest = usize::try_from(length % CHUNK as u64).expect("it is less than a chunk");
    let whole = length / CHUNK as u64;
    let pieces = [Bytes::from_static(b"{\"value\":\"")]
        .into_iter()
        .chain((0..whole).map({
            let chunk = chunk.clone();
            move |_| chunk.clone()
        }))
        .chain([chunk.slice(..rest), Bytes::from_static(b"\"}")]);
    Body::from_stream(stream::iter(pieces.map(Ok::<_, io::Error>)))
}

/// The answer up to its middle, though its header promises all of it.
pub(super) fn truncated(reply: Reply) -> Response {
    let text = reply.text();
    let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
    let pieces = [Ok(half), Err(io::Error::from(io::ErrorKind::ConnectionReset))];
    let mut response = Response::from(reply);
    *response.body_mut() = Body::from_stream(stream::iter(pieces));
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
    response
}
