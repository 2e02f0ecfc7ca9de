//! Logging in to AWS: sessions of AWS STS.
//!
//! What was found about the SDK: with `aws-config` it would read the environment and profiles of this process for every
//! tenant, so its configuration is made by hand; it retries and paces by itself, so that is off.

use std::time::Duration;

use aws_sdk_sts::config::{
    BehaviorVersion, Credentials, Region, SharedCredentialsProvider, StalledStreamProtectionConfig,
};
use aws_sdk_sts::types::Credentials as Session;
use aws_smithy_async::rt::sleep::TokioSleep;
use aws_smithy_async::time::SystemTimeSource;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use aws_smithy_types::retry::RetryConfig;
use aws_smithy_types::timeout::TimeoutConfig;
use scaivault_backends::{BackendError, aws_failure, aws_http_client};
use scaivault_domain::backend::{AwsLogin, AwsRole, AwsTarget, Provider};
use scaivault_domain::lease::Material;
use scaivault_domain::secret::SecretValue;
use scaivault_domain::time::Timestamp;
use scaivault_domain::{Error, Reason};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::{Asking, Holder, Issued, Renewal, Revocation};

/// How long a session of nodes lasts that is made of an IAM user's keys.
const NODES_SESSION: Duration = Duration::from_secs(3600);
/// The longest session of a role that was assumed with another role's session.
///
/// Source: "Roles terms and concepts", role chaining, in the AWS IAM User Guide.
const LONGEST_CHAINED: Duration = Duration::from_secs(3600);

/// Keys that sign requests.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: SecretString,
    /// Of a session; `None` with an IAM user's own keys.
    pub(crate) session_token: Option<SecretString>,
}

impl Keys {
    /// Reads the stored secret.
    pub(crate) fn parse(provider: &Provider, value: &SecretValue) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Fields {
            access_key_id: Option<String>,
            secret_access_key: Option<SecretString>,
            session_token: Option<SecretString>,
        }

        let unusable = |message: String| super::unusable(provider, message);
        let fields: Fields = serde_json::from_slice(value.expose())
            .map_err(|_| unusable("the credential is no JSON object of strings".into()))?;
        let missing = |name: &str| {
            unusable(format!("the credential has no `{name}`")).next(
                "store it as `{access_key_id, secret_access_key}`, with `session_token` if it is temporary",
            )
        };
        let graphic = |name: &str, text: &str| match is_graphic(text) {
            true => Ok(()),
            false => Err(unusable(format!(
                "`{name}` of the credential is empty or has characters that no key has"
            ))),
        };
        let access_key_id = fields.access_key_id.ok_or_else(|| missing("access_key_id"))?;
        let secret_access_key = fields.secret_access_key.ok_or_else(|| missing("secret_access_key"))?;
        graphic("access_key_id", &access_key_id)?;
        graphic("secret_access_key", secret_access_key.expose_secret())?;
        if let Some(token) = &fields.session_token {
            graphic("session_token", token.expose_secret())?;
        }
        Ok(Keys { access_key_id, secret_access_key, session_token: fields.session_token })
    }

    /// As the SDK takes them.
    pub(crate) fn for_sdk(&self) -> Credentials {
        Credentials::new(
            self.access_key_id.clone(),
            self.secret_access_key.expose_secret(),
            self.session_token.as_ref().map(|token| token.expose_secret().to_owned()),
            None,
            "scaivault",
        )
    }

    fn is_temporary(&self) -> bool {
        self.session_token.is_some()
    }
}

