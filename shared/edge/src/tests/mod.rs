//! The promises of the front, kept by a small service in memory.

mod admin;
mod documents;
mod fake;
mod federation;
mod frame;
mod secrets;
mod serve;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tower::ServiceExt as _;

use crate::{Front, Readiness};
use fake::Fake;

/// A front of one fake service.
fn front() -> (Arc<Fake>, Router) {
    let fake = Arc::new(Fake::default());
    (fake.clone(), front_of(fake))
}

fn front_of(fake: Arc<Fake>) -> Router {
    let front = Front::new(Readiness::ready).metrics(|| "up 1\n".to_owned());
    front.secrets(fake.clone()).federation(fake.clone()).admin(fake).build()
}

/// An answer, whole.
struct Answered {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answered {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.body))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The code of a problem and the pointer to the first wrong field.
    fn refusal(&self) -> (u16, String, String) {
        assert_eq!(self.header("content-type"), "application/problem+json", "{:?}", self.body);
        let problem = self.json();
        assert_eq!(problem["status"], self.status.as_u16());
        assert_eq!(problem["request_id"], self.header("x-request-id"));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (self.status.as_u16(), text(&problem["code"]), text(&problem["errors"][0]["pointer"]))
    }
}

async fn send(router: &Router, request: Request<Body>) -> Answered {
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answered { status: parts.status, headers: parts.headers, body }
}

/// Sends a request; `headers` are `name: value` lines.
async fn call(router: &Router, method: Method, uri: &str, headers: &[&str], body: &str) -> Answered {
    let mut request = Request::builder().method(method).uri(uri);
    for header in headers {
        let (name, value) = header.split_once(": ").unwrap();
        request = request.header(name, value);
    }
    send(router, request.body(Body::from(body.to_owned())).unwrap()).await
}

async fn get(router: &Router, uri: &str) -> Answered {
    call(router, Method::GET, uri, &[], "").await
}

fn refusal(status: u16, code: &str, pointer: &str) -> (u16, String, String) {
    (status, code.to_owned(), pointer.to_owned())
}
