//! drongo: the server of GCP Secret Manager, over REST.
//!
//! It does not ask who calls, has no pages, no annotations and no checksums.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Method, StatusCode, Url};
use serde_json::{Value, json};
use xtask::tools;

use super::python::Server;
use crate::http;

/// A drongo of a test's own, in memory.
#[derive(Debug)]
pub struct Drongo {
    server: Server,
}

impl Drongo {
    /// Installs drongo if need be, starts one on a free port and waits until it serves.
    ///
    /// # Errors
    /// What went wrong, with the end of the server's log.
    pub async fn start() -> Result<Drongo> {
        let mut server = Server::new(tools::DRONGO, "drongo.cli").await?;
        let port = server.socket().port().to_string();
        server.command().args(["server", "--host", "127.0.0.1", "--port", &port]);
        server.start().await?;
        Ok(Drongo { server })
    }

    /// Its base URL.
    pub fn addr(&self) -> String {
        format!("http://{}", self.socket())
    }

    /// Where it listens, to put a proxy in front of it.
    pub fn socket(&self) -> SocketAddr {
        self.server.socket()
    }

    /// A client for the secrets of a project; every project is there and empty.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn client(&self, project: &str) -> Result<Admin> {
        Ok(Admin { http: http::client(None)?, addr: self.addr(), project: project.to_owned() })
    }

    /// Ends it; its port stays reserved for [`Drongo::start_again`].
    ///
    /// # Errors
    /// If it does not go.
    pub async fn stop(&mut self) -> Result<()> {
        self.server.stop().await
    }

    /// Starts it after [`Drongo::stop`], at the same address and empty.
    ///
    /// # Errors
    /// What went wrong, with the end of the server's log.
    pub async fn start_again(&mut self) -> Result<()> {
        self.server.start().await
    }

    /// Freezes it: connections stay open, nothing is answered.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn pause(&self) -> Result<()> {
        self.server.pause().await
    }

    /// Lets it go on after [`Drongo::pause`].
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }
}

/// What an administrator of a project's secrets does.
#[derive(Clone, Debug)]
pub struct Admin {
    http: reqwest::Client,
    addr: String,
    project: String,
}

impl Admin {
    /// Calls `/v1/projects/{project}/{path}`. The path is plain text and may have a query.
    ///
    /// # Errors
    /// If it is not answered, or not with success.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let (status, answer) = self.exchange(method.clone(), path, body).await?;
        ensure!(status.is_success(), "{method} {path}: {status} {answer}");
        Ok(answer)
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Value>) -> Result<(StatusCode, Value)> {
        let url = Url::parse(&format!("{}/v1/projects/{}/{path}", self.addr, self.project))?;
        let mut request = self.http.request(method, url);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        Ok((response.status(), response.json().await?))
    }

    /// Creates a secret without a version.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn create_secret(&self, id: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: Value = labels.iter().map(|&(name, value)| (name, Value::from(value))).collect();
        let body = json!({ "replication": { "automatic": {} }, "labels": labels });
        self.call(Method::POST, &format!("secrets?secretId={id}"), Some(body)).await.map(drop)
    }

    /// Adds a version, and returns its number.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn add_version(&self, id: &str, value: &[u8]) -> Result<u64> {
        let body = json!({ "payload": { "data": STANDARD.encode(value) } });
        let answer = self.call(Method::POST, &format!("secrets/{id}:addVersion"), Some(body)).await?;
        let number = answer["name"].as_str().and_then(|name| name.rsplit('/').next()?.parse().ok());
        number.with_context(|| format!("no version in {answer}"))
    }

    /// What a version holds, by its number or as `latest`; `None` if the secret or the version is not there.
    ///
    /// # Errors
    /// If the call is refused, as it is for a version that is disabled or destroyed.
    pub async fn access(&self, id: &str, version: &str) -> Result<Option<Vec<u8>>> {
        let path = format!("secrets/{id}/versions/{version}:access");
        let (status, answer) = self.exchange(Method::GET, &path, None).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        ensure!(status.is_success(), "GET {path}: {status} {answer}");
        let value = answer["payload"]["data"].as_str().with_context(|| format!("no data in {answer}"))?;
        Ok(Some(STANDARD.decode(value)?))
    }

    /// Takes a version out of use; it could be enabled again.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn disable_version(&self, id: &str, version: u64) -> Result<()> {
        self.change_version(id, version, "disable").await
    }

    /// Takes a disabled version into use again.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn enable_version(&self, id: &str, version: u64) -> Result<()> {
        self.change_version(id, version, "enable").await
    }

    /// Destroys what a version holds, for good.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn destroy_version(&self, id: &str, version: u64) -> Result<()> {
        self.change_version(id, version, "destroy").await
    }

    async fn change_version(&self, id: &str, version: u64, change: &str) -> Result<()> {
        let path = format!("secrets/{id}/versions/{version}:{change}");
        self.call(Method::POST, &path, Some(json!({}))).await.map(drop)
    }

    /// Deletes a secret with all of its versions.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn delete_secret(&self, id: &str) -> Result<()> {
        self.call(Method::DELETE, &format!("secrets/{id}"), None).await.map(drop)
    }
}
