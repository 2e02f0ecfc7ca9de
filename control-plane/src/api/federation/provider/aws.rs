//! AWS Secrets Manager.

use scaivault_domain::backend::{AwsLogin, AwsRegion, AwsRole, AwsTarget, Provider, RoleArn};
use scaivault_domain::{Error, Reason};
use scaivault_edge::wire;
use scaivault_proto::federation::v1 as pb;

use super::{given, invalid, optional_endpoint, optional_path, shown, tls};

pub(super) fn parse(config: pb::AwsSecretsManagerConfig) -> Result<Provider, Error> {
    let target = AwsTarget {
        region: AwsRegion::parse("region", &config.region)?,
        endpoint: optional_endpoint("endpoint", &config.endpoint)?,
        tls: tls(config.ca_cert, config.tls_verify),
    };
    let credentials = optional_path("credentials_path", &config.credentials_path)?;
    let session = config
        .session_duration
        .map(|session| wire::parse_duration(Reason::InvalidConfig, "/config/session_duration", &session))
        .transpose()?;
    let role = if config.role_arn.is_empty() {
        if session.is_some() {
            return Err(invalid("session_duration", "belongs to a `role_arn`"));
        }
        if !config.external_id.is_empty() {
            return Err(invalid("external_id", "belongs to a `role_arn`"));
        }
        None
    } else {
        let arn = RoleArn::parse(&config.role_arn)?;
        Some(AwsRole::new(arn, given(config.external_id), session.unwrap_or(AwsRole::SESSION))?)
    };
    if config.allow_static_on_nodes && (credentials.is_none() || role.is_some()) {
        let detail =
            "belongs to a `credentials_path` without `role_arn`: a role's sessions end by themselves";
        return Err(invalid("allow_static_on_nodes", detail));
    }
    let login = AwsLogin {
        credentials,
        role,
        sts_endpoint: optional_endpoint("sts_endpoint", &config.sts_endpoint)?,
        allow_static_on_nodes: config.allow_static_on_nodes,
    };
    Ok(Provider::AwsSecretsManager { target, login })
}

pub(super) fn message(target: &AwsTarget, login: &AwsLogin) -> pb::AwsSecretsManagerConfig {
    let role = login.role.as_ref();
    pb::AwsSecretsManagerConfig {
        region: target.region.to_string(),
        credentials_path: shown(login.credentials.as_ref()),
        role_arn: role.map(|role| role.arn.as_str().to_owned()).unwrap_or_default(),
        external_id: role.and_then(|role| role.external_id.clone()).unwrap_or_default(),
        session_duration: role.map(|role| wire::duration(role.session)),
        allow_static_on_nodes: login.allow_static_on_nodes,
        endpoint: shown(target.endpoint.as_ref()),
        sts_endpoint: shown(login.sts_endpoint.as_ref()),
        ca_cert: target.tls.ca_cert.clone().unwrap_or_default(),
        tls_verify: Some(target.tls.verify),
    }
}
