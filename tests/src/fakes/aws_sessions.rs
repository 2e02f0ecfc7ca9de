//! A moto whose sessions are over when AWS's would be.
//!
//! It stands in front of a moto, which checks every signature and every policy, and adds what moto has not: a session
//! ends when it was to end, or when it is ended here; a session is as long as a test wants; and `GetSessionToken` gives
//! keys that work, which moto's do not: those of a role that stands for the user. It also serves the container
//! credentials of AWS, which are how a process finds its own identity where it runs.
//!
//! Written from the API references of AWS STS ("GetSessionToken", "AssumeRole", common errors) and of AWS Secrets Manager,
//! and "Container credential provider" in the AWS SDKs and Tools Reference Guide.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::{self, Body};
use axum::extract::{Request, State as Extract};
use axum::http::{StatusCode, header};
use axum::response::Response;
use jiff::Timestamp;
use serde_json::json;

use super::serving::{Bound, Serving};
use crate::http;
use crate::servers::moto::{AccessKey, Client, Moto};

/// Where [`AwsSessions::container_url`] leads.
const CONTAINER: &str = "/container-credentials";

/// A moto with sessions that end; gone when dropped.
#[derive(Debug)]
pub struct AwsSessions {
    front: Arc<Front>,
    url: String,
    _serving: Serving,
}

#[derive(Debug)]
struct Front {
    http: reqwest::Client,
    moto: String,
    administrator: Client,
    /// What a session of a user is a session of.
    role: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When each session ends, by the id of its key.
    ends: BTreeMap<String, Timestamp>,
    /// How long sessions last, if not as long as was asked for.
    length: Option<Duration>,
    calls: Vec<Call>,
    container: Option<AccessKey>,
}

/// A call of STS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// E.g. `AssumeRole`.
    pub action: String,
    /// Its parameters.
    pub parameters: BTreeMap<String, String>,
}

impl AwsSessions {
    /// Starts one in front of a moto; `role` is the ARN of what a session of a user's keys may do.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn in_front_of(moto: &Moto, role: String) -> Result<AwsSessions> {
        let bound = Bound::plain().await?;
        let front = Arc::new(Front {
            http: http::client(None)?,
            moto: moto.addr(),
            administrator: moto.client()?,
            role,
            state: Mutex::default(),
        });
        let url = bound.url();
        let router = Router::new().fallback(answer).with_state(front.clone());
        Ok(AwsSessions { front, url, _serving: bound.serve(router) })
    }

    /// The base URL of every service.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The calls of STS so far, refused ones included, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.front.state().calls.clone()
    }

    /// Ends every session that was begun so far, as if its keys had never been.
    pub fn end_sessions(&self) {
        for end in self.front.state().ends.values_mut() {
            *end = Timestamp::UNIX_EPOCH;
        }
    }

    /// Has sessions last so long from now on, whatever is asked for.
    pub fn set_length(&self, length: Duration) {
        self.front.state().length = Some(length);
    }

    /// For `AWS_CONTAINER_CREDENTIALS_FULL_URI`.
    pub fn container_url(&self) -> String {
        format!("{}{CONTAINER}", self.url)
    }

    /// Who assumes the role of the container: its keys are those of a new session each time. The keys of a session are
    /// given as they are.
    pub fn set_container(&self, key: AccessKey) {
        self.front.state().container = Some(key);
    }
}

impl Front {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a session ends that begins now and would last for an hour, and from then on it has.
    fn begin(&self, key: &AccessKey) -> Timestamp {
        let mut state = self.state();
        let end = Timestamp::now() + state.length.unwrap_or(Duration::from_secs(3600));
        state.ends.insert(key.id.clone(), end);
        end
    }

    async fn session_of_container(&self) -> Result<Response> {
        let Some(key) = self.state().container.clone() else {
            return Ok(respond(StatusCode::NOT_FOUND, "application/json", "{}".to_owned()));
        };
        let session = match key.session_token {
            Some(_) => key,
            None => self.administrator.with_key(key).assume_role(&self.role, "container").await?,
        };
        let end = self.begin(&session);
        let body = json!({
            "AccessKeyId": session.id, "SecretAccessKey": session.secret, "Token": session.session_token,
            "Expiration": end.to_string(), "RoleArn": self.role,
        });
        Ok(respond(StatusCode::OK, "application/json", body.to_string()))
    }

