//! A Kubernetes API server as far as an auth method meets it: it reviews tokens.
//!
//! It answers `POST /apis/authentication.k8s.io/v1/tokenreviews` over TLS. A token is reviewed by its signature, expiry and
//! audiences, and whoever asks must be a service account that may. Written from the Kubernetes API reference.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::{self, Body};
use axum::extract::{Request, State as Extract};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::clock::{Clock, seconds};
use super::keys::{self, SigningKey, random_hex};
use super::serving::{Bound, Serving};
use crate::authority::Authority;

/// The audience of a token for the API server itself, and its issuer.
const API_AUDIENCE: &str = "https://kubernetes.default.svc.cluster.local";
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

/// An API server; gone when dropped.
#[derive(Debug)]
pub struct Kubernetes {
    cluster: Arc<Cluster>,
    host: String,
    authority: Authority,
    _serving: Serving,
}

#[derive(Debug)]
struct Cluster {
    clock: Clock,
    key: SigningKey,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By `jti`.
    revoked: BTreeSet<String>,
    /// By user name.
    reviewers: BTreeSet<String>,
    fails_with: Option<StatusCode>,
    reviews: usize,
}

impl Kubernetes {
    /// Starts one with an authority and a signing key of its own.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start() -> Result<Kubernetes> {
        let authority = Authority::new()?;
        let bound = Bound::tls(&authority).await?;
        let cluster =
            Arc::new(Cluster { clock: Clock::default(), key: SigningKey::new()?, state: Mutex::default() });
        let host = bound.url();
        let serving = bound.serve(Router::new().fallback(answer).with_state(cluster.clone()));
        Ok(Kubernetes { cluster, host, authority, _serving: serving })
    }

    /// Its URL, the `kubernetes_host` of an auth method.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whom to trust, the `kubernetes_ca_cert` of an auth method.
    pub fn ca_pem(&self) -> String {
        self.authority.pem()
    }

    /// A token of a service account, as a pod finds it in its file. Without audiences it is for the API server.
    pub fn mint(&self, namespace: &str, name: &str, lifetime: Duration, audiences: &[&str]) -> String {
        let now = self.cluster.clock.seconds();
        let audiences = if audiences.is_empty() { &[API_AUDIENCE] } else { audiences };
        self.cluster.key.sign(&json!({
            "aud": audiences,
            "exp": now + seconds(lifetime),
            "iat": now,
            "nbf": now,
            "iss": API_AUDIENCE,
            "jti": random_hex::<16>(),
            "sub": user_name(namespace, name),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": { "name": name, "uid": uid(namespace, name) },
            },
        }))
    }

    /// A token of an account that may review others, the `token_reviewer_jwt` of an auth method. Valid for a day.
    pub fn reviewer_token(&self) -> String {
        self.allow_reviews("kube-system", "token-reviewer");
        self.mint("kube-system", "token-reviewer", Duration::from_secs(86_400), &[])
    }

    /// Lets a service account review tokens, as `system:auth-delegator` does. A client that logs in without a reviewer's
    /// token has its own reviewed with itself.
    pub fn allow_reviews(&self, namespace: &str, name: &str) {
        self.cluster.state().reviewers.insert(user_name(namespace, name));
    }

    /// Makes a token invalid, as deleting its pod or account does.
    pub fn revoke(&self, token: &str) {
        if let Some(id) = self.cluster.key.verify(token).as_ref().and_then(|claims| claims["jti"].as_str()) {
            self.cluster.state().revoked.insert(id.to_owned());
        }
    }

    /// Puts its clock forward, by whole seconds: tokens expire.
    pub fn advance(&self, by: Duration) {
        self.cluster.clock.advance(by);
    }

    /// Every request is answered with this status. For faults of the network put [`crate::faults::Proxy`] in front.
    pub fn fail_with(&self, status: StatusCode) {
        self.cluster.state().fails_with = Some(status);
    }

    /// Ends [`Kubernetes::fail_with`].
    pub fn heal(&self) {
        self.cluster.state().fails_with = None;
    }

    /// How many tokens were reviewed.
    pub fn reviews(&self) -> usize {
        self.cluster.state().reviews
    }
}

fn user_name(namespace: &str, name: &str) -> String {
    format!("system:serviceaccount:{namespace}:{name}")
}

