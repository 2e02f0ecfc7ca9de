//! Logging in to Vault with the requests of `vaultrs`, on an HTTP client of ours.
//!
//! What was found about `vaultrs` 0.8, and what is done about it: its own client follows a redirect with the token, has
//! no timeouts and reads answers of any size, so its requests are sent with the adapter's client and a cap; it panics on a token that is no header
//! value, so such a token never reaches it; its errors and `AuthInfo` print bodies and tokens, so neither is ever
//! printed; it reads `VAULT_*` from the environment for what its builder is not told, so the builder is not used.

mod aws;

use std::time::Duration;

use http::{Request, Response};
use rustify::endpoint::Endpoint;
use rustify::errors::ClientError;
use scaivault_backends::egress::refusal_in;
use scaivault_backends::{BackendError, Egress};
use scaivault_domain::backend::{Provider, VaultLogin, VaultMethod, VaultTarget};
use scaivault_domain::lease::Material;
use scaivault_domain::secret::SecretValue;
use scaivault_domain::{Error, Reason};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use vaultrs::api::auth::approle::requests::LoginWithApproleRequest;
use vaultrs::api::auth::aws::requests::IamLoginRequest;
use vaultrs::api::auth::kubernetes::requests::LoginWithKubernetesRequest;
use vaultrs::api::token::requests::{
    CreateTokenRequest, LookupTokenSelfRequest, RenewTokenSelfRequest, RevokeTokenSelfRequest,
};
use vaultrs::api::token::responses::LookupTokenResponse;
use vaultrs::api::{AuthInfo, EndpointMiddleware, EndpointResult};

use super::aws::Keys;
use super::own::OwnIdentities;
use super::{Asking, Holder, Issued, Renewal, Revocation, gcp};

/// Most bytes of an answer to a login.
const MAX_ANSWER: usize = 1024 * 1024;

/// How long a token that a service account's key signs is good for Vault, which takes 15 minutes at most unless a role
/// says otherwise; less, for clocks differ.
///
/// Source: `max_jwt_exp` in the API documentation of Vault's `gcp` method.
const GCP_LIFE: Duration = Duration::from_secs(600);

/// What a login needs.
pub(crate) enum Credential {
    Approle {
        role_id: SecretString,
        secret_id: SecretString,
    },
    Token(SecretString),
    /// Of `kubernetes`, or signed by Google for `gcp`.
    Jwt(SecretString),
    Aws(Keys),
    Gcp(Box<gcp::Credential>),
}

impl Credential {
    /// Reads the stored secret.
    pub(crate) fn parse(
        provider: &Provider,
        method: &VaultMethod,
        value: &SecretValue,
    ) -> Result<Self, Error> {
        let unusable = |message: String| super::unusable(provider, message);
        #[derive(Deserialize)]
        struct Fields {
            role_id: Option<SecretString>,
            secret_id: Option<SecretString>,
            token: Option<SecretString>,
            jwt: Option<SecretString>,
        }

        match method {
            VaultMethod::Aws { .. } => return Keys::parse(provider, value).map(Credential::Aws),
            VaultMethod::Gcp { .. } => {
                return gcp::Credential::parse(provider, value).map(|key| Credential::Gcp(Box::new(key)));
            }
            VaultMethod::Approle { .. } | VaultMethod::Token { .. } | VaultMethod::Kubernetes { .. } => {}
        }

        let fields: Fields = serde_json::from_slice(value.expose())
            .map_err(|_| unusable("the credential is no JSON object of strings".into()))?;
        let required = |name: &str, field: Option<SecretString>| match field {
            Some(text) if is_token(text.expose_secret()) => Ok(text),
            Some(_) => Err(unusable(format!(
                "`{name}` of the credential is empty or has characters that no token has"
            ))),
            None => Err(unusable(format!("the credential has no `{name}`"))
                .next("store it with the keys that the auth method needs")),
        };
        Ok(match method {
            VaultMethod::Approle { .. } => Credential::Approle {
                role_id: required("role_id", fields.role_id)?,
                secret_id: required("secret_id", fields.secret_id)?,
            },
            VaultMethod::Token { .. } => Credential::Token(required("token", fields.token)?),
            VaultMethod::Kubernetes { .. } | VaultMethod::Aws { .. } | VaultMethod::Gcp { .. } => {
                Credential::Jwt(required("jwt", fields.jwt)?)
            }
        })
    }

