//! A reverse proxy on loopback that answers HTTP in the place of a server, or spoils what the server answers.
//!
//! [`crate::faults`] breaks connections, and so works in front of TLS too; this one speaks HTTP, so that a fault can be
//! that of a gateway, of a store that throttles, or of a listing that never ends. Requests are passed on with the `Host`
//! that the client sent, since signatures cover it and links are made of it.

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, TRANSFER_ENCODING};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures::stream;

use crate::fakes::serving::{Bound, Serving};
use crate::http;

/// The largest request and answer that are passed on.
const MOST_BYTES: usize = 64 << 20;
/// What AWS's JSON protocol names the operation by.
const TARGET: &str = "x-amz-target";

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is passed on, and its answer back.
    Pass,
    /// It is never answered.
    Hang,
    /// It is answered with this status and an empty JSON object, and passed on to nobody.
    Status(u16),
    /// It is answered with 429.
    Throttled {
        /// The seconds in `Retry-After`, if there is one.
        retry_after: Option<u32>,
    },
    /// It is answered with this status and a page of HTML, as gateways and captive portals do.
    Page(u16),
    /// It is answered with 200 and bytes that are called JSON and are none.
    Garbage,
    /// It is answered with 200 and this JSON, in which `{n}` stands for the number of the request.
    Json(String),
    /// It is sent to another address.
    Redirect(String),
    /// It is passed on; of the answer, the first half comes back.
    Truncated,
    /// The first answer to a request of its kind is given to all later ones, whatever their query: a listing whose pages
    /// are all the first one.
    Replay,
}

/// A proxy in front of one address, gone when dropped.
#[derive(Debug)]
pub struct HttpProxy {
    address: SocketAddr,
    front: Arc<Front>,
    _serving: Serving,
}

#[derive(Debug)]
struct Front {
    upstream: SocketAddr,
    http: reqwest::Client,
    state: Mutex<FrontState>,
}

#[derive(Debug)]
struct FrontState {
    fault: Fault,
    /// For how many more requests; without end if there is none.
    left: Option<u32>,
    requests: Vec<String>,
    first_answers: BTreeMap<String, Answered>,
}

/// An answer of the server, whole.
#[derive(Clone, Debug)]
struct Answered {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl HttpProxy {
    /// Starts one that passes everything on to `upstream`, which speaks HTTP without TLS.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(upstream: SocketAddr) -> Result<HttpProxy> {
        let bound = Bound::plain().await?;
        let address = bound.address();
        let state = FrontState {
            fault: Fault::Pass,
            left: None,
            requests: Vec::new(),
            first_answers: BTreeMap::new(),
        };
        let front = Arc::new(Front { upstream, http: http::client(None)?, state: Mutex::new(state) });
        let router = Router::new().fallback(answer).with_state(front.clone());
        Ok(HttpProxy { address, front, _serving: bound.serve(router) })
    }

    /// Its base URL, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Does this with every request from now on.
    pub fn set(&self, fault: Fault) {
        self.front.set(fault, None);
    }

    /// Does this with the next so many requests, and passes on those after them.
    pub fn set_times(&self, fault: Fault, times: u32) {
        self.front.set(fault, Some(times));
    }

    /// The requests so far, oldest first, e.g. `GET /secrets?api-version=7.4`.
    pub fn requests(&self) -> Vec<String> {
        self.front.state().requests.clone()
    }
}

impl Front {
    fn state(&self) -> MutexGuard<'_, FrontState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, fault: Fault, left: Option<u32>) {
        let mut state = self.state();
        state.first_answers.clear();
        (state.fault, state.left) = (fault, left);
    }

    async fn pass(&self, request: Request) -> Result<Answered> {
        let (head, body) = request.into_parts();
        let url = format!("http://{}{}", self.upstream, head.uri);
        let body = to_bytes(body, MOST_BYTES).await?;
        let answer = self.http.request(head.method, url).headers(head.headers).body(body).send().await?;
        let (status, mut headers) = (answer.status(), answer.headers().clone());
        for hop in [CONNECTION, TRANSFER_ENCODING, CONTENT_LENGTH] {
            headers.remove(hop);
        }
        Ok(Answered { status, headers, body: answer.bytes().await? })
    }
}

impl FrontState {
    /// The fault that a request meets, and its number.
    fn next(&mut self, request: String) -> (Fault, usize) {
        self.requests.push(request);
        let fault = match &mut self.left {
            Some(0) => Fault::Pass,
            Some(left) => {
                *left -= 1;
                self.fault.clone()
            }
            None => self.fault.clone(),
        };
        (fault, self.requests.len())
    }
}

impl From<Answered> for Response {
    fn from(Answered { status, headers, body }: Answered) -> Response {
        (status, headers, body).into_response()
    }
}

async fn answer(State(front): State<Arc<Front>>, request: Request) -> Response {
    let target = request.headers().get(TARGET).and_then(|target| target.to_str().ok()).unwrap_or_default();
    let kind = format!("{} {} {target}", request.method(), request.uri().path());
    let (fault, number) = front.state().next(format!("{} {}", request.method(), request.uri()));
    let passed = match fault {
        Fault::Hang => return pending().await,
        Fault::Status(status) => return json(status, "{}".to_owned()),
        Fault::Throttled { retry_after } => {
            let mut response = json(429, "{}".to_owned());
            if let Some(seconds) = retry_after {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            return response;
        }
        Fault::Page(status) => {
            let page = "<html><body>Please sign in</body></html>";
            return (code(status), [(CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response();
        }
        Fault::Garbage => {
            return ([(CONTENT_TYPE, "application/json")], vec![0xfe_u8; 512]).into_response();
        }
        Fault::Json(text) => return json(200, text.replace("{n}", &number.to_string())),
        Fault::Redirect(to) => return (code(307), [("location", to)]).into_response(),
        Fault::Replay => {
            let first = front.state().first_answers.get(&kind).cloned();
            if let Some(first) = first {
                return first.into();
            }
            let passed = front.pass(request).await;
            if let Ok(answered) = &passed {
                front.state().first_answers.insert(kind, answered.clone());
            }
            passed
        }
        Fault::Pass | Fault::Truncated => front.pass(request).await,
    };
    match (passed, fault) {
        (Ok(answered), Fault::Truncated) => truncated(answered),
        (Ok(answered), _) => answered.into(),
        (Err(error), _) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}

fn json(status: u16, body: String) -> Response {
    (code(status), [(CONTENT_TYPE, "application/json")], body).into_response()
}

fn code(status: u16) -> StatusCode {
    StatusCode::from_u16(status).expect("a fault has a status between 100 and 999")
}

/// The answer up to its middle, though its header promises all of it.
fn truncated(answered: Answered) -> Response {
    let length = answered.body.len();
    let half = answered.body.slice(..length / 2);
    let pieces = [Ok(half), Err(io::Error::from(io::ErrorKind::ConnectionReset))];
    let mut response = Response::from(answered);
    *response.body_mut() = Body::from_stream(stream::iter(pieces));
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}
