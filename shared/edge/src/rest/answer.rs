//! Answers as JSON.

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, LOCATION};
use http::{HeaderName, HeaderValue, StatusCode};
use scaivault_domain::Error;
use serde::Serialize;
use tonic::metadata::MetadataMap;

/// The header in which the control plane says after which revision a change is in force.
const REVISION: HeaderName = HeaderName::from_static("x-scaivault-revision");

/// An answer in the making: JSON that nobody may keep.
pub(super) struct Json(Response);

impl Json {
    /// `body` as JSON.
    pub(super) fn new(status: StatusCode, body: &impl Serialize) -> Self {
        Self::with_capacity(status, body, 256)
    }

    /// `body` as JSON of about `bytes` bytes.
    pub(super) fn with_capacity(status: StatusCode, body: &impl Serialize, bytes: usize) -> Self {
        let mut text = Vec::with_capacity(bytes);
        serde_json::to_writer(&mut text, body).expect("DTOs have string keys and no failing parts");
        let mut response = Response::new(Body::from(text));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Json(response).no_store()
    }

    /// An answer without a body.
    pub(super) fn empty(status: StatusCode) -> Self {
        Json(status.into_response()).no_store()
    }

    fn no_store(mut self) -> Self {
        self.0.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        self
    }

    /// With this `ETag`, which is already in quotes.
    pub(super) fn etag(self, etag: Option<HeaderValue>) -> Self {
        self.header(ETAG, etag)
    }

    /// With the place of what was made.
    pub(super) fn location(self, folder: &str, name: &str) -> Self {
        self.header(LOCATION, HeaderValue::try_from(format!("{folder}/{name}")).ok())
    }

    /// With the revision that the service gave, if it did.
    pub(super) fn revision(self, metadata: &MetadataMap) -> Self {
        self.header(REVISION, metadata.as_ref().get(REVISION).cloned())
    }

    /// With a header, if there is a value.
    pub(super) fn header(mut self, name: HeaderName, value: Option<HeaderValue>) -> Self {
        if let Some(value) = value {
            self.0.headers_mut().insert(name, value);
        }
        self
    }

    /// The response.
    pub(super) fn done(self) -> super::Answer {
        Ok(self.0)
    }
}

/// A part of a service's answer that is always there; without it the service has a fault.
pub(super) fn required<T>(part: Option<T>) -> Result<T, Error> {
    part.ok_or_else(|| fault("an answer of the service lacks a part"))
}

/// A fault of the service, which nobody else will tell the log.
pub(super) fn fault(what: &'static str) -> Error {
    tracing::error!("{what}");
    Error::internal()
}