    /// What our own identity shows to the method.
    pub(crate) async fn own(method: &VaultMethod, own: &OwnIdentities) -> Result<Self, Error> {
        match method {
            VaultMethod::Kubernetes { .. } => own.kubernetes.token().await.map(Credential::Jwt),
            VaultMethod::Aws { .. } => own.aws.keys().await.map(Credential::Aws),
            VaultMethod::Gcp { role, .. } => {
                // Source: "GCE login" in the documentation of Vault's `gcp` method.
                own.gcp.identity_token(&format!("http://vault/{role}")).await.map(Credential::Jwt)
            }
            // These have a credential: the configuration cannot be without.
            VaultMethod::Approle { .. } | VaultMethod::Token { .. } => Err(Error::internal()),
        }
    }
}

/// Logs in as `asking`.
pub(crate) async fn log_in(
    target: &VaultTarget,
    login: &VaultLogin,
    credential: Credential,
    asking: &Asking<'_>,
) -> Result<Issued, Error> {
    let egress = asking.egress;
    match (credential, &login.method) {
        (Credential::Approle { role_id, secret_id }, _) => {
            let mut request = LoginWithApproleRequest::builder();
            request.mount(&login.mount).role_id(role_id.expose_secret()).secret_id(secret_id.expose_secret());
            let request = request.build().map_err(|_| Error::internal())?;
            let step = match asking.holder {
                Holder::ControlPlane => Step::Login,
                Holder::Nodes => Step::SecondLogin,
            };
            Vault::new(target, None, egress)?.log_in(request, step).await
        }
        (Credential::Token(token), _) => {
            let vault = Vault::new(target, Some(&token), egress)?;
            let own = own_token(&vault, &token).await?;
            match asking.holder {
                Holder::ControlPlane => Ok(own),
                Holder::Nodes => for_nodes(&vault, login, own).await,
            }
        }
        (Credential::Aws(keys), VaultMethod::Aws { role, server_id, region, sts_endpoint, .. }) => {
            let signed = aws::identify(&keys, region, sts_endpoint.as_ref(), server_id, asking.now)?;
            let mut request = IamLoginRequest::builder();
            request.mount(&login.mount).role(role).iam_http_request_method(signed.method);
            request.iam_request_url(signed.url).iam_request_body(signed.body);
            let request =
                request.iam_request_headers(signed.headers).build().map_err(|_| Error::internal())?;
            Vault::new(target, None, egress)?.log_in(request, Step::RoleLogin).await
        }
        (Credential::Jwt(jwt), VaultMethod::Kubernetes { role, .. } | VaultMethod::Gcp { role, .. }) => {
            log_in_with_jwt(target, login, role, &jwt, egress).await
        }
        (Credential::Gcp(key), VaultMethod::Gcp { role, .. }) => {
            // Source: "IAM login" in the documentation of Vault's `gcp` method.
            let jwt = key.token_for(&format!("vault/{role}"), GCP_LIFE)?;
            log_in_with_jwt(target, login, role, &jwt, egress).await
        }
        // A credential is parsed for the method that it is used with.
        (Credential::Jwt(_) | Credential::Aws(_) | Credential::Gcp(_), _) => Err(Error::internal()),
    }
}

/// The login of `kubernetes` and that of `gcp` have the same form.
async fn log_in_with_jwt(
    target: &VaultTarget,
    login: &VaultLogin,
    role: &str,
    jwt: &SecretString,
    egress: &Egress,
) -> Result<Issued, Error> {
    let mut request = LoginWithKubernetesRequest::builder();
    request.mount(&login.mount).role(role).jwt(jwt.expose_secret());
    let request = request.build().map_err(|_| Error::internal())?;
    Vault::new(target, None, egress)?.log_in(request, Step::RoleLogin).await
}