fn is_graphic(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Logs in with stored `keys`, or with our own.
pub(crate) async fn log_in(
    target: &AwsTarget,
    login: &AwsLogin,
    keys: Option<Keys>,
    asking: &Asking<'_>,
) -> Result<Issued, Error> {
    let (keys, whose) = match keys {
        Some(keys) => (keys, Whose::Stored),
        None => (asking.own.aws.keys().await?, Whose::Ours),
    };
    let sts = Sts::new(target, login, &keys, whose, asking)?;
    if let Some(role) = &login.role {
        return sts.assume(role, &session_name(asking), &keys).await;
    }
    if matches!(whose, Whose::Ours) {
        // The configuration says so first. They are for STS alone: no store and no node sees what is ours.
        let detail = "is required where ScaiVault's own identity is used";
        return Err(Error::field(Reason::BackendLoginFailed, "/config/role_arn", detail));
    }
    match asking.holder {
        Holder::Nodes if !keys.is_temporary() => match sts.session().await {
            Err(Refused::Forbidden) if login.allow_static_on_nodes => sts.as_they_are(keys).await,
            Err(Refused::Forbidden) => Err(Error::new(
                Reason::NoLease,
                "the keys may not call `sts:GetSessionToken`, so nodes would have to hold the keys themselves",
            )
            .next("allow that call, set `role_arn` to a role that the keys may assume, or set `allow_static_on_nodes`")),
            Err(Refused::Otherwise(error)) => Err(error),
            Ok(issued) => Ok(issued),
        },
        // No session can be made of a session: what there is ends by itself.
        Holder::Nodes | Holder::ControlPlane => sts.as_they_are(keys).await,
    }
}

/// Names the session in the logs of AWS. Of the characters that STS allows.
fn session_name(asking: &Asking<'_>) -> String {
    format!("scaivault-{}", asking.key.backend)
}

/// Whose keys are shown.
#[derive(Clone, Copy)]
enum Whose {
    /// The tenant's.
    Stored,
    /// ScaiVault's own.
    Ours,
}

/// Why there is no session.
enum Refused {
    /// The keys are good, but have no right to it.
    Forbidden,
    Otherwise(Error),
}

struct Sts {
    client: aws_sdk_sts::Client,
    whose: Whose,
    now: Timestamp,
}

impl Sts {
    fn new(
        target: &AwsTarget,
        login: &AwsLogin,
        keys: &Keys,
        whose: Whose,
        asking: &Asking<'_>,
    ) -> Result<Self, Error> {
        let endpoint = login.sts_endpoint(&target.region);
        let config = aws_sdk_sts::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(target.region.as_str().to_owned()))
            .endpoint_url(endpoint.to_string())
            .http_client(aws_http_client(&endpoint, &login.sts_tls(target), asking.egress)?)
            .credentials_provider(SharedCredentialsProvider::new(keys.for_sdk()))
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .time_source(SystemTimeSource::new())
            .sleep_impl(TokioSleep::new())
            .build();
        Ok(Sts { client: aws_sdk_sts::Client::from_conf(config), whose, now: asking.now })
    }

    /// A session of `role`.
    async fn assume(&self, role: &AwsRole, name: &str, keys: &Keys) -> Result<Issued, Error> {
        let mut outcome = self.try_assume(role, name, role.session).await;
        if keys.is_temporary()
            && role.session > LONGEST_CHAINED
            && let Err(error) = &outcome
            && is_invalid(error)
        {
            outcome = self.try_assume(role, name, LONGEST_CHAINED).await;
        }
        match outcome {
            Ok((session, longest)) => issued(session, longest, self.now),
            Err(error) if is_invalid(&error) => {
                let detail = "STS takes no session of this length, or no such role";
                Err(Error::field(Reason::BackendLoginFailed, "/config/session_duration", detail)
                    .next("ask for no more than the role's maximum session duration, and check `role_arn`"))
            }
            Err(error) => Err(match self.refused(&error) {
                Refused::Otherwise(error) => error,
                Refused::Forbidden => {
                    let next = match self.whose {
                        Whose::Stored => {
                            "let the role's trust policy allow the keys' user, check `external_id`, and allow the user `sts:AssumeRole`"
                        }
                        Whose::Ours => {
                            "let the role's trust policy allow ScaiVault's identity with the `external_id` that the configuration shows"
                        }
                    };
                    let detail = "AWS does not let the role be assumed";
                    Error::field(Reason::BackendLoginFailed, "/config/role_arn", detail).next(next)
                }
            }),
        }
    }

    async fn try_assume(
        &self,
        role: &AwsRole,
        name: &str,
        length: Duration,
    ) -> Result<
        (Option<Session>, Duration),
        SdkError<aws_sdk_sts::operation::assume_role::AssumeRoleError, HttpResponse>,
    > {
        let answer = self
            .client
            .assume_role()
            .role_arn(role.arn.as_str())
            .role_session_name(name)
            .set_external_id(role.external_id.clone())
            .duration_seconds(seconds(length))
            .send()
            .await?;
        Ok((answer.credentials, length))
    }

    /// A session with the rights of the keys, except that it cannot call IAM.
    async fn session(&self) -> Result<Issued, Refused> {
        let answer = self.client.get_session_token().duration_seconds(seconds(NODES_SESSION)).send().await;
        let answer = answer.map_err(|error| self.refused(&error))?;
        issued(answer.credentials, NODES_SESSION, self.now).map_err(Refused::Otherwise)
    }

    /// The keys themselves, if AWS still takes them. To ask who they are needs no permission.
    async fn as_they_are(&self, keys: Keys) -> Result<Issued, Error> {
        if let Err(error) = self.client.get_caller_identity().send().await
            && let Refused::Otherwise(error) = self.refused(&error)
        {
            return Err(error);
        }
        Ok(Issued {
            material: Material::AwsKeys {
                access_key_id: keys.access_key_id,
                secret_access_key: keys.secret_access_key,
                session_token: keys.session_token,
            },
            ttl: None,
            renewal: Renewal::Again,
            revocation: Revocation::Leave,
        })
    }

    fn refused<E: ProvideErrorMetadata>(&self, error: &SdkError<E, HttpResponse>) -> Refused {
        let next = match self.whose {
            Whose::Stored => {
                "store keys that are valid at `credentials_path`: they are read again at the next login"
            }
            Whose::Ours => "ask the operator to renew the AWS identity of the control plane",
        };
        let message = match error.code() {
            Some("ExpiredToken" | "ExpiredTokenException") => "the session of the AWS keys is over",
            Some("RegionDisabledException") => {
                return Refused::Otherwise(
                    Error::new(Reason::BackendLoginFailed, "AWS STS is not active in this region").next(
                        "activate STS for the region in the account's settings, or set `sts_endpoint` to another region's",
                    ),
                );
            }
            _ => match aws_failure(error) {
                BackendError::LoginExpired => {
                    "AWS does not take the keys: they are wrong, deleted or inactive"
                }
                BackendError::Forbidden => return Refused::Forbidden,
                other => return Refused::Otherwise(other.into()),
            },
        };
        Refused::Otherwise(Error::new(Reason::BackendLoginFailed, message).next(next))
    }
}

