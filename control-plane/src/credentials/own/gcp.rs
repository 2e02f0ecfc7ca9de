//! The control plane's identity in GCP: that of the metadata server, or one of another cloud that Google trusts.
//!
//! Sources: "About VM metadata", "Get an ID token from the metadata server", AIP-4117 (`external_account` files),
//! RFC 8693 and the reference of `projects.serviceAccounts.generateAccessToken`.

use std::path::{Path, PathBuf};

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use scaivault_backends::egress::{Egress, Policy};
use scaivault_backends::http::{Body, Http};
use scaivault_domain::backend::{Endpoint, Tls};
use scaivault_domain::lease::Material;
use scaivault_domain::time::{Clock as _, Timestamp};
use scaivault_domain::{Error, Reason};
use scaivault_telemetry::SystemClock;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use zeroize::Zeroizing;

use super::metadata::{Answer, MetadataService};
use crate::credentials::Issued;
use crate::credentials::bearer::{self, MAX_ANSWER, invalid_answer};
use crate::credentials::vault::is_token;

const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const ACCOUNT: &str = "/computeMetadata/v1/instance/service-accounts/default";
const FLAVOR: (&str, &str) = ("Metadata-Flavor", "Google");
/// Most bytes of a file of the operator's.
const MAX_FILE: u64 = 64 * 1024;

/// Our identity in GCP.
#[derive(Debug)]
pub struct GcpIdentity {
    metadata: MetadataService,
    external_account: Option<PathBuf>,
}

impl GcpIdentity {
    pub(super) fn new(metadata: &Endpoint, external_account: Option<PathBuf>) -> anyhow::Result<Self> {
        let metadata = MetadataService::new(metadata, "Google's metadata server", FLAVOR)?;
        Ok(GcpIdentity { metadata, external_account })
    }

    /// An access token for all of Google Cloud, as far as our identity has rights.
    ///
    /// # Errors
    /// If there is no identity, or whoever gives tokens does not answer.
    pub(crate) async fn access_token(&self) -> Result<Issued, Error> {
        match &self.external_account {
            Some(file) => ExternalAccount::read(file).await?.access_token().await,
            None => bearer::token_in(&self.ask("/token", &[]).await?.body),
        }
    }

    /// A token that says who we are, and on which machine, to `audience` alone; signed by Google. It comes from the
    /// metadata server, whatever gives access tokens.
    ///
    /// # Errors
    /// If there is no identity, or the metadata server does not answer.
    pub async fn identity_token(&self, audience: &str) -> Result<SecretString, Error> {
        let answer = self.ask("/identity", &[("audience", audience), ("format", "full")]).await?;
        match std::str::from_utf8(&answer.body).map(str::trim) {
            Ok(token) if is_token(token) => Ok(SecretString::from(token)),
            _ => Err(invalid_answer("Google's metadata server gave no identity token")),
        }
    }

    async fn ask(&self, what: &str, query: &[(&str, &str)]) -> Result<Answer, Error> {
        let answer = self.metadata.get(&format!("{ACCOUNT}{what}"), query).await?;
        if answer.headers.get(FLAVOR.0).is_none_or(|flavor| flavor != FLAVOR.1) {
            return Err(invalid_answer("what answers is not Google's metadata server")
                .next("ask the operator to check `--gcp-metadata`"));
        }
        match answer.status {
            StatusCode::OK => Ok(answer),
            StatusCode::NOT_FOUND => Err(failed("the control plane's machine has no service account")
                .next("ask the operator to attach one to the machine, or to set `--gcp-external-account`")),
            _ => Err(failed("Google's metadata server gives no token")
                .next("ask the operator to look at the service account of the control plane's machine")),
        }
    }
}

fn failed(message: &'static str) -> Error {
    Error::new(Reason::BackendLoginFailed, message)
}

/// The operator's file cannot be used. Neither its path nor what is in it is told to a tenant.
fn misconfigured(what: &str) -> Error {
    Error::new(Reason::BackendLoginFailed, format!("the operator's `external_account` file {what}"))
        .next("ask the operator to correct `--gcp-external-account`")
}

/// An identity of another cloud that Google trusts. It is the operator's, so its URLs are taken as they are.
#[derive(Deserialize)]
struct ExternalAccount {
    audience: String,
    subject_token_type: String,
    token_url: String,
    service_account_impersonation_url: Option<String>,
    service_account_impersonation: Option<Impersonation>,
    credential_source: Source,
}

#[derive(Deserialize)]
struct Impersonation {
    token_lifetime_seconds: Option<u64>,
}

#[derive(Deserialize)]
struct Source {
    file: Option<PathBuf>,
    format: Option<Format>,
    url: Option<IgnoredAny>,
    executable: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Format {
    Text,
    Json { subject_token_field_name: String },
}

impl ExternalAccount {
    async fn read(path: &Path) -> Result<Self, Error> {
        let text = read(path).await.map_err(|_| misconfigured("cannot be read"))?;
        Self::parse(&text)
    }