/// What the configured token is.
async fn own_token(vault: &Vault, token: &SecretString) -> Result<Issued, Error> {
    let info = vault.lookup().await.map_err(|error| refused(&error, Step::Login))?;
    if info.num_uses > 0 {
        let detail = "the token works for a limited number of calls only";
        return Err(Error::field(Reason::CredentialUnusable, "/config/auth_config_path", detail)
            .next("create a token without `num_uses`"));
    }
    let renewal = if info.renewable == Some(true) { Renewal::Renew } else { Renewal::Again };
    Ok(Issued {
        material: Material::VaultToken(token.clone()),
        ttl: (info.ttl > 0).then(|| Duration::from_secs(info.ttl)),
        renewal,
        revocation: Revocation::Leave,
    })
}

/// A child of the configured token; where that is forbidden the token itself, if that may be.
async fn for_nodes(vault: &Vault, login: &VaultLogin, own: Issued) -> Result<Issued, Error> {
    let mut request = CreateTokenRequest::builder();
    // A child of a token that never ends would never end either.
    request.ttl("1h");
    let (lease_policies, allow_static_on_nodes) = match &login.method {
        VaultMethod::Token { lease_policies, allow_static_on_nodes, .. } => {
            (lease_policies.clone(), *allow_static_on_nodes)
        }
        _ => (Vec::new(), false),
    };
    if !lease_policies.is_empty() {
        request.policies(lease_policies);
    }
    let request = request.build().map_err(|_| Error::internal())?;
    match vault.auth(request).await {
        Ok(info) => issued(info),
        Err(ClientError::ServerResponseError { code: 403, .. })
            if own.ttl.is_some() || allow_static_on_nodes =>
        {
            Ok(own)
        }
        Err(ClientError::ServerResponseError { code: 403, .. }) => Err(Error::new(
            Reason::NoLease,
            "the configured token never expires and may not make child tokens",
        )
        .next("allow it `update` on `auth/token/create`, or set `allow_static_on_nodes`")),
        Err(error) => Err(refused(&error, Step::Child)),
    }
}

/// Renews a token; how long it lasts from now.
pub(crate) async fn renew(
    target: &VaultTarget,
    material: &Material,
    egress: &Egress,
) -> Result<Option<Duration>, Error> {
    let Material::VaultToken(token) = material else { return Err(Error::internal()) };
    let vault = Vault::new(target, Some(token), egress)?;
    let request = RenewTokenSelfRequest::builder().build().map_err(|_| Error::internal())?;
    let info = vault.auth(request).await.map_err(|error| refused(&error, Step::Renewal))?;
    Ok((info.lease_duration > 0).then(|| Duration::from_secs(info.lease_duration)))
}

/// Revokes a token that a login gave.
pub(crate) async fn revoke(target: &VaultTarget, material: &Material, egress: &Egress) {
    let Material::VaultToken(token) = material else { return };
    let Ok(vault) = Vault::new(target, Some(token), egress) else { return };
    if let Err(error) = vault.revoke().await {
        tracing::debug!(status = status(&error), "a token was not revoked and ends by itself");
    }
}

fn issued(info: AuthInfo) -> Result<Issued, Error> {
    if !is_token(&info.client_token) {
        return Err(Error::new(
            Reason::BackendInvalidAnswer,
            "the backend gave a token that no header can carry",
        ));
    }
    // Batch tokens cannot be renewed or revoked.
    let service = info.token_type != "batch";
    Ok(Issued {
        material: Material::VaultToken(info.client_token.into()),
        ttl: (info.lease_duration > 0).then(|| Duration::from_secs(info.lease_duration)),
        renewal: if service && info.renewable { Renewal::Renew } else { Renewal::Again },
        revocation: if service { Revocation::Revoke } else { Revocation::Leave },
    })
}

/// Whether a text can be sent as it is.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())
}

/// Where a refusal came from, to say what can be done.
enum Step {
    Login,
    /// With the same `secret_id` as the control plane's own.
    SecondLogin,
    /// With a role of Vault's, which is bound to identities.
    RoleLogin,
    Child,
    Renewal,
}