fn is_invalid<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    error.code() == Some("ValidationError")
}

/// A length as STS takes it.
fn seconds(length: Duration) -> i32 {
    i32::try_from(length.as_secs()).expect("a session lasts at most 12 hours")
}

fn issued(session: Option<Session>, longest: Duration, now: Timestamp) -> Result<Issued, Error> {
    let strange =
        || Error::new(Reason::BackendInvalidAnswer, "STS answered without a session that can be used");
    let session = session.ok_or_else(strange)?;
    if ![&session.access_key_id, &session.secret_access_key, &session.session_token]
        .into_iter()
        .all(|text| is_graphic(text))
    {
        return Err(strange());
    }
    let end = Timestamp::from_millis(session.expiration.to_millis().map_err(|_| strange())?);
    Ok(Issued {
        material: Material::AwsKeys {
            access_key_id: session.access_key_id,
            secret_access_key: session.secret_access_key.into(),
            session_token: Some(session.session_token.into()),
        },
        // It lasts no longer than was asked for, whatever our clock makes of its end.
        ttl: Some(end.since(now).min(longest)),
        renewal: Renewal::Again,
        revocation: Revocation::Leave,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::http::StatusCode;
    use scaivault_backends::egress::{Egress, Policy};
    use scaivault_domain::backend::{AwsRegion, BackendId, Endpoint, RoleArn, Tls};
    use scaivault_domain::lease::LeaseKey;
    use scaivault_domain::tenant::TenantId;
    use tokio::net::TcpListener;

    use super::super::own::{OwnIdentities, Settings};
    use super::*;

    /// An STS that answers each form as `answer` says.
    struct FakeSts {
        endpoint: Endpoint,
        asked: Arc<Mutex<Vec<String>>>,
        allow_static_on_nodes: bool,
    }

    impl FakeSts {
        async fn start(answer: impl Fn(&str) -> (u16, String) + Clone + Send + Sync + 'static) -> Self {
            let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let asked = Arc::new(Mutex::new(Vec::new()));
            let seen = asked.clone();
            let router = Router::new().fallback(move |form: String| {
                let (status, body) = answer(&form);
                seen.lock().unwrap().push(form);
                async move { (StatusCode::from_u16(status).unwrap(), body) }
            });
            tokio::spawn(async move { axum::serve(listener, router).await });
            let endpoint = Endpoint::parse("endpoint", &format!("http://{address}")).unwrap();
            FakeSts { endpoint, asked, allow_static_on_nodes: false }
        }

        async fn log_in(&self, keys: Keys, role: Option<AwsRole>, holder: Holder) -> Result<Issued, Error> {
            let target = AwsTarget {
                region: AwsRegion::parse("region", "eu-central-1").unwrap(),
                endpoint: None,
                tls: Tls::default(),
            };
            let login = AwsLogin {
                credentials: None,
                role,
                sts_endpoint: Some(self.endpoint.clone()),
                allow_static_on_nodes: self.allow_static_on_nodes,
            };
            let key = LeaseKey {
                tenant: TenantId::parse("acme").unwrap(),
                backend: BackendId::from_random([7; 10]),
            };
            let own = OwnIdentities::new(Settings::default()).unwrap();
            let egress = Egress::new(Policy::default().with_loopback());
            let asking = Asking { key: &key, holder, own: &own, egress: &egress, now: Timestamp::default() };
            log_in(&target, &login, Some(keys), &asking).await
        }
    }

    pub(in super::super) fn keys(session_token: Option<&str>) -> Keys {
        Keys {
            access_key_id: "AKIAEXAMPLE".into(),
            secret_access_key: "secret".into(),
            session_token: session_token.map(Into::into),
        }
    }

    fn role(hours: u64) -> AwsRole {
        let arn = RoleArn::parse("arn:aws:iam::123456789012:role/reader").unwrap();
        AwsRole::new(arn, Some("tenant:7".into()), Duration::from_secs(hours * 3600)).unwrap()
    }

    fn session(action: &str) -> (u16, String) {
        let end = "2999-01-01T00:00:00Z";
        let keys = format!(
            "<Credentials><AccessKeyId>ASIA</AccessKeyId><SecretAccessKey>s</SecretAccessKey>\
             <SessionToken>t</SessionToken><Expiration>{end}</Expiration></Credentials>"
        );
        (200, format!("<{action}Response><{action}Result>{keys}</{action}Result></{action}Response>"))
    }

    fn nobody_in_particular() -> (u16, String) {
        let result = "<GetCallerIdentityResult></GetCallerIdentityResult>";
        (200, format!("<GetCallerIdentityResponse>{result}</GetCallerIdentityResponse>"))
    }

    fn refusal(status: u16, code: &str) -> (u16, String) {
        (
            status,
            format!(
                "<ErrorResponse><Error><Code>{code}</Code><Message>SENT</Message></Error></ErrorResponse>"
            ),
        )
    }

    fn key_id(issued: &Issued) -> &str {
        match &issued.material {
            Material::AwsKeys { access_key_id, .. } => access_key_id,
            _ => "",
        }
    }

    #[tokio::test]
    async fn a_role_is_assumed_for_as_long_as_is_configured() {
        let sts = FakeSts::start(|_| session("AssumeRole")).await;
        let issued = sts.log_in(keys(None), Some(role(2)), Holder::Nodes).await.unwrap();
        assert_eq!((key_id(&issued), issued.ttl), ("ASIA", Some(Duration::from_secs(7200))));
        let form = sts.asked.lock().unwrap().concat();
        for part in ["ExternalId=tenant%3A7", "DurationSeconds=7200", "RoleSessionName=scaivault-fed_"] {
            assert!(form.contains(part), "{form}");
        }
    }

    #[tokio::test]
    async fn a_session_of_a_session_is_content_with_an_hour() {
        let sts = FakeSts::start(|form| match form.contains("DurationSeconds=3600") {
            true => session("AssumeRole"),
            false => refusal(400, "ValidationError"),
        })
        .await;
        let issued = sts.log_in(keys(Some("token")), Some(role(4)), Holder::ControlPlane).await.unwrap();
        assert_eq!(issued.ttl, Some(Duration::from_secs(3600)));
        let error = sts.log_in(keys(None), Some(role(4)), Holder::ControlPlane).await.err().unwrap();
        assert_eq!(error.violations[0].pointer, "/config/session_duration");
    }

    #[tokio::test]
    async fn nodes_get_a_session_of_long_term_keys_and_temporary_keys_as_they_are() {
        let sts = FakeSts::start(|form| match form.contains("GetSessionToken") {
            true => session("GetSessionToken"),
            false => nobody_in_particular(),
        })
        .await;
        for (keys, holder, id, ttl) in [
            (keys(None), Holder::ControlPlane, "AKIAEXAMPLE", None),
            (keys(None), Holder::Nodes, "ASIA", Some(NODES_SESSION)),
            (keys(Some("token")), Holder::Nodes, "AKIAEXAMPLE", None),
        ] {
            let issued = sts.log_in(keys, None, holder).await.unwrap();
            assert_eq!((key_id(&issued), issued.ttl), (id, ttl), "{holder:?}");
        }
    }

    #[tokio::test]
    async fn nodes_hold_long_term_keys_only_where_that_is_allowed() {
        let sts = FakeSts::start(|form| match form.contains("GetSessionToken") {
            true => refusal(403, "AccessDenied"),
            false => nobody_in_particular(),
        })
        .await;
        let error = sts.log_in(keys(None), None, Holder::Nodes).await.err().unwrap();
        assert_eq!(error.reason, Reason::NoLease);
        let sts = FakeSts { allow_static_on_nodes: true, ..sts };
        let issued = sts.log_in(keys(None), None, Holder::Nodes).await.unwrap();
        assert_eq!((key_id(&issued), issued.ttl), ("AKIAEXAMPLE", None));
    }

    #[tokio::test]
    async fn a_refused_login_says_what_to_do_and_nothing_that_was_sent() {
        for (status, code, reason) in [
            (403, "InvalidClientTokenId", Reason::BackendLoginFailed),
            (403, "SignatureDoesNotMatch", Reason::BackendLoginFailed),
            (400, "ExpiredTokenException", Reason::BackendLoginFailed),
            (403, "RegionDisabledException", Reason::BackendLoginFailed),
            (403, "AccessDenied", Reason::BackendLoginFailed),
            (400, "Throttling", Reason::BackendThrottled),
            (500, "InternalFailure", Reason::BackendUnreachable),
        ] {
            let sts = FakeSts::start(move |_| refusal(status, code)).await;
            let error = sts.log_in(keys(None), Some(role(1)), Holder::ControlPlane).await.err().unwrap();
            assert_eq!(error.reason, reason, "{code}");
            assert!(!format!("{error:?}").contains("SENT") && error.next_step.is_some(), "{code}: {error:?}");
            assert_eq!(sts.asked.lock().unwrap().len(), 1, "{code}: the SDK tries nothing again");
        }
    }

    #[test]
    fn a_stored_credential_that_cannot_be_used_names_what_is_missing() {
        let target = AwsTarget {
            region: AwsRegion::parse("region", "eu-central-1").unwrap(),
            endpoint: None,
            tls: Tls::default(),
        };
        let login =
            AwsLogin { credentials: None, role: None, sts_endpoint: None, allow_static_on_nodes: false };
        let provider = Provider::AwsSecretsManager { target, login };
        for (stored, named) in [
            ("[]", "no JSON object"),
            (r#"{"access_key_id":"A"}"#, "`secret_access_key`"),
            (r#"{"secret_access_key":"S"}"#, "`access_key_id`"),
            (r#"{"access_key_id":"A b","secret_access_key":"S"}"#, "`access_key_id`"),
            (r#"{"access_key_id":"A","secret_access_key":"S","session_token":""}"#, "`session_token`"),
        ] {
            let error = Keys::parse(&provider, &SecretValue::new(stored.into())).unwrap_err();
            assert_eq!(
                (error.reason, &*error.violations[0].pointer),
                (Reason::CredentialUnusable, "/config/credentials_path")
            );
            assert!(error.message.contains(named), "{stored}: {error}");
        }
    }
}
