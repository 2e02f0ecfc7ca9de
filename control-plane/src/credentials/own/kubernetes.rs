//! The Kubernetes service account of the control plane.

use std::path::PathBuf;

use scaivault_domain::{Error, Reason};
use secrecy::SecretString;

/// Where Kubernetes mounts the token of a pod's service account.
///
/// Source: "Accessing the Kubernetes API from a Pod" in the documentation of Kubernetes.
const TOKEN_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// The service account that the control plane's pod runs as.
#[derive(Debug)]
pub(crate) struct ServiceAccount {
    file: PathBuf,
}

impl ServiceAccount {
    /// The account whose token is in `file`; `None`: where Kubernetes puts it.
    pub(crate) fn new(file: Option<PathBuf>) -> Self {
        ServiceAccount { file: file.unwrap_or_else(|| TOKEN_FILE.into()) }
    }

    /// The token of this moment: the kubelet replaces it long before it expires.
    ///
    /// # Errors
    /// `backend_login_failed`, if there is none.
    pub(crate) async fn token(&self) -> Result<SecretString, Error> {
        let none = |message| {
            Error::new(Reason::BackendLoginFailed, message).next(
                "ask the operator to run the control plane with a service account, or to set `--kubernetes-token-file`",
            )
        };
        let text = tokio::fs::read_to_string(&self.file).await.map_err(|error| {
            tracing::warn!(file = %self.file.display(), %error, "the service account's token cannot be read");
            none("ScaiVault has no Kubernetes service account where it runs")
        })?;
        match text.trim() {
            "" => Err(none("the token of ScaiVault's Kubernetes service account is empty")),
            token => Ok(token.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[tokio::test]
    async fn a_replaced_token_is_seen_at_the_next_login() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let account = ServiceAccount::new(Some(file.clone()));
        assert_eq!(account.token().await.unwrap_err().reason, Reason::BackendLoginFailed);
        for text in ["first\n", "second"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(account.token().await.unwrap().expose_secret(), text.trim());
        }
    }
}
