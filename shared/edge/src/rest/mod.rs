//! REST over the generated traits: the same services, JSON instead of protobuf.

pub(crate) mod admin;
mod answer;
mod body;
mod call;
mod dto;
pub(crate) mod federation;
mod field;
mod freshness;
pub mod json;
mod merge;
mod precondition;
mod query;
pub(crate) mod secrets;

pub(crate) use body::MAX_BODY;

use axum::extract::Request;
use axum::response::Response;
use http::StatusCode;
use scaivault_domain::{Error, Reason};

use crate::error::Refusal;

/// What a handler gives.
type Answer = Result<Response, Refusal>;

/// The answer to a known route with another method; axum adds `Allow`.
pub(crate) async fn method_not_allowed(_: Request) -> Refusal {
    let error = Error::new(Reason::InvalidRequest, "this route has no such method")
        .next("the header `Allow` lists the methods of the route");
    Refusal::with_status(error, StatusCode::METHOD_NOT_ALLOWED)
}