fn refused(error: &ClientError, step: Step) -> Error {
    if let ClientError::ResponseError { source } = error
        && let Some(refusal) = refusal_in(source.as_ref())
    {
        return BackendError::from(refusal).into();
    }
    let next = match step {
        Step::Login => "check the credential at `auth_config_path`, the auth mount and the namespace",
        Step::SecondLogin => {
            "check the credential; a `secret_id` that may be used once has no second login for nodes: set `secret_id_num_uses` to 0"
        }
        Step::RoleLogin => {
            "check `auth_role`, whom that role is bound to in Vault, the auth mount, the namespace and the credential"
        }
        Step::Child => "check `lease_policies` and the token's right to create children",
        Step::Renewal => "nothing: there will be another login",
    };
    match status(error) {
        Some(429) => Error::new(Reason::BackendThrottled, "the backend asked us to slow down")
            .retry_after(Duration::from_secs(1)),
        Some(code @ 500..) => {
            Error::new(Reason::BackendUnreachable, format!("the backend answered the login with {code}"))
        }
        Some(code) => {
            Error::new(Reason::BackendLoginFailed, format!("the backend refused the login with {code}"))
                .next(next)
        }
        None => Error::new(Reason::BackendUnreachable, "the backend cannot be reached for a login")
            .next("check the endpoint, the network and the certificate"),
    }
}

/// The status in an error, which is the only part of it that is safe to show.
fn status(error: &ClientError) -> Option<u16> {
    match error {
        ClientError::ServerResponseError { code, .. } => Some(*code),
        _ => None,
    }
}

/// One Vault: the requests of `vaultrs` on a client of ours.
struct Vault {
    http: Capped,
    middle: EndpointMiddleware,
}

impl Vault {
    fn new(target: &VaultTarget, token: Option<&SecretString>, egress: &Egress) -> Result<Self, Error> {
        // The middleware puts the version before the whole path, so a path of the endpoint must come with it.
        let mut origin = target.endpoint.url().clone();
        let folder = origin.path().trim_matches('/').to_owned();
        origin.set_path("");
        Ok(Vault {
            http: Capped {
                http: scaivault_backends::vault_client(target, egress)?,
                base: origin.as_str().trim_end_matches('/').to_owned(),
            },
            middle: EndpointMiddleware {
                token: token.map(|token| token.expose_secret().to_owned()).unwrap_or_default(),
                version: if folder.is_empty() { "v1".into() } else { format!("{folder}/v1") },
                wrap: None,
                namespace: target.namespace.clone(),
            },
        })
    }

    async fn auth<E: Endpoint<Response = ()>>(&self, endpoint: E) -> Result<AuthInfo, ClientError> {
        let answer = endpoint.with_middleware(&self.middle).exec(&self.http).await?;
        answer.wrap::<EndpointResult<()>>()?.auth.ok_or_else(|| unexpected("no `auth`"))
    }

    async fn log_in<E: Endpoint<Response = ()>>(&self, request: E, step: Step) -> Result<Issued, Error> {
        issued(self.auth(request).await.map_err(|error| refused(&error, step))?)
    }

    async fn lookup(&self) -> Result<LookupTokenResponse, ClientError> {
        let request = LookupTokenSelfRequest::builder().build().map_err(|_| unexpected("no request"))?;
        let answer = request.with_middleware(&self.middle).exec(&self.http).await?;
        answer.wrap::<EndpointResult<LookupTokenResponse>>()?.data.ok_or_else(|| unexpected("no `data`"))
    }

    async fn revoke(&self) -> Result<(), ClientError> {
        let request = RevokeTokenSelfRequest::builder().build().map_err(|_| unexpected("no request"))?;
        request.with_middleware(&self.middle).exec(&self.http).await.map(drop)
    }
}

/// An HTTP client that reads no more than a login can need: whoever configures a backend chooses who answers.
struct Capped {
    http: reqwest::Client,
    base: String,
}

#[async_trait::async_trait]
impl rustify::client::Client for Capped {
    async fn send(&self, request: Request<Vec<u8>>) -> Result<Response<Vec<u8>>, ClientError> {
        let failed =
            |error: reqwest::Error| ClientError::ResponseError { source: error.without_url().into() };
        let request = reqwest::Request::try_from(request).map_err(failed)?;
        let mut answer = self.http.execute(request).await.map_err(failed)?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(unexpected("too much"));
            }
            body.extend_from_slice(&chunk);
        }
        let mut response = Response::new(body);
        *response.status_mut() = status;
        Ok(response)
    }

    fn base(&self) -> &str {
        &self.base
    }
}

