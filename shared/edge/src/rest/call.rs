//! What a handler needs of a request besides its body, and the request to the service that comes of it.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::{FromRequestParts, Path};
use http::header::{AUTHORIZATION, IF_MATCH, IF_NONE_MATCH};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use scaivault_domain::{Error, Reason};
use tonic::metadata::MetadataMap;

use crate::auth::TENANT;
use crate::context::{REQUEST_ID, RequestContext};
use crate::error::Refusal;
use crate::rest::freshness;
use crate::rest::query::Query;
use crate::serve::PeerCertificates;

/// The headers that become metadata. Any other could break HTTP/2 where the request is forwarded.
const FORWARDED: [HeaderName; 5] = [
    AUTHORIZATION,
    HeaderName::from_static(TENANT),
    REQUEST_ID,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

/// A request without its body.
#[derive(Clone)]
pub(super) struct Call {
    uri: Uri,
    metadata: MetadataMap,
    context: Option<RequestContext>,
    peer: Option<PeerCertificates>,
    pub(super) if_match: Option<HeaderValue>,
    pub(super) if_none_match: Option<HeaderValue>,
    /// The greatest age of an answer that the caller accepts.
    pub(super) max_age: Option<Duration>,
}

impl<S: Send + Sync> FromRequestParts<S> for Call {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let mut forwarded = HeaderMap::with_capacity(FORWARDED.len());
        for name in FORWARDED {
            for value in parts.headers.get_all(&name) {
                forwarded.append(name.clone(), value.clone());
            }
        }
        Ok(Call {
            uri: parts.uri.clone(),
            metadata: MetadataMap::from_headers(forwarded),
            context: parts.extensions.get().cloned(),
            peer: parts.extensions.get().cloned(),
            if_match: parts.headers.get(IF_MATCH).cloned(),
            if_none_match: parts.headers.get(IF_NONE_MATCH).cloned(),
            max_age: freshness::max_age(&parts.headers),
        })
    }
}

impl Call {
    /// The path exactly as it was sent.
    pub(super) fn path(&self) -> &str {
        self.uri.path()
    }

    /// The query, which may have no other parameters than `known`.
    pub(super) fn query(&self, known: &[&'static str]) -> Result<Query<'_>, Error> {
        Query::parse(self.uri.query().unwrap_or_default(), known)
    }

    /// The request to the service.
    pub(super) fn request<T>(self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::from_parts(self.metadata, http::Extensions::new(), message);
        if let Some(context) = self.context {
            request.extensions_mut().insert(context);
        }
        if let Some(peer) = self.peer {
            request.extensions_mut().insert(peer);
        }
        request
    }
}

/// The name in a path such as `/v1/tenants/{id}`.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(name) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|_| no_such_name())?;
        Ok(Name(name))
    }
}

/// The two names in a path such as `/v1/federation/backends/{id}/syncs/{run}`.
pub(super) struct Names(pub(super) String, pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Names {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let names = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((outer, inner)) = names.map_err(|_| no_such_name())?;
        Ok(Names(outer, inner))
    }
}

fn no_such_name() -> Error {
    Error::new(Reason::NotFound, "nothing has this name: a part of the route is not UTF-8")
}
