//! AWS Secrets Manager: where one is, and how to log in.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Endpoint, Tls, invalid};
use crate::error::Error;
use crate::path::SecretPath;

/// An AWS region, e.g. `eu-central-1`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AwsRegion(String);

impl AwsRegion {
    /// Parses a region. It becomes a part of host names, so nothing but its letters is taken.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.<field>`.
    pub fn parse(field: &str, text: &str) -> Result<Self, Error> {
        let parts: Vec<&str> = text.split('-').collect();
        let is = |part: &str, byte: fn(u8) -> bool| !part.is_empty() && part.bytes().all(byte);
        let is_region = match parts[..] {
            // Else `s3-us-west-2` were one, below which everybody can have a host.
            [first, ref between @ .., last] => {
                (1..=3).contains(&between.len())
                    && is(first, |b| b.is_ascii_lowercase())
                    && between.iter().all(|part| is(part, |b| b.is_ascii_lowercase() || b.is_ascii_digit()))
                    && is(last, |b| b.is_ascii_digit())
            }
            _ => false,
        };
        if is_region && text.len() <= 32 {
            return Ok(AwsRegion(text.to_owned()));
        }
        Err(invalid(field, "is a region such as `eu-central-1`"))
    }

    /// The region's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The domain of the region's services, by its partition.
    ///
    /// Source: the endpoints in the AWS General Reference.
    pub fn domain(&self) -> &'static str {
        match self.0.split('-').collect::<Vec<_>>()[..] {
            ["cn", ..] => "amazonaws.com.cn",
            ["us", "iso", ..] => "c2s.ic.gov",
            ["us", "isob", ..] => "sc2s.sgov.gov",
            ["us", "isof", ..] => "csp.hci.ic.gov",
            ["eu", "isoe", ..] => "cloud.adc-e.uk",
            ["eusc", ..] => "amazonaws.eu",
            _ => "amazonaws.com",
        }
    }

    /// The partition of the region, as it stands in ARNs.
    ///
    /// Source: "Partitions" in the AWS whitepaper on fault isolation boundaries, and the SDK's `partitions.json`.
    pub fn partition(&self) -> &'static str {
        match self.0.split('-').collect::<Vec<_>>()[..] {
            ["cn", ..] => "aws-cn",
            ["us", "gov", ..] => "aws-us-gov",
            ["us", "iso", ..] => "aws-iso",
            ["us", "isob", ..] => "aws-iso-b",
            ["us", "isof", ..] => "aws-iso-f",
            ["eu", "isoe", ..] => "aws-iso-e",
            ["eusc", ..] => "aws-eusc",
            _ => "aws",
        }
    }

    /// A service of the region, e.g. `sts`.
    pub fn service(&self, service: &str) -> Endpoint {
        let url = format!("https://{service}.{}.{}", self.0, self.domain());
        Endpoint::parse("region", &url).expect("a region is made of letters that a host may have")
    }
}

impl TryFrom<String> for AwsRegion {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        Self::parse("region", &text)
    }
}

impl From<AwsRegion> for String {
    fn from(region: AwsRegion) -> String {
        region.0
    }
}

impl fmt::Display for AwsRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an AWS Secrets Manager is. All that a node is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwsTarget {
    /// The region, which requests are signed for.
    pub region: AwsRegion,
    /// Where it is, if not at the region's own address: a private link, another partition, an emulator.
    pub endpoint: Option<Endpoint>,
    /// How the connection is secured.
    pub tls: Tls,
}

impl AwsTarget {
    /// Where it is.
    pub fn endpoint(&self) -> Cow<'_, Endpoint> {
        match &self.endpoint {
            Some(endpoint) => Cow::Borrowed(endpoint),
            None => Cow::Owned(self.region.service("secretsmanager")),
        }
    }
}

/// The login of an AWS backend. Stays in the control plane.
///
/// Without credentials the identity of the control plane itself is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwsLogin {
    /// The local secret `{access_key_id, secret_access_key, session_token?}`.
    pub credentials: Option<SecretPath>,
    /// The role to assume.
    pub role: Option<AwsRole>,
    /// Where STS is, if not at the region's own address.
    pub sts_endpoint: Option<Endpoint>,
    /// Whether nodes may hold the configured keys themselves where no session can be made of them.
    pub allow_static_on_nodes: bool,
}

impl AwsLogin {
    /// Where STS is.
    pub fn sts_endpoint(&self, region: &AwsRegion) -> Cow<'_, Endpoint> {
        match &self.sts_endpoint {
            Some(endpoint) => Cow::Borrowed(endpoint),
            None => Cow::Owned(region.service("sts")),
        }
    }

    /// How the connection to STS is secured: `ca_cert` is for every server, but `tls_verify: false` is for hosts that the
    /// configuration names.
    pub fn sts_tls(&self, target: &AwsTarget) -> Tls {
        Tls { verify: target.tls.verify || self.sts_endpoint.is_none(), ..target.tls.clone() }
    }
}

