//! The fake of Azure Key Vault.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use reqwest::header::CONTENT_TYPE;
use scaivault_backends::{Lease, Material};
use scaivault_domain::backend::{AzureTarget, Endpoint, Target, Tls};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State};
use scaivault_tests::fakes::azure::{ALL_RIGHTS, AzureFake, Fault, Right, Side};
use scaivault_tests::http;
use secrecy::SecretString;
use serde_json::Value;
use url::form_urlencoded::Serializer;

use super::capabilities::{
    Capabilities, Closes, Deleted, Empty, HistoryOfNobody, Json, NoSecrets, Pages, Surveys, Told, Unfit,
    Versions, Writes,
};
use super::{Provider, Store, keeps, suite};

/// Every store is a fake of its own.
struct Azure;

/// One vault, and an application that may use it.
pub(super) struct Vault {
    fake: AzureFake,
    client_id: String,
    token: String,
}

impl Provider for Azure {
    type Store = Vault;

    async fn start() -> Result<Self> {
        Ok(Azure)
    }

    async fn store(&self, _: &str) -> Result<Vault> {
        let fake = AzureFake::start().await?;
        let app = fake.register_app(&ALL_RIGHTS);
        let form = [
            ("grant_type", "client_credentials"),
            ("client_id", &*app.client_id),
            ("client_secret", &*app.client_secret),
            ("scope", "https://vault.azure.net/.default"),
        ];
        let form = Serializer::new(String::new()).extend_pairs(form).finish();
        let request = http::client(None)?.post(fake.token_endpoint()).body(form);
        let request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        let granted: Value = request.send().await?.json().await?;
        let token = granted["access_token"].as_str().context("a token")?.to_owned();
        Ok(Vault { client_id: app.client_id, token, fake })
    }
}

impl Store for Vault {
    const CAN: Capabilities = Capabilities {
        title: "Azure Key Vault",
        pages: Pages::Tokens { size: 25, empty: r#"{"value":[],"nextLink":"{url}/secrets?after={n}"}"# },
        surveys: Surveys::TellVersions,
        versions: Versions::All,
        states: &[State::Disabled, State::Expired, State::Deleted],
        deleted: Deleted::NotFound,
        kinds: &[Kind::Json, Kind::Text],
        empty: Empty::Carried,
        empty_objects: Empty::Carried,
        no_secrets: NoSecrets::Said,
        json: Json::AsWritten,
        most_bytes: 25 * 1024,
        good_names: &["a-b", "0"],
        bad_names: &["", "a_b", "a.b", "a/b", "\u{e4}"],
        metadata: Told::ByReads,
        unfit: Unfit::Keys(15),
        writes: Writes::Checked,
        closes: Closes::OneSecret,
        history_of_nobody: HistoryOfNobody::NotFound,
    };

    fn socket(&self) -> SocketAddr {
        let address = self.fake.url().trim_start_matches("http://");
        address.parse().expect("the fake is at an address of loopback")
    }

    fn target(&self, endpoint: Endpoint) -> Target {
        Target::AzureKeyVault(AzureTarget { vault: endpoint, tls: Tls::default() })
    }

    fn lease(&self) -> Lease {
        let material = Material::Bearer(SecretString::from(self.token.as_str()));
        Lease { id: "azure".to_owned(), material, expires_at: None, login_generation: 0 }
    }

    fn root(&self) -> Option<RemoteName> {
        None
    }

    fn longest(&self) -> RemoteName {
        self.name(&"x".repeat(127))
    }

    async fn put(&self, leaf: &str, value: &[u8], _: Kind) -> Result<()> {
        self.fake.put(leaf, str::from_utf8(value)?);
        Ok(())
    }

    async fn change(&self, leaf: &str, to: State) -> Result<()> {
        match to {
            State::Disabled => self.fake.disable(leaf),
            State::Expired => self.fake.set_expiry(leaf, 1),
            State::Deleted => self.fake.delete(leaf),
            _ => bail!("Azure has no such state"),
        }
        Ok(())
    }

    async fn restore(&self, leaf: &str) -> Result<()> {
        self.fake.recover(leaf);
        Ok(())
    }

    async fn describe(&self, leaf: &str, metadata: &Metadata) -> Result<()> {
        self.fake.change(leaf, |draft| draft.tags = metadata.clone());
        Ok(())
    }

    async fn forbid(&self, leaf: &str) -> Result<()> {
        self.fake.set_fault(Side::Vault, Fault::ForbidName(leaf.to_owned()));
        Ok(())
    }

    async fn forbid_listing(&self) -> Result<()> {
        self.fake.set_rights(&self.client_id, &[Right::Get, Right::Set, Right::Delete]);
        Ok(())
    }

    async fn revoke(&self) -> Result<()> {
        self.fake.revoke_tokens();
        Ok(())
    }

    /// Times have whole seconds there.
    fn settle(&self) {
        self.fake.advance(Duration::from_secs(3));
    }
}

#[tokio::test]
async fn azure_keeps_the_contract() -> Result<()> {
    keeps::<Azure>(suite()).await
}
