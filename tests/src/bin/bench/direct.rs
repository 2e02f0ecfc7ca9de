//! The least that a program could do with the store of a cloud: the requests that it needs, and nothing else.

use anyhow::{Context as _, Result, ensure};
use aws_credential_types::Credentials;
use aws_sdk_secretsmanager::config::retry::RetryConfig;
use aws_sdk_secretsmanager::config::timeout::TimeoutConfig;
use aws_sdk_secretsmanager::config::{
    BehaviorVersion, Region, SharedAsyncSleep, StalledStreamProtectionConfig,
};
use aws_sdk_secretsmanager::types::{Filter, FilterNameStringType};
use aws_smithy_async::rt::sleep::TokioSleep;
use aws_smithy_async::time::SystemTimeSource;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use scaivault_backends::egress::{Egress, Policy};
use scaivault_domain::backend::{Endpoint, Tls};
use scaivault_tests::http;
use scaivault_tests::servers::moto::{self, AccessKey};
use serde_json::Value;

use crate::bulk::READS;
use crate::load::{Http, Reader};

/// The most that a page of ListSecrets has.
const AWS_PAGE: i32 = 100;
/// The most that BatchGetSecretValue takes.
const AWS_BATCH: usize = 20;

/// A caller of a store.
#[derive(Clone)]
pub(crate) enum Client {
    /// The official SDK over the HTTP client that ScaiVault has, built by hand.
    Aws(aws_sdk_secretsmanager::Client),
    /// reqwest, with the token at hand.
    Bearer {
        http: reqwest::Client,
        /// Of the resource that secrets lie in.
        base: String,
        token: String,
        api: Api,
    },
}

/// Which paths there are, and how a listing goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Api {
    Azure,
    Gcp,
}

impl Client {
    /// With the keys of a session.
    pub(crate) fn aws(endpoint: &str, key: &AccessKey) -> Result<Client> {
        let endpoint = Endpoint::parse("endpoint", endpoint)?;
        let egress = Egress::new(Policy::default().with_loopback());
        let http = scaivault_backends::aws_http_client(&endpoint, &Tls::default(), &egress)?;
        let session = key.session_token.clone();
        let config = aws_sdk_secretsmanager::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(moto::REGION))
            .endpoint_url(endpoint.to_string())
            .http_client(http)
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .sleep_impl(SharedAsyncSleep::new(TokioSleep::new()))
            .time_source(SystemTimeSource::new())
            .credentials_provider(Credentials::new(&key.id, &key.secret, session, None, "bench"))
            .build();
        Ok(Client::Aws(aws_sdk_secretsmanager::Client::from_conf(config)))
    }

    /// With a token.
    pub(crate) fn bearer(api: Api, base: String, token: String) -> Result<Client> {
        Ok(Client::Bearer { http: http::client(None)?, base, token, api })
    }

    /// What is asked for when a secret is read, and what is shown for it; none if requests are signed one by one.
    pub(crate) fn request(&self, name: &str) -> Option<(String, (&'static str, String))> {
        let Client::Bearer { base, token, api, .. } = self else { return None };
        Some((api.read(&format!("{base}/secrets/{name}")), authorization(token)))
    }

    /// Who reads one secret again and again.
    pub(crate) fn reader(&self, name: &str) -> Result<Caller> {
        match self {
            Client::Aws(client) => Ok(Caller::Aws { client: client.clone(), name: name.to_owned() }),
            Client::Bearer { http, .. } => {
                let (url, header) = self.request(name).context("it has a token")?;
                Ok(Caller::Http(Http { client: http.clone(), url, header }))
            }
        }
    }

    /// Lists the secrets below `folder`, which stands for nothing where there are no folders, reads each and parses what
    /// comes. Returns how many there were.
    pub(crate) async fn list_and_read(&self, folder: &str) -> Result<usize> {
        match self {
            Client::Aws(client) => aws_list_and_read(client, folder).await,
            Client::Bearer { http, base, token, api } => {
                let get = async |url: &str| {
                    let (name, value) = authorization(token);
                    let answer = http.get(url).header(name, value).send().await?;
                    let answer = answer.error_for_status()?.bytes().await?;
                    anyhow::Ok(serde_json::from_slice::<Value>(&answer)?)
                };
                let mut secrets = Vec::new();
                let mut next = Some(api.first_page(base));
                while let Some(page) = next {
                    let mut page = get(&page).await?;
                    next = api.next_page(base, &page);
                    let items = page[api.items()].as_array_mut().context("a page without a list")?;
                    secrets.extend(items.drain(..).filter_map(|item| api.secret(base, &item)));
                }
                let reads = secrets.iter().map(async |secret| {
                    let answer = get(&api.read(secret)).await?;
                    anyhow::Ok(answer["value"].is_string() || answer["payload"]["data"].is_string())
                });
                let read: Vec<bool> = stream::iter(reads).buffer_unordered(READS).try_collect().await?;
                ensure!(read.iter().all(|is_there| *is_there), "an answer without a value");
                Ok(read.len())
            }
        }
    }
}

