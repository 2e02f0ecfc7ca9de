//! GCP Secret Manager.

use scaivault_domain::Error;
use scaivault_domain::backend::{GcpLogin, GcpTarget, ProjectId, Provider};
use scaivault_proto::federation::v1 as pb;

use super::{given, invalid, one_of, only_of, optional_endpoint, path, shown, tls};

pub(super) fn parse(config: pb::GoogleSecretManagerConfig) -> Result<Provider, Error> {
    let login = match (config.auth_method.as_str(), config.credentials_path.as_str()) {
        ("service_account" | "", given) if !given.is_empty() => {
            GcpLogin::ServiceAccount { credentials: path("credentials_path", given)? }
        }
        ("service_account", _) => {
            return Err(invalid("credentials_path", "is required: the local secret with the JSON key"));
        }
        ("workload_identity", given) => {
            only_of("credentials_path", !given.is_empty(), "`service_account`")?;
            GcpLogin::WorkloadIdentity
        }
        ("", _) => {
            let detail = "is required without a `credentials_path`: `workload_identity`";
            return Err(invalid("auth_method", detail));
        }
        _ => return Err(invalid("auth_method", one_of(GcpLogin::NAMES))),
    };
    let location = given(config.location);
    location.as_deref().map(GcpTarget::check_location).transpose()?;
    let target = GcpTarget {
        project: ProjectId::parse(&config.project_id)?,
        location,
        endpoint: optional_endpoint("endpoint", &config.endpoint)?,
        tls: tls(config.ca_cert, config.tls_verify),
    };
    Ok(Provider::GoogleSecretManager { target, login })
}

pub(super) fn message(target: &GcpTarget, login: &GcpLogin) -> pb::GoogleSecretManagerConfig {
    pb::GoogleSecretManagerConfig {
        project_id: target.project.to_string(),
        auth_method: login.as_str().into(),
        credentials_path: shown(login.credentials()),
        location: target.location.clone().unwrap_or_default(),
        endpoint: shown(target.endpoint.as_ref()),
        ca_cert: target.tls.ca_cert.clone().unwrap_or_default(),
        tls_verify: Some(target.tls.verify),
    }
}
