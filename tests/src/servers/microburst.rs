//! microburst: a proxy in front of an AWS server that answers with AWS's own errors on demand.
//!
//! A signature covers the host that a client believes to call, so the proxy signs anew what it passes on: behind it,
//! everybody is the owner of its key, and nobody's own signature counts.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::{Value, json};
use xtask::tools;

use super::moto::AccessKey;
use super::python::Server;
use crate::http;

/// A microburst of a test's own. It passes everything on until it is told otherwise.
#[derive(Debug)]
pub struct Microburst {
    server: Server,
    http: reqwest::Client,
}

impl Microburst {
    /// Installs microburst if need be, starts one in front of the plain HTTP server at `upstream` and waits until it
    /// serves. It signs with `key`, which is of a user.
    ///
    /// # Errors
    /// What went wrong, with the end of the proxy's log.
    pub async fn start(upstream: SocketAddr, key: &AccessKey) -> Result<Microburst> {
        let mut server = Server::new(tools::MICROBURST, "microburst").await?;
        let (upstream, port) = (format!("http://{upstream}"), server.socket().port().to_string());
        server.command().args(["--host", "127.0.0.1", "--port", &port, "--upstream", &upstream]);
        server.command().arg("--resign").env("AWS_ACCESS_KEY_ID", &key.id);
        server.command().env("AWS_SECRET_ACCESS_KEY", &key.secret);
        server.start().await?;
        Ok(Microburst { server, http: http::client(None)? })
    }

    /// The base URL that clients use instead of the server's.
    pub fn addr(&self) -> String {
        format!("http://{}", self.socket())
    }

    /// Where it listens.
    pub fn socket(&self) -> SocketAddr {
        self.server.socket()
    }

    /// Answers every call of a Secrets Manager operation, e.g. `GetSecretValue`, with `ThrottlingException`, until
    /// [`Microburst::heal`].
    ///
    /// # Errors
    /// If the proxy does not take it.
    pub async fn throttle(&self, operation: &str) -> Result<()> {
        self.add_rule(throttling(operation)).await
    }

    /// As [`Microburst::throttle`], for the next `times` calls only.
    ///
    /// # Errors
    /// If the proxy does not take it.
    pub async fn throttle_times(&self, operation: &str, times: u32) -> Result<()> {
        let mut rule = throttling(operation);
        rule["times"] = times.into();
        self.add_rule(rule).await
    }

    /// Adds a rule in microburst's own words.
    ///
    /// # Errors
    /// If the proxy does not take it.
    pub async fn add_rule(&self, rule: Value) -> Result<()> {
        self.control(Method::PATCH, "rules", Some(json!([rule]))).await.map(drop)
    }

    /// Passes everything on again.
    ///
    /// # Errors
    /// If the proxy does not take it.
    pub async fn heal(&self) -> Result<()> {
        self.control(Method::POST, "rules", Some(json!([]))).await.map(drop)
    }

    /// How many calls it has taken so far, those it answered itself included.
    ///
    /// # Errors
    /// If the proxy does not tell.
    pub async fn calls(&self) -> Result<u64> {
        let health = self.control(Method::GET, "health", None).await?;
        health["requests_seen"].as_u64().with_context(|| format!("no count in {health}"))
    }

    /// Freezes it: connections stay open, nothing is answered.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn pause(&self) -> Result<()> {
        self.server.pause().await
    }

    /// Lets it go on after [`Microburst::pause`].
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }

    async fn control(&self, method: Method, what: &str, body: Option<Value>) -> Result<Value> {
        let mut request = self.http.request(method, format!("{}/_microburst/{what}", self.addr()));
        if let Some(body) = body {
            request = request.json(&body);
        }
        Ok(request.send().await?.error_for_status()?.json().await?)
    }
}

fn throttling(operation: &str) -> Value {
    let error = json!({ "code": "ThrottlingException", "message": "Rate exceeded" });
    json!({ "service": "secretsmanager", "operation": operation, "error": error })
}
