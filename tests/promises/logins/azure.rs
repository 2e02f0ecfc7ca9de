//! Azure Key Vault: a client secret, a certificate, a managed identity.

use anyhow::Result;
use scaivault_tests::fakes::azure::{ALL_RIGHTS, AppCertificate, AzureFake, Identity, Operation};
use scaivault_tests::planes::{Options, Planes};
use serde_json::{Value, json};

use super::{Method, SECRET, SHORT, VALUE, Wrong, grant, keeps_every_promise};

async fn vault() -> Result<AzureFake> {
    let fake = AzureFake::start().await?;
    fake.put(SECRET, VALUE);
    Ok(fake)
}

fn backend(fake: &AzureFake, auth_method: &str) -> Value {
    let config = json!({ "vault_url": fake.url(), "authority": fake.url(), "auth_method": auth_method });
    json!({ "type": "azure-key-vault", "config": config })
}

/// What every application has to have.
fn malformed(good: &Value) -> Vec<(Value, &'static str)> {
    let mut all = Vec::new();
    for (key, value) in [("tenant_id", "a/b"), ("client_id", "a b")] {
        all.push((changed(good, key, json!(value)), key));
        all.push((changed(good, key, Value::Null), key));
    }
    all
}

fn changed(good: &Value, key: &str, value: Value) -> Value {
    let mut bad = good.clone();
    bad[key] = value;
    bad
}

struct Secret {
    fake: AzureFake,
    client_id: String,
}

impl Secret {
    fn stored(&self, secret: &str) -> Value {
        json!({ "tenant_id": self.fake.tenant(), "client_id": self.client_id, "client_secret": secret })
    }
}

impl Method for Secret {
    const NAME: &'static str = "azure client_secret";

    fn backend(&mut self) -> Value {
        backend(&self.fake, "client_secret")
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        Ok(Some(self.stored(&self.fake.rotate_secret(&self.client_id))))
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.fake.calls(Operation::Token)))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.fake.revoke_tokens();
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.fake.rotate_secret(&self.client_id);
        self.fake.revoke_tokens();
        Ok(())
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        let good = self.stored("~s");
        let mut all = malformed(&good);
        all.extend(
            [json!(""), json!("s\n"), Value::Null]
                .map(|bad| (changed(&good, "client_secret", bad), "`client_secret`")),
        );
        all
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(Wrong::Stored(self.stored("of-another-application")))
    }

    async fn shorten(&mut self) -> Result<()> {
        self.fake.set_token_lifetime(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn a_client_secret_of_azure_keeps_every_promise() -> Result<()> {
    let (fake, planes) = tokio::try_join!(vault(), Planes::start(Options::default()))?;
    let client_id = fake.register_app(&ALL_RIGHTS).client_id;
    keeps_every_promise(planes, Secret { fake, client_id }).await
}

struct Certificate {
    fake: AzureFake,
    client_id: String,
    another: AppCertificate,
}

impl Certificate {
    fn stored(&self, with: &AppCertificate) -> Value {
        json!({
            "tenant_id": self.fake.tenant(), "client_id": self.client_id,
            "certificate_pem": with.certificate, "private_key_pem": with.key,
        })
    }
}

impl Method for Certificate {
    const NAME: &'static str = "azure certificate";

    fn backend(&mut self) -> Value {
        backend(&self.fake, "certificate")
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        let next = AppCertificate::generate()?;
        self.fake.add_certificate(&self.client_id, &next.certificate)?;
        Ok(Some(self.stored(&next)))
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.fake.calls(Operation::Token)))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.fake.revoke_tokens();
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.fake.remove_certificates(&self.client_id);
        self.fake.revoke_tokens();
        Ok(())
    }

    fn malformed(&self) -> Vec<(Value, &'static str)> {
        let good = self.stored(&self.another);
        let mut all = malformed(&good);
        for key in ["certificate_pem", "private_key_pem"] {
            all.extend([json!("no PEM"), Value::Null].map(|bad| (changed(&good, key, bad), key)));
        }
        all
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(Wrong::Stored(self.stored(&self.another)))
    }

    async fn shorten(&mut self) -> Result<()> {
        self.fake.set_token_lifetime(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn a_certificate_of_azure_keeps_every_promise() -> Result<()> {
    let (fake, planes) = tokio::try_join!(vault(), Planes::start(Options::default()))?;
    let (first, another) = (AppCertificate::generate()?, AppCertificate::generate()?);
    let client_id = fake.register_app_with_certificate(&first.certificate, &ALL_RIGHTS)?;
    keeps_every_promise(planes, Certificate { fake, client_id, another }).await
}

struct Managed {
    fake: AzureFake,
    /// Of an identity that is assigned to the machine, besides its own.
    client_id: String,
}

impl Method for Managed {
    const NAME: &'static str = "azure managed_identity";

    fn backend(&mut self) -> Value {
        // Our identity would not go to an authority of the fake's, and asks for none.
        json!({
            "type": "azure-key-vault",
            "config": {
                "vault_url": self.fake.url(), "auth_method": "managed_identity", "client_id": self.client_id,
            },
        })
    }

    async fn credential(&mut self) -> Result<Option<Value>> {
        self.fake.assign_identity(Identity::User, &self.client_id);
        Ok(None)
    }

    fn logins(&self) -> Result<Option<usize>> {
        Ok(Some(self.fake.calls(Operation::IdentityToken)))
    }

    async fn revoke(&mut self) -> Result<usize> {
        self.fake.revoke_tokens();
        Ok(2)
    }

    async fn withdraw(&mut self) -> Result<()> {
        self.fake.unassign_identity(&self.client_id);
        self.fake.revoke_tokens();
        Ok(())
    }

    async fn wrong(&mut self) -> Result<Wrong> {
        Ok(Wrong::Configured(json!({ "client_id": "00000000-0000-0000-0000-000000000000" })))
    }

    async fn shorten(&mut self) -> Result<()> {
        self.fake.set_token_lifetime(SHORT);
        Ok(())
    }
}

#[tokio::test]
async fn a_managed_identity_of_azure_keeps_every_promise() -> Result<()> {
    let fake = vault().await?;
    let options = Options::default()
        .control_plane_flag("--azure-metadata", fake.url())
        .control_plane_flag("--own-identity-hosts", "127.0.0.1");
    let planes = Planes::start(options).await?;
    grant(&planes.control_plane_rest()?, &["azure"]).await?;
    let client_id = fake.register_identity(Identity::User, &ALL_RIGHTS);
    keeps_every_promise(planes, Managed { fake, client_id }).await
}
