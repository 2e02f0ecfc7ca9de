//! Logging in to a store, whichever it is.

use std::time::Duration;

use scaivault_backends::Egress;
use scaivault_domain::backend::Provider;
use scaivault_domain::lease::Material;
use scaivault_domain::secret::SecretValue;
use scaivault_domain::{Error, Reason};

use super::{Asking, Issued, aws, azure, gcp, vault};

/// Checks that a stored credential has what the login needs; nobody is called.
///
/// # Errors
/// `credential_unusable`, naming the field.
pub(super) fn check(provider: &Provider, credential: &SecretValue) -> Result<(), Error> {
    match provider {
        Provider::HashicorpVault { login, .. } => {
            vault::Credential::parse(provider, &login.method, credential).map(drop)
        }
        Provider::AwsSecretsManager { .. } => aws::Keys::parse(provider, credential).map(drop),
        Provider::AzureKeyVault { login, .. } => {
            azure::Credential::parse(provider, &login.method, credential).map(drop)
        }
        Provider::GoogleSecretManager { .. } => gcp::Credential::parse(provider, credential).map(drop),
    }
}

/// Logs in as `asking`, with the stored credential if the login has one, else as ourselves.
///
/// # Errors
/// What the store, or the provider's token service, did wrong.
pub(super) async fn log_in(
    provider: &Provider,
    credential: Option<&SecretValue>,
    asking: &Asking<'_>,
) -> Result<Issued, Error> {
    match (provider, credential) {
        (Provider::HashicorpVault { target, login }, value) => {
            let credential = match value {
                Some(value) => vault::Credential::parse(provider, &login.method, value)?,
                None => vault::Credential::own(&login.method, asking.own).await?,
            };
            vault::log_in(target, login, credential, asking).await
        }
        (Provider::AwsSecretsManager { target, login }, value) => {
            let keys = value.map(|value| aws::Keys::parse(provider, value)).transpose()?;
            aws::log_in(target, login, keys, asking).await
        }
        (Provider::AzureKeyVault { target, login }, Some(value)) => {
            let credential = azure::Credential::parse(provider, &login.method, value)?;
            azure::log_in(target, login, &credential, asking.egress).await
        }
        (Provider::AzureKeyVault { login, .. }, None) => azure::log_in_as_ourselves(login, asking.own).await,
        (Provider::GoogleSecretManager { .. }, Some(value)) => {
            gcp::log_in(&gcp::Credential::parse(provider, value)?)
        }
        (Provider::GoogleSecretManager { .. }, None) => asking.own.gcp.access_token().await,
    }
}

/// Renews what a login gave; how long it lasts from now.
///
/// # Errors
/// What the store did wrong.
pub(super) async fn renew(
    provider: &Provider,
    material: &Material,
    egress: &Egress,
) -> Result<Option<Duration>, Error> {
    match provider {
        Provider::HashicorpVault { target, .. } => vault::renew(target, material, egress).await,
        _ => Err(Error::new(Reason::Unsupported, "these are not renewed but issued again")),
    }
}

/// Revokes what a login gave, as far as the store can.
pub(super) async fn revoke(provider: &Provider, material: &Material, egress: &Egress) {
    if let Provider::HashicorpVault { target, .. } = provider {
        vault::revoke(target, material, egress).await;
    }
}
