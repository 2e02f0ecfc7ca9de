//! GCP Secret Manager: a service account's key, and workload identity from the metadata server and from another issuer,
//! with and without a service account that it acts as.

use std::fs;

use anyhow::{Result, ensure};
use scaivault_tests::fakes::clock::Clock;
use scaivault_tests::fakes::gcp::{AccountKey, Gcp, Operation, PROJECT, Permission};
use scaivault_tests::fakes::keys::SigningKey;
use scaivault_tests::planes::{Options, Planes};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Method, SECRET, SHORT, VALUE, Wrong, grant, keeps_every_promise};

async fn cloud() -> Result<Gcp> {
    let gcp = Gcp::start().await?;
    gcp.secrets().put(SECRET, VALUE)?;
    Ok(gcp)
}

fn backend(gcp: &Gcp, auth_method: &str) -> Value {
    let config = json!({ "project_id": PROJECT, "endpoint": gcp.url(), "auth_method": auth_method });
    json!({ "type": "google-secret-manager", "config": config })
}

pub(super) fn file(account: &AccountKey) -> Result<Value> {
    Ok(serde_json::from_str(account.json())?)
}

/// What every key of a service account has to have.
pub(super) fn malformed(good: &Value) -> Vec<(Value, &'static str)> {
    let changes = [
        ("type", json!("external_account")),
        ("type", json!("authorized_user")),
        ("type", Value::Null),
        ("client_email", json!("a b")),
        ("client_email", Value::Null),
        ("private_key_id", Value::Null),
        ("private_key", json!("no PEM")),
        ("private_key", Value::Null),
    ];
    let changed = |(key, value): (&'static str, Value)| {
        let mut bad = good.clone();
        bad[key] = value;
        (bad, key)
    };
    changes.into_iter().map(changed).collect()
}

struct ServiceAccount {
    gcp: Gcp,
    account: AccountKey,
}

impl Method for ServiceAccount {
    const NAME: &'static str = "gcp service_account";

    fn backend(&mut self) -> Value {
        backend(&self.gcp, "service_account")
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        self.gcp.revoke_key(&self.account);
        self.account = self.gcp.service_account("reader")?;
        Ok(Some(file(&self.account)?))
    }

    fn logins(&self) -> Result<Option<usize>> {
        let asked = self.gcp.calls(Operation::OauthToken);
        ensure!(asked == 0, "what signs for itself asked {asked} times for a token");
        Ok(None)
    }

    async fn revoke(&mut self) -> Result<usize> {
        // A key signs for itself: what it signed is good for as long as the key is.
        Ok(0)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.gcp.revoke_key(&self.account);
        Ok(())
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        file(&self.account).map(|good| malformed(&good)).unwrap_or_default()
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        let deleted = self.gcp.service_account("reader")?;
        self.gcp.revoke_key(&deleted);
        Ok(Wrong::Stored(file(&deleted)?))
    }
}

#[tokio::test]
async fn the_key_of_a_service_account_keeps_every_promise() -> Result<()> {
    let (gcp, planes) = tokio::try_join!(cloud(), Planes::start(Options::default()))?;
    let account = gcp.service_account("reader")?;
    keeps_every_promise(planes, ServiceAccount { gcp, account }).await
}

struct Metadata(Gcp);

impl Method for Metadata {
    const NAME: &'static str = "gcp metadata";

    fn backend(&mut self) -> Value {
        backend(&self.0, "workload_identity")
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        self.0.attach_account();
        Ok(None)
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.0.calls(Operation::MetadataToken)))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.0.revoke_tokens(&self.0.default_account());
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.0.detach_account();
        self.0.revoke_tokens(&self.0.default_account());
        Ok(())
    }

    async fn shorten(&mut self) -> Result<()> {
        self.0.set_token_lifetime(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn the_service_account_of_our_machine_keeps_every_promise() -> Result<()> {
    let gcp = cloud().await?;
    let options = Options::default()
        .control_plane_flag("--gcp-metadata", gcp.url())
        .control_plane_flag("--own-identity-hosts", "127.0.0.1");
    let planes = Planes::start(options).await?;
    grant(&planes.control_plane_rest()?, &["gcp"]).await?;
    keeps_every_promise(planes, Metadata(gcp)).await
}

/// A workload of another cloud.
struct External<const IMPERSONATES: bool> {
    gcp: Gcp,
    issuer: SigningKey,
    audience: String,
    /// Who holds the access tokens.
    principal: String,
    folder: TempDir,
}

const ISSUER: &str = "https://issuer.test";
const POOL: &str = "pool";
const SUBJECT: &str = "scaivault";

impl<const IMPERSONATES: bool> External<IMPERSONATES> {
    async fn start() -> Result<(Self, Planes)> {
        let (gcp, issuer, folder) = (cloud().await?, SigningKey::new()?, tempfile::tempdir()?);
        let audience = gcp.trust_issuer(POOL, "provider", ISSUER, &issuer);
        let workload = Gcp::workload(POOL, SUBJECT);
        let principal = if IMPERSONATES {
            let email = gcp.service_account("acts-as")?.email;
            gcp.allow_impersonation(&workload, &email);
            email
        } else {
            Permission::ALL.into_iter().for_each(|permission| gcp.allow(&workload, permission));
            workload
        };
        let email = IMPERSONATES.then_some(principal.as_str());
        let account = gcp.external_account(&audience, &folder.path().join("token"), email);
        let file = folder.path().join("account.json");
        fs::write(&file, account)?;
        let options = Options::default()
            .control_plane_flag("--gcp-external-account", file.display())
            .control_plane_flag("--own-identity-hosts", "127.0.0.1");
        let planes = Planes::start(options).await?;
        grant(&planes.control_plane_rest()?, &["gcp"]).await?;
        Ok((External { gcp, issuer, audience, principal, folder }, planes))
    }

    fn write_token(&self, issuer: &SigningKey) -> Result<()> {
        let now = Clock::default().seconds();
        let claims =
            json!({ "iss": ISSUER, "sub": SUBJECT, "aud": self.audience, "iat": now, "exp": now + 3600 });
        Ok(fs::write(self.folder.path().join("token"), issuer.sign(&claims))?)
    }
}

impl<const IMPERSONATES: bool> Method for External<IMPERSONATES> {
    const NAME: &'static str = if IMPERSONATES { "gcp impersonation" } else { "gcp external_account" };

    fn backend(&mut self) -> Value {
        backend(&self.gcp, "workload_identity")
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        self.write_token(&self.issuer)?;
        Ok(None)
    }

    fn logins(&self) -> Result<Option<usize>> {
        let (exchanged, acted) =
            (self.gcp.calls(Operation::StsToken), self.gcp.calls(Operation::GenerateAccessToken));
        ensure!(acted <= if IMPERSONATES { exchanged } else { 0 }, "{acted} of {exchanged}");
        Ok(Some(exchanged))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.gcp.revoke_tokens(&self.principal);
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        // A token of nobody whom Google trusts is where the issuer's was.
        self.write_token(&SigningKey::new()?)?;
        self.gcp.revoke_tokens(&self.principal);
        Ok(())
    }

    async fn shorten(&mut self) -> Result<()> {
        self.gcp.set_token_lifetime(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn a_workload_of_another_cloud_keeps_every_promise() -> Result<()> {
    let (method, planes) = External::<false>::start().await?;
    keeps_every_promise(planes, method).await
}

#[tokio::test]
async fn a_workload_that_acts_as_a_service_account_keeps_every_promise() -> Result<()> {
    let (method, planes) = External::<true>::start().await?;
    keeps_every_promise(planes, method).await
}