    async fn pass(&self, request: Request) -> Result<Response> {
        let (parts, body) = request.into_parts();
        let body = body::to_bytes(body, 4 << 20).await?;
        let is_form = !parts.headers.contains_key("x-amz-target");
        let parameters: BTreeMap<String, String> = match is_form {
            true => url::form_urlencoded::parse(&body).into_owned().collect(),
            false => BTreeMap::new(),
        };
        let action = parameters.get("Action").cloned().unwrap_or_default();
        if is_form {
            self.state().calls.push(Call { action: action.clone(), parameters });
        }
        let signed = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let signer = signed.and_then(|text| text.split_once("Credential=")?.1.split('/').next());
        let end = signer.and_then(|id| self.state().ends.get(id).copied());
        if end.is_some_and(|end| end <= Timestamp::now()) {
            return Ok(over(is_form, end == Some(Timestamp::UNIX_EPOCH)));
        }

        // With the host that was signed for.
        let url = format!("{}{}", self.moto, parts.uri);
        let sent = self.http.request(parts.method, url).headers(parts.headers).body(body);
        let answered = sent.send().await?;
        let (status, kind) = (answered.status(), answered.headers().get(header::CONTENT_TYPE).cloned());
        let kind = kind.as_ref().and_then(|kind| kind.to_str().ok()).unwrap_or("text/xml").to_owned();
        let mut answer = answered.text().await?;
        if status.is_success() && matches!(action.as_str(), "AssumeRole" | "GetSessionToken") {
            let session = match action.as_str() {
                "AssumeRole" => AccessKey::from_xml(&answer)?,
                _ => self.administrator.assume_role(&self.role, "user").await?,
            };
            let end = self.begin(&session);
            for (name, value) in [
                ("AccessKeyId", session.id),
                ("SecretAccessKey", session.secret),
                ("SessionToken", session.session_token.context("no token")?),
                ("Expiration", format!("{end:.0}")),
            ] {
                answer = with_element(&answer, name, &value).with_context(|| format!("no {name}"))?;
            }
        }
        Ok(respond(status, &kind, answer))
    }
}

/// The same XML with another text in the first element of this name.
fn with_element(xml: &str, name: &str, text: &str) -> Option<String> {
    let (before, rest) = xml.split_once(&format!("<{name}>"))?;
    let (_, after) = rest.split_once(&format!("</{name}>"))?;
    Some(format!("{before}<{name}>{text}</{name}>{after}"))
}

/// How AWS refuses a session's keys: STS in XML, Secrets Manager in JSON.
fn over(is_form: bool, is_unknown: bool) -> Response {
    let unknown = "The security token included in the request is invalid.";
    let expired = "The security token included in the request is expired";
    match (is_form, is_unknown) {
        (true, _) => {
            let (code, message) =
                if is_unknown { ("InvalidClientTokenId", unknown) } else { ("ExpiredToken", expired) };
            let body = format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>\
                 </ErrorResponse>"
            );
            respond(StatusCode::FORBIDDEN, "text/xml", body)
        }
        (false, _) => {
            let (code, message) = if is_unknown {
                ("UnrecognizedClientException", unknown)
            } else {
                ("ExpiredTokenException", expired)
            };
            let body = json!({ "__type": code, "message": message });
            respond(StatusCode::BAD_REQUEST, "application/x-amz-json-1.1", body.to_string())
        }
    }
}

async fn answer(Extract(front): Extract<Arc<Front>>, request: Request) -> Response {
    let answered = match request.uri().path() {
        CONTAINER => front.session_of_container().await,
        _ => front.pass(request).await,
    };
    answered.unwrap_or_else(|error| respond(StatusCode::BAD_GATEWAY, "text/plain", error.to_string()))
}

fn respond(status: StatusCode, kind: &str, body: String) -> Response {
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, kind);
    response.body(Body::from(body)).expect("a status and a known header")
}
