//! Azure Key Vault.

use scaivault_domain::Error;
use scaivault_domain::backend::{AzureCloud, AzureLogin, AzureMethod, AzureTarget, Endpoint, Provider};
use scaivault_proto::federation::v1 as pb;

use super::{given, invalid, one_of, only_of, optional_endpoint, path, shown, tls};

pub(super) fn parse(config: pb::AzureKeyVaultConfig) -> Result<Provider, Error> {
    let vault = Endpoint::parse("vault_url", &config.vault_url)?;
    let method = method(&config)?;
    let authority = optional_endpoint("authority", &config.authority)?;
    let is_resource = |text: &String| {
        text.starts_with("https://") && text.len() <= 255 && text.bytes().all(|b| b.is_ascii_graphic())
    };
    let resource = given(config.resource);
    if resource.as_ref().is_some_and(|resource| !is_resource(resource)) {
        return Err(invalid("resource", "is a URL such as `https://vault.azure.net`"));
    }
    let cloud = AzureCloud::of(&vault);
    let target = AzureTarget { vault, tls: tls(config.ca_cert, config.tls_verify) };
    Ok(Provider::AzureKeyVault { target, login: AzureLogin { method, authority, resource, cloud } })
}

fn method(config: &pb::AzureKeyVaultConfig) -> Result<AzureMethod, Error> {
    let is = |name: &str| config.auth_method == name;
    if !is("managed_identity") {
        only_of(
            "client_id",
            !config.client_id.is_empty(),
            "`managed_identity`; an application's is in its credential",
        )?;
    }
    let credentials = || path("credentials_path", &config.credentials_path);
    Ok(match config.auth_method.as_str() {
        "managed_identity" => {
            only_of(
                "credentials_path",
                !config.credentials_path.is_empty(),
                "`client_secret` or `certificate`",
            )?;
            only_of("authority", !config.authority.is_empty(), "`client_secret` or `certificate`")?;
            // Otherwise a tenant could have our identity's tokens for any service made and sent.
            only_of("resource", !config.resource.is_empty(), "`client_secret` or `certificate`")?;
            let is_id =
                |id: &str| id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if !is_id(&config.client_id) {
                return Err(invalid("client_id", "is the client id of a user-assigned identity"));
            }
            AzureMethod::ManagedIdentity { client_id: given(config.client_id.clone()) }
        }
        "client_secret" => AzureMethod::ClientSecret { credentials: credentials()? },
        "certificate" => AzureMethod::Certificate { credentials: credentials()? },
        _ => return Err(invalid("auth_method", one_of(AzureMethod::NAMES))),
    })
}

pub(super) fn message(target: &AzureTarget, login: &AzureLogin) -> pb::AzureKeyVaultConfig {
    let client_id = match &login.method {
        AzureMethod::ManagedIdentity { client_id } => client_id.clone(),
        AzureMethod::ClientSecret { .. } | AzureMethod::Certificate { .. } => None,
    };
    pb::AzureKeyVaultConfig {
        vault_url: target.vault.to_string(),
        auth_method: login.method.as_str().into(),
        credentials_path: shown(login.method.credentials()),
        client_id: client_id.unwrap_or_default(),
        authority: shown(login.authority.as_ref()),
        resource: login.resource.clone().unwrap_or_default(),
        ca_cert: target.tls.ca_cert.clone().unwrap_or_default(),
        tls_verify: Some(target.tls.verify),
    }
}