fn unexpected(what: &'static str) -> ClientError {
    ClientError::GenericError { source: anyhow::anyhow!(what) }
}

#[cfg(test)]
mod tests {
    use scaivault_backends::egress::Policy;
    use scaivault_domain::backend::Endpoint;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_answer_without_end_is_given_up_early() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let hostile = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = hostile.local_addr().unwrap();
        let sent = tokio::spawn(async move {
            let (mut stream, _) = hostile.accept().await.unwrap();
            let head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n";
            stream.write_all(head).await.unwrap();
            let mut sent = 0;
            while stream.write_all(&[b' '; 64 * 1024]).await.is_ok() {
                sent += 64 * 1024;
            }
            sent
        });
        let target = VaultTarget::at(Endpoint::parse("endpoint", &format!("http://{address}")).unwrap());
        let egress = Egress::new(Policy::default().with_loopback());
        let vault = Vault::new(&target, Some(&"token".into()), &egress).unwrap();
        assert!(vault.lookup().await.is_err());
        drop(vault);
        assert!(sent.await.unwrap() < 64 * MAX_ANSWER, "what the kernel buffers, and no more");
    }

    #[tokio::test]
    async fn a_login_goes_to_no_refused_address_and_says_why() {
        let target = |endpoint| VaultTarget::at(Endpoint::parse("endpoint", endpoint).unwrap());
        let name = Vault::new(&target("http://localhost:1"), None, &Egress::default()).unwrap();
        let by_name = refused(&name.lookup().await.err().unwrap(), Step::Login);
        let by_address = Vault::new(&target("http://127.1:1"), None, &Egress::default()).err().unwrap();
        for error in [by_name, by_address] {
            assert_eq!(error.reason, Reason::BackendInvalidAnswer);
            assert!(error.message.contains("a loopback address"), "{error}");
        }
    }

    use axum::http::{StatusCode, Uri};
    use axum::{Json, Router};
    use jsonwebtoken::dangerous::insecure_decode;
    use scaivault_domain::backend::{BackendId, VaultLogin};
    use scaivault_domain::lease::LeaseKey;
    use scaivault_domain::path::SecretPath;
    use scaivault_domain::tenant::TenantId;
    use scaivault_domain::time::Timestamp;
    use serde_json::{Value, json};

    use crate::credentials::own::tests::serve;
    use crate::credentials::own::{OwnIdentities, Settings};

    /// Logs in with `stored`, or as ourselves, to a Vault that answers each login as `answer` says.
    async fn logged_in(
        method: VaultMethod,
        stored: Option<Value>,
        holder: Holder,
        answer: impl Fn(&str, &Value) -> StatusCode + Clone + Send + Sync + 'static,
    ) -> Result<Issued, Error> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let auth = json!({"request_id": "1", "lease_id": "", "renewable": false, "lease_duration": 0, "auth": {
            "client_token": "hvs.issued", "accessor": "a", "policies": [], "token_policies": [], "metadata": {},
            "lease_duration": 3600, "renewable": true, "entity_id": "", "token_type": "service", "orphan": true,
        }});
        let router = Router::new().fallback(move |uri: Uri, body: String| {
            let body = serde_json::from_str(&body).unwrap();
            let status = answer(uri.path(), &body);
            async move {
                (status, Json(if status == StatusCode::OK { auth } else { json!({"errors": ["SENT"]}) }))
            }
        });
        let target = VaultTarget::at(serve(router).await);
        let login = VaultLogin { mount: "team/mine".into(), method };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "ours\n").unwrap();
        let settings =
            Settings { kubernetes_token_file: Some(file.path().to_owned()), ..Settings::default() };
        let own = OwnIdentities::new(settings).unwrap();
        let key =
            LeaseKey { tenant: TenantId::parse("acme").unwrap(), backend: BackendId::from_random([7; 10]) };
        let egress = Egress::new(Policy::default().with_loopback());
        let asking = Asking { key: &key, holder, own: &own, egress: &egress, now: Timestamp::default() };
        let provider = Provider::HashicorpVault { target: target.clone(), login: login.clone() };
        let credential = match stored {
            Some(stored) => Credential::parse(
                &provider,
                &login.method,
                &SecretValue::new(stored.to_string().into_bytes()),
            )?,
            None => Credential::own(&login.method, &own).await?,
        };
        log_in(&target, &login, credential, &asking).await
    }

    fn kubernetes() -> VaultMethod {
        VaultMethod::Kubernetes { role: "reader".into(), credentials: None }
    }

    #[tokio::test]
    async fn a_service_account_shows_its_token_the_stored_one_or_ours() {
        for (stored, jwt) in [(Some(json!({"jwt": "theirs"})), "theirs"), (None, "ours")] {
            let issued = logged_in(kubernetes(), stored, Holder::Nodes, move |path, body| {
                let asked =
                    (path, body) == ("/v1/auth/team/mine/login", &json!({"role": "reader", "jwt": jwt}));
                if asked { StatusCode::OK } else { StatusCode::BAD_REQUEST }
            })
            .await
            .unwrap();
            assert_eq!(issued.ttl, Some(Duration::from_secs(3600)));
            assert_eq!((issued.renewal, issued.revocation), (Renewal::Renew, Revocation::Revoke));
        }
    }

    #[tokio::test]
    async fn a_service_accounts_key_signs_for_the_role_alone() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
        let stored = json!({
            "type": "service_account", "client_email": "reader@acme.iam.gserviceaccount.com",
            "private_key_id": "k1", "private_key": key.serialize_pem(),
        });
        let method = VaultMethod::Gcp { role: "reader".into(), credentials: None };
        let login = logged_in(method, Some(stored), Holder::ControlPlane, |_, body| {
            let jwt = insecure_decode::<Value>(body["jwt"].as_str().unwrap()).unwrap();
            let life = jwt.claims["exp"].as_u64().unwrap() - jwt.claims["iat"].as_u64().unwrap();
            let is_ours = jwt.header.kid.as_deref() == Some("k1")
                && jwt.claims["sub"] == "reader@acme.iam.gserviceaccount.com"
                && jwt.claims["aud"] == "vault/reader"
                && life <= 900;
            if is_ours { StatusCode::OK } else { StatusCode::BAD_REQUEST }
        });
        assert!(login.await.is_ok());
    }

    #[tokio::test]
    async fn keys_of_aws_sign_a_request_that_vault_sends_on() {
        let method = VaultMethod::Aws {
            role: "reader".into(),
            credentials: None,
            server_id: "vault.internal".into(),
            region: scaivault_domain::backend::AwsRegion::parse("aws_region", "us-east-1").unwrap(),
            sts_endpoint: None,
        };
        let stored = json!({"access_key_id": "AKIAEXAMPLE", "secret_access_key": "secret"});
        let login = logged_in(method, Some(stored), Holder::ControlPlane, |_, body| {
            let has_all = ["iam_request_url", "iam_request_body", "iam_request_headers"]
                .iter()
                .all(|name| body[name].as_str().is_some_and(|text| !text.is_empty()));
            let asked = has_all && body["iam_http_request_method"] == "POST" && body["role"] == "reader";
            if asked { StatusCode::OK } else { StatusCode::BAD_REQUEST }
        });
        assert!(login.await.is_ok());
    }

    #[tokio::test]
    async fn a_refused_login_says_what_to_look_at_and_nothing_that_was_sent() {
        let approle = VaultMethod::Approle { credentials: SecretPath::parse("vault").unwrap() };
        let role_id = json!({"role_id": "r", "secret_id": "s"});
        for (method, stored, named) in
            [(approle, role_id, "secret_id_num_uses"), (kubernetes(), json!({"jwt": "j"}), "auth_role")]
        {
            let error = logged_in(method, Some(stored), Holder::Nodes, |_, _| StatusCode::BAD_REQUEST)
                .await
                .err()
                .unwrap();
            assert_eq!(error.reason, Reason::BackendLoginFailed);
            assert!(error.what_next().contains(named) && !format!("{error:?}").contains("SENT"), "{error:?}");
        }
        let error =
            logged_in(kubernetes(), Some(json!({"token": "t"})), Holder::Nodes, |_, _| StatusCode::OK)
                .await
                .err()
                .unwrap();
        assert_eq!(error.reason, Reason::CredentialUnusable);
        assert!(error.message.contains("`jwt`"), "{error}");
    }
}
