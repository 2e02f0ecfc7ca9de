//! What the AWS environment gives the control plane: environment, profile, web identity, container, machine.
//!
//! It is found as the SDKs find it, on HTTP clients of ours. Where it is looked for is said by the operator's environment
//! alone, never by a tenant.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::imds;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::provider::ProvideCredentials as _;
use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::error::display::DisplayErrorContext;
use scaivault_backends::aws_http_client;
use scaivault_backends::egress::{Egress, Policy};
use scaivault_domain::backend::{Endpoint, Tls};
use scaivault_domain::{Error, Reason};
use tokio::sync::OnceCell;

use super::super::aws::Keys;

/// Where a web identity is exchanged if the environment names no region.
const REGION: &str = "us-east-1";
/// How long a machine's metadata service may take; more than two tries would outlast a login.
const METADATA_TRIES: u32 = 2;
/// How long an exchange may take for which the SDK sets no limit.
const EXCHANGE: Duration = Duration::from_secs(5);

/// What gives credentials on machines of AWS: IMDS, ECS, EKS Pod Identity.
///
/// Sources: the AWS SDKs and Tools Reference Guide, "IMDS credential provider" and "Container credential provider".
const METADATA: &[&str] =
    &["169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23"];

/// The AWS identity of this process.
#[derive(Debug, Default)]
pub(crate) struct AwsIdentity {
    chain: OnceCell<DefaultCredentialsChain>,
}

impl AwsIdentity {
    /// The keys of this moment.
    ///
    /// # Errors
    /// `backend_login_failed`, if there are none where the control plane runs.
    pub(crate) async fn keys(&self) -> Result<Keys, Error> {
        let chain = self.chain.get_or_init(find).await;
        let credentials = chain.provide_credentials().await.map_err(|error| missing(&error))?;
        Ok(Keys {
            access_key_id: credentials.access_key_id().to_owned(),
            secret_access_key: credentials.secret_access_key().into(),
            session_token: credentials.session_token().map(Into::into),
        })
    }
}

async fn find() -> DefaultCredentialsChain {
    let config = ProviderConfig::default().with_http_client(AnyServer::new());
    let region = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::builder().configure(&config).build())
        .or_else(REGION);
    let metadata = imds::Client::builder().configure(&config).max_attempts(METADATA_TRIES).build();
    DefaultCredentialsChain::builder().configure(config).region(region).imds_client(metadata).build().await
}

fn missing(error: &CredentialsError) -> Error {
    // For the operator, whom the caller is sent to.
    tracing::warn!(error = %DisplayErrorContext(error), "no AWS identity of the control plane could be had");
    let (reason, message) = match error {
        CredentialsError::ProviderTimedOut(_) => {
            (Reason::BackendTimeout, "what gives ScaiVault its AWS identity did not answer in time")
        }
        // `Unhandled` is an answer that is none, or no answer at all.
        CredentialsError::ProviderError(_) | CredentialsError::Unhandled(_) => {
            (Reason::BackendUnreachable, "what gives ScaiVault its AWS identity cannot be used")
        }
        _ => (Reason::BackendLoginFailed, "ScaiVault has no AWS identity where it runs"),
    };
    Error::new(reason, message)
        .next("ask the operator to give the control plane an AWS identity, or give keys of your own")
}

/// A client for whatever the environment names, with one of our clients for each server.
#[derive(Clone, Debug)]
struct AnyServer {
    egress: Egress,
    connectors: Arc<Mutex<HashMap<String, SharedHttpConnector>>>,
}

impl AnyServer {
    fn new() -> Self {
        let allow = METADATA.iter().map(|address| address.parse().expect("it is an address")).collect();
        let policy = Policy { allow, ..Policy::default() }.with_loopback();
        AnyServer { egress: Egress::new(policy), connectors: Arc::default() }
    }

    fn connector(
        &self,
        request: &HttpRequest,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> Result<SharedHttpConnector, ConnectorError> {
        let unusable = || ConnectorError::user("no server of this address can be asked".into());
        let mut url = reqwest::Url::parse(request.uri()).map_err(|_| unusable())?;
        url.set_path("");
        url.set_query(None);
        let server = Endpoint::parse("endpoint", url.as_str()).map_err(|_| unusable())?;
        let mut servers = self.connectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connector) = servers.get(url.as_str()) {
            return Ok(connector.clone());
        }
        let client = aws_http_client(&server, &Tls::default(), &self.egress).map_err(|_| unusable())?;
        let connector = client.http_connector(settings, components);
        servers.insert(url.into(), connector.clone());
        Ok(connector)
    }
}

impl HttpClient for AnyServer {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let (servers, settings, components) = (self.clone(), settings.clone(), components.clone());
        SharedHttpConnector::new(AnyConnector { servers, settings, components })
    }
}

#[derive(Debug)]
struct AnyConnector {
    servers: AnyServer,
    settings: HttpConnectorSettings,
    components: RuntimeComponents,
}

impl HttpConnector for AnyConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let connector = match self.servers.connector(&request, &self.settings, &self.components) {
            Ok(connector) => connector,
            Err(error) => return HttpConnectorFuture::ready(Err(error)),
        };
        // A machine that is none of AWS's may swallow what is sent to the metadata service.
        let limit = match (self.settings.connect_timeout(), self.settings.read_timeout()) {
            (None, None) => EXCHANGE,
            (connect, read) => connect.unwrap_or_default() + read.unwrap_or_default(),
        };
        HttpConnectorFuture::new(async move {
            tokio::time::timeout(limit, connector.call(request))
                .await
                .unwrap_or_else(|elapsed| Err(ConnectorError::timeout(elapsed.into())))
        })
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::{get, put};

    use super::super::tests::serve;
    use super::*;

    #[tokio::test]
    async fn the_services_of_the_machine_are_reached() {
        let token = async || ([("x-aws-ec2-metadata-token-ttl-seconds", "21600")], "token");
        let router = Router::new()
            .route("/latest/api/token", put(token))
            .route("/latest/meta-data/instance-id", get(async || "i-1"));
        let url = serve(router).await;
        let config = ProviderConfig::default().with_http_client(AnyServer::new());
        let metadata = imds::Client::builder().configure(&config).endpoint(url.to_string()).unwrap().build();
        assert_eq!(metadata.get("/latest/meta-data/instance-id").await.unwrap().as_ref(), "i-1");
    }
}
