//! Requests as they were taken apart, and answers before they are sent.

use std::borrow::Cow;

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

/// What was asked.
pub(super) struct Asked {
    /// What the client called us, e.g. `http://127.0.0.1:4711`: links and identifiers begin with it.
    pub(super) base: String,
    pub(super) query: Vec<(String, String)>,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// Seconds since the Unix epoch.
    pub(super) now: i64,
}

impl Asked {
    /// A parameter of the query; the first if it is repeated.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    status: StatusCode,
    body: Value,
    challenge: Option<String>,
}

impl Reply {
    pub(super) fn ok(body: Value) -> Reply {
        Reply::json(StatusCode::OK, body)
    }

    pub(super) fn json(status: StatusCode, body: Value) -> Reply {
        Reply { status, body, challenge: None }
    }

    /// An error as the key vault writes it.
    pub(super) fn error<'a>(status: StatusCode, code: &str, message: impl Into<Cow<'a, str>>) -> Reply {
        Reply::json(status, json!({ "error": { "code": code, "message": message.into() } }))
    }

    /// The same, with the inner code that tells apart what shares a code.
    pub(super) fn inner_error<'a>(
        status: StatusCode,
        code: &str,
        message: impl Into<Cow<'a, str>>,
        inner: &str,
    ) -> Reply {
        let innererror = json!({ "code": inner });
        let error = json!({ "code": code, "message": message.into(), "innererror": innererror });
        Reply::json(status, json!({ "error": error }))
    }

    /// A refusal of whoever has no valid token, with where to get one.
    pub(super) fn challenge(message: &str, challenge: String) -> Reply {
        let refusal = Reply::error(StatusCode::UNAUTHORIZED, "Unauthorized", message);
        Reply { challenge: Some(challenge), ..refusal }
    }

    pub(super) fn text(&self) -> String {
        self.body.to_string()
    }
}

impl From<Reply> for Response {
    fn from(reply: Reply) -> Response {
        let mut response = Response::new(Body::from(reply.text()));
        *response.status_mut() = reply.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
        if let Some(challenge) = reply.challenge {
            let value = HeaderValue::from_str(&challenge).expect("an address and a tenant are plain text");
            headers.insert(WWW_AUTHENTICATE, value);
        }
        response
    }
}
