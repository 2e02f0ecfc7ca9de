//! Vault: approle, token, kubernetes, aws and gcp, the last three also with our own identity. OpenBao is real; the methods
//! that it has not are checked in front of it.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use reqwest::Method as Http;
use scaivault_domain::backend::KvVersion;
use scaivault_tests::fakes::gcp::{AccountKey, Gcp};
use scaivault_tests::fakes::kubernetes::Kubernetes;
use scaivault_tests::fakes::vault_logins::{AwsMount, AwsRole, GcpRole, GcpRoleType, Granted, VaultLogins};
use scaivault_tests::planes::{Options, POLICY, Planes};
use scaivault_tests::servers::moto::{ACCOUNT, REGION};
use scaivault_tests::servers::openbao::{self, Admin, OpenBao};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::aws::{self, Aws};
use super::gcp;
use super::{Method, SECRET, SHORT, VALUE, Wrong, grant, keeps_every_promise};

const HOUR: Duration = Duration::from_secs(3600);
/// What every login gives.
const POLICY_NAME: &str = "scaivault";
const SERVER_ID: &str = "vault.test";

/// An OpenBao with a secret and a policy.
struct Vault {
    bao: OpenBao,
    admin: Admin,
}

impl Vault {
    async fn start() -> Result<Vault> {
        let bao = OpenBao::start(openbao::Options::default().audited()).await?;
        let admin = bao.client()?;
        admin.enable_kv("secret", KvVersion::V2).await?;
        admin.put("secret", SECRET, json!({ "password": VALUE })).await?;
        admin.write_policy(POLICY_NAME, POLICY).await?;
        Ok(Vault { bao, admin })
    }

    async fn write(&self, path: &str, body: Value) -> Result<Value> {
        self.admin.call(Http::POST, path, Some(body)).await
    }

    fn asked(&self, what: &[&str]) -> Result<usize> {
        let requests = self.bao.requests()?;
        Ok(requests.iter().filter(|request| what.contains(&request.as_str())).count())
    }

    /// Revokes every token that was made at `path`, e.g. `auth/token/create`.
    async fn revoke_made_at(&self, path: &str) -> Result<()> {
        let listed = self.admin.call(Http::from_bytes(b"LIST")?, "auth/token/accessors", None).await?;
        for accessor in listed["data"]["keys"].as_array().context("keys")? {
            // It may have ended meanwhile.
            let Ok(token) = self.write("auth/token/lookup-accessor", json!({ "accessor": accessor })).await
            else {
                continue;
            };
            if token["data"]["path"] == path {
                self.admin.revoke_accessor(accessor.as_str().context("no text")?).await?;
            }
        }
        Ok(())
    }
}

fn backend(endpoint: &str, auth_method: &str, settings: &Value) -> Value {
    let mut config = json!({ "endpoint": endpoint, "auth_method": auth_method });
    scaivault_tests::planes::merge(&mut config, settings);
    json!({ "type": "hashicorp-vault", "config": config })
}

struct Approle(Vault);

const ROLE: &str = "auth/approle/role/app";

impl Approle {
    async fn stored(&self, secret_id: Value) -> Result<Value> {
        let role = self.0.admin.call(Http::GET, &format!("{ROLE}/role-id"), None).await?;
        Ok(json!({ "role_id": role["data"]["role_id"], "secret_id": secret_id }))
    }
}

impl Method for Approle {
    const NAME: &'static str = "vault approle";

    fn backend(&mut self) -> Value {
        backend(&self.0.bao.addr(), "approle", &json!({}))
    }

