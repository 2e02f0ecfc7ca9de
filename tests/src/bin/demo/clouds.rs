//! The stores of the clouds, beside OpenBao: each has a credential and becomes a backend, and the same requests read them.
//!
//! One whose server cannot be had here is left out, and it is said why.

use anyhow::{Context as _, Result, ensure};
use scaivault_tests::fakes::azure::{AzureFake, Right};
use scaivault_tests::fakes::keys::SigningKey;
use scaivault_tests::planes::Rest;
use scaivault_tests::servers::drongo::Drongo;
use scaivault_tests::servers::moto::{self, Moto};
use serde_json::{Value, json};

use crate::stage::Stage;
use crate::story::{Secrets, create_backend, first_run, healthy, read, read_by_grpc, refused, store};
use crate::transcript::Transcript;

/// What tokens for a vault of Azure's public cloud are for.
const AZURE_RESOURCE: &str = "https://vault.azure.net";
/// Any project that could be somebody's.
const GCP_PROJECT: &str = "acme-demo";

/// A store that is federated, for the command lines.
pub(crate) struct Cloud {
    /// Its name.
    pub(crate) title: &'static str,
    /// A secret of it.
    pub(crate) path: &'static str,
    /// What an answer contains that came from it.
    pub(crate) proof: &'static str,
}

