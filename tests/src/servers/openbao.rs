//! OpenBao: the server of the Vault API.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use anyhow::{Context as _, Result, anyhow, ensure};
use reqwest::{Method, StatusCode, Url};
use scaivault_domain::backend::KvVersion;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::tools;

use crate::authority::Authority;
use crate::process::Process;
use crate::{http, ports, wait};

/// How an OpenBao is to run. The default: in memory, without TLS, not audited.
#[derive(Debug, Default)]
pub struct Options {
    storage: Storage,
    audit: Audit,
    authority: Option<Authority>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Storage {
    #[default]
    Memory,
    Disk,
}

#[derive(Clone, Copy, Debug, Default)]
enum Audit {
    #[default]
    Off,
    File,
}

impl Options {
    /// Keeps its data across [`OpenBao::stop`] and [`OpenBao::start_again`].
    #[must_use]
    pub fn on_disk(mut self) -> Self {
        self.storage = Storage::Disk;
        self
    }

    /// Notes every request, so that [`OpenBao::requests`] can tell them.
    #[must_use]
    pub fn audited(mut self) -> Self {
        self.audit = Audit::File;
        self
    }

    /// Serves TLS with a certificate of this authority.
    #[must_use]
    pub fn tls(mut self, authority: Authority) -> Self {
        self.authority = Some(authority);
        self
    }
}

/// An OpenBao of a test's own, initialised and unsealed.
#[derive(Debug)]
pub struct OpenBao {
    port: u16,
    ca: Option<String>,
    program: PathBuf,
    folder: TempDir,
    audit: Audit,
    keys: Keys,
    process: Option<Process>,
}

#[derive(Debug, Default, Deserialize)]
struct Keys {
    #[serde(rename = "keys")]
    unseal: Vec<String>,
    root_token: String,
}

impl OpenBao {
    /// Installs OpenBao if need be, starts one on a free port and waits until it serves.
    ///
    /// # Errors
    /// What went wrong, with the end of the server's log.
    pub async fn start(options: Options) -> Result<OpenBao> {
        let program = tokio::task::spawn_blocking(|| tools::OPENBAO.install()).await??;
        let folder = tempfile::Builder::new().prefix("openbao-").tempdir()?;
        let port = ports::free();
        fs::write(folder.path().join("config.hcl"), configuration(&options, &folder, port)?)?;
        let mut bao = OpenBao {
            port,
            ca: options.authority.as_ref().map(Authority::pem),
            program,
            folder,
            audit: options.audit,
            keys: Keys::default(),
            process: None,
        };
        bao.start_again().await?;
        Ok(bao)
    }

