//! HashiCorp Vault and OpenBao.

use scaivault_domain::Error;
use scaivault_domain::backend::{
    AwsRegion, Endpoint, KvMount, KvVersion, Provider, VaultLogin, VaultMethod, VaultTarget,
};
use scaivault_proto::federation::v1 as pb;

use super::{given, invalid, one_of, only_of, optional_endpoint, optional_path, path, shown, tls};

pub(super) fn parse(config: pb::HashicorpVaultConfig) -> Result<Provider, Error> {
    let endpoint = Endpoint::parse("endpoint", &config.endpoint)?;
    let method = method(&config, &endpoint)?;
    let mount = given(config.auth_mount).unwrap_or_else(|| method.as_str().to_owned());
    if !is_mount(&mount) {
        return Err(invalid("auth_mount", "is a path such as `approle` or `team/approle`"));
    }
    if !config.namespace.is_empty() && !is_mount(config.namespace.trim_end_matches('/')) {
        return Err(invalid("namespace", "is a path such as `team` or `team/project`"));
    }
    let kv = config.kv.map(|kv| {
        let version = match kv.version {
            1 => KvVersion::V1,
            2 => KvVersion::V2,
            _ => return Err(invalid("kv_version", "is 1 or 2")),
        };
        if !is_mount(&kv.path) {
            return Err(invalid("kv_mount", "is a path such as `secret` or `team/kv`"));
        }
        Ok(KvMount { path: kv.path, version })
    });
    let target = VaultTarget {
        endpoint,
        namespace: given(config.namespace),
        tls: tls(config.ca_cert, config.tls_verify),
        kv: kv.transpose()?,
    };
    Ok(Provider::HashicorpVault { target, login: VaultLogin { mount, method } })
}

fn method(config: &pb::HashicorpVaultConfig, endpoint: &Endpoint) -> Result<VaultMethod, Error> {
    let is = |name: &str| config.auth_method == name;
    if !is("token") {
        only_of("lease_policies", !config.lease_policies.is_empty(), "`token`")?;
        only_of("allow_static_on_nodes", config.allow_static_on_nodes, "`token`")?;
    }
    if !is("aws") {
        only_of("aws_server_id", !config.aws_server_id.is_empty(), "`aws`")?;
        only_of("aws_region", !config.aws_region.is_empty(), "`aws`")?;
        only_of("sts_endpoint", !config.sts_endpoint.is_empty(), "`aws`")?;
    }
    if is("approle") || is("token") {
        only_of("auth_role", !config.auth_role.is_empty(), "`kubernetes`, `aws` or `gcp`")?;
    }
    let credentials = || path("auth_config_path", &config.auth_config_path);
    let own_or_given = || optional_path("auth_config_path", &config.auth_config_path);
    let role = || {
        let role = &config.auth_role;
        if is_mount(role) && !role.contains('/') {
            return Ok(role.clone());
        }
        Err(invalid("auth_role", "is required: the role of the auth method in Vault, e.g. `scaivault`"))
    };
    Ok(match config.auth_method.as_str() {
        "approle" => VaultMethod::Approle { credentials: credentials()? },
        "token" => VaultMethod::Token {
            credentials: credentials()?,
            lease_policies: config.lease_policies.clone(),
            allow_static_on_nodes: config.allow_static_on_nodes,
        },
        "kubernetes" => VaultMethod::Kubernetes { role: role()?, credentials: own_or_given()? },
        "aws" => {
            let region =
                if config.aws_region.is_empty() { VaultMethod::AWS_REGION } else { &config.aws_region };
            let server_id = match config.aws_server_id.as_str() {
                "" => endpoint.host().to_owned(),
                id if id.bytes().all(|b| b.is_ascii_graphic()) && id.len() <= 255 => id.to_owned(),
                _ => return Err(invalid("aws_server_id", "is a text that a header can carry")),
            };
            VaultMethod::Aws {
                role: role()?,
                credentials: own_or_given()?,
                server_id,
                region: AwsRegion::parse("aws_region", region)?,
                sts_endpoint: optional_endpoint("sts_endpoint", &config.sts_endpoint)?,
            }
        }
        "gcp" => VaultMethod::Gcp { role: role()?, credentials: own_or_given()? },
        _ => return Err(invalid("auth_method", one_of(VaultMethod::NAMES))),
    })
}

pub(super) fn message(target: &VaultTarget, login: &VaultLogin) -> pb::HashicorpVaultConfig {
    let mut config = pb::HashicorpVaultConfig {
        endpoint: target.endpoint.to_string(),
        auth_method: login.method.as_str().into(),
        auth_config_path: shown(login.method.credentials()),
        auth_mount: login.mount.clone(),
        tls_verify: Some(target.tls.verify),
        namespace: target.namespace.clone().unwrap_or_default(),
        ca_cert: target.tls.ca_cert.clone().unwrap_or_default(),
        kv: target.kv.as_ref().map(|kv| pb::KvMount {
            path: kv.path.clone(),
            version: match kv.version {
                KvVersion::V1 => 1,
                KvVersion::V2 => 2,
            },
        }),
        ..Default::default()
    };
    match &login.method {
        VaultMethod::Approle { .. } => {}
        VaultMethod::Token { lease_policies, allow_static_on_nodes, .. } => {
            config.lease_policies.clone_from(lease_policies);
            config.allow_static_on_nodes = *allow_static_on_nodes;
        }
        VaultMethod::Kubernetes { role, .. } | VaultMethod::Gcp { role, .. } => {
            config.auth_role.clone_from(role);
        }
        VaultMethod::Aws { role, server_id, region, sts_endpoint, .. } => {
            config.auth_role.clone_from(role);
            config.aws_server_id.clone_from(server_id);
            config.aws_region = region.to_string();
            config.sts_endpoint = shown(sts_endpoint.as_ref());
        }
    }
    config
}

/// Whether `text` can stand in a URL and in a header as it is.
fn is_mount(text: &str) -> bool {
    text.len() <= 255
        && text.split('/').all(|segment| {
            !matches!(segment, "" | "." | "..")
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        })
}
