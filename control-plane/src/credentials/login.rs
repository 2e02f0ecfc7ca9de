//! Logging in to a store, whichever it is.

use std::time::Duration;

use scaivault_domain::backend::Provider;
use scaivault_domain::lease::Material;
use scaivault_domain::secret::SecretValue;
use scaivault_domain::{Error, Reason};

use super::own::OwnIdentities;
use super::{Holder, Issued, azure, gcp, vault};

/// Checks that a stored credential has what the login needs; nobody is called.
///
/// # Errors
/// `credential_unusable`, naming the field.
pub(super) fn check(provider: &Provider, credential: &SecretValue) -> Result<(), Error> {
    match provider {
        Provider::HashicorpVault { login, .. } => {
            vault::Credential::parse(provider, &login.method, credential).map(drop)
        }
        Provider::AwsSecretsManager { .. } => Ok(()),
        Provider::AzureKeyVault { login, .. } => {
            azure::Credential::parse(provider, &login.method, credential).map(drop)
        }
        Provider::GoogleSecretManager { .. } => gcp::Credential::parse(provider, credential).map(drop),
    }
}

/// Logs in for `holder`, with the stored credential if the login has one, else as ourselves.
///
/// # Errors
/// What the store, or the provider's token service, did wrong.
pub(super) async fn log_in(
    provider: &Provider,
    credential: Option<&SecretValue>,
    holder: Holder,
    own: &OwnIdentities,
) -> Result<Issued, Error> {
    match (provider, credential) {
        (Provider::HashicorpVault { target, login }, Some(value)) => {
            let credential = vault::Credential::parse(provider, &login.method, value)?;
            vault::log_in(target, login, credential, holder).await
        }
        (Provider::AzureKeyVault { target, login }, Some(value)) => {
            let credential = azure::Credential::parse(provider, &login.method, value)?;
            azure::log_in(target, login, &credential).await
        }
        (Provider::AzureKeyVault { login, .. }, None) => azure::log_in_as_ourselves(login, own).await,
        (Provider::GoogleSecretManager { .. }, Some(value)) => {
            gcp::log_in(&gcp::Credential::parse(provider, value)?)
        }
        (Provider::GoogleSecretManager { .. }, None) => own.gcp.access_token().await,
        _ => Err(Error::new(Reason::Unsupported, "not there yet")),
    }
}

/// Renews what a login gave; how long it lasts from now.
///
/// # Errors
/// What the store did wrong.
pub(super) async fn renew(provider: &Provider, material: &Material) -> Result<Option<Duration>, Error> {
    match provider {
        Provider::HashicorpVault { target, .. } => vault::renew(target, material).await,
        _ => Err(Error::new(Reason::Unsupported, "these are not renewed but issued again")),
    }
}

/// Revokes what a login gave, as far as the store can.
pub(super) async fn revoke(provider: &Provider, material: &Material) {
    if let Provider::HashicorpVault { target, .. } = provider {
        vault::revoke(target, material).await;
    }
}
