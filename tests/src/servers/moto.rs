//! moto: the server of AWS Secrets Manager, STS and IAM.
//!
//! Signatures and policies are enforced, with these differences from AWS:
//!
//! - refusals are XML with status 403, for Secrets Manager too, where AWS answers JSON with status 400;
//! - for Secrets Manager only a statement about the resource `*` counts: one about an ARN neither allows nor denies;
//! - a trust policy has to name the caller's own ARN or `*`: the account's root lets nobody in; a condition on
//!   `sts:ExternalId` refuses a wrong one, but not a missing one;
//! - the signature of a form (IAM, STS) must be that of the form as Python would write it, with `+` for a space;
//! - an access key that was made inactive goes on working, so there is no call for that here: delete it;
//! - nobody looks at how old a signature is, nor whether an assumed role's session is over.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{StatusCode, Url};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use xtask::tools;

use super::python::Server;
use crate::authority::Authority;
use crate::http;

/// The region that everything here is in.
pub const REGION: &str = "eu-central-1";
/// The account that everything here belongs to.
pub const ACCOUNT: &str = "123456789012";

/// All but what RFC 3986 leaves as it is.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What [`Moto`] makes the administrator with: a user, its policy and its key. Whatever comes after is checked.
const UNCHECKED_CALLS: &str = "3";

/// How a moto is to run. The default: without TLS.
#[derive(Debug, Default)]
pub struct Options {
    authority: Option<Authority>,
}

impl Options {
    /// Serves TLS with a certificate of this authority.
    #[must_use]
    pub fn tls(mut self, authority: Authority) -> Self {
        self.authority = Some(authority);
        self
    }
}

/// A moto of a test's own, in memory, that enforces signatures and policies.
#[derive(Debug)]
pub struct Moto {
    server: Server,
    ca: Option<String>,
    administrator: AccessKey,
}

impl Moto {
    /// Installs moto if need be, starts one on a free port, makes an administrator and waits until it serves.
    ///
    /// # Errors
    /// What went wrong, with the end of the server's log.
    pub async fn start(options: Options) -> Result<Moto> {
        let mut server = Server::new(tools::MOTO, "moto.server").await?;
        let port = server.socket().port().to_string();
        if let Some(authority) = &options.authority {
            let issued = authority.issue()?;
            let certificate = server.folder().join("certificate.pem");
            let key = server.folder().join("key.pem");
            fs::write(&certificate, issued.certificate)?;
            fs::write(&key, issued.key)?;
            server.command().arg("--ssl-cert").arg(certificate).arg("--ssl-key").arg(key);
        }
        server.command().args(["--host", "127.0.0.1", "--port", &port]);
        server.command().env("INITIAL_NO_AUTH_ACTION_COUNT", UNCHECKED_CALLS);
        let ca = options.authority.as_ref().map(Authority::pem);
        let mut moto = Moto { server, ca, administrator: AccessKey::unknown() };
        moto.start_again().await?;
        Ok(moto)
    }

    /// Its base URL, the endpoint of all its services.
    pub fn addr(&self) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.socket())
    }

    /// Where it listens, to put a proxy in front of it.
    pub fn socket(&self) -> SocketAddr {
        self.server.socket()
    }

    /// The id of its process, to see what it uses.
    ///
    /// # Errors
    /// If it does not run.
    pub fn process(&self) -> Result<u32> {
        self.server.process()
    }

    /// The key of [`Moto::client`].
    pub fn administrator(&self) -> &AccessKey {
        &self.administrator
    }

    /// A client that may do everything.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn client(&self) -> Result<Client> {
        let http = http::client(self.ca.as_deref())?;
        Ok(Client { http, addr: self.addr(), key: self.administrator.clone() })
    }

    /// How many calls it has taken so far. A call is counted before it is answered.
    ///
    /// # Errors
    /// If its log cannot be read.
    pub fn calls(&self) -> Result<usize> {
        Ok(self.server.log()?.lines().filter(|line| line.contains("\"POST / HTTP/")).count())
    }

    /// Ends it; its port stays reserved for [`Moto::start_again`].
    ///
    /// # Errors
    /// If it does not go.
    pub async fn stop(&mut self) -> Result<()> {
        self.server.stop().await
    }

    /// Starts it after [`Moto::stop`], at the same address, empty and with a new administrator.
    ///
    /// # Errors
    /// What went wrong, with the end of the server's log.
    pub async fn start_again(&mut self) -> Result<()> {
        self.server.start().await?;
        self.administrator = AccessKey::unknown();
        let everything = json!({
            "Version": "2012-10-17",
            "Statement": [{ "Effect": "Allow", "Action": "*", "Resource": "*" }],
        });
        self.administrator = self.client()?.create_user("administrator", &everything).await?;
        Ok(())
    }

    /// Freezes it: connections stay open, nothing is answered.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn pause(&self) -> Result<()> {
        self.server.pause().await
    }

    /// Lets it go on after [`Moto::pause`].
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }
}

/// What a caller signs with.
#[derive(Clone, Debug)]
pub struct AccessKey {
    /// The access key's id.
    pub id: String,
    /// Its secret.
    pub secret: String,
    /// Of an assumed role.
    pub session_token: Option<String>,
}