    fn template(&self) -> &'static str {
        "secret/data/*"
    }

    fn credential_field(&self) -> &'static str {
        "auth_config_path"
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        let mut made = self.0.write(&format!("{ROLE}/secret-id"), json!({})).await?;
        Ok(Some(self.stored(made["data"]["secret_id"].take()).await?))
    }

    fn logins(&self) -> Result<Option<usize>> {
        self.0.asked(&["update auth/approle/login"]).map(Some)
    }

    fn renewals(&self) -> Result<usize> {
        self.0.asked(&["update auth/approle/login", "update auth/token/renew-self"])
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.0.write("sys/leases/revoke-prefix/auth/approle", json!({})).await?;
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        let list = Http::from_bytes(b"LIST")?;
        if let Ok(listed) = self.0.admin.call(list, &format!("{ROLE}/secret-id"), None).await {
            for accessor in listed["data"]["keys"].as_array().into_iter().flatten() {
                let destroyed = json!({ "secret_id_accessor": accessor });
                self.0.write(&format!("{ROLE}/secret-id-accessor/destroy"), destroyed).await?;
            }
        }
        self.revoke().await.map(drop)
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        vec![
            (json!({ "secret_id": "s" }), "`role_id`"),
            (json!({ "role_id": "r" }), "`secret_id`"),
            (json!({ "role_id": "", "secret_id": "s" }), "`role_id`"),
            (json!({ "role_id": "r", "secret_id": "a b" }), "`secret_id`"),
        ]
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(Wrong::Stored(self.stored(json!("nothing")).await?))
    }

    async fn shorten(&mut self) -> Result<()> {
        // After the longest life a renewal no longer helps.
        let settings = json!({ "token_ttl": "4s", "token_max_ttl": "8s" });
        self.0.write(ROLE, settings).await.map(drop)
    }
}

#[tokio::test]
async fn an_approle_of_vault_keeps_every_promise() -> Result<()> {
    let (vault, planes) = tokio::try_join!(Vault::start(), Planes::start(Options::default()))?;
    vault.admin.enable_auth("approle", "approle").await?;
    let settings = json!({ "token_policies": [POLICY_NAME], "token_ttl": "1h" });
    vault.admin.create_approle("approle", "app", settings).await?;
    keeps_every_promise(planes, Approle(vault)).await
}

struct Token {
    vault: Vault,
    token: Option<String>,
    ttl: &'static str,
}

impl Method for Token {
    const NAME: &'static str = "vault token";

    fn backend(&mut self) -> Value {
        backend(&self.vault.bao.addr(), "token", &json!({ "lease_policies": [POLICY_NAME] }))
    }

    fn template(&self) -> &'static str {
        "secret/data/*"
    }

    fn credential_field(&self) -> &'static str {
        "auth_config_path"
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        let settings = json!({ "policies": ["parent", POLICY_NAME], "ttl": self.ttl });
        let token = self.vault.admin.create_token(settings).await?.token;
        self.token = Some(token.clone());
        Ok(Some(json!({ "token": token })))
    }

    fn logins(&self) -> Result<Option<usize>> {
        // Each holder has the token looked up, but so do probes of the backend.
        Ok(None)
    }

    fn renewals(&self) -> Result<usize> {
        self.vault.asked(&["update auth/token/renew-self"])
    }

    fn ending(&self) -> usize {
        // The children are for an hour: they end before that only if the token does.
        1
    }

    async fn revoke(&mut self) -> Result<usize> {
        // What was made for nodes; the control plane uses the token itself.
        let token = self.token.clone().context("no token yet")?;
        let children = json!({ "token": token });
        let kept = self.vault.write("auth/token/lookup", children).await?;
        let listed = self.vault.admin.call(Http::from_bytes(b"LIST")?, "auth/token/accessors", None).await?;
        for accessor in listed["data"]["keys"].as_array().context("keys")? {
            let known =
                self.vault.write("auth/token/lookup-accessor", json!({ "accessor": accessor })).await?;
            let is_child = known["data"]["policies"] == json!(["default", POLICY_NAME]);
            if is_child && known["data"]["accessor"] != kept["data"]["accessor"] {
                self.vault.admin.revoke_accessor(accessor.as_str().context("no text")?).await?;
            }
        }
        Ok(1)
    }

    async fn withdraw(&mut self) -> Result<()> {
        if let Some(token) = self.token.take() {
            self.vault.admin.revoke_token(&token).await?;
        }
        Ok(())
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        vec![
            (json!({ "tokens": "t" }), "`token`"),
            (json!({ "token": "" }), "`token`"),
            (json!({ "token": "a b" }), "`token`"),
        ]
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(Wrong::Stored(json!({ "token": "s.nothing" })))
    }

    async fn shorten(&mut self) -> Result<()> {
        self.ttl = "4s";
        Ok(())
    }
}

