//! The fakes of Azure and GCP as servers: in a process of their own they do not disturb the generator.

use std::fs;
use std::future::pending;
use std::path::Path;

use anyhow::{Context as _, Result};
use scaivault_domain::time::Clock as _;
use scaivault_telemetry::SystemClock;
use scaivault_tests::fakes::azure::{AzureFake, Right};
use scaivault_tests::fakes::gcp::Gcp;
use scaivault_tests::http;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clouds::name;
use crate::subjects::value;

/// What a fake writes into a file as soon as it serves.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Ready {
    /// Where.
    pub(crate) url: String,
    /// What ScaiVault logs in with.
    pub(crate) credential: Value,
    /// A token of the same login, for direct reads.
    pub(crate) token: String,
}

impl Ready {
    fn tell(&self, file: &Path) -> Result<()> {
        let unfinished = file.with_extension("unfinished");
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(unfinished, file)?;
        eprintln!("{} serves; what it is logged into with is in {}", self.url, file.display());
        Ok(())
    }
}

/// A vault with so many secrets, until the process is ended.
#[tokio::main]
pub(crate) async fn azure(file: &Path, secrets: &str) -> Result<()> {
    let fake = AzureFake::start().await?;
    let app = fake.register_app(&[Right::Get, Right::List]);
    for index in 0..secrets.parse()? {
        fake.put(&name(index), &value(&name(index)).to_string());
    }
    let login = [
        ("grant_type", "client_credentials"),
        ("client_id", &app.client_id),
        ("client_secret", &app.client_secret),
        ("scope", "https://vault.azure.net/.default"),
    ];
    let answer = http::client(None)?.post(fake.token_endpoint()).form(&login).send().await?;
    let answer: Value = answer.error_for_status()?.json().await?;
    let credential = json!({
        "tenant_id": fake.tenant(),
        "client_id": app.client_id,
        "client_secret": app.client_secret,
    });
    let token = answer["access_token"].as_str().context("a login without a token")?.to_owned();
    Ready { url: fake.url().to_owned(), credential, token }.tell(file)?;
    pending().await
}

/// A project with so many secrets, until the process is ended.
#[tokio::main]
pub(crate) async fn gcp(file: &Path, secrets: &str) -> Result<()> {
    let fake = Gcp::start().await?;
    for index in 0..secrets.parse()? {
        fake.secrets().put(&name(index), value(&name(index)).to_string())?;
    }
    let account = fake.service_account("scaivault")?;
    let now = SystemClock.now().as_millis() / 1000;
    // As ScaiVault's own: one that the account's key signs, which takes Google longer to check than one of its own.
    let token = account.key.sign(&json!({
        "iss": account.email,
        "sub": account.email,
        "aud": "https://secretmanager.googleapis.com/",
        "iat": now,
        "exp": now + 3600,
    }));
    let credential = serde_json::from_str(account.json())?;
    Ready { url: fake.url().to_owned(), credential, token }.tell(file)?;
    pending().await
}