/// The same for every token of an account.
fn uid(namespace: &str, name: &str) -> String {
    let sum = crc32c::crc32c(user_name(namespace, name).as_bytes());
    format!("{sum:08x}-7c1e-4f0a-9d53-b2a6{sum:08x}")
}

impl Cluster {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claims of a token that is valid for one of these audiences, or why it is not.
    fn authenticate(&self, token: &str, audiences: &[String]) -> Result<Value, String> {
        let claims = self.key.verify(token).ok_or("invalid bearer token")?;
        let now = self.clock.seconds();
        if claims["exp"].as_i64().is_none_or(|expires| expires <= now) {
            return Err("[invalid bearer token, service account token has expired]".to_owned());
        }
        if claims["nbf"].as_i64().is_some_and(|begins| begins > now) {
            return Err("[invalid bearer token, service account token is not valid yet]".to_owned());
        }
        if claims["jti"].as_str().is_none_or(|id| self.state().revoked.contains(id)) {
            return Err("[invalid bearer token, service account token has been invalidated]".to_owned());
        }
        let own = keys::audiences(&claims);
        if !own.iter().any(|audience| audiences.contains(audience)) {
            let message =
                format!("token audiences {own:?} is invalid for the target audiences {audiences:?}");
            return Err(format!("[invalid bearer token, {message}]"));
        }
        Ok(claims)
    }

    fn review(&self, spec: &Value) -> Value {
        let wanted: Vec<String> = match spec["audiences"].as_array() {
            Some(wanted) if !wanted.is_empty() => {
                wanted.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            _ => vec![API_AUDIENCE.to_owned()],
        };
        self.state().reviews += 1;
        let claims = match self.authenticate(spec["token"].as_str().unwrap_or_default(), &wanted) {
            Ok(claims) => claims,
            Err(error) => return json!({ "user": {}, "error": error }),
        };
        let account = &claims["kubernetes.io"];
        let namespace = account["namespace"].as_str().unwrap_or_default();
        let mut audiences = keys::audiences(&claims);
        audiences.retain(|audience| wanted.contains(audience));
        json!({
            "authenticated": true,
            "audiences": audiences,
            "user": {
                "username": claims["sub"],
                "uid": account["serviceaccount"]["uid"],
                "groups": [
                    "system:serviceaccounts",
                    format!("system:serviceaccounts:{namespace}"),
                    "system:authenticated",
                ],
                "extra": {
                    "authentication.kubernetes.io/credential-id":
                        [format!("JTI={}", claims["jti"].as_str().unwrap_or_default())],
                },
            },
        })
    }
}

async fn answer(Extract(cluster): Extract<Arc<Cluster>>, request: Request) -> Response {
    let fails_with = cluster.state().fails_with;
    if let Some(status) = fails_with {
        return failure(
            status,
            "InternalError",
            "an error on the server has prevented the request from succeeding",
        );
    }
    let (parts, body) = request.into_parts();
    let bearer = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    let Ok(caller) = cluster.authenticate(bearer, &[API_AUDIENCE.to_owned()]) else {
        return failure(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized");
    };
    if parts.uri.path() != REVIEWS || parts.method != Method::POST {
        return failure(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the server could not find the requested resource",
        );
    }
    let user = caller["sub"].as_str().unwrap_or_default();
    if !cluster.state().reviewers.contains(user) {
        let message = format!(
            "tokenreviews.authentication.k8s.io is forbidden: User {user:?} cannot create resource \"tokenreviews\" \
             in API group \"authentication.k8s.io\" at the cluster scope"
        );
        return failure(StatusCode::FORBIDDEN, "Forbidden", &message);
    }
    let body = body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let review: Option<Value> = serde_json::from_slice(&body).ok();
    let Some(mut review) = review.filter(|review| review["spec"]["token"].is_string()) else {
        return failure(StatusCode::BAD_REQUEST, "BadRequest", "the request body is no TokenReview");
    };
    review["apiVersion"] = json!("authentication.k8s.io/v1");
    review["kind"] = json!("TokenReview");
    review["status"] = cluster.review(&review["spec"]);
    respond(StatusCode::CREATED, &review)
}

fn failure(status: StatusCode, reason: &str, message: &str) -> Response {
    let body = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": status.as_u16(),
    });
    respond(status, &body)
}

fn respond(status: StatusCode, body: &Value) -> Response {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .expect("a status and a known header")
}