impl AccessKey {
    /// For the calls that nobody checks.
    fn unknown() -> AccessKey {
        AccessKey { id: "AKIAUNKNOWN".into(), secret: "unknown".into(), session_token: None }
    }

    pub(crate) fn from_xml(answer: &str) -> Result<AccessKey> {
        let (id, secret) = (element(answer, "AccessKeyId"), element(answer, "SecretAccessKey"));
        let session_token = element(answer, "SessionToken");
        Ok(AccessKey { id: id.context("no id")?, secret: secret.context("no secret")?, session_token })
    }
}

/// A caller with an access key; [`Moto::client`] may do everything.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    addr: String,
    key: AccessKey,
}

impl Client {
    /// The same client with another key.
    #[must_use]
    pub fn with_key(&self, key: AccessKey) -> Client {
        Client { key, ..self.clone() }
    }

    /// The same client at another base URL: that of a proxy.
    #[must_use]
    pub fn at(&self, addr: String) -> Client {
        Client { addr, ..self.clone() }
    }

    /// Calls an operation of Secrets Manager.
    ///
    /// # Errors
    /// If it is not answered, or not with success.
    pub async fn call(&self, operation: &str, body: Value) -> Result<Value> {
        let (status, answer) = self.exchange(operation, body).await?;
        ensure!(status.is_success(), "{operation}: {status} {answer}");
        Ok(serde_json::from_str(&answer)?)
    }

    /// Calls an operation of Secrets Manager, and returns its status and the body as it came.
    ///
    /// # Errors
    /// If it is not answered.
    pub async fn exchange(&self, operation: &str, body: Value) -> Result<(StatusCode, String)> {
        let target = format!("secretsmanager.{operation}");
        let request = Request {
            service: "secretsmanager",
            content_type: "application/x-amz-json-1.1",
            target: Some(&target),
            body: body.to_string(),
        };
        self.send(request).await
    }

    /// Calls an operation of IAM or STS, and returns the XML of its answer.
    /// Parameters have no spaces.
    async fn query(&self, api: Api, operation: &str, parameters: &[(&str, &str)]) -> Result<String> {
        let (service, version) = match api {
            Api::Iam => ("iam", "2010-05-08"),
            Api::Sts => ("sts", "2011-06-15"),
        };
        let mut form = format!("Action={operation}&Version={version}");
        for (name, value) in parameters {
            write!(form, "&{name}={}", utf8_percent_encode(value, RESERVED))?;
        }
        let request =
            Request { service, content_type: "application/x-www-form-urlencoded", target: None, body: form };
        let (status, answer) = self.send(request).await?;
        ensure!(status.is_success(), "{operation}: {status} {answer}");
        Ok(answer)
    }

    async fn send(&self, request: Request<'_>) -> Result<(StatusCode, String)> {
        let url = Url::parse(&self.addr)?;
        let host = format!("{}:{}", url.host_str().context("no host")?, url.port().context("no port")?);
        let mut call = self.http.post(url);
        for (name, value) in request.signed(&host, &self.key, Timestamp::now()) {
            call = call.header(name, value);
        }
        let response = call.body(request.body).send().await?;
        Ok((response.status(), response.text().await?))
    }

    /// Creates an IAM user with this policy and an access key.
    ///
    /// # Errors
    /// If a call is refused.
    pub async fn create_user(&self, name: &str, policy: &Value) -> Result<AccessKey> {
        self.query(Api::Iam, "CreateUser", &[("UserName", name)]).await?;
        self.set_user_policy(name, policy).await?;
        self.create_access_key(name).await
    }

