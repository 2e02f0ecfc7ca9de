//! A Vault that knows the login methods `aws` and `gcp`, which OpenBao has not.
//!
//! It stands in front of a real OpenBao: a login at a mount of this fake is checked as Vault's plugins check it, and is
//! answered with a token that OpenBao made. Everything else is OpenBao's, so that what comes after the login is real:
//! reading, renewing, revoking. For faults of the network put [`crate::faults::Proxy`] in front.
//!
//! Written from Vault's API documentation of both methods. Of `aws` it has the type `iam`, of `gcp` both types.

mod aws;
mod gcp;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::{self, Body};
use axum::extract::{Request, State as Extract};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

pub use self::aws::{AwsMount, AwsRole};
pub use self::gcp::{GcpRole, GcpRoleType};

use super::gcp::Gcp;
use super::serving::{Bound, Serving};
use crate::servers::openbao::OpenBao;

/// A Vault with more login methods than OpenBao; gone when dropped.
#[derive(Debug)]
pub struct VaultLogins {
    front: Arc<Front>,
    url: String,
    _serving: Serving,
}

/// What a login of a role gives.
#[derive(Clone, Debug)]
pub struct Granted {
    /// The token's policies.
    pub policies: Vec<String>,
    /// How long the token lives.
    pub ttl: Duration,
}

/// A login that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// The mount, e.g. `aws`.
    pub mount: String,
    /// The role.
    pub role: String,
    /// Who it was: an ARN, or a service account's e-mail address.
    pub principal: String,
}

#[derive(Debug)]
struct Front {
    client: reqwest::Client,
    bao: String,
    root_token: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mounts: BTreeMap<String, Mount>,
    logins: Vec<Login>,
    refused: usize,
}

#[derive(Clone, Debug)]
enum Mount {
    Aws(AwsMount),
    Gcp(gcp::GcpMount),
}

/// Who has logged in, and what that gives.
#[derive(Debug)]
struct Proven {
    principal: String,
    granted: Granted,
    metadata: Value,
}

impl VaultLogins {
    /// Starts one in front of a server.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn in_front_of(bao: &OpenBao) -> Result<VaultLogins> {
        let bound = Bound::plain().await?;
        let front = Arc::new(Front {
            client: bao.http()?,
            bao: bao.addr(),
            root_token: bao.root_token().to_owned(),
            state: Mutex::default(),
        });
        let url = bound.url();
        let router = Router::new().fallback(answer).with_state(front.clone());
        Ok(VaultLogins { front, url, _serving: bound.serve(router) })
    }

    /// Its base URL.
    pub fn addr(&self) -> &str {
        &self.url
    }

    /// Mounts the method `aws` at `auth/{mount}`, or changes it there.
    pub fn enable_aws(&self, mount: &str, settings: AwsMount) {
        self.front.state().mounts.insert(mount.to_owned(), Mount::Aws(settings));
    }

    /// Mounts the method `gcp` at `auth/{mount}`, or changes it there; it trusts the keys of this cloud.
    pub fn enable_gcp(&self, mount: &str, cloud: &Gcp, roles: BTreeMap<String, GcpRole>) {
        let settings = gcp::GcpMount { cloud: cloud.cloud(), roles };
        self.front.state().mounts.insert(mount.to_owned(), Mount::Gcp(settings));
    }

    /// The logins that succeeded, the first one in front.
    pub fn logins(&self) -> Vec<Login> {
        self.front.state().logins.clone()
    }

    /// How many logins were refused.
    pub fn refused(&self) -> usize {
        self.front.state().refused
    }
}

/// Why a login is refused, in Vault's words as far as they are known.
type Refused = String;

impl Front {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mount that a path logs in at, and its name.
    fn mount(&self, method: &Method, path: &str) -> Option<(String, Mount)> {
        let name = path.strip_prefix("/v1/auth/")?.strip_suffix("/login")?;
        let mount = self.state().mounts.get(name)?.clone();
        (method == Method::POST || method == Method::PUT).then(|| (name.to_owned(), mount))
    }

    async fn login(&self, name: &str, mount: Mount, headers: &HeaderMap, body: &[u8]) -> Result<Response> {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let role = body["role"].as_str().unwrap_or_default().to_owned();
        let proven = match &mount {
            Mount::Aws(aws) => aws.prove(&self.client, &role, &body).await,
            Mount::Gcp(gcp) => gcp.prove(&role, &body),
        };
        let proven = match proven {
            Ok(proven) => proven,
            Err(reason) => {
                self.state().refused += 1;
                return Ok(json_of(StatusCode::BAD_REQUEST, &json!({ "errors": [reason] })));
            }
        };
        let token = json!({
            "policies": proven.granted.policies,
            "ttl": format!("{}s", proven.granted.ttl.as_secs()),
            "renewable": true,
            "display_name": format!("{name}-{role}"),
            "meta": proven.metadata,
        });
        let mut request = self
            .client
            .post(format!("{}/v1/auth/token/create-orphan", self.bao))
            .header("X-Vault-Token", &self.root_token)
            .json(&token);
        if let Some(namespace) = headers.get("X-Vault-Namespace") {
            request = request.header("X-Vault-Namespace", namespace);
        }
        let made = request.send().await?;
        let (status, mut answer) = (made.status(), made.json::<Value>().await?);
        if status.is_success() {
            // What comes with creating a token and not with a login.
            answer["warnings"] = Value::Null;
            let login = Login { mount: name.to_owned(), role, principal: proven.principal };
            self.state().logins.push(login);
        }
        Ok(json_of(status, &answer))
    }

    async fn forward(
        &self,
        method: Method,
        target: &str,
        headers: &HeaderMap,
        body: Vec<u8>,
    ) -> Result<Response> {
        let mut request = self.client.request(method, format!("{}{target}", self.bao)).body(body);
        for (name, value) in headers.iter().filter(|(name, _)| end_to_end(name)) {
            request = request.header(name, value);
        }
        let answered = request.send().await?;
        let mut response = Response::builder().status(answered.status());
        for (name, value) in answered.headers().iter().filter(|(name, _)| end_to_end(name)) {
            response = response.header(name, value);
        }
        Ok(response.body(Body::from(answered.bytes().await?))?)
    }
}

/// Whether a header is about the message and not about the connection.
fn end_to_end(name: &HeaderName) -> bool {
    ![header::HOST, header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING].contains(name)
}

async fn answer(Extract(front): Extract<Arc<Front>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = body::to_bytes(body, 4 << 20).await.unwrap_or_default();
    let answered = match front.mount(&parts.method, parts.uri.path()) {
        Some((name, mount)) => front.login(&name, mount, &parts.headers, &body).await,
        None => {
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            front.forward(parts.method, target, &parts.headers, body.to_vec()).await
        }
    };
    answered
        .unwrap_or_else(|_| json_of(StatusCode::BAD_GATEWAY, &json!({ "errors": ["OpenBao is not there"] })))
}

fn json_of(status: StatusCode, body: &Value) -> Response {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .expect("a status and a known header")
}
