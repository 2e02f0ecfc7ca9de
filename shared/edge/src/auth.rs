//! Who is calling: the bearer token, and the tenant that an operator may name.

use std::sync::Arc;

use async_trait::async_trait;
use http::header::AUTHORIZATION;
use scaivault_domain::access::{Caller, Scope};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::{Error, Reason};
use secrecy::SecretString;
use tonic::metadata::MetadataMap;

/// The header with which an operator names the tenant that it acts for.
pub const TENANT: &str = "x-scaivault-tenant";

/// Turns a token into a caller. Each plane has its own way to know tokens.
#[async_trait]
pub trait Verifier: Send + Sync + 'static {
    /// The caller whose token this is.
    ///
    /// # Errors
    /// `unauthenticated` for a token that is unknown, expired or revoked; what else keeps the answer from being known.
    async fn verify(&self, token: &SecretString) -> Result<Arc<Caller>, Error>;
}

/// The caller of a request with this metadata.
///
/// # Errors
/// `unauthenticated` without a valid token, `permission_denied` if another tenant is named without scope `operator`.
pub async fn caller(verifier: &dyn Verifier, metadata: &MetadataMap) -> Result<Arc<Caller>, Error> {
    let caller = verifier.verify(&bearer(metadata)?).await?;
    let Some(named) = metadata.get(TENANT) else { return Ok(caller) };
    let malformed = || Error::invalid(format!("/{TENANT}"), "is no name of a tenant");
    let named = TenantId::parse(named.to_str().map_err(|_| malformed())?).map_err(|_| malformed())?;
    if named == caller.tenant {
        return Ok(caller);
    }
    if !caller.has(Scope::Operator) {
        return Err(Error::new(Reason::PermissionDenied, "the token belongs to another tenant")
            .next(format!("leave the header `{TENANT}` out, or use a token with scope `operator`")));
    }
    Ok(Arc::new(caller.acting_for(named)))
}

fn bearer(metadata: &MetadataMap) -> Result<SecretString, Error> {
    const NEXT: &str = "send the header `Authorization: Bearer svt_…`";
    let refuse = |message: &'static str| Error::new(Reason::Unauthenticated, message).next(NEXT);
    let mut values = metadata.get_all(AUTHORIZATION.as_str()).iter();
    let value = values.next().ok_or_else(|| refuse("the request has no token"))?;
    if values.next().is_some() {
        return Err(refuse("the request has more than one token"));
    }
    let malformed = || refuse("the header `Authorization` carries no bearer token");
    let (scheme, token) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(malformed)?;
    let token = token.trim_matches(' ');
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.contains(' ') {
        return Err(malformed());
    }
    Ok(token.into())
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    struct Known(Vec<Scope>);

    #[async_trait]
    impl Verifier for Known {
        async fn verify(&self, token: &SecretString) -> Result<Arc<Caller>, Error> {
            if token.expose_secret() != "svt_known" {
                return Err(Error::new(Reason::Unauthenticated, "the token is unknown"));
            }
            Ok(Arc::new(Caller {
                tenant: TenantId::parse("acme").unwrap(),
                token: None,
                subject: "ci".into(),
                accessor: "a".into(),
                scopes: self.0.clone(),
                rules: [].into(),
                expires_at: None,
            }))
        }
    }

    async fn tenant_of(scopes: &[Scope], headers: &[(&'static str, &str)]) -> Result<String, Reason> {
        let mut metadata = MetadataMap::new();
        for (name, value) in headers {
            metadata.append(*name, value.parse().unwrap());
        }
        let caller = caller(&Known(scopes.to_vec()), &metadata).await;
        caller.map(|c| c.tenant.to_string()).map_err(|error| error.reason)
    }

    #[tokio::test]
    async fn only_one_bearer_token_is_one() {
        for value in ["Bearer svt_known", "bearer svt_known", "BEARER  svt_known "] {
            assert_eq!(tenant_of(&[], &[("authorization", value)]).await, Ok("acme".into()), "{value}");
        }
        for value in
            ["", "Bearer", "Bearer ", "Basic svt_known", "svt_known", "Bearer svt_known x", "Bearer no"]
        {
            let refused = tenant_of(&[], &[("authorization", value)]).await;
            assert_eq!(refused, Err(Reason::Unauthenticated), "{value}");
        }
        assert_eq!(tenant_of(&[], &[]).await, Err(Reason::Unauthenticated));
        let twice = [("authorization", "Bearer svt_known"), ("authorization", "Bearer svt_known")];
        assert_eq!(tenant_of(&[], &twice).await, Err(Reason::Unauthenticated));
    }

    #[tokio::test]
    async fn only_an_operator_names_another_tenant() {
        let naming = |tenant| [("authorization", "Bearer svt_known"), (TENANT, tenant)];
        assert_eq!(tenant_of(&[], &naming("acme")).await, Ok("acme".into()));
        assert_eq!(tenant_of(&[Scope::Admin], &naming("other")).await, Err(Reason::PermissionDenied));
        assert_eq!(tenant_of(&[Scope::Operator], &naming("other")).await, Ok("other".into()));
        assert_eq!(tenant_of(&[Scope::Operator], &naming("../x")).await, Err(Reason::InvalidRequest));
    }
}
