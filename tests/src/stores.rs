//! Stores that can be federated, each with what a backend of it needs: a server or a fake, a login that works, and what
//! its administrator does.
//!
//! All of them are given the same secrets by the same words, so that one promise is tried with each. What only one of
//! them has is done with its own server: [`Aws::moto`], [`Azure::fake`], [`Gcp::fake`], [`DrongoStore::drongo`].

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::authority::Authority;
use crate::fakes::azure::{self, AzureFake, ClientSecret, Draft, Right};
use crate::fakes::gcp::{self, AccountKey};
use crate::fakes::keys::SigningKey;
use crate::planes::{Rest, merge};
use crate::servers::drongo::{self, Drongo};
use crate::servers::moto::{self, AccessKey, Moto};
use crate::wait;

/// What an application in Azure needs to be proxied and synced: the role "Key Vault Secrets User" has no more.
pub const AZURE_READER: [Right; 2] = [Right::Get, Right::List];

/// The project of [`DrongoStore`]; drongo has every project.
const DRONGO_PROJECT: &str = "drongo-tests";

/// A store of any kind.
#[derive(Debug)]
pub enum Store {
    /// AWS Secrets Manager.
    Aws(Box<Aws>),
    /// Azure Key Vault.
    Azure(Azure),
    /// GCP Secret Manager.
    Gcp(Gcp),
    /// GCP Secret Manager, another one's idea of it.
    Drongo(DrongoStore),
}

/// moto, with a user who may assume a role that reads and lists.
#[derive(Debug)]
pub struct Aws {
    /// The server.
    pub moto: Moto,
    /// The user's.
    pub key: AccessKey,
    /// The role's ARN.
    pub role: String,
    ca: Option<String>,
}

/// A fake vault, with an application that reads and lists.
pub struct Azure {
    /// The vault and its directory.
    pub fake: AzureFake,
    /// The application's login.
    pub app: ClientSecret,
    ca: Option<String>,
}

impl fmt::Debug for Azure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Azure").field("fake", &self.fake).finish_non_exhaustive()
    }
}

/// A fake project, with a service account that may do everything.
#[derive(Debug)]
pub struct Gcp {
    /// The cloud.
    pub fake: gcp::Gcp,
    /// The account's key.
    pub account: AccountKey,
    ca: Option<String>,
}

/// drongo, which lets everybody in.
#[derive(Debug)]
pub struct DrongoStore {
    /// The server.
    pub drongo: Drongo,
    key: SigningKey,
}

/// A statement of AWS that allows these actions, e.g. `["secretsmanager:GetSecretValue"]`, everywhere.
pub fn aws_policy(actions: &[&str]) -> Value {
    let statement = json!({ "Effect": "Allow", "Action": actions, "Resource": "*" });
    json!({ "Version": "2012-10-17", "Statement": [statement] })
}

/// An access key as a backend wants it to be stored.
pub fn aws_credential(key: &AccessKey) -> Value {
    let mut credential = json!({ "access_key_id": key.id, "secret_access_key": key.secret });
    if let Some(token) = &key.session_token {
        credential["session_token"] = json!(token);
    }
    credential
}

impl Aws {
    /// Starts moto, with TLS if there is an authority.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn start(authority: Option<Authority>) -> Result<Aws> {
        let ca = authority.as_ref().map(Authority::pem);
        let options = moto::Options::default();
        let moto = Moto::start(match authority {
            Some(authority) => options.tls(authority),
            None => options,
        })
        .await?;
        let admin = moto.client()?;
        let key = admin.create_user("scaivault", &aws_policy(&["sts:AssumeRole"])).await?;
        let principal = admin.with_key(key.clone()).caller().await?;
        let statement =
            json!({ "Effect": "Allow", "Principal": { "AWS": principal }, "Action": "sts:AssumeRole" });
        let trust = json!({ "Version": "2012-10-17", "Statement": [statement] });
        let actions = [
            "GetSecretValue",
            "BatchGetSecretValue",
            "ListSecrets",
            "DescribeSecret",
            "ListSecretVersionIds",
        ];
        let actions = actions.map(|action| format!("secretsmanager:{action}"));
        let policy = aws_policy(&actions.each_ref().map(String::as_str));
        let role = admin.create_role("scaivault", &trust, &policy).await?;
        Ok(Aws { moto, key, role, ca })
    }
}

