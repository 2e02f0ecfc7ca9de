//! Between messages and the store of a backend: where it is, and how to log in.

mod aws;
mod azure;
mod gcp;
mod vault;

use scaivault_domain::backend::{Endpoint, Provider, Tls};
use scaivault_domain::path::SecretPath;
use scaivault_domain::{Error, Reason};
use scaivault_proto::federation::v1::backend::Config;

/// The store that a message describes.
///
/// # Errors
/// `invalid_config`, naming the field.
pub(super) fn parse(config: Option<Config>) -> Result<Provider, Error> {
    let provider = match config {
        None => return Err(Error::field(Reason::InvalidConfig, "/config", "is required")),
        Some(Config::HashicorpVault(config)) => vault::parse(config)?,
        Some(Config::AwsSecretsManager(config)) => aws::parse(config)?,
        Some(Config::AzureKeyVault(config)) => azure::parse(config)?,
        Some(Config::GoogleSecretManager(config)) => gcp::parse(config)?,
    };
    // Certificates that cannot be used are an error now, not at the first read.
    scaivault_backends::check_tls(provider.target().tls())
        .map_err(|_| invalid("ca_cert", "has no certificate in PEM that can be used"))?;
    Ok(provider)
}

/// The store as a message.
pub(super) fn message(provider: &Provider) -> Config {
    match provider {
        Provider::HashicorpVault { target, login } => Config::HashicorpVault(vault::message(target, login)),
        Provider::AwsSecretsManager { target, login } => {
            Config::AwsSecretsManager(aws::message(target, login))
        }
        Provider::AzureKeyVault { target, login } => Config::AzureKeyVault(azure::message(target, login)),
        Provider::GoogleSecretManager { target, login } => {
            Config::GoogleSecretManager(gcp::message(target, login))
        }
    }
}

fn invalid(field: &str, detail: impl Into<String>) -> Error {
    Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
}

/// A text that may be left out.
fn given(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn shown<T: ToString>(value: Option<&T>) -> String {
    value.map(T::to_string).unwrap_or_default()
}

fn tls(ca_cert: String, verify: Option<bool>) -> Tls {
    Tls { ca_cert: given(ca_cert), verify: verify.unwrap_or(true) }
}

fn path(field: &str, text: &str) -> Result<SecretPath, Error> {
    SecretPath::check(text).map_err(|fault| invalid(field, fault.detail()))
}

fn optional_path(field: &str, text: &str) -> Result<Option<SecretPath>, Error> {
    (!text.is_empty()).then(|| path(field, text)).transpose()
}

fn optional_endpoint(field: &str, text: &str) -> Result<Option<Endpoint>, Error> {
    (!text.is_empty()).then(|| Endpoint::parse(field, text)).transpose()
}

/// Refuses a field that another method has.
fn only_of(field: &str, is_given: bool, methods: &str) -> Result<(), Error> {
    if is_given { Err(invalid(field, format!("belongs to auth_method {methods}"))) } else { Ok(()) }
}

/// A list of names, as a refusal tells them.
fn one_of(names: &[&str]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => format!("is {last}"),
        Some((last, others)) => format!("is {} or {last}", others.join(", ")),
        None => String::new(),
    }
}