const AWS: Cloud =
    Cloud { title: "AWS Secrets Manager", path: "external/aws/app/db", proof: r#""source":"sync""# };
const AZURE: Cloud =
    Cloud { title: "Azure Key Vault", path: "external/azure/app/db", proof: r#""source":"proxy""# };
const GCP: Cloud =
    Cloud { title: "GCP Secret Manager", path: "external/gcp/app/db", proof: r#""source":"proxy""# };

/// A store with secrets in it.
struct Seeded {
    /// Its base URL.
    endpoint: String,
    /// What ScaiVault logs in with.
    credential: Value,
}

/// Goes on with the story, and returns the stores that were there.
pub(crate) async fn tell(
    stage: &mut Stage,
    api: &Rest,
    secrets: &mut Secrets,
    out: &mut Transcript,
) -> Result<Vec<Cloud>> {
    out.step("The stores of three clouds, as far as they can be had on this machine")?;
    let aws = match stage.moto.ready().await {
        Ok(moto) => {
            out.detail(&format!("{}: moto, at {}", AWS.title, moto.addr()))?;
            out.detail("    prod/app/db, prod/app/stripe, prod/mail/smtp, staging/app/db")?;
            out.detail("    a user who may list secrets and read them, and nothing else")?;
            Some(seed_aws(moto).await.context("moto does not take the demo's secrets")?)
        }
        Err(error) => left_out(&AWS, &error, out)?,
    };
    let azure = match stage.azure.ready().await {
        Ok(fake) => {
            out.detail(&format!(
                "{}: a stand-in, for no server of it exists, at {}",
                AZURE.title,
                fake.url()
            ))?;
            out.detail("    app--db, mail--smtp; an application that may list and read")?;
            Some(seed_azure(fake))
        }
        Err(error) => left_out(&AZURE, &error, out)?,
    };
    let gcp = match stage.drongo.ready().await {
        Ok(drongo) => {
            out.detail(&format!("{}: drongo, at {}", GCP.title, drongo.addr()))?;
            out.detail("    app__db; it does not check who calls, so the account's key is made up")?;
            Some(seed_gcp(drongo).await.context("drongo does not take the demo's secrets")?)
        }
        Err(error) => left_out(&GCP, &error, out)?,
    };

    out.step("Their credentials become secrets of ScaiVault")?;
    for (seeded, path) in
        [(&aws, "infra/aws/reader"), (&azure, "infra/azure/reader"), (&gcp, "infra/gcp/reader")]
    {
        if let Some(seeded) = seeded {
            store(api, path, seeded.credential.clone(), out).await?;
        }
    }

    let mut clouds = Vec::new();
    let mut copied = None;
    if let Some(Seeded { endpoint, .. }) = &aws {
        out.step("AWS Secrets Manager becomes a backend in sync mode; only prod/ is mapped")?;
        let body = [
            r#"{"name":"aws-production","type":"aws-secrets-manager","mode":"sync","sync_interval":"5m","#
                .to_owned(),
            r#" "config":{"region":"eu-central-1","credentials_path":"infra/aws/reader","#.to_owned(),
            format!(r#"           "endpoint":"{endpoint}","sts_endpoint":"{endpoint}"}},"#),
            r#" "path_mapping":{"external/aws/**":"prod/**"}}"#.to_owned(),
        ];
        let backend = create_backend(api, &body, out).await?;
        out.received(&format!("201, id {backend}"))?;
        copied = Some(backend);
        clouds.push(AWS);
    }
    if let Some(Seeded { endpoint, .. }) = &azure {
        out.step("Azure Key Vault becomes a backend; its names have no slashes, so app/db is app--db there")?;
        let body = [
            r#"{"name":"azure-production","type":"azure-key-vault","mode":"proxy","#.to_owned(),
            format!(r#" "config":{{"vault_url":"{endpoint}","auth_method":"client_secret","#),
            r#"           "credentials_path":"infra/azure/reader","#.to_owned(),
            format!(r#"           "authority":"{endpoint}","resource":"{AZURE_RESOURCE}"}},"#),
            r#" "path_mapping":[{"pattern":"external/azure/**","template":"**","separator":"--"}]}"#
                .to_owned(),
        ];
        connect(api, &body, out).await?;
        clouds.push(AZURE);
    }
    if let Some(Seeded { endpoint, .. }) = &gcp {
        out.step("GCP Secret Manager becomes a backend; app/db is app__db there")?;
        let body = [
            r#"{"name":"gcp-production","type":"google-secret-manager","mode":"proxy","#.to_owned(),
            format!(r#" "config":{{"project_id":"{GCP_PROJECT}","endpoint":"{endpoint}","#),
            r#"           "credentials_path":"infra/gcp/reader"},"#.to_owned(),
            r#" "path_mapping":[{"pattern":"external/gcp/**","template":"**","separator":"__"}]}"#.to_owned(),
        ];
        connect(api, &body, out).await?;
        clouds.push(GCP);
    }

    if let Some(backend) = copied {
        out.step("The first sync from AWS: only prod/ is listed, and values are read together")?;
        let (_, report) = first_run(api, &backend, out).await?;
        ensure!(report["outcome"] == "complete" && report["created"] == 3, "the sync from AWS: {report}");
    }

    out.step("The same two requests read a secret of each, whatever store it lies in")?;
    for cloud in &clouds {
        read(api, cloud.path, out).await?;
        read_by_grpc(secrets, cloud.path, out).await?;
    }

    if azure.is_some() {
        out.step(
            "Key Vault does not tell upper from lower case. One spelling is the path, others are refused",
        )?;
        let refusal = refused(api, "external/azure/App/DB", 404, out).await?;
        ensure!(refusal["code"] == "unrepresentable", "another spelling: {refusal}");
        out.received(&format!("     {}", refusal["detail"].as_str().unwrap_or_default()))?;
    }
    Ok(clouds)
}

/// Configures a backend in proxy mode, and waits until it is healthy.
async fn connect(api: &Rest, body: &[String], out: &Transcript) -> Result<()> {
    let backend = create_backend(api, body, out).await?;
    let status = healthy(api, &backend).await?;
    let state = status["connection"]["status"].as_str().unwrap_or_default();
    out.received(&format!("201, id {backend}, {state}"))
}

/// Says that a store is not there, and why: the error's first line tells what failed, its last one what would help.
fn left_out(cloud: &Cloud, error: &anyhow::Error, out: &Transcript) -> Result<Option<Seeded>> {
    let error = format!("{error:#}");
    let mut lines = error.lines();
    out.detail(&format!("{}: left out, {}", cloud.title, lines.next().unwrap_or_default()))?;
    if let Some(last) = lines.next_back() {
        out.detail(&format!("    {}", last.trim()))?;
    }
    Ok(None)
}

fn login(user: &str, password: &str) -> String {
    json!({ "user": user, "password": password }).to_string()
}

/// Puts secrets into moto, and lets a user read them. Of statements about single secrets moto knows nothing.
async fn seed_aws(moto: &Moto) -> Result<Seeded> {
    let admin = moto.client()?;
    for (name, value) in [
        ("prod/app/db", login("app", "heron")),
        ("prod/app/stripe", json!({ "api_key": "of-production" }).to_string()),
        ("prod/mail/smtp", json!({ "host": "smtp.internal", "port": 587 }).to_string()),
        ("staging/app/db", login("app", "finch")),
    ] {
        admin.create_secret(name, &value, &[("team", "payments")]).await?;
    }
    let actions =
        ["secretsmanager:ListSecrets", "secretsmanager:GetSecretValue", "secretsmanager:BatchGetSecretValue"];
    let statement = json!({ "Effect": "Allow", "Action": actions, "Resource": "*" });
    let policy = json!({ "Version": "2012-10-17", "Statement": [statement] });
    let moto::AccessKey { id, secret, .. } = admin.create_user("scaivault", &policy).await?;
    let credential = json!({ "access_key_id": id, "secret_access_key": secret });
    Ok(Seeded { endpoint: moto.addr(), credential })
}

/// Puts secrets into the stand-in for Azure, and lets an application read them.
fn seed_azure(fake: &AzureFake) -> Seeded {
    fake.put("app--db", &login("app", "kestrel"));
    fake.put("mail--smtp", &json!({ "host": "smtp.internal", "port": 587 }).to_string());
    let app = fake.register_app(&[Right::Get, Right::List]);
    let credential = json!({
        "tenant_id": fake.tenant(),
        "client_id": app.client_id,
        "client_secret": app.client_secret,
    });
    Seeded { endpoint: fake.url().to_owned(), credential }
}

/// Puts a secret into drongo, and makes the key of a service account, which signs but which nobody has registered.
async fn seed_gcp(drongo: &Drongo) -> Result<Seeded> {
    let admin = drongo.client(GCP_PROJECT)?;
    admin.create_secret("app__db", &[("team", "payments")]).await?;
    admin.add_version("app__db", login("app", "plover").as_bytes()).await?;
    let key = SigningKey::new()?;
    let credential = json!({
        "type": "service_account",
        "client_email": format!("scaivault@{GCP_PROJECT}.iam.gserviceaccount.com"),
        "private_key_id": key.id(),
        "private_key": key.pem(),
    });
    Ok(Seeded { endpoint: drongo.addr(), credential })
}
