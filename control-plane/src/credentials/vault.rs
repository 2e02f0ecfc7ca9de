//! Logging in to Vault with the requests of `vaultrs`, on an HTTP client of ours.
//!
//! What was found about `vaultrs` 0.8, and what is done about it: its own client follows a redirect with the token, has
//! no timeouts and reads answers of any size, so its requests are sent with the adapter's client and a cap; it panics on a token that is no header
//! value, so such a token never reaches it; its errors and `AuthInfo` print bodies and tokens, so neither is ever
//! printed; it reads `VAULT_*` from the environment for what its builder is not told, so the builder is not used.

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
use vaultrs::api::token::requests::{
    CreateTokenRequest, LookupTokenSelfRequest, RenewTokenSelfRequest, RevokeTokenSelfRequest,
};
use vaultrs::api::token::responses::LookupTokenResponse;
use vaultrs::api::{AuthInfo, EndpointMiddleware, EndpointResult};

use super::{Asking, Holder, Issued, Renewal, Revocation};

/// Most bytes of an answer to a login.
const MAX_ANSWER: usize = 1024 * 1024;

/// What a login needs.
pub(crate) enum Credential {
    Approle { role_id: SecretString, secret_id: SecretString },
    Token(SecretString),
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
                return Err(unusable("not there yet".into()));
            }
        })
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
    match credential {
        Credential::Approle { role_id, secret_id } => {
            let vault = Vault::new(target, None, egress)?;
            let mut request = LoginWithApproleRequest::builder();
            request.mount(&login.mount).role_id(role_id.expose_secret()).secret_id(secret_id.expose_secret());
            let request = request.build().map_err(|_| Error::internal())?;
            issued(vault.auth(request).await.map_err(|error| refused(&error, Step::Login))?)
        }
        Credential::Token(token) => {
            let vault = Vault::new(target, Some(&token), egress)?;
            let own = own_token(&vault, &token).await?;
            match asking.holder {
                Holder::ControlPlane => Ok(own),
                Holder::Nodes => for_nodes(&vault, login, own).await,
            }
        }
    }
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
}