    /// Its base URL.
    pub fn addr(&self) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.socket())
    }

    /// Where it listens, to put a proxy in front of it.
    pub fn socket(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The token that may do everything.
    pub fn root_token(&self) -> &str {
        &self.keys.root_token
    }

    /// A client that trusts its certificate, if it has one.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn http(&self) -> Result<reqwest::Client> {
        http::client(self.ca.as_deref())
    }

    /// A client with the root token.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn client(&self) -> Result<Admin> {
        Ok(Admin {
            http: self.http()?,
            addr: self.addr(),
            token: self.root_token().to_owned(),
            namespace: None,
        })
    }

    /// Shuts it down in order; its port stays reserved for [`OpenBao::start_again`].
    ///
    /// # Errors
    /// If it does not go.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            let _: ExitStatus = process.stop().await?;
        }
        Ok(())
    }

    /// Starts it after [`OpenBao::stop`], at the same address. In memory it is a new one with a new root token.
    ///
    /// # Errors
    /// What went wrong, with the end of the server's log.
    pub async fn start_again(&mut self) -> Result<()> {
        let mut command = Command::new(&self.program);
        // Without our environment: it would take a proxy, a token or an address from there.
        command.arg("server").arg("-config").arg(self.folder.path().join("config.hcl")).env_clear();
        let mut process = Process::spawn(&mut command, &self.folder.path().join("log"))?;
        let admin = self.client()?;
        let initialized = wait::until("OpenBao answers", async || {
            process.ensure_running()?;
            // It does not listen yet, or not everything is set up.
            Ok(admin
                .call(Method::GET, "sys/init", None)
                .await
                .ok()
                .map(|status| status["initialized"] == true))
        })
        .await?;
        if !initialized {
            let shares = json!({ "secret_shares": 1, "secret_threshold": 1 });
            let keys = admin.call(Method::PUT, "sys/init", Some(shares)).await?;
            self.keys = serde_json::from_value(keys)?;
        }
        let key = json!({ "key": self.keys.unseal.first() });
        admin.call(Method::PUT, "sys/unseal", Some(key)).await?;
        wait::until("OpenBao is unsealed and active", async || {
            process.ensure_running()?;
            Ok(admin.call(Method::GET, "sys/health", None).await.ok().map(drop))
        })
        .await?;
        self.process = Some(process);
        Ok(())
    }

    /// Freezes it: connections stay open, nothing is answered.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn pause(&self) -> Result<()> {
        self.running()?.pause().await
    }

    /// Lets it go on after [`OpenBao::pause`].
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> Result<()> {
        self.running()?.resume()
    }

    /// Every request it has taken so far, oldest first, e.g. `read secret/data/app/db`. A request is noted before it
    /// is answered.
    ///
    /// # Errors
    /// If it is not [`Options::audited`].
    pub fn requests(&self) -> Result<Vec<String>> {
        ensure!(matches!(self.audit, Audit::File), "start it with `Options::audited`");
        let log = fs::read_to_string(self.folder.path().join("audit.log"))?;
        let mut requests = Vec::new();
        for line in log.lines() {
            let row: Value = serde_json::from_str(line)?;
            if row["type"] == "request" {
                let word = |name: &str| row["request"][name].as_str().unwrap_or_default().to_owned();
                requests.push(format!("{} {}", word("operation"), word("path")));
            }
        }
        Ok(requests)
    }

    /// How many values of KV version 2 it has given so far. An answer is noted before it is sent.
    ///
    /// # Errors
    /// If it is not [`Options::audited`].
    pub fn values_given(&self) -> Result<usize> {
        ensure!(matches!(self.audit, Audit::File), "start it with `Options::audited`");
        let log = fs::read_to_string(self.folder.path().join("audit.log"))?;
        let mut values = 0;
        for line in log.lines() {
            let row: Value = serde_json::from_str(line)?;
            let path = row["request"]["path"].as_str().unwrap_or_default();
            let reads = row["type"] == "response" && row["request"]["operation"] == "read";
            values +=
                usize::from(reads && path.contains("/data/") && row["response"]["data"]["data"].is_object());
        }
        Ok(values)
    }

    fn running(&self) -> Result<&Process> {
        self.process.as_ref().context("OpenBao does not run")
    }
}

fn configuration(options: &Options, folder: &TempDir, port: u16) -> Result<String> {
    let folder = folder.path();
    let storage = match options.storage {
        Storage::Memory => "\"inmem\" {}".to_owned(),
        Storage::Disk => {
            let data = folder.join("raft");
            fs::create_dir(&data)?;
            // The multiplier makes it the leader of itself in a second instead of five.
            format!("\"raft\" {{\n path = {data:?}\n node_id = \"alone\"\n performance_multiplier = 1\n}}")
        }
    };
    let tls = match &options.authority {
        None => "tls_disable = true".to_owned(),
        Some(authority) => {
            let issued = authority.issue()?;
            let (certificate, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
            fs::write(&certificate, issued.certificate)?;
            fs::write(&key, issued.key)?;
            format!("tls_cert_file = {certificate:?}\n  tls_key_file = {key:?}")
        }
    };
    let audit = match options.audit {
        Audit::Off => String::new(),
        Audit::File => {
            let log = folder.join("audit.log");
            format!("audit \"file\" \"requests\" {{\n  options {{ file_path = {log:?} }}\n}}")
        }
    };
    let cluster = ports::free();
    Ok(format!(
        r#"storage {storage}
api_addr = "http://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster}"
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster}"
  {tls}
}}
{audit}
"#
    ))
}

