//! AWS Secrets Manager: stored keys, a role that they assume, and a role that our own identity assumes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use scaivault_tests::fakes::aws_sessions::{AwsSessions, Call};
use scaivault_tests::planes::{Options, Planes};
use scaivault_tests::servers::moto::{self, AccessKey, Client, Moto, REGION};
use scaivault_tests::wait;
use serde_json::{Value, json};

use super::{Method, SECRET, SHORT, VALUE, Wrong, grant, keeps_every_promise, path};

/// The user whose keys are stored, or are the control plane's own.
const USER: &str = "reader";
const SESSION: Duration = Duration::from_secs(900);

/// A moto with one secret, one user, and sessions that end.
pub(super) struct Aws {
    pub(super) sessions: AwsSessions,
    admin: Client,
    key: AccessKey,
    roles: usize,
    _moto: Moto,
}

fn allow(actions: &[&str]) -> Value {
    json!({ "Version": "2012-10-17", "Statement": [{ "Effect": "Allow", "Action": actions, "Resource": "*" }] })
}

fn trust(principal: &str, external_id: Option<&str>) -> Value {
    let mut statement =
        json!({ "Effect": "Allow", "Principal": { "AWS": principal }, "Action": "sts:AssumeRole" });
    if let Some(id) = external_id {
        statement["Condition"] = json!({ "StringEquals": { "sts:ExternalId": id } });
    }
    json!({ "Version": "2012-10-17", "Statement": [statement] })
}

const READ: &[&str] = &["secretsmanager:GetSecretValue", "secretsmanager:ListSecrets"];

impl Aws {
    pub(super) async fn start() -> Result<Aws> {
        let moto = Moto::start(moto::Options::default()).await?;
        let admin = moto.client()?;
        admin.create_secret(SECRET, VALUE, &[]).await?;
        let key = admin
            .create_user(USER, &allow(&[READ, &["sts:AssumeRole", "sts:GetSessionToken"]].concat()))
            .await?;
        let role = admin
            .create_role("session", &trust("*", None), &allow(&[READ, &["sts:AssumeRole"]].concat()))
            .await?;
        let sessions = AwsSessions::in_front_of(&moto, role).await?;
        Ok(Aws { sessions, admin, key, roles: 0, _moto: moto })
    }

    pub(super) fn backend(&self, settings: &Value) -> Value {
        let mut config =
            json!({ "region": REGION, "endpoint": self.sessions.url(), "sts_endpoint": self.sessions.url() });
        scaivault_tests::planes::merge(&mut config, settings);
        json!({ "type": "aws-secrets-manager", "config": config })
    }

    /// A new key of the user, the only one that it has from now on.
    pub(super) async fn new_key(&mut self) -> Result<AccessKey> {
        self.delete_key().await;
        self.key = self.admin.create_access_key(USER).await?;
        Ok(self.key.clone())
    }

    pub(super) async fn delete_key(&self) {
        // It may be gone already.
        drop(self.admin.delete_access_key(USER, &self.key.id).await);
    }

    fn calls(&self, actions: &[&str]) -> Vec<Call> {
        let mut calls = self.sessions.calls();
        calls.retain(|call| actions.contains(&call.action.as_str()));
        calls
    }

    /// From now on the control plane's own identity is a role that the user assumes.
    pub(super) async fn be_the_user(&mut self) -> Result<()> {
        let key = self.new_key().await?;
        self.sessions.set_container(key);
        Ok(())
    }

    /// From now on the control plane's own identity is one that AWS does not know, and what it was is over.
    pub(super) fn be_nobody(&self) {
        self.sessions.set_container(AccessKey {
            id: "ASIANOBODY0000000000".into(),
            secret: "nothing".into(),
            session_token: Some("nothing".into()),
        });
        self.sessions.end_sessions();
    }
}

pub(super) fn stored(key: &AccessKey) -> Value {
    json!({ "access_key_id": key.id, "secret_access_key": key.secret })
}

