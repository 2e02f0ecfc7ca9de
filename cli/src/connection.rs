//! The connection to a server: where, with which certificates, as whom.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use scaivault_domain::tenant::TenantId;
use scaivault_proto::admin::v1::admin_service_client::AdminServiceClient;
use scaivault_proto::federation::v1::federation_service_client::FederationServiceClient;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use secrecy::{ExposeSecret as _, SecretString};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use tower::ServiceExt as _;

use crate::failure::{Failure, deepest};
use crate::parse;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than anything that a server does before it answers.
const CALL_TIMEOUT: Duration = Duration::from_secs(90);

/// Where the server is. The token is never an argument: other users of the machine see those.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Connect {
    /// Address of a data-plane node.
    #[arg(
        long,
        global = true,
        env = "SCAIVAULT_ADDR",
        default_value = "http://127.0.0.1:8300",
        value_name = "URL"
    )]
    pub(crate) addr: String,
    /// PEM certificates that the server's certificate must chain to, instead of the system's.
    #[arg(long, global = true, env = "SCAIVAULT_CACERT", value_name = "FILE")]
    pub(crate) ca_cert: Option<PathBuf>,
    /// The tenant to act in (operators only).
    #[arg(long = "as-tenant", global = true, env = "SCAIVAULT_TENANT", value_name = "TENANT", value_parser = parse::tenant)]
    pub(crate) tenant: Option<TenantId>,
    /// File with the token; otherwise SCAIVAULT_TOKEN, then SCAIVAULT_TOKEN_FILE.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// As whom.
#[derive(Debug, Default)]
pub(crate) struct Credentials(Option<SecretString>);

impl Credentials {
    /// Takes the token from `--token-file`, `SCAIVAULT_TOKEN` or the file that `SCAIVAULT_TOKEN_FILE` names.
    pub(crate) fn from_environment(connect: &Connect) -> Result<Self, Failure> {
        let variable = |name| std::env::var(name).ok().filter(|text: &String| !text.is_empty());
        if let Some(file) = &connect.token_file {
            return Self::from_file(file);
        }
        if let Some(token) = variable("SCAIVAULT_TOKEN") {
            return Ok(Credentials(Some(token.trim().into())));
        }
        variable("SCAIVAULT_TOKEN_FILE")
            .map_or_else(|| Ok(Credentials(None)), |file| Self::from_file(file.as_ref()))
    }

    fn from_file(file: &Path) -> Result<Self, Failure> {
        let token = std::fs::read_to_string(file).map_err(|error| {
            Failure::usage(
                format!("the token file {} cannot be read: {error}", file.display()),
                "correct --token-file or SCAIVAULT_TOKEN_FILE",
            )
        })?;
        Ok(Credentials(Some(token.trim().into())))
    }

    fn authorization(&self) -> Result<MetadataValue<Ascii>, Failure> {
        let token = self.0.as_ref().ok_or_else(|| {
            Failure::usage(
                "there is no token",
                "set SCAIVAULT_TOKEN, or SCAIVAULT_TOKEN_FILE to a file that holds it",
            )
        })?;
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {}", token.expose_secret()).parse().map_err(|_| {
                Failure::usage(
                    "the token has characters that no token has",
                    "copy it again into SCAIVAULT_TOKEN",
                )
            })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl From<&str> for Credentials {
    fn from(token: &str) -> Self {
        Credentials(Some(token.into()))
    }
}

/// A channel that says on every call who is calling.
pub(crate) type Wire = InterceptedService<Channel, Identity>;

/// Adds the token, and the tenant if an operator named one.
#[derive(Clone)]
pub(crate) struct Identity {
    authorization: MetadataValue<Ascii>,
    tenant: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Identity {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.authorization.clone());
        if let Some(tenant) = &self.tenant {
            request.metadata_mut().insert("x-scaivault-tenant", tenant.clone());
        }
        Ok(request)
    }
}

/// An open connection.
#[derive(Clone)]
pub(crate) struct Connection(Wire);

impl Connection {
    /// Connects.
    pub(crate) async fn open(to: &Connect, credentials: &Credentials) -> Result<Self, Failure> {
        let identity = Identity {
            authorization: credentials.authorization()?,
            tenant: to.tenant.as_ref().map(|t| t.as_str().parse().expect("a tenant's id is ASCII")),
        };
        Ok(Connection(InterceptedService::new(connect(to).await?, identity)))
    }