#[tokio::test]
async fn a_token_of_vault_keeps_every_promise() -> Result<()> {
    let (vault, planes) = tokio::try_join!(Vault::start(), Planes::start(Options::default()))?;
    let parent = r#"path "auth/token/create" { capabilities = ["update"] }"#;
    vault.admin.write_policy("parent", parent).await?;
    keeps_every_promise(planes, Token { vault, token: None, ttl: "1h" }).await
}

/// A service account of Kubernetes: whose token is stored, or that of the control plane.
struct ServiceAccount<const OURS: bool> {
    vault: Vault,
    kubernetes: Kubernetes,
    token: String,
    folder: TempDir,
}

impl<const OURS: bool> ServiceAccount<OURS> {
    async fn start() -> Result<(Self, Planes)> {
        let (vault, kubernetes, folder) =
            (Vault::start().await?, Kubernetes::start().await?, tempfile::tempdir()?);
        vault.admin.enable_auth("kubernetes", "kubernetes").await?;
        let config = json!({
            "kubernetes_host": kubernetes.host(), "kubernetes_ca_cert": kubernetes.ca_pem(),
            "token_reviewer_jwt": kubernetes.reviewer_token(), "disable_local_ca_jwt": true,
        });
        vault.write("auth/kubernetes/config", config).await?;
        for (role, account) in [("app", "app"), ("others", "other")] {
            let role = format!("auth/kubernetes/role/{role}");
            let bound = json!({
                "bound_service_account_names": [account], "bound_service_account_namespaces": ["team"],
                "audience": "vault", "token_policies": [POLICY_NAME], "token_ttl": "1h",
            });
            vault.write(&role, bound).await?;
        }
        let options = Options::default()
            .control_plane_flag("--kubernetes-token-file", folder.path().join("token").display())
            .control_plane_flag("--own-identity-hosts", "127.0.0.1");
        let planes = Planes::start(options).await?;
        if OURS {
            grant(&planes.control_plane_rest()?, &["kubernetes"]).await?;
        }
        Ok((ServiceAccount { vault, kubernetes, token: String::new(), folder }, planes))
    }
}

impl<const OURS: bool> Method for ServiceAccount<OURS> {
    const NAME: &'static str = if OURS { "vault own kubernetes" } else { "vault kubernetes" };

    fn backend(&mut self) -> Value {
        backend(&self.vault.bao.addr(), "kubernetes", &json!({ "auth_role": "app" }))
    }

    fn template(&self) -> &'static str {
        "secret/data/*"
    }

    fn credential_field(&self) -> &'static str {
        "auth_config_path"
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        self.token = self.kubernetes.mint("team", "app", HOUR, &["vault"]);
        if OURS {
            fs::write(self.folder.path().join("token"), &self.token)?;
            return Ok(None);
        }
        Ok(Some(json!({ "jwt": self.token })))
    }

    fn logins(&self) -> Result<Option<usize>> {
        self.vault.asked(&["update auth/kubernetes/login"]).map(Some)
    }

    fn renewals(&self) -> Result<usize> {
        self.vault.asked(&["update auth/kubernetes/login", "update auth/token/renew-self"])
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.vault.write("sys/leases/revoke-prefix/auth/kubernetes", json!({})).await?;
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.kubernetes.revoke(&self.token);
        self.revoke().await.map(drop)
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        vec![(json!({ "token": "t" }), "`jwt`"), (json!({ "jwt": "a b" }), "`jwt`")]
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(match OURS {
            true => Wrong::Configured(json!({ "auth_role": "others" })),
            false => Wrong::Stored(json!({ "jwt": self.kubernetes.mint("team", "other", HOUR, &["vault"]) })),
        })
    }

    async fn shorten(&mut self) -> Result<()> {
        let settings = json!({ "token_ttl": "4s", "token_max_ttl": "8s" });
        self.vault.write("auth/kubernetes/role/app", settings).await.map(drop)
    }
}

