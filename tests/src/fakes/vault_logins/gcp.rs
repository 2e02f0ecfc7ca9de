//! The method `gcp`: a token that a service account or Google itself has signed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Granted, Proven, Refused};
use crate::fakes::clock::seconds;
use crate::fakes::gcp::{Cloud, PROJECT};
use crate::fakes::keys::audiences;

/// The most that the token of a service account may still be valid for: the default of `max_jwt_exp`.
const LONGEST: Duration = Duration::from_secs(15 * 60);
/// How far a client's clock may be off.
const TOLERANCE_SECONDS: i64 = 60;

#[derive(Clone, Debug)]
pub(super) struct GcpMount {
    pub(super) cloud: Arc<Cloud>,
    pub(super) roles: BTreeMap<String, GcpRole>,
}

/// Who may log in for a role.
#[derive(Clone, Debug)]
pub struct GcpRole {
    /// How they prove it.
    pub kind: GcpRoleType,
    /// E-mail addresses of service accounts; `*` is every one.
    pub bound_service_accounts: Vec<String>,
    /// What that gives.
    pub granted: Granted,
}

/// How a client proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GcpRoleType {
    /// With a token signed by the service account's own key, for the audience `vault/{role}`, valid for 15 minutes at
    /// most.
    Iam,
    /// With an identity token of a machine's metadata server in the format `full`, for the audience
    /// `http://vault/{role}`.
    Gce,
}

impl GcpMount {
    pub(super) fn prove(&self, role: &str, login: &Value) -> Result<Proven, Refused> {
        let bound = self.roles.get(role).ok_or_else(|| format!("role '{role}' not found"))?;
        let token = login["jwt"].as_str().ok_or("jwt argument is required")?;
        let (email, claims) = match bound.kind {
            GcpRoleType::Iam => {
                let (email, claims) = self.cloud.account_token(token).ok_or("unable to verify the JWT")?;
                if claims["sub"] != email {
                    return Err("the JWT claim 'sub' is not the account whose key signed it".to_owned());
                }
                (email, claims)
            }
            GcpRoleType::Gce => {
                let claims = self.cloud.identity_token(token).ok_or("unable to verify the JWT")?;
                if claims["google"]["compute_engine"]["project_id"] != PROJECT {
                    return Err("expected JWT to have claims about a GCE instance".to_owned());
                }
                (claims["email"].as_str().unwrap_or_default().to_owned(), claims)
            }
        };
        // The plugin compares the end, so that `http://vault/…` passes as well; a token without any does not.
        let wanted = format!("vault/{role}");
        let named = audiences(&claims);
        if named.is_empty() || !named.iter().all(|audience| audience.ends_with(&wanted)) {
            return Err(format!("at least one of the JWT claim 'aud' must end in {wanted:?}"));
        }
        let expires = claims["exp"].as_i64().unwrap_or_default();
        let left = expires - self.cloud.seconds();
        if left <= 0 {
            return Err("JWT is expired or does not have proper 'exp' claim".to_owned());
        }
        if bound.kind == GcpRoleType::Iam && left > seconds(LONGEST) + TOLERANCE_SECONDS {
            return Err(format!("role requires that service account JWTs expire within {LONGEST:?}"));
        }
        if !bound.bound_service_accounts.iter().any(|account| account == "*" || *account == email) {
            return Err(format!("service account {email} is not authorized for role"));
        }
        let metadata = json!({ "project_id": PROJECT, "role": role, "service_account_email": email });
        Ok(Proven { principal: email, granted: bound.granted.clone(), metadata })
    }
}
