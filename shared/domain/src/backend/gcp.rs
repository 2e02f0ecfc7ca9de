//! GCP Secret Manager: where one is, and how to log in.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Endpoint, Tls, invalid};
use crate::error::Error;
use crate::path::SecretPath;

/// The id of a GCP project, e.g. `acme-prod` or `example.com:acme-prod`, or its number.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ProjectId(String);

impl ProjectId {
    /// Parses an id.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.project_id`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let is_id = (1..=63).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.:".contains(&b))
            && text.starts_with(|first: char| first.is_ascii_alphanumeric());
        if is_id {
            Ok(ProjectId(text.to_owned()))
        } else {
            Err(invalid("project_id", "is a project id such as `acme-prod`"))
        }
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a GCP Secret Manager is. All that a node is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcpTarget {
    /// Whose secrets.
    pub project: ProjectId,
    /// The location of regional secrets, e.g. `europe-west3`; `None`: the global ones.
    pub location: Option<String>,
    /// Where it is, if not at Google's own address: a private service connection, an emulator.
    pub endpoint: Option<Endpoint>,
    /// How the connection is secured.
    pub tls: Tls,
}

impl GcpTarget {
    /// Checks the name of a location, which becomes a part of a host.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.location`.
    pub fn check_location(location: &str) -> Result<(), Error> {
        let is_name = (1..=32).contains(&location.len())
            && location.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && location.starts_with(|first: char| first.is_ascii_lowercase());
        if is_name { Ok(()) } else { Err(invalid("location", "is a location such as `europe-west3`")) }
    }

    /// Where it is.
    ///
    /// Source: "Regional secrets" in the documentation of Secret Manager.
    pub fn endpoint(&self) -> Cow<'_, Endpoint> {
        let url = match (&self.endpoint, &self.location) {
            (Some(endpoint), _) => return Cow::Borrowed(endpoint),
            (None, None) => "https://secretmanager.googleapis.com".to_owned(),
            (None, Some(location)) => format!("https://secretmanager.{location}.rep.googleapis.com"),
        };
        Cow::Owned(
            Endpoint::parse("location", &url).expect("a location is made of letters that a host may have"),
        )
    }

    /// The resource that secrets lie in, e.g. `projects/acme-prod`.
    pub fn parent(&self) -> String {
        match &self.location {
            None => format!("projects/{}", self.project),
            Some(location) => format!("projects/{}/locations/{location}", self.project),
        }
    }
}

/// The login of a GCP backend. Stays in the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GcpLogin {
    /// The key of a service account.
    ServiceAccount {
        /// The local secret with the JSON key.
        credentials: SecretPath,
    },
    /// The identity of the control plane: workload identity federation, or the metadata server.
    WorkloadIdentity,
}

impl GcpLogin {
    /// The names of all methods in the API.
    pub const NAMES: &'static [&'static str] = &["service_account", "workload_identity"];

    /// The name in the API.
    pub fn as_str(&self) -> &'static str {
        match self {
            GcpLogin::ServiceAccount { .. } => "service_account",
            GcpLogin::WorkloadIdentity => "workload_identity",
        }
    }

    /// The local secret with the credential.
    pub fn credentials(&self) -> Option<&SecretPath> {
        match self {
            GcpLogin::ServiceAccount { credentials } => Some(credentials),
            GcpLogin::WorkloadIdentity => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_and_a_location_stay_in_their_place() {
        for text in ["acme-prod", "123456789012", "example.com:acme"] {
            assert!(ProjectId::parse(text).is_ok(), "{text}");
        }
        for text in ["", "a/b", "a?b", "..", "Acme", "a b"] {
            assert!(ProjectId::parse(text).is_err(), "{text}");
        }
        for text in ["", "a.b", "europe/west3", "1a"] {
            assert!(GcpTarget::check_location(text).is_err(), "{text}");
        }
        let project = ProjectId::parse("acme").unwrap();
        let target =
            GcpTarget { project, location: Some("europe-west3".into()), endpoint: None, tls: Tls::default() };
        assert_eq!(target.endpoint().to_string(), "https://secretmanager.europe-west3.rep.googleapis.com");
        assert_eq!(target.parent(), "projects/acme/locations/europe-west3");
    }
}