/// What every pair of keys has to have.
pub(super) fn malformed() -> Vec<(Value, &'static str)> {
    vec![
        (json!({ "access_key_id": "AKIA" }), "`secret_access_key`"),
        (json!({ "secret_access_key": "s" }), "`access_key_id`"),
        (json!({ "access_key_id": "A B", "secret_access_key": "s" }), "`access_key_id`"),
        (json!({ "access_key_id": "AKIA", "secret_access_key": "" }), "`secret_access_key`"),
        (
            json!({ "access_key_id": "AKIA", "secret_access_key": "s", "session_token": "" }),
            "`session_token`",
        ),
    ]
}

pub(super) fn wrong() -> Wrong {
    Wrong::Stored(json!({ "access_key_id": "AKIANOBODY0000000000", "secret_access_key": "nothing" }))
}

struct Keys(Aws);

impl Method for Keys {
    const NAME: &'static str = "aws keys";

    fn backend(&mut self) -> Value {
        self.0.backend(&json!({}))
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        Ok(Some(stored(&self.0.new_key().await?)))
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.0.calls(&["GetCallerIdentity", "GetSessionToken"]).len()))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.0.sessions.end_sessions();
        Ok(self.ending())
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.0.delete_key().await;
        self.0.sessions.end_sessions();
        Ok(())
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        malformed()
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(wrong())
    }

    fn ending(&self) -> usize {
        // The control plane signs with the keys themselves.
        1
    }

    async fn shorten(&mut self) -> Result<()> {
        self.0.sessions.set_length(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn stored_keys_of_aws_keep_every_promise() -> Result<()> {
    let (aws, planes) = tokio::try_join!(Aws::start(), Planes::start(Options::default()))?;
    keeps_every_promise(planes, Keys(aws)).await
}

struct Role {
    aws: Aws,
    arn: String,
}

impl Method for Role {
    const NAME: &'static str = "aws role with keys";

    fn backend(&mut self) -> Value {
        let settings = json!({ "role_arn": self.arn, "external_id": "acme:7", "session_duration": "15m" });
        self.aws.backend(&settings)
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        Ok(Some(stored(&self.aws.new_key().await?)))
    }

    fn logins(&self) -> Result<Option<usize>> {
        let calls = self.aws.calls(&["AssumeRole"]);
        for call in &calls {
            let seconds = SESSION.as_secs().to_string();
            for (name, value) in [("ExternalId", "acme:7"), ("DurationSeconds", seconds.as_str())] {
                let given = call.parameters.get(name).map(String::as_str);
                ensure!(given == Some(value), "{name} is {given:?}");
            }
        }
        Ok(Some(calls.len()))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.aws.sessions.end_sessions();
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.aws.delete_key().await;
        self.aws.sessions.end_sessions();
        Ok(())
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        malformed()
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(wrong())
    }

    async fn shorten(&mut self) -> Result<()> {
        self.aws.sessions.set_length(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn a_role_of_aws_assumed_with_stored_keys_keeps_every_promise() -> Result<()> {
    let (aws, planes) = tokio::try_join!(Aws::start(), Planes::start(Options::default()))?;
    let user = format!("arn:aws:iam::{}:user/{USER}", moto::ACCOUNT);
    let arn = aws.admin.create_role("app", &trust(&user, Some("acme:7")), &allow(READ)).await?;
    keeps_every_promise(planes, Role { aws, arn }).await
}

/// A control plane whose environment says where the keys of its container are.
pub(super) async fn planes_in_a_container(aws: &mut Aws) -> Result<Planes> {
    aws.be_the_user().await?;
    let options = Options::default()
        .control_plane_flag("--own-identity-hosts", "127.0.0.1")
        .control_plane_variable("AWS_CONTAINER_CREDENTIALS_FULL_URI", &aws.sessions.container_url());
    let planes = Planes::start(options).await?;
    grant(&planes.control_plane_rest()?, &["aws"]).await?;
    Ok(planes)
}

struct OwnRole {
    aws: Aws,
    external_ids: Vec<String>,
}

impl Method for OwnRole {
    const NAME: &'static str = "aws own role";

    fn backend(&mut self) -> Value {
        self.aws.roles += 1;
        let arn = format!("arn:aws:iam::{}:role/app-{}", moto::ACCOUNT, self.aws.roles);
        self.aws.backend(&json!({ "role_arn": arn }))
    }

    async fn configured(&mut self, backend: &Value) -> Result<()> {
        // The role is made for the external id that the configuration shows.
        let config = &backend["config"];
        let id = config["external_id"].as_str().context("no external id")?;
        let name = config["role_arn"].as_str().and_then(|arn| arn.rsplit('/').next()).context("no role")?;
        ensure!(id.starts_with("scaivault-") && !self.external_ids.iter().any(|known| known == id), "{id}");
        if name != "closed" {
            self.aws.admin.create_role(name, &trust("*", Some(id)), &allow(READ)).await?;
        }
        self.external_ids.push(id.to_owned());
        Ok(())
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        self.aws.be_the_user().await?;
        Ok(None)
    }

    fn logins(&self) -> Result<Option<usize>> {
        let calls = self.aws.calls(&["AssumeRole"]);
        for call in &calls {
            let id = call.parameters.get("ExternalId").context("no external id")?;
            // The first of a backend may come before the test has seen its configuration.
            ensure!(id.starts_with("scaivault-"), "{id}");
        }
        Ok(Some(calls.len()))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.aws.sessions.end_sessions();
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.aws.be_nobody();
        Ok(())
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        let nobody = trust("arn:aws:iam::123456789012:user/nobody", None);
        let closed = self.aws.admin.create_role("closed", &nobody, &allow(READ)).await?;
        Ok(Wrong::Configured(json!({ "role_arn": closed })))
    }

    async fn shorten(&mut self) -> Result<()> {
        self.aws.sessions.set_length(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn a_role_of_aws_assumed_with_our_own_keys_keeps_every_promise() -> Result<()> {
    let mut aws = Aws::start().await?;
    let planes = planes_in_a_container(&mut aws).await?;
    keeps_every_promise(planes, OwnRole { aws, external_ids: Vec::new() }).await
}

#[tokio::test]
async fn the_keys_in_our_environment_are_an_identity_too() -> Result<()> {
    let aws = Aws::start().await?;
    let options = Options::default()
        .control_plane_flag("--own-identity-hosts", "127.0.0.1")
        .control_plane_variable("AWS_ACCESS_KEY_ID", &aws.key.id)
        .control_plane_variable("AWS_SECRET_ACCESS_KEY", &aws.key.secret);
    let planes = Planes::start(options).await?;
    let (node, control_plane) = (planes.rest(0)?, planes.control_plane_rest()?);
    grant(&node, &["aws"]).await?;
    let user = format!("arn:aws:iam::{}:user/{USER}", moto::ACCOUNT);
    let arn = aws.admin.create_role("app", &trust(&user, None), &allow(READ)).await?;
    let mut backend = aws.backend(&json!({ "role_arn": arn }));
    let more = json!({ "name": "own", "mode": "proxy", "path_mapping": { "own/*": "*" } });
    scaivault_tests::planes::merge(&mut backend, &more);
    node.configure(backend).await?;
    for plane in [&node, &control_plane] {
        let read = async || Ok((plane.get(&path("own")).await?.status == 200).then_some(()));
        wait::until("the backend is read", read).await?;
    }
    // Our keys reach no node, and no session of them either: each plane has one of the role.
    ensure!(aws.calls(&["GetSessionToken"]).is_empty(), "{:?}", aws.calls(&["GetSessionToken"]));
    ensure!(aws.calls(&["AssumeRole"]).len() == 2, "{:?}", aws.calls(&["AssumeRole"]));
    Ok(())
}