    fn parse(text: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Type {
            r#type: Option<String>,
        }
        let kind = serde_json::from_slice(text).map(|found: Type| found.r#type);
        if !matches!(&kind, Ok(Some(name)) if name == "external_account") {
            return Err(misconfigured("is no JSON of the type `external_account`"));
        }
        let account: ExternalAccount =
            serde_json::from_slice(text).map_err(|_| misconfigured("lacks a field, or has a wrong one"))?;
        let source = &account.credential_source;
        match (&source.file, &source.executable, &source.url) {
            (Some(_), _, _) => Ok(account),
            (None, Some(_), _) => Err(misconfigured("names an executable, and none is run here")),
            (None, None, Some(_)) => {
                Err(misconfigured("takes its token from a URL; a `file` is needed here"))
            }
            (None, None, None) => Err(misconfigured("has no `credential_source` with a `file`")),
        }
    }

    async fn access_token(&self) -> Result<Issued, Error> {
        let subject = self.subject_token().await?;
        let form = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("audience", &self.audience),
            ("scope", SCOPE),
            ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("subject_token_type", &self.subject_token_type),
            ("subject_token", subject.expose_secret()),
        ];
        let http = client("token_url", &self.token_url)?;
        let sent = http.send(Method::POST, "", HeaderMap::new(), Some(Body::Form(&form)), MAX_ANSWER).await;
        let answer = sent.map_err(bearer::fault)?;
        if !answer.status.is_success() {
            return Err(failed("Google does not take the token of the control plane's own identity")
                .next("ask the operator to check that token, its audience, and the workload identity pool"));
        }
        let federated = bearer::token_in(&answer.body)?;
        match &self.service_account_impersonation_url {
            None => Ok(federated),
            Some(url) => self.impersonate(url, &federated).await,
        }
    }

    async fn subject_token(&self) -> Result<SecretString, Error> {
        let source = &self.credential_source;
        let file = source.file.as_deref().ok_or_else(Error::internal)?;
        // Read every time: whoever writes it replaces it before it expires.
        let text =
            read(file).await.map_err(|_| misconfigured("names a file with a token that cannot be read"))?;
        let no_token = || misconfigured("names a file without a token");
        let token = match &source.format {
            None | Some(Format::Text) => {
                SecretString::from(std::str::from_utf8(&text).map_err(|_| no_token())?.trim())
            }
            Some(Format::Json { subject_token_field_name }) => {
                let found: Value = serde_json::from_slice(&text).map_err(|_| no_token())?;
                SecretString::from(found[subject_token_field_name].as_str().ok_or_else(no_token)?)
            }
        };
        if token.expose_secret().is_empty() { Err(no_token()) } else { Ok(token) }
    }

    async fn impersonate(&self, url: &str, federated: &Issued) -> Result<Issued, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Impersonated {
            access_token: SecretString,
            expire_time: String,
        }

        let Material::Bearer(token) = &federated.material else { return Err(Error::internal()) };
        let bearer = Zeroizing::new(format!("Bearer {}", token.expose_secret()));
        let mut bearer = HeaderValue::from_str(&bearer).map_err(|_| Error::internal())?;
        bearer.set_sensitive(true);
        let headers = HeaderMap::from_iter([(AUTHORIZATION, bearer)]);
        let mut asked = json!({ "scope": [SCOPE] });
        if let Some(seconds) =
            self.service_account_impersonation.as_ref().and_then(|own| own.token_lifetime_seconds)
        {
            asked["lifetime"] = json!(format!("{seconds}s"));
        }
        let body = Body::Json(Zeroizing::new(asked.to_string().into_bytes()));
        let http = client("service_account_impersonation_url", url)?;
        let sent = http.send(Method::POST, "", headers, Some(body), MAX_ANSWER).await;
        let answer = sent.map_err(bearer::fault)?;
        if !answer.status.is_success() {
            return Err(failed("the control plane's own identity may not act as its service account").next(
                "ask the operator to grant it `roles/iam.workloadIdentityUser` on the service account",
            ));
        }
        let invalid = || invalid_answer("Google gave no token of the service account");
        let found: Impersonated = serde_json::from_slice(&answer.body).map_err(|_| invalid())?;
        let ends = Timestamp::parse(&found.expire_time).ok_or_else(invalid)?;
        // By Google's clock, if it told it: ours may differ.
        bearer::issued(found.access_token, ends.since(answer.date.unwrap_or_else(|| SystemClock.now())))
    }
}