/// A role that is assumed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwsRole {
    /// Which one.
    pub arn: RoleArn,
    /// What the role's trust policy may ask for, so that nobody else's ScaiVault can assume it.
    pub external_id: Option<String>,
    /// How long a session lasts.
    pub session: Duration,
}

impl AwsRole {
    /// How long a session lasts unless configured.
    pub const SESSION: Duration = Duration::from_secs(3600);

    /// Checks the parts of a role.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.external_id` or `config.session_duration`. The limits are those of AssumeRole
    /// in the AWS STS API Reference.
    pub fn new(arn: RoleArn, external_id: Option<String>, session: Duration) -> Result<Self, Error> {
        let is_external_id = |text: &String| {
            (2..=1224).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@:/-".contains(&b))
        };
        if external_id.as_ref().is_some_and(|id| !is_external_id(id)) {
            return Err(invalid("external_id", "has 2 to 1224 characters of A-Z a-z 0-9 _ + = , . @ : / -"));
        }
        if !(Duration::from_secs(900)..=Duration::from_secs(43_200)).contains(&session) {
            return Err(invalid("session_duration", "is between 15m and 12h"));
        }
        Ok(AwsRole { arn, external_id, session })
    }
}

/// The ARN of an IAM role, e.g. `arn:aws:iam::123456789012:role/reader`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RoleArn(String);

impl RoleArn {
    /// Parses an ARN.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.role_arn`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let is_name = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@-/".contains(&b))
        };
        let is_role = match text.split(':').collect::<Vec<_>>()[..] {
            ["arn", partition, "iam", "", account, role] => {
                partition.starts_with("aws")
                    && account.len() == 12
                    && account.bytes().all(|b| b.is_ascii_digit())
                    && role.strip_prefix("role/").is_some_and(is_name)
            }
            _ => false,
        };
        if is_role && text.len() <= 2048 {
            return Ok(RoleArn(text.to_owned()));
        }
        Err(invalid("role_arn", "is the ARN of a role, such as `arn:aws:iam::123456789012:role/reader`"))
    }

    /// The ARN.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_can_be_nothing_but_a_part_of_a_host() {
        for text in ["eu-central-1", "us-gov-west-1", "us-iso-east-1", "eusc-de-east-1"] {
            assert!(AwsRegion::parse("region", text).is_ok(), "{text}");
        }
        for text in
            ["", "eu", "eu-central-1.evil.example", "eu/central/1", "EU-central-1", "a--1", "eu-central-1#"]
                .into_iter()
                .chain(["s3-us-west-2", "s3-website-us-west-2", "eu-central-1a", "eu-central-x", "eu-1"])
        {
            let error = AwsRegion::parse("region", text).expect_err(text);
            assert_eq!(error.violations[0].pointer, "/config/region");
        }
        let host = |region: &str| AwsRegion::parse("region", region).unwrap().service("sts").to_string();
        assert_eq!(host("eu-central-1"), "https://sts.eu-central-1.amazonaws.com");
        assert_eq!(host("cn-north-1"), "https://sts.cn-north-1.amazonaws.com.cn");
    }

    #[test]
    fn a_role_is_named_by_its_arn() {
        for text in ["arn:aws:iam::123456789012:role/a/b", "arn:aws-cn:iam::123456789012:role/reader"] {
            assert!(RoleArn::parse(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "reader",
            "arn:aws:iam::123456789012:user/a",
            "arn:aws:iam::12345:role/a",
            "arn:aws:s3:::bucket",
            "arn:aws:iam::123456789012:role/",
            "arn:aws:iam::123456789012:role/a b",
        ] {
            assert!(RoleArn::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_role_keeps_the_limits_of_sts() {
        let arn = || RoleArn::parse("arn:aws:iam::123456789012:role/a").unwrap();
        let pointer = |id: Option<&str>, seconds| {
            let role = AwsRole::new(arn(), id.map(str::to_owned), Duration::from_secs(seconds));
            role.err().map(|error| error.violations[0].pointer.clone())
        };
        assert_eq!(pointer(Some("tenant:7"), 900), None);
        assert_eq!(pointer(Some("x"), 900).as_deref(), Some("/config/external_id"));
        assert_eq!(pointer(Some("a b"), 900).as_deref(), Some("/config/external_id"));
        assert_eq!(pointer(None, 899).as_deref(), Some("/config/session_duration"));
        assert_eq!(pointer(None, 43_201).as_deref(), Some("/config/session_duration"));
    }
}