    /// Sets what a user may do, instead of what was set before.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn set_user_policy(&self, user: &str, policy: &Value) -> Result<()> {
        let policy = policy.to_string();
        let parameters = [("UserName", user), ("PolicyName", "policy"), ("PolicyDocument", &policy)];
        self.query(Api::Iam, "PutUserPolicy", &parameters).await.map(drop)
    }

    /// Creates one more access key of a user.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn create_access_key(&self, user: &str) -> Result<AccessKey> {
        AccessKey::from_xml(&self.query(Api::Iam, "CreateAccessKey", &[("UserName", user)]).await?)
    }

    /// Deletes an access key of a user.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn delete_access_key(&self, user: &str, id: &str) -> Result<()> {
        let parameters = [("UserName", user), ("AccessKeyId", id)];
        self.query(Api::Iam, "DeleteAccessKey", &parameters).await.map(drop)
    }

    /// Creates a role that `trust` says who may assume, and `policy` what it may do. Returns its ARN.
    ///
    /// # Errors
    /// If a call is refused.
    pub async fn create_role(&self, name: &str, trust: &Value, policy: &Value) -> Result<String> {
        let (trust, policy) = (trust.to_string(), policy.to_string());
        let parameters = [("RoleName", name), ("AssumeRolePolicyDocument", &trust)];
        let answer = self.query(Api::Iam, "CreateRole", &parameters).await?;
        let parameters = [("RoleName", name), ("PolicyName", "policy"), ("PolicyDocument", &policy)];
        self.query(Api::Iam, "PutRolePolicy", &parameters).await?;
        element(&answer, "Arn").context("no ARN")
    }

    /// Assumes a role, and returns the key of the session.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn assume_role(&self, arn: &str, session: &str) -> Result<AccessKey> {
        let parameters = [("RoleArn", arn), ("RoleSessionName", session)];
        AccessKey::from_xml(&self.query(Api::Sts, "AssumeRole", &parameters).await?)
    }

    /// Who the caller is, as an ARN.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn caller(&self) -> Result<String> {
        element(&self.query(Api::Sts, "GetCallerIdentity", &[]).await?, "Arn").context("no ARN")
    }

    /// Creates a secret with its first version, and returns that version's id.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn create_secret(&self, name: &str, value: &str, tags: &[(&str, &str)]) -> Result<String> {
        let body = json!({ "Name": name, "SecretString": value, "Tags": pairs(tags) });
        version(&self.call("CreateSecret", body).await?)
    }

    /// Gives a secret a new current version, and returns that version's id.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn put_secret(&self, name: &str, value: &str) -> Result<String> {
        version(&self.call("PutSecretValue", json!({ "SecretId": name, "SecretString": value })).await?)
    }

    /// The text of a secret's current version.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn get_secret(&self, name: &str) -> Result<String> {
        let answer = self.call("GetSecretValue", json!({ "SecretId": name })).await?;
        Ok(answer["SecretString"].as_str().context("no text")?.to_owned())
    }

    /// All that is known about a secret but its value.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn describe_secret(&self, name: &str) -> Result<Value> {
        self.call("DescribeSecret", json!({ "SecretId": name })).await
    }

    /// Sets tags of a secret; other tags stay.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn tag_secret(&self, name: &str, tags: &[(&str, &str)]) -> Result<()> {
        let body = json!({ "SecretId": name, "Tags": pairs(tags) });
        self.exchange_without_answer("TagResource", body).await
    }

    /// Takes tags from a secret.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn untag_secret(&self, name: &str, tags: &[&str]) -> Result<()> {
        let body = json!({ "SecretId": name, "TagKeys": tags });
        self.exchange_without_answer("UntagResource", body).await
    }

    /// Deletes a secret; it could be restored.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn delete_secret(&self, name: &str) -> Result<()> {
        self.call("DeleteSecret", json!({ "SecretId": name })).await.map(drop)
    }

    /// Restores a deleted secret.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn restore_secret(&self, name: &str) -> Result<()> {
        self.call("RestoreSecret", json!({ "SecretId": name })).await.map(drop)
    }

    /// Removes a secret with all of its versions, as if it had never been there.
    ///
    /// # Errors
    /// If the call is refused.
    pub async fn remove_secret(&self, name: &str) -> Result<()> {
        let body = json!({ "SecretId": name, "ForceDeleteWithoutRecovery": true });
        self.call("DeleteSecret", body).await.map(drop)
    }

    async fn exchange_without_answer(&self, operation: &str, body: Value) -> Result<()> {
        let (status, answer) = self.exchange(operation, body).await?;
        ensure!(status.is_success(), "{operation}: {status} {answer}");
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Api {
    Iam,
    Sts,
}

/// A `POST` to the root of the endpoint, as all calls of these services are.
struct Request<'a> {
    service: &'a str,
    content_type: &'a str,
    target: Option<&'a str>,
    body: String,
}

impl Request<'_> {
    /// The headers that prove who calls: AWS's Signature Version 4, without what only other requests need.
    fn signed(&self, host: &str, key: &AccessKey, now: Timestamp) -> Vec<(&'static str, String)> {
        let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
        let (date, _) = time.split_at("20260101".len());
        let mut headers = vec![
            ("content-type", self.content_type.to_owned()),
            ("host", host.to_owned()),
            ("x-amz-date", time.clone()),
        ];
        headers.extend(key.session_token.clone().map(|token| ("x-amz-security-token", token)));
        headers.extend(self.target.map(|target| ("x-amz-target", target.to_owned())));

        let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let lines: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
        let request = format!("POST\n/\n\n{lines}\n{names}\n{}", hex(&Sha256::digest(&self.body)));
        let scope = format!("{date}/{REGION}/{}/aws4_request", self.service);
        let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex(&Sha256::digest(request)));

        let secret = format!("AWS4{}", key.secret);
        let words = [date, REGION, self.service, "aws4_request", &text];
        let signature = words.iter().fold(secret.into_bytes(), |key, word| hmac(&key, word));
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={}",
            key.id,
            hex(&signature)
        );
        headers.push(("authorization", authorization));
        headers
    }
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

fn pairs(tags: &[(&str, &str)]) -> Value {
    tags.iter().map(|(key, value)| json!({ "Key": key, "Value": value })).collect()
}

fn version(answer: &Value) -> Result<String> {
    Ok(answer["VersionId"].as_str().with_context(|| format!("no version in {answer}"))?.to_owned())
}

/// The text of the first such element; what is asked for here holds no character that XML escapes.
fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    Some(rest.split_once("</")?.0.to_owned())
}