#[tokio::test]
async fn a_token_of_kubernetes_keeps_every_promise_at_vault() -> Result<()> {
    let (method, planes) = ServiceAccount::<false>::start().await?;
    keeps_every_promise(planes, method).await
}

#[tokio::test]
async fn our_own_service_account_of_kubernetes_keeps_every_promise_at_vault() -> Result<()> {
    let (method, planes) = ServiceAccount::<true>::start().await?;
    keeps_every_promise(planes, method).await
}

/// What a method in front of OpenBao has.
struct Front {
    logins: VaultLogins,
    vault: Vault,
    ttl: Duration,
}

impl Front {
    async fn start() -> Result<Front> {
        let vault = Vault::start().await?;
        Ok(Front { logins: VaultLogins::in_front_of(&vault.bao).await?, vault, ttl: HOUR })
    }

    fn granted(&self) -> Granted {
        Granted { policies: vec![POLICY_NAME.to_owned()], ttl: self.ttl }
    }

    fn logins(&self) -> usize {
        self.logins.logins().len() + self.logins.refused()
    }

    fn renewals(&self) -> Result<usize> {
        Ok(self.logins() + self.vault.asked(&["update auth/token/renew-self"])?)
    }

    async fn revoke(&self) -> Result<usize> {
        self.vault.revoke_made_at("auth/token/create-orphan").await?;
        Ok(2)
    }
}

/// The method `aws`: with stored keys, or with those of the control plane.
struct AwsIam<const OURS: bool> {
    front: Front,
    aws: Aws,
}

impl<const OURS: bool> AwsIam<OURS> {
    /// Our own identity signs for the endpoint's host and for nothing else.
    const SERVER: &str = if OURS { "127.0.0.1" } else { SERVER_ID };

    fn enable(&self) {
        // Our own is a role that the user assumes.
        let arn = if OURS { "role/session" } else { "user/reader" };
        let bound = |arn: &str| AwsRole {
            bound_principals: vec![format!("arn:aws:iam::{ACCOUNT}:{arn}")],
            granted: self.front.granted(),
        };
        let roles =
            BTreeMap::from([("app".to_owned(), bound(arn)), ("others".to_owned(), bound("user/other"))]);
        let sts = self.aws.sessions.url().to_owned();
        self.front.logins.enable_aws("aws", AwsMount { sts, server_id: Self::SERVER.into(), roles });
    }
}

impl<const OURS: bool> Method for AwsIam<OURS> {
    const NAME: &'static str = if OURS { "vault own aws" } else { "vault aws" };

    fn backend(&mut self) -> Value {
        let settings = json!({
            "auth_role": "app", "aws_server_id": Self::SERVER, "aws_region": REGION,
            "sts_endpoint": self.aws.sessions.url(),
        });
        backend(self.front.logins.addr(), "aws", &settings)
    }

    fn template(&self) -> &'static str {
        "secret/data/*"
    }

    fn credential_field(&self) -> &'static str {
        "auth_config_path"
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        if OURS {
            self.aws.be_the_user().await?;
            return Ok(None);
        }
        Ok(Some(aws::stored(&self.aws.new_key().await?)))
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.front.logins()))
    }

    fn renewals(&self) -> Result<usize> {
        self.front.renewals()
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.front.revoke().await
    }

    async fn withdraw(&mut self) -> Result<()> {
        if OURS {
            self.aws.be_nobody();
        } else {
            self.aws.delete_key().await;
        }
        self.front.revoke().await.map(drop)
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        aws::malformed()
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(if OURS { Wrong::Configured(json!({ "auth_role": "others" })) } else { aws::wrong() })
    }

    async fn shorten(&mut self) -> Result<()> {
        self.front.ttl = SHORT;
        self.enable();
        Ok(())
    }
}

#[tokio::test]
async fn stored_keys_of_aws_keep_every_promise_at_vault() -> Result<()> {
    let (front, aws, planes) =
        tokio::try_join!(Front::start(), Aws::start(), Planes::start(Options::default()))?;
    let method = AwsIam::<false> { front, aws };
    method.enable();
    keeps_every_promise(planes, method).await
}

