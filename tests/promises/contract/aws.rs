//! moto, and microburst in front of it for AWS's own way to throttle.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use scaivault_backends::guard::BreakerState;
use scaivault_backends::{BackendError, Lease, Material};
use scaivault_domain::backend::{AwsRegion, AwsTarget, Endpoint, Target, Tls};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State};
use scaivault_tests::servers::microburst::Microburst;
use scaivault_tests::servers::moto::{AccessKey, Client, Moto, Options, REGION};
use secrecy::SecretString;
use serde_json::{Value, json};

use super::capabilities::{
    Capabilities, Closes, Deleted, Empty, HistoryOfNobody, Json, NoSecrets, Pages, Surveys, Told, Unfit,
    Versions, Writes,
};
use super::{Connected, Provider, Store, keeps, suite};

/// What the documentation gives a role that syncs both ways.
const ACTIONS: &[&str] = &[
    "secretsmanager:GetSecretValue",
    "secretsmanager:DescribeSecret",
    "secretsmanager:ListSecretVersionIds",
    "secretsmanager:ListSecrets",
    "secretsmanager:BatchGetSecretValue",
    "secretsmanager:CreateSecret",
    "secretsmanager:PutSecretValue",
    "secretsmanager:UpdateSecretVersionStage",
    "secretsmanager:TagResource",
    "secretsmanager:UntagResource",
    "secretsmanager:DeleteSecret",
];

/// The secrets below one folder, and a user who may use them.
pub(super) struct Secrets {
    socket: SocketAddr,
    admin: Client,
    user: String,
    key: AccessKey,
}

fn policy(without: &str) -> Value {
    let actions: Vec<_> = ACTIONS.iter().filter(|action| **action != without).collect();
    json!({ "Version": "2012-10-17", "Statement": [{ "Effect": "Allow", "Action": actions, "Resource": "*" }] })
}

fn lease(key: &AccessKey) -> Lease {
    Lease {
        id: key.id.clone(),
        material: Material::AwsKeys {
            access_key_id: key.id.clone(),
            secret_access_key: SecretString::from(key.secret.as_str()),
            session_token: None,
        },
        expires_at: None,
        login_generation: 0,
    }
}

impl Provider for Moto {
    type Store = Secrets;

    async fn start() -> Result<Self> {
        Moto::start(Options::default()).await
    }

    async fn store(&self, promise: &str) -> Result<Secrets> {
        let (admin, user) = (self.client()?, promise[..promise.len().min(40)].to_owned());
        let key = admin.create_user(&user, &policy("")).await?;
        Ok(Secrets { socket: self.socket(), admin, user, key })
    }
}

impl Secrets {
    fn id(&self, leaf: &str) -> String {
        self.name(leaf).as_str().to_owned()
    }
}

impl Store for Secrets {
    const CAN: Capabilities = Capabilities {
        title: "AWS Secrets Manager",
        pages: Pages::Tokens { size: 100, empty: r#"{"SecretList":[],"NextToken":"{n}"}"# },
        surveys: Surveys::TellVersions,
        versions: Versions::Two,
        states: &[State::Deleted],
        deleted: Deleted::As(State::Deleted),
        kinds: &[Kind::Json, Kind::Text, Kind::Binary],
        empty: Empty::Refused,
        empty_objects: Empty::Carried,
        no_secrets: NoSecrets::Said,
        json: Json::AsWritten,
        most_bytes: 65_536,
        good_names: &["a+b=c.d@e_f-g", "A/b"],
        bad_names: &["a b", "a:b", "\u{e4}", "a%2Fb"],
        metadata: Told::ByListings,
        unfit: Unfit::Key("a*b"),
        writes: Writes::Conditional,
        closes: Closes::AllSecrets,
        history_of_nobody: HistoryOfNobody::Breaks,
    };

    /// moto answers with a fault of its own to what meets in it.
    const AT_ONCE: usize = 1;

    fn socket(&self) -> SocketAddr {
        self.socket
    }

    fn target(&self, endpoint: Endpoint) -> Target {
        let region = AwsRegion::parse("region", REGION).expect("moto is in a region");
        Target::AwsSecretsManager(AwsTarget { region, endpoint: Some(endpoint), tls: Tls::default() })
    }

    fn lease(&self) -> Lease {
        lease(&self.key)
    }

    fn root(&self) -> Option<RemoteName> {
        Some(RemoteName::with_literal(self.user.as_str(), 1))
    }

    fn longest(&self) -> RemoteName {
        self.name(&"x".repeat(512 - self.user.len() - 1))
    }

    async fn put(&self, leaf: &str, value: &[u8], kind: Kind) -> Result<()> {
        let (field, value) = match kind {
            Kind::Binary => ("SecretBinary", STANDARD.encode(value)),
            Kind::Json | Kind::Text => ("SecretString", str::from_utf8(value)?.to_owned()),
        };
        let id = self.id(leaf);
        match self.admin.call("CreateSecret", json!({ "Name": id, field: value })).await {
            Ok(_) => Ok(()),
            Err(_) => {
                self.admin.call("PutSecretValue", json!({ "SecretId": id, field: value })).await.map(drop)
            }
        }
    }

    async fn change(&self, leaf: &str, to: State) -> Result<()> {
        match to {
            State::Deleted => self.admin.delete_secret(&self.id(leaf)).await,
            _ => bail!("AWS has no such state"),
        }
    }

    async fn restore(&self, leaf: &str) -> Result<()> {
        self.admin.restore_secret(&self.id(leaf)).await
    }

    async fn describe(&self, leaf: &str, metadata: &Metadata) -> Result<()> {
        let tags: Vec<_> = metadata.iter().map(|(key, value)| (&**key, &**value)).collect();
        self.admin.tag_secret(&self.id(leaf), &tags).await
    }

    async fn forbid(&self, _: &str) -> Result<()> {
        self.admin.set_user_policy(&self.user, &policy("secretsmanager:GetSecretValue")).await
    }

    async fn forbid_listing(&self) -> Result<()> {
        self.admin.set_user_policy(&self.user, &policy("secretsmanager:ListSecrets")).await
    }

    async fn revoke(&self) -> Result<()> {
        self.admin.delete_access_key(&self.user, &self.key.id).await
    }
}

#[tokio::test]
async fn aws_keeps_the_contract() -> Result<()> {
    keeps::<Moto>(suite()).await
}

/// In AWS's own words: status 400 and a `ThrottlingException`.
#[tokio::test]
async fn aws_throttles_with_a_status_of_its_own_and_is_asked_later() -> Result<()> {
    let moto = <Moto as Provider>::start().await?;
    let store = moto.store("throttled").await?;
    let microburst = Microburst::start(moto.socket(), moto.administrator()).await?;
    let id = store.id("a");
    store.admin.create_secret(&id, "text", &[]).await?;
    let at = Connected::to(Secrets { socket: microburst.socket(), ..store }).await?;
    microburst.throttle("GetSecretValue").await?;
    assert_eq!(at.read("a").await.err(), Some(BackendError::Throttled { retry_after: None }));
    microburst.heal().await?;
    microburst.throttle_times("GetSecretValue", 2).await?;
    let guarded = at.guarded()?;
    let read = guarded.background(Duration::from_secs(5)).read(&at.name("a")).await?;
    assert_eq!(read.value.expose(), b"text");
    assert_eq!(guarded.guard().state(), BreakerState::Closed);
    Ok(())
}
