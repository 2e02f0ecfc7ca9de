//! What Vault's `aws` method is shown: a signed request to AWS STS that Vault sends on, to learn who signed it.
//!
//! Source: "AWS auth method", IAM, in Vault's documentation, and "Login" in its API documentation.

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4::SigningParams;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use scaivault_domain::Error;
use scaivault_domain::backend::{AwsRegion, Endpoint};
use scaivault_domain::time::Timestamp;

use crate::credentials::aws::Keys;

const METHOD: &str = "POST";
const BODY: &str = "Action=GetCallerIdentity&Version=2011-06-15";
const SERVER_ID: &str = "x-vault-aws-iam-server-id";
/// Where Vault sends the requests that are signed for the default region, unless it is configured otherwise.
const GLOBAL: (&str, &str) = ("us-east-1", "https://sts.amazonaws.com/");

/// A signed request, as the login has it.
pub(super) struct SignedRequest {
    pub(super) method: &'static str,
    /// The rest is base64.
    pub(super) url: String,
    pub(super) body: String,
    /// Of a JSON object.
    pub(super) headers: String,
}

/// Signs at `now` a request that says who has `keys`, and is good for the Vault of this `server_id` alone.
pub(super) fn identify(
    keys: &Keys,
    region: &AwsRegion,
    sts: Option<&Endpoint>,
    server_id: &str,
    now: Timestamp,
) -> Result<SignedRequest, Error> {
    let url = match sts {
        Some(endpoint) => endpoint.url().to_string(),
        None if region.as_str() == GLOBAL.0 => GLOBAL.1.to_owned(),
        None => region.service("sts").url().to_string(),
    };
    let length = BODY.len().to_string();
    let mut headers: BTreeMap<String, String> = BTreeMap::from([
        ("content-type".into(), "application/x-www-form-urlencoded; charset=utf-8".into()),
        ("content-length".into(), length),
        (SERVER_ID.into(), server_id.into()),
    ]);
    // What cannot be signed was refused when the keys and the configuration were parsed.
    let failed = |_| Error::internal();
    let identity = keys.for_sdk().into();
    let parameters = SigningParams::builder()
        .identity(&identity)
        .region(region.as_str())
        .name("sts")
        .time(SystemTime::UNIX_EPOCH + now.since(Timestamp::default()))
        .settings(SigningSettings::default())
        .build()
        .map_err(|_| Error::internal())?
        .into();
    let given = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let request =
        SignableRequest::new(METHOD, &url, given, SignableBody::Bytes(BODY.as_bytes())).map_err(failed)?;
    let (instructions, _) = sign(request, &parameters).map_err(failed)?.into_parts();
    headers.extend(instructions.headers().map(|(name, value)| (name.to_owned(), value.to_owned())));
    let lists: BTreeMap<_, _> = headers.into_iter().map(|(name, value)| (name, [value])).collect();
    let headers = serde_json::to_vec(&lists).map_err(|_| Error::internal())?;
    Ok(SignedRequest {
        method: METHOD,
        url: STANDARD.encode(url),
        body: STANDARD.encode(BODY),
        headers: STANDARD.encode(headers),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::aws::tests::keys;

    fn decoded(text: &str) -> String {
        String::from_utf8(STANDARD.decode(text).unwrap()).unwrap()
    }

    fn identified(region: &str, sts: Option<&str>, server_id: &str) -> (String, serde_json::Value) {
        let region = AwsRegion::parse("aws_region", region).unwrap();
        let sts = sts.map(|sts| Endpoint::parse("sts_endpoint", sts).unwrap());
        let now = Timestamp::from_millis(1_800_000_000_000);
        let signed = identify(&keys(Some("session")), &region, sts.as_ref(), server_id, now).unwrap();
        assert_eq!((signed.method, &*decoded(&signed.body)), (METHOD, BODY));
        (decoded(&signed.url), serde_json::from_str(&decoded(&signed.headers)).unwrap())
    }

    #[test]
    fn the_request_is_good_for_one_vault_alone() {
        let (url, headers) = identified("us-east-1", None, "vault.internal");
        assert_eq!(url, "https://sts.amazonaws.com/");
        assert_eq!(headers[SERVER_ID][0], "vault.internal");
        assert_eq!(headers["x-amz-security-token"][0], "session");
        assert_eq!(headers["x-amz-date"][0], "20270115T080000Z");
        let authorization =
            |headers: &serde_json::Value| headers["authorization"][0].as_str().unwrap().to_owned();
        let signed = authorization(&headers);
        assert!(signed.contains("Credential=AKIAEXAMPLE/20270115/us-east-1/sts/aws4_request"), "{signed}");
        assert!(
            signed.contains(
                "SignedHeaders=content-length;content-type;host;x-amz-date;x-amz-security-token;x-vault-aws-iam-server-id,"
            ),
            "{signed}"
        );
        let (_, elsewhere) = identified("us-east-1", None, "other.internal");
        assert_ne!(signed, authorization(&elsewhere));
    }

    #[test]
    fn it_is_for_the_sts_that_vault_sends_it_to() {
        assert_eq!(identified("eu-central-1", None, "v").0, "https://sts.eu-central-1.amazonaws.com/");
        assert_eq!(
            identified("eu-central-1", Some("https://sts.internal:8443"), "v").0,
            "https://sts.internal:8443/"
        );
    }
}
