//! The managed identities of the control plane's machine.
//!
//! Source: "How to use managed identities for Azure resources on an Azure VM to acquire an access token".

use http::StatusCode;
use scaivault_domain::backend::Endpoint;
use scaivault_domain::{Error, Reason};
use serde::Deserialize;

use super::metadata::MetadataService;
use crate::credentials::{Issued, bearer};

/// The managed identities of this machine.
#[derive(Debug)]
pub struct ManagedIdentities {
    service: MetadataService,
}

impl ManagedIdentities {
    pub(super) fn new(metadata: &Endpoint) -> anyhow::Result<Self> {
        let name = "Azure's metadata service";
        Ok(ManagedIdentities { service: MetadataService::new(metadata, name, ("Metadata", "true"))? })
    }

    /// A token for `resource`, of the identity with this client id or of the machine's only one.
    ///
    /// # Errors
    /// If there is no such identity, or the service does not answer.
    pub(crate) async fn token(&self, resource: &str, client_id: Option<&str>) -> Result<Issued, Error> {
        let mut query = vec![("api-version", "2018-02-01"), ("resource", resource)];
        query.extend(client_id.map(|id| ("client_id", id)));
        let answer = self.service.get("/metadata/identity/oauth2/token", &query).await?;
        if answer.status == StatusCode::OK {
            bearer::token_in(&answer.body)
        } else {
            Err(refused(answer.status, &answer.body))
        }
    }
}

fn refused(status: StatusCode, body: &[u8]) -> Error {
    #[derive(Deserialize)]
    struct Refusal<'a> {
        error: &'a str,
    }

    let failed = |message: &'static str| Error::new(Reason::BackendLoginFailed, message);
    // Its documentation calls these two passing: it is being updated.
    if matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
        let message = "Azure's metadata service has no tokens now";
        return Error::new(Reason::BackendUnreachable, message)
            .next("nothing if it passes; otherwise ask the operator whether this is a machine of Azure");
    }
    match serde_json::from_slice(body) {
        Ok(Refusal { error: "invalid_resource" }) => {
            failed("Azure gives the managed identity no token for the vault's resource")
                .next("check that the vault is in the cloud, and the tenant, of the control plane's machine")
        }
        Ok(Refusal { error: "invalid_request" }) => {
            failed("the control plane's machine has no such managed identity")
                .next("ask the operator to assign one to the machine; of several one is named by `client_id`")
        }
        _ => failed("Azure's metadata service gives no token")
            .next("ask the operator to look at the managed identity of the control plane's machine"),
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::RawQuery;
    use axum::http::HeaderMap;
    use axum::routing::get;
    use axum::{Json, Router};
    use serde_json::json;

    use super::super::tests::serve;
    use super::*;

    #[tokio::test]
    async fn the_machine_is_asked_for_the_identity_that_is_named() {
        let answer = async |headers: HeaderMap, RawQuery(query): RawQuery| {
            assert_eq!(headers["metadata"], "true");
            let expected = "api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net&client_id=4711";
            assert_eq!(query.as_deref(), Some(expected));
            Json(json!({ "access_token": "t", "expires_in": "86399" }))
        };
        let url = serve(Router::new().route("/metadata/identity/oauth2/token", get(answer))).await;
        let identities = ManagedIdentities::new(&url).unwrap();
        let issued = identities.token("https://vault.azure.net", Some("4711")).await.unwrap();
        assert_eq!(issued.ttl.unwrap().as_secs(), 86_399);
    }

    #[test]
    fn a_refusal_tells_whether_it_passes() {
        let told = |status, error: &str| {
            refused(status, json!({ "error": error, "error_description": "x" }).to_string().as_bytes())
        };
        let missing = told(StatusCode::BAD_REQUEST, "invalid_request");
        assert!(missing.message.contains("no such managed identity"), "{missing}");
        assert_eq!(told(StatusCode::GONE, "").reason, Reason::BackendUnreachable);
        assert_eq!(refused(StatusCode::FORBIDDEN, b"<html>").reason, Reason::BackendLoginFailed);
    }
}