fn client(field: &str, url: &str) -> Result<Http, Error> {
    // The operator wrote the file, so it may name what no tenant may.
    let egress = Egress::new(Policy::default().with_loopback());
    let endpoint =
        Endpoint::parse(field, url).map_err(|_| misconfigured(&format!("has no URL as `{field}`")))?;
    Http::new(&endpoint, &Tls::default(), HeaderMap::new(), &egress).map_err(bearer::fault)
}

async fn read(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::new());
    tokio::fs::File::open(path).await?.take(MAX_FILE).read_to_end(&mut text).await?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::Bytes;
    use axum::extract::RawQuery;
    use axum::routing::{get, post};
    use axum::{Json, Router};

    use super::super::tests::serve;
    use super::*;

    const GOOGLE: [(&str, &str); 1] = [FLAVOR];

    #[tokio::test]
    async fn only_googles_own_metadata_server_is_believed() {
        let token = || Json(json!({ "access_token": "t", "expires_in": 3599 }));
        let google = Router::new()
            .route(
                &format!("{ACCOUNT}/token"),
                get(async move |headers: HeaderMap| {
                    assert_eq!(headers["metadata-flavor"], "Google");
                    (GOOGLE, token())
                }),
            )
            .route(
                &format!("{ACCOUNT}/identity"),
                get(async |RawQuery(query): RawQuery| {
                    assert_eq!(query.as_deref(), Some("audience=vault%2Frole&format=full"));
                    (GOOGLE, "a.b.c\n")
                }),
            );
        let google = GcpIdentity::new(&serve(google).await, None).unwrap();
        assert_eq!(google.access_token().await.unwrap().ttl.unwrap().as_secs(), 3599);
        assert_eq!(google.identity_token("vault/role").await.unwrap().expose_secret(), "a.b.c");

        let other = Router::new().fallback(async move || token());
        let other = GcpIdentity::new(&serve(other).await, None).unwrap();
        assert_eq!(other.access_token().await.err().unwrap().reason, Reason::BackendInvalidAnswer);

        let nobody = Router::new().fallback(async || (StatusCode::NOT_FOUND, GOOGLE, "<p>"));
        let nobody = GcpIdentity::new(&serve(nobody).await, None).unwrap();
        let error = nobody.access_token().await.err().unwrap();
        assert!(error.message.contains("no service account"), "{error}");
    }

    #[tokio::test]
    async fn a_token_of_another_cloud_is_exchanged_and_acts_as_the_service_account() {
        let exchange = async |body: Bytes| {
            let form = String::from_utf8(body.to_vec()).unwrap();
            assert!(form.contains("subject_token=ours&") || form.ends_with("subject_token=ours"), "{form}");
            Json(json!({ "access_token": "federated", "expires_in": 3600 }))
        };
        let act = async |headers: HeaderMap, Json(asked): Json<Value>| {
            assert_eq!(headers["authorization"], "Bearer federated");
            assert_eq!(asked, json!({ "scope": [SCOPE], "lifetime": "600s" }));
            let dated = [("date", "Thu, 01 Jan 2026 00:00:00 GMT")];
            (dated, Json(json!({ "accessToken": "t", "expireTime": "2026-01-01T00:10:00Z" })))
        };
        let url = serve(Router::new().route("/v1/token", post(exchange)).route("/act", post(act))).await;
        let dir = tempfile::tempdir().unwrap();
        let (subject, account) = (dir.path().join("token"), dir.path().join("account"));
        std::fs::write(&subject, r#"{"id":"ours"}"#).unwrap();
        let json = json!({
            "type": "external_account", "audience": "//iam", "subject_token_type": "jwt",
            "token_url": format!("{url}/v1/token"),
            "service_account_impersonation_url": format!("{url}/act"),
            "service_account_impersonation": { "token_lifetime_seconds": 600 },
            "credential_source":
                { "file": subject, "format": { "type": "json", "subject_token_field_name": "id" } },
        });
        std::fs::write(&account, json.to_string()).unwrap();
        let issued = GcpIdentity::new(&url, Some(account)).unwrap().access_token().await.unwrap();
        assert_eq!(issued.ttl, Some(Duration::from_secs(600)));
    }

    #[test]
    fn a_file_that_runs_or_is_something_else_is_refused() {
        let source = |source: Value| {
            json!({
                "type": "external_account", "audience": "a", "subject_token_type": "t", "token_url": "https://x",
                "credential_source": source,
            })
        };
        for (json, part) in [
            (source(json!({ "executable": { "command": "/bin/sh" } })), "executable"),
            (source(json!({ "url": "http://x" })), "URL"),
            (source(json!({ "environment_id": "aws1" })), "`file`"),
            (json!({ "type": "service_account" }), "`external_account`"),
            (json!({ "type": "external_account" }), "lacks"),
        ] {
            let error = ExternalAccount::parse(json.to_string().as_bytes()).err().unwrap();
            assert_eq!(error.reason, Reason::BackendLoginFailed);
            assert!(error.message.contains(part), "{error}");
        }
    }
}