/// What a Vault's administrator does, over its HTTP API.
#[derive(Clone, Debug)]
pub struct Admin {
    http: reqwest::Client,
    addr: String,
    token: String,
    namespace: Option<String>,
}

/// What an application logs in with.
#[derive(Clone, Debug)]
pub struct AppRole {
    /// The role's id.
    pub role_id: String,
    /// A secret id of the role.
    pub secret_id: String,
}

/// A token, and the name it can be revoked by.
#[derive(Clone, Debug, Deserialize)]
pub struct IssuedToken {
    /// The token.
    #[serde(rename = "client_token")]
    pub token: String,
    /// Its accessor.
    pub accessor: String,
}

impl Admin {
    /// The same client in a namespace.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> Admin {
        Admin { namespace: Some(namespace.to_owned()), ..self.clone() }
    }

    /// The same client with another token.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Admin {
        Admin { token: token.to_owned(), ..self.clone() }
    }

    /// Calls `/v1/{path}`; `null` is an answer without a body. The path is plain text, its segments are encoded here.
    ///
    /// # Errors
    /// If it is not answered, or not with success.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let (status, answer) = self.exchange(method.clone(), path, body).await?;
        ensure!(status.is_success(), "{method} {path}: {status} {answer}");
        Ok(answer)
    }

    /// Reads `/v1/{path}`; `None` if nothing is there.
    ///
    /// # Errors
    /// If it is not answered, or refused.
    pub async fn read(&self, path: &str) -> Result<Option<Value>> {
        let (status, answer) = self.exchange(Method::GET, path, None).await?;
        ensure!(status.is_success() || status == StatusCode::NOT_FOUND, "GET {path}: {status} {answer}");
        Ok(status.is_success().then_some(answer))
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Value>) -> Result<(StatusCode, Value)> {
        let mut url = Url::parse(&self.addr)?;
        url.path_segments_mut().map_err(|()| anyhow!("no base URL"))?.push("v1").extend(path.split('/'));
        let mut request = self.http.request(method, url).header("X-Vault-Token", &self.token);
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let status = response.status();
        let body = response.text().await?;
        let answer = if body.is_empty() { Value::Null } else { serde_json::from_str(&body)? };
        Ok((status, answer))
    }

    async fn write(&self, path: &str, body: Value) -> Result<Value> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Mounts a KV engine and waits until it takes writes.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn enable_kv(&self, mount: &str, version: KvVersion) -> Result<()> {
        let number = match version {
            KvVersion::V1 => "1",
            KvVersion::V2 => "2",
        };
        let options = json!({ "type": "kv", "options": { "version": number } });
        self.write(&format!("sys/mounts/{mount}"), options).await?;
        if version == KvVersion::V2 {
            let config = format!("{mount}/config");
            let upgraded = async || Ok(self.call(Method::GET, &config, None).await.ok().map(drop));
            wait::until("the mount is upgraded", upgraded).await?;
        }
        Ok(())
    }

    /// Writes a secret of KV version 2, and returns its new version.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn put(&self, mount: &str, path: &str, data: Value) -> Result<u64> {
        let answer = self.write(&format!("{mount}/data/{path}"), json!({ "data": data })).await?;
        answer["data"]["version"].as_u64().with_context(|| format!("no version in {answer}"))
    }

    /// Writes a secret of KV version 1.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn put_v1(&self, mount: &str, path: &str, data: Value) -> Result<()> {
        self.write(&format!("{mount}/{path}"), data).await.map(drop)
    }

    /// Deletes versions of a secret of KV version 2; they could be undeleted.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn delete(&self, mount: &str, path: &str, versions: &[u64]) -> Result<()> {
        self.write(&format!("{mount}/delete/{path}"), json!({ "versions": versions })).await.map(drop)
    }

    /// Brings deleted versions of a secret of KV version 2 back.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn undelete(&self, mount: &str, path: &str, versions: &[u64]) -> Result<()> {
        self.write(&format!("{mount}/undelete/{path}"), json!({ "versions": versions })).await.map(drop)
    }

    /// Removes a secret of KV version 2 with all of its versions, as if it had never been there.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn remove(&self, mount: &str, path: &str) -> Result<()> {
        self.call(Method::DELETE, &format!("{mount}/metadata/{path}"), None).await.map(drop)
    }

    /// Writes a secret of KV version 1 whose value is this JSON, byte for byte.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn put_v1_raw(&self, mount: &str, path: &str, data: &RawValue) -> Result<()> {
        let url = format!("{}/v1/{mount}/{path}", self.addr);
        let request = self.http.post(url).header("X-Vault-Token", &self.token).json(data);
        request.send().await?.error_for_status()?;
        Ok(())
    }

    /// Destroys versions of a secret of KV version 2 for good.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn destroy(&self, mount: &str, path: &str, versions: &[u64]) -> Result<()> {
        self.write(&format!("{mount}/destroy/{path}"), json!({ "versions": versions })).await.map(drop)
    }

    /// Sets the custom metadata of a secret of KV version 2.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn set_custom_metadata(&self, mount: &str, path: &str, metadata: Value) -> Result<()> {
        let body = json!({ "custom_metadata": metadata });
        self.write(&format!("{mount}/metadata/{path}"), body).await.map(drop)
    }

    /// Writes a policy in HCL.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn write_policy(&self, name: &str, policy: &str) -> Result<()> {
        self.write(&format!("sys/policies/acl/{name}"), json!({ "policy": policy })).await.map(drop)
    }

    /// Mounts an auth method, e.g. `approle` at `approle`.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn enable_auth(&self, mount: &str, method: &str) -> Result<()> {
        self.write(&format!("sys/auth/{mount}"), json!({ "type": method })).await.map(drop)
    }

    /// Creates a role of an approle mount with settings such as `token_policies`, `token_ttl`, `token_num_uses`.
    ///
    /// # Errors
    /// If a call is refused.
    pub async fn create_approle(&self, mount: &str, role: &str, settings: Value) -> Result<AppRole> {
        let path = format!("auth/{mount}/role/{role}");
        self.write(&path, settings).await?;
        let role_id = self.call(Method::GET, &format!("{path}/role-id"), None).await?;
        let secret_id = self.write(&format!("{path}/secret-id"), json!({})).await?;
        let text = |answer: &Value, name: &str| {
            answer["data"][name].as_str().map(str::to_owned).with_context(|| format!("no {name}"))
        };
        Ok(AppRole { role_id: text(&role_id, "role_id")?, secret_id: text(&secret_id, "secret_id")? })
    }

    /// Creates a token with settings such as `policies`, `ttl`, `period`, `num_uses`.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn create_token(&self, settings: Value) -> Result<IssuedToken> {
        let mut answer = self.write("auth/token/create", settings).await?;
        Ok(serde_json::from_value(answer["auth"].take())?)
    }

    /// Revokes a token and its children.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn revoke_token(&self, token: &str) -> Result<()> {
        self.write("auth/token/revoke", json!({ "token": token })).await.map(drop)
    }

    /// Revokes the token with this accessor, and its children.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn revoke_accessor(&self, accessor: &str) -> Result<()> {
        self.write("auth/token/revoke-accessor", json!({ "accessor": accessor })).await.map(drop)
    }

    /// Creates a namespace.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn create_namespace(&self, name: &str) -> Result<()> {
        self.write(&format!("sys/namespaces/{name}"), json!({})).await.map(drop)
    }
}