    pub(crate) fn secrets(&self) -> SecretsServiceClient<Wire> {
        SecretsServiceClient::new(self.0.clone())
    }

    pub(crate) fn federation(&self) -> FederationServiceClient<Wire> {
        FederationServiceClient::new(self.0.clone())
    }

    pub(crate) fn admin(&self) -> AdminServiceClient<Wire> {
        AdminServiceClient::new(self.0.clone())
    }
}

/// Asks the server whether it is ready, without a token.
pub(crate) async fn readiness(of: &Connect) -> Result<http::StatusCode, Failure> {
    let request =
        http::Request::get("/readyz").body(tonic::body::Body::empty()).expect("a fixed request is valid");
    let answer = connect(of).await?.oneshot(request).await.map_err(|error| unreachable(&of.addr, &error))?;
    Ok(answer.status())
}

async fn connect(to: &Connect) -> Result<Channel, Failure> {
    endpoint(to)?.connect().await.map_err(|error| unreachable(&to.addr, &error))
}

fn endpoint(to: &Connect) -> Result<Endpoint, Failure> {
    let bad = |what: &str| {
        Failure::usage(
            format!("the address {:?} {what}", to.addr),
            "set SCAIVAULT_ADDR or --addr to a URL such as https://scaivault.internal:8300",
        )
    };
    let endpoint = Endpoint::from_shared(to.addr.clone()).map_err(|_| bad("is no URL"))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .user_agent(concat!("scaivault/", env!("CARGO_PKG_VERSION")))
        .expect("the user agent is ASCII");
    let tls = match endpoint.uri().scheme_str() {
        Some("http") => return Ok(endpoint),
        Some("https") => ClientTlsConfig::new(),
        _ => return Err(bad("begins with neither https:// nor http://")),
    };
    let tls = match &to.ca_cert {
        Some(file) => tls.ca_certificate(certificates(file)?),
        None => tls.with_native_roots(),
    };
    endpoint.tls_config(tls).map_err(|error| {
        Failure::usage(
            format!("TLS cannot be set up: {}", deepest(&error)),
            "set SCAIVAULT_CACERT to a PEM file with the certificate of the server's CA",
        )
    })
}

fn certificates(file: &Path) -> Result<Certificate, Failure> {
    let next = "correct SCAIVAULT_CACERT or --ca-cert: it names a PEM file";
    let pem = std::fs::read(file)
        .map_err(|error| Failure::usage(format!("{} cannot be read: {error}", file.display()), next))?;
    if !pem.windows(27).any(|text| text == b"-----BEGIN CERTIFICATE-----") {
        return Err(Failure::usage(format!("{} holds no PEM certificate", file.display()), next));
    }
    Ok(Certificate::from_pem(pem))
}

fn unreachable(addr: &str, error: &tonic::transport::Error) -> Failure {
    let cause = deepest(error);
    let next = if cause.contains("certificate") {
        "set SCAIVAULT_CACERT to a PEM file with the certificate of the server's CA"
    } else {
        "check that a server runs there, or set SCAIVAULT_ADDR (or --addr) to the address of one"
    };
    Failure::server(format!("no server can be reached at {addr}: {cause}"), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(addr: &str) -> Connect {
        Connect { addr: addr.to_owned(), ca_cert: None, tenant: None, token_file: None }
    }

    #[tokio::test]
    async fn a_missing_server_is_named_with_what_to_set() {
        let unused =
            std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
        let failure = readiness(&to(&format!("http://{unused}"))).await.expect_err("nobody listens");
        let mut told = Vec::new();
        failure.tell(&mut told, false);
        let told = String::from_utf8(told).expect("UTF-8");
        assert!(told.contains(&unused.to_string()) && told.contains("SCAIVAULT_ADDR"), "{told}");
        assert_eq!(failure.exit(), crate::failure::Exit::Server);
    }

    #[test]
    fn addresses_have_a_scheme() {
        for addr in ["127.0.0.1:8300", "ftp://a", "not a url"] {
            assert!(endpoint(&to(addr)).is_err(), "{addr}");
        }
    }

    #[test]
    fn a_token_never_prints() {
        assert!(!format!("{:?}", Credentials::from("svt_canary")).contains("canary"));
    }
}