async fn aws_list_and_read(client: &aws_sdk_secretsmanager::Client, folder: &str) -> Result<usize> {
    let filter = Filter::builder().key(FilterNameStringType::Name).values(folder).build();
    let mut names = Vec::new();
    let mut after = None;
    loop {
        let call = client.list_secrets().max_results(AWS_PAGE).filters(filter.clone());
        let page = call.set_next_token(after).send().await?;
        names.extend(page.secret_list.unwrap_or_default().into_iter().filter_map(|secret| secret.name));
        after = page.next_token.filter(|token| !token.is_empty());
        if after.is_none() {
            break;
        }
    }
    let reads = names.chunks(AWS_BATCH).map(async |names| {
        let call = client.batch_get_secret_value().set_secret_id_list(Some(names.to_vec()));
        let values = call.send().await?.secret_values.unwrap_or_default();
        anyhow::Ok(values.iter().filter(|value| value.secret_string().is_some()).count())
    });
    let read: Vec<usize> = stream::iter(reads).buffer_unordered(READS).try_collect().await?;
    Ok(read.iter().sum())
}

fn authorization(token: &str) -> (&'static str, String) {
    ("authorization", format!("Bearer {token}"))
}

impl Api {
    fn read(self, secret: &str) -> String {
        match self {
            Api::Azure => format!("{secret}?api-version=7.4"),
            Api::Gcp => format!("{secret}/versions/latest:access"),
        }
    }

    fn first_page(self, base: &str) -> String {
        match self {
            Api::Azure => format!("{base}/secrets?maxresults=25&api-version=7.4"),
            Api::Gcp => format!("{base}/secrets?pageSize=1000"),
        }
    }

    fn next_page(self, base: &str, page: &Value) -> Option<String> {
        match self {
            Api::Azure => page["nextLink"].as_str().map(str::to_owned),
            Api::Gcp => {
                let token = page["nextPageToken"].as_str().filter(|token| !token.is_empty())?;
                Some(format!("{}&pageToken={token}", self.first_page(base)))
            }
        }
    }

    fn items(self) -> &'static str {
        match self {
            Api::Azure => "value",
            Api::Gcp => "secrets",
        }
    }

    /// Where a listed secret is.
    fn secret(self, base: &str, item: &Value) -> Option<String> {
        match self {
            Api::Azure => item["id"].as_str().map(str::to_owned),
            Api::Gcp => Some(format!("{base}/secrets/{}", item["name"].as_str()?.rsplit('/').next()?)),
        }
    }
}

/// Reads one secret, by whatever way.
pub(crate) enum Caller {
    Http(Http),
    Aws { client: aws_sdk_secretsmanager::Client, name: String },
}

impl Reader for Caller {
    async fn read(&mut self) -> Result<()> {
        match self {
            Caller::Http(http) => http.read().await,
            Caller::Aws { client, name } => {
                let answer = client.get_secret_value().secret_id(name.as_str()).send().await?;
                ensure!(answer.secret_string.is_some(), "an answer without a value");
                Ok(())
            }
        }
    }
}