impl Azure {
    /// Starts a fake, with TLS if there is an authority.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(authority: Option<&Authority>) -> Result<Azure> {
        let fake = match authority {
            Some(authority) => AzureFake::start_tls(authority).await?,
            None => AzureFake::start().await?,
        };
        let app = fake.register_app(&AZURE_READER);
        Ok(Azure { fake, app, ca: authority.map(Authority::pem) })
    }
}

impl Gcp {
    /// Starts a fake, with TLS if there is an authority.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(authority: Option<&Authority>) -> Result<Gcp> {
        let fake = match authority {
            Some(authority) => gcp::Gcp::start_tls(authority).await?,
            None => gcp::Gcp::start().await?,
        };
        let account = fake.service_account("scaivault")?;
        Ok(Gcp { fake, account, ca: authority.map(Authority::pem) })
    }
}

impl DrongoStore {
    /// Starts drongo.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn start() -> Result<DrongoStore> {
        Ok(DrongoStore { drongo: Drongo::start().await?, key: SigningKey::new()? })
    }

    /// What the administrator of its project does.
    ///
    /// # Errors
    /// If the client cannot be made.
    pub fn admin(&self) -> Result<drongo::Admin> {
        self.drongo.client(DRONGO_PROJECT)
    }
}

impl Store {
    /// Starts moto.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn aws() -> Result<Store> {
        Ok(Store::Aws(Box::new(Aws::start(None).await?)))
    }

    /// Starts a fake of Azure.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn azure() -> Result<Store> {
        Ok(Store::Azure(Azure::start(None).await?))
    }

    /// Starts a fake of GCP.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn gcp() -> Result<Store> {
        Ok(Store::Gcp(Gcp::start(None).await?))
    }

    /// Starts drongo.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn drongo() -> Result<Store> {
        Ok(Store::Drongo(DrongoStore::start().await?))
    }

    /// The `type` of a backend.
    pub fn kind(&self) -> &'static str {
        match self {
            Store::Aws(_) => "aws-secrets-manager",
            Store::Azure(_) => "azure-key-vault",
            Store::Gcp(_) | Store::Drongo(_) => "google-secret-manager",
        }
    }

    /// What joins the parts of a name; nothing where a slash does.
    pub fn separator(&self) -> Option<&'static str> {
        match self {
            Store::Aws(_) => None,
            Store::Azure(_) => Some("--"),
            Store::Gcp(_) | Store::Drongo(_) => Some("__"),
        }
    }

    /// The name of the secret that `path`, e.g. `app/db`, stands for by [`Store::rule`].
    pub fn name(&self, path: &str) -> String {
        let separator = self.separator().unwrap_or("/");
        format!("prod/{path}").replace('/', separator)
    }

    /// The rule that maps everything below `prefix` to what begins with `prod` in the store.
    pub fn rule(&self, prefix: &str) -> Value {
        let mut rule = json!({ "pattern": format!("{prefix}/**"), "template": "prod/**" });
        if let Some(separator) = self.separator() {
            rule["separator"] = json!(separator);
        }
        rule
    }

    /// The login, as it is to be stored.
    ///
    /// # Errors
    /// If a key file is no JSON.
    pub fn credential(&self) -> Result<Value> {
        Ok(match self {
            Store::Aws(aws) => aws_credential(&aws.key),
            Store::Azure(azure) => json!({
                "tenant_id": azure.fake.tenant(),
                "client_id": azure.app.client_id,
                "client_secret": azure.app.client_secret,
            }),
            Store::Gcp(gcp) => serde_json::from_str(gcp.account.json())?,
            Store::Drongo(drongo) => json!({
                "type": "service_account",
                "client_email": "reader@drongo-tests.iam.gserviceaccount.com",
                "private_key_id": drongo.key.id(),
                "private_key": drongo.key.pem(),
            }),
        })
    }

    /// A backend in mode `proxy` of this name, with [`Store::rule`] for what is below its name and the login at
    /// `infra/<name>`.
    pub fn backend(&self, name: &str) -> Value {
        let credentials = format!("infra/{name}");
        let (mut config, ca) = match self {
            Store::Aws(aws) => {
                let endpoint = aws.moto.addr();
                let config = json!({
                    "region": moto::REGION, "credentials_path": credentials, "role_arn": aws.role,
                    "endpoint": endpoint, "sts_endpoint": endpoint,
                });
                (config, &aws.ca)
            }
            Store::Azure(azure) => {
                let config = json!({
                    "vault_url": azure.fake.url(), "authority": azure.fake.url(),
                    "auth_method": "client_secret", "credentials_path": credentials,
                });
                (config, &azure.ca)
            }
            Store::Gcp(gcp) => {
                let config = json!({
                    "project_id": gcp::PROJECT, "endpoint": gcp.fake.url(),
                    "auth_method": "service_account", "credentials_path": credentials,
                });
                (config, &gcp.ca)
            }
            Store::Drongo(drongo) => {
                let config = json!({
                    "project_id": DRONGO_PROJECT, "endpoint": drongo.drongo.addr(),
                    "auth_method": "service_account", "credentials_path": credentials,
                });
                (config, &None)
            }
        };
        if let Some(ca) = ca {
            config["ca_cert"] = json!(ca);
        }
        json!({
            "name": name,
            "type": self.kind(),
            "config": config,
            "path_mapping": [self.rule(name)],
            "mode": "proxy",
        })
    }

    /// Stores the login and creates [`Store::backend`] with `settings` merged into it; returns its id.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn federate(&self, rest: &Rest, name: &str, settings: Value) -> Result<String> {
        rest.put_data(&format!("infra/{name}"), self.credential()?).await?;
        let mut backend = self.backend(name);
        merge(&mut backend, &settings);
        rest.configure(backend).await
    }

    /// [`Store::federate`] in mode `sync`, by no clock; returns its id and the report of its first run.
    ///
    /// # Errors
    /// If it is refused, or the run does not end.
    pub async fn sync(&self, rest: &Rest, name: &str, settings: Value) -> Result<(String, Value)> {
        let mut synced = json!({ "mode": "sync", "sync_interval": "1h" });
        merge(&mut synced, &settings);
        let id = self.federate(rest, name, synced).await?;
        let runs = format!("/v1/federation/backends/{id}/syncs");
        let run = wait::until("the first run has begun", async || {
            Ok(rest.get(&runs).await?.ok()?["syncs"][0]["run_id"].as_str().map(str::to_owned))
        });
        let report = rest.ended(&id, &run.await?).await?;
        Ok((id, report))
    }

    /// Gives the secret of this name a new version, and makes it if need be.
    ///
    /// # Errors
    /// If the store does not take it.
    pub async fn put(&self, name: &str, value: &str) -> Result<()> {
        match self {
            Store::Aws(aws) => {
                let admin = aws.moto.client()?;
                match admin.describe_secret(name).await {
                    Ok(_) => admin.put_secret(name, value).await.map(drop),
                    Err(_) => admin.create_secret(name, value, &[]).await.map(drop),
                }
            }
            Store::Azure(azure) => {
                let before = azure.fake.current(name).map(|(_, draft)| draft);
                azure.fake.put_with(name, Draft { value: value.into(), ..before.unwrap_or_default() });
                Ok(())
            }
            Store::Gcp(gcp) => gcp.fake.secrets().put(name, value).map(drop),
            Store::Drongo(_) => self.put_bytes(name, value.as_bytes()).await,
        }
    }

    /// [`Store::put`] of what is no text. Azure has only texts.
    ///
    /// # Errors
    /// If the store does not take it.
    pub async fn put_bytes(&self, name: &str, value: &[u8]) -> Result<()> {
        match self {
            Store::Aws(aws) => {
                let body = json!({ "Name": name, "SecretBinary": STANDARD.encode(value) });
                aws.moto.client()?.call("CreateSecret", body).await.map(drop)
            }
            Store::Azure(_) => bail!("a vault's values are texts"),
            Store::Gcp(gcp) => gcp.fake.secrets().put(name, value).map(drop),
            Store::Drongo(drongo) => {
                let admin = drongo.admin()?;
                if admin.call(reqwest::Method::GET, &format!("secrets/{name}"), None).await.is_err() {
                    admin.create_secret(name, &[]).await?;
                }
                admin.add_version(name, value).await.map(drop)
            }
        }
    }

    /// Replaces the custom metadata of a secret: tags, or annotations.
    ///
    /// # Errors
    /// If there is no such secret, or the store does not take them.
    pub async fn set_metadata(&self, name: &str, metadata: &[(&str, &str)]) -> Result<()> {
        match self {
            Store::Aws(aws) => aws.moto.client()?.tag_secret(name, metadata).await,
            Store::Azure(azure) => {
                let tags = metadata.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
                azure.fake.change(name, |draft| draft.tags = tags.collect());
                Ok(())
            }
            Store::Gcp(gcp) => gcp.fake.secrets().set_annotations(name, metadata),
            Store::Drongo(_) => bail!("drongo has no annotations"),
        }
    }

    /// Deletes a secret as its users do: softly, where the store can.
    ///
    /// # Errors
    /// If there is no such secret.
    pub async fn delete(&self, name: &str) -> Result<()> {
        match self {
            Store::Aws(aws) => aws.moto.client()?.delete_secret(name).await,
            Store::Azure(azure) => {
                azure.fake.delete(name);
                Ok(())
            }
            Store::Gcp(gcp) => gcp.fake.secrets().delete(name),
            Store::Drongo(drongo) => drongo.admin()?.delete_secret(name).await,
        }
    }

    /// Lets the next listing show everything that was done before it. Azure dates changes to the second, so what was
    /// changed in the second of a listing is read once more after the next one; its clock is moved on.
    pub fn settle(&self) {
        if let Store::Azure(azure) = self {
            azure.fake.advance(Duration::from_secs(3));
        }
    }

    /// How often values were read so far.
    ///
    /// # Errors
    /// If the store does not tell.
    pub fn values_read(&self) -> Result<usize> {
        match self {
            Store::Azure(azure) => Ok(azure.fake.calls(azure::Operation::Get)),
            Store::Gcp(gcp) => Ok(gcp.fake.calls(gcp::Operation::AccessVersion)),
            Store::Aws(_) | Store::Drongo(_) => bail!("they do not tell reads from other calls"),
        }
    }

    /// How many requests the store's API has had so far, those of logins apart where they can be told apart.
    ///
    /// # Errors
    /// If the store does not count.
    pub fn calls(&self) -> Result<usize> {
        match self {
            Store::Aws(aws) => aws.moto.calls(),
            Store::Azure(azure) => {
                let requests = azure.fake.requests();
                Ok(requests.iter().filter(|request| request.contains(" /secrets")).count())
            }
            Store::Gcp(gcp) => {
                use gcp::Operation::{AccessVersion, GetSecret, GetVersion, ListSecrets, ListVersions};
                let operations = [AccessVersion, GetSecret, GetVersion, ListSecrets, ListVersions];
                Ok(operations.into_iter().map(|operation| gcp.fake.calls(operation)).sum())
            }
            Store::Drongo(_) => bail!("drongo does not count"),
        }
    }

    /// The fake of Azure that this is.
    ///
    /// # Errors
    /// If it is another store.
    pub fn azure_fake(&self) -> Result<&AzureFake> {
        let Store::Azure(azure) = self else { bail!("{} is not Azure", self.kind()) };
        Ok(&azure.fake)
    }

    /// The fake of GCP that this is.
    ///
    /// # Errors
    /// If it is another store.
    pub fn gcp_fake(&self) -> Result<&gcp::Gcp> {
        let Store::Gcp(gcp) = self else { bail!("{} is not the fake of GCP", self.kind()) };
        Ok(&gcp.fake)
    }

    /// The moto that this is.
    ///
    /// # Errors
    /// If it is another store.
    pub fn moto(&self) -> Result<&Moto> {
        let Store::Aws(aws) = self else { bail!("{} is not AWS", self.kind()) };
        Ok(&aws.moto)
    }
}

/// The answer of [`Rest::get`] once it is of a copy.
///
/// # Errors
/// If it never is.
pub async fn copied(rest: &Rest, path: &str) -> Result<Value> {
    let mut last = String::new();
    let answer = wait::until("the node serves the copy", async || {
        let answer = rest.get(path).await?;
        last.clone_from(&answer.text);
        Ok((answer.json["source"] == "sync").then_some(answer.json))
    })
    .await;
    answer.with_context(|| format!("{path}: {last}"))
}