#[tokio::test]
async fn our_own_keys_of_aws_keep_every_promise_at_vault() -> Result<()> {
    let (front, mut aws) = tokio::try_join!(Front::start(), Aws::start())?;
    let planes = aws::planes_in_a_container(&mut aws).await?;
    let method = AwsIam::<true> { front, aws };
    method.enable();
    keeps_every_promise(planes, method).await
}

/// The method `gcp`: with the key of a service account, or with the account of our machine.
struct GoogleSigned<const OURS: bool> {
    front: Front,
    gcp: Gcp,
    account: AccountKey,
}

impl<const OURS: bool> GoogleSigned<OURS> {
    fn enable(&self) {
        let (kind, email) = match OURS {
            true => (GcpRoleType::Gce, self.gcp.default_account()),
            false => (GcpRoleType::Iam, self.account.email.clone()),
        };
        let bound = |email: String| GcpRole {
            kind,
            bound_service_accounts: vec![email],
            granted: self.front.granted(),
        };
        let roles =
            [("app".to_owned(), bound(email)), ("others".to_owned(), bound("other@example.test".into()))];
        self.front.logins.enable_gcp("gcp", &self.gcp, BTreeMap::from(roles));
    }
}

impl<const OURS: bool> Method for GoogleSigned<OURS> {
    const NAME: &'static str = if OURS { "vault own gcp" } else { "vault gcp" };

    fn backend(&mut self) -> Value {
        backend(self.front.logins.addr(), "gcp", &json!({ "auth_role": "app" }))
    }

    fn template(&self) -> &'static str {
        "secret/data/*"
    }

    fn credential_field(&self) -> &'static str {
        "auth_config_path"
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        if OURS {
            self.gcp.attach_account();
            // A role that refuses is the other way to be without an identity.
            self.enable();
            return Ok(None);
        }
        self.account = self.gcp.service_account("reader")?;
        Ok(Some(gcp::file(&self.account)?))
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.front.logins()))
    }

    fn renewals(&self) -> Result<usize> {
        self.front.renewals()
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.front.revoke().await
    }

    async fn withdraw(&mut self) -> Result<()> {
        if OURS {
            // The machine has its account, but Vault lets nobody in for it.
            self.front.logins.enable_gcp("gcp", &self.gcp, BTreeMap::new());
        } else {
            self.gcp.revoke_key(&self.account);
        }
        self.front.revoke().await.map(drop)
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        gcp::file(&self.account).map(|good| gcp::malformed(&good)).unwrap_or_default()
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        if OURS {
            return Ok(Wrong::Configured(json!({ "auth_role": "others" })));
        }
        let deleted = self.gcp.service_account("reader")?;
        self.gcp.revoke_key(&deleted);
        Ok(Wrong::Stored(gcp::file(&deleted)?))
    }

    async fn shorten(&mut self) -> Result<()> {
        self.front.ttl = SHORT;
        self.enable();
        Ok(())
    }
}

#[tokio::test]
async fn the_key_of_a_service_account_keeps_every_promise_at_vault() -> Result<()> {
    let (front, gcp, planes) =
        tokio::try_join!(Front::start(), Gcp::start(), Planes::start(Options::default()))?;
    let account = gcp.service_account("reader")?;
    let method = GoogleSigned::<false> { front, gcp, account };
    method.enable();
    keeps_every_promise(planes, method).await
}

#[tokio::test]
async fn the_service_account_of_our_machine_keeps_every_promise_at_vault() -> Result<()> {
    let (front, gcp) = tokio::try_join!(Front::start(), Gcp::start())?;
    let options = Options::default()
        .control_plane_flag("--gcp-metadata", gcp.url())
        .control_plane_flag("--own-identity-hosts", "127.0.0.1");
    let planes = Planes::start(options).await?;
    grant(&planes.control_plane_rest()?, &["gcp"]).await?;
    let account = gcp.service_account("reader")?;
    let method = GoogleSigned::<true> { front, gcp, account };
    method.enable();
    keeps_every_promise(planes, method).await
}
