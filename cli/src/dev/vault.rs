//! The Vault of whoever tries ScaiVault out: the one that `VAULT_ADDR` and `VAULT_TOKEN` name, as they do for the
//! command `vault`, becomes the backend `vault` of dev mode.
//!
//! The token becomes a local secret and is shown nowhere. What keeps the Vault from being federated is told in one
//! line, and keeps dev mode from nothing.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use reqwest::header::HeaderValue;
use reqwest::{Response, StatusCode};
use scaivault_backends::{Egress, vault_client};
use scaivault_domain::backend::{Endpoint, Tls, VaultTarget};
use scaivault_domain::mapping::MAX_RULES;
use scaivault_domain::path::SecretPath;
use scaivault_proto::federation::v1::federation_service_client::FederationServiceClient;
use scaivault_proto::federation::v1::{
    Backend, CreateBackendRequest, HashicorpVaultConfig, ListBackendsRequest, Mode, PathRule,
    UpdateBackendRequest, backend,
};
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_proto::secrets::v1::{GetRequest, ListRequest, PutRequest};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint as Address};

use super::{Dev, Operator};

/// What the backend is called.
const BACKEND: &str = "vault";
/// Where the token is kept.
const CREDENTIAL: &str = "infra/vault/token";
/// What the paths of the Vault begin with.
const FOLDER: &str = "external/vault";

/// How long the Vault may take to tell its mounts.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long may be looked for a secret to show.
const LOOKING: Duration = Duration::from_secs(10);
/// Most bytes of what the Vault tells of its mounts.
const LIMIT: usize = 4 << 20;
/// How deep, and among how many secrets of a folder, one is looked for.
const DEPTH: usize = 8;
const CANDIDATES: usize = 3;

/// A Vault, and a token for it.
#[derive(Debug)]
pub struct Vault {
    target: VaultTarget,
    token: SecretString,
}

/// What became of it.
#[derive(Debug)]
pub struct Federated {
    endpoint: String,
    rules: Vec<PathRule>,
    left_out: Vec<String>,
    /// A command that works, or why there is none.
    example: anyhow::Result<String>,
}

/// The mounts of a Vault that are KV stores.
#[derive(Debug, PartialEq, Eq)]
struct Mounts {
    served: Vec<String>,
    left_out: Vec<String>,
}

#[derive(Deserialize)]
struct MountsAnswer {
    data: MountsData,
}

#[derive(Deserialize)]
struct MountsData {
    secret: BTreeMap<String, MountAnswer>,
}

#[derive(Deserialize)]
struct MountAnswer {
    #[serde(rename = "type")]
    kind: String,
}

impl Vault {
    /// The Vault that these variables name; `None` if they name none.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Option<Vault>> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let Some(addr) = variable("VAULT_ADDR") else { return Ok(None) };
        let token = variable("VAULT_TOKEN").context("VAULT_ADDR is set and VAULT_TOKEN is not")?;
        let endpoint = Endpoint::parse("endpoint", &addr).map_err(|error| {
            let detail = error.violations.first().map_or("cannot be used", |violation| &*violation.detail);
            anyhow::anyhow!("VAULT_ADDR {detail}")
        })?;
        let ca_cert = variable("VAULT_CACERT")
            .map(|file| fs::read_to_string(&file).with_context(|| format!("cannot read VAULT_CACERT {file}")))
            .transpose()?;
        let target = VaultTarget {
            endpoint,
            namespace: variable("VAULT_NAMESPACE"),
            tls: Tls {
                ca_cert,
                verify: !variable("VAULT_SKIP_VERIFY").map_or(Ok(false), |text| flag(&text))?,
            },
            kv: None,
        };
        Ok(Some(Vault { target, token: token.into() }))
    }

    /// Makes it a backend of the running planes, or brings the one that it is up to date.
    ///
    /// # Errors
    /// Why it cannot be read here, in one line.
    pub async fn federate(&self, dev: &Dev) -> anyhow::Result<Federated> {
        let mounts = self.mounts(&dev.egress).await?;
        let operator = dev.operator()?;
        let node = Address::from_shared(format!("http://{}", dev.node))?.connect().await?;
        let mut federation = FederationServiceClient::with_interceptor(node.clone(), operator.clone());
        let mut secrets = SecretsServiceClient::with_interceptor(node, operator);

        let listed = federation.list_backends(ListBackendsRequest { page_size: 1000, ..Default::default() });
        let backends = listed.await.map_err(refused)?.into_inner().backends;
        let existing = backends.into_iter().find(|backend| backend.name == BACKEND);
        if let Some(existing) = &existing {
            self.check_ours(existing)?;
        }
        let token = serde_json::json!({ "token": self.token.expose_secret() });
        let put =
            PutRequest { path: CREDENTIAL.into(), value: token.to_string().into(), ..Default::default() };
        secrets.put(put).await.map_err(refused)?;

        let new = self.backend(&mounts);
        let made = match existing {
            None => {
                let request = CreateBackendRequest { backend: Some(new), ..Default::default() };
                federation.create_backend(request).await.map_err(refused)?.into_inner().backend
            }
            Some(existing) => {
                let request = brought_up_to_date(existing, new);
                federation.update_backend(request).await.map_err(refused)?.into_inner().backend
            }
        };
        let made = made.context("ScaiVault answered without a backend")?;
        let example = tokio::time::timeout(LOOKING, example(&mut secrets, &made.rules)).await;
        Ok(Federated {
            endpoint: self.target.endpoint.to_string(),
            rules: made.rules,
            left_out: mounts.left_out,
            example: example.unwrap_or_else(|_| Err(anyhow::anyhow!("it takes too long to answer"))),
        })
    }

    /// Asks which KV stores the token sees.
    async fn mounts(&self, egress: &Egress) -> anyhow::Result<Mounts> {
        let client = vault_client(&self.target, egress)?;
        let url = format!("{}/v1/sys/internal/ui/mounts", self.target.endpoint);
        let mut token = HeaderValue::from_str(self.token.expose_secret())
            .ok()
            .context("VAULT_TOKEN is no text that a header can carry")?;
        token.set_sensitive(true);
        let mut request = client.get(url).header("x-vault-token", token).header("x-vault-request", "true");
        if let Some(namespace) = &self.target.namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        let answer = request.timeout(PATIENCE).send().await.map_err(|error| unreachable(&error))?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::FORBIDDEN => {
                bail!("it refuses VAULT_TOKEN, or does not tell it which mounts there are")
            }
            StatusCode::SERVICE_UNAVAILABLE => bail!("it is sealed, or not ready yet"),
            status => bail!("it answers {} when asked for its mounts: is it a Vault?", status.as_u16()),
        }
        let answer: MountsAnswer = serde_json::from_slice(&body(answer).await?)
            .ok()
            .context("its answer is none of a Vault when asked for its mounts")?;
        let mounts = Mounts::of(answer.data.secret);
        ensure!(!mounts.served.is_empty(), mounts.why_none());
        Ok(mounts)
    }

    fn backend(&self, mounts: &Mounts) -> Backend {
        let VaultTarget { endpoint, namespace, tls, kv: _ } = &self.target;
        let rule = |mount: &String| PathRule {
            pattern: format!("{FOLDER}/{mount}/**"),
            template: format!("{mount}/**"),
            ..Default::default()
        };
        Backend {
            name: BACKEND.into(),
            config: Some(backend::Config::HashicorpVault(HashicorpVaultConfig {
                endpoint: endpoint.to_string(),
                auth_method: "token".into(),
                auth_config_path: CREDENTIAL.into(),
                namespace: namespace.clone().unwrap_or_default(),
                ca_cert: tls.ca_cert.clone().unwrap_or_default(),
                tls_verify: Some(tls.verify),
                // The node is this very process.
                allow_static_on_nodes: true,
                ..Default::default()
            })),
            rules: mounts.served.iter().map(rule).collect(),
            mode: Mode::Proxy.into(),
            ..Default::default()
        }
    }

    /// Refuses to touch a backend that somebody made for something else, and to send the token to another server.
    fn check_ours(&self, existing: &Backend) -> anyhow::Result<()> {
        let Some(backend::Config::HashicorpVault(config)) = &existing.config else {
            bail!("there is a backend `{BACKEND}` of another kind, which stays as it is");
        };
        ensure!(
            config.auth_config_path == CREDENTIAL,
            "there is a backend `{BACKEND}` with another credential, which stays as it is"
        );
        ensure!(
            config.endpoint == self.target.endpoint.to_string(),
            "the backend `{BACKEND}` is of {}: remove it first (`scaivault backend remove {BACKEND}`)",
            config.endpoint
        );
        Ok(())
    }
}

/// The change that gives `existing` the settings of `new`. Its own rules stay, and stay in front.
fn brought_up_to_date(existing: Backend, new: Backend) -> UpdateBackendRequest {
    let mut rules = existing.rules;
    let missing = |rule: &PathRule| !rules.iter().any(|own| own.pattern == rule.pattern);
    let added: Vec<PathRule> = new.rules.into_iter().filter(missing).collect();
    rules.extend(added);
    rules.truncate(MAX_RULES);
    UpdateBackendRequest {
        backend: Some(Backend { id: existing.id, config: new.config, rules, ..Default::default() }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["hashicorp_vault".into(), "rules".into()] }),
        ..Default::default()
    }
}

impl Mounts {
    fn of(mounts: BTreeMap<String, MountAnswer>) -> Mounts {
        let (mut served, mut left_out) = (Vec::new(), Vec::new());
        for (path, _) in mounts.into_iter().filter(|(_, mount)| matches!(&*mount.kind, "kv" | "generic")) {
            let path = path.trim_end_matches('/').to_owned();
            let is_path = SecretPath::check(&format!("{FOLDER}/{path}")).is_ok();
            if is_path && served.len() < MAX_RULES { served.push(path) } else { left_out.push(path) }
        }
        Mounts { served, left_out }
    }

    fn why_none(&self) -> &'static str {
        if self.left_out.is_empty() {
            "VAULT_TOKEN sees no KV mount there"
        } else {
            "no KV mount there has a name that a path can have"
        }
    }
}

/// As the command `vault` reads it.
fn flag(text: &str) -> anyhow::Result<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => bail!("VAULT_SKIP_VERIFY is neither true nor false"),
    }
}

/// Why there is no answer: what is at the bottom of it, without the URL.
fn unreachable(error: &reqwest::Error) -> anyhow::Error {
    if error.is_timeout() {
        return anyhow::anyhow!("it does not answer");
    }
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    match causes.last() {
        Some(cause) => anyhow::anyhow!("it cannot be reached: {cause}"),
        None => anyhow::anyhow!("it cannot be reached"),
    }
}

async fn body(mut answer: Response) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| unreachable(&error))? {
        ensure!(body.len() + chunk.len() <= LIMIT, "its answer is too long when asked for its mounts");
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What ScaiVault refused, which quotes nothing of what was sent.
fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

type Secrets = SecretsServiceClient<InterceptedService<Channel, Operator>>;

/// A command that shows something of the Vault. It was tried.
async fn example(secrets: &mut Secrets, rules: &[PathRule]) -> anyhow::Result<String> {
    let mut listed = None;
    let mut fault = None;
    for folder in rules.iter().filter_map(|rule| rule.pattern.strip_suffix("/**")) {
        match readable(secrets, folder).await {
            Ok(Some(path)) => return Ok(format!("scaivault get {path}")),
            Ok(None) => listed = listed.or(Some(folder)),
            Err(error) => fault = fault.or(Some(error)),
        }
    }
    match (listed, fault) {
        (_, Some(fault)) => Err(fault),
        (Some(folder), None) => Ok(format!("scaivault list {folder}/")),
        (None, None) => bail!("no rule of the backend is about a folder"),
    }
}

/// A secret below `folder` that can be read, where the first few entries of each folder lead to one.
async fn readable(secrets: &mut Secrets, folder: &str) -> anyhow::Result<Option<String>> {
    let mut folder = format!("{folder}/");
    let mut fault = None;
    for _ in 0..DEPTH {
        let request = ListRequest { folder: folder.clone(), ..Default::default() };
        let keys = secrets.list(request).await.map_err(refused)?.into_inner().keys;
        for key in keys.iter().filter(|key| !key.ends_with('/')).take(CANDIDATES) {
            let path = format!("{folder}{key}");
            match secrets.get(GetRequest { path: path.clone(), ..Default::default() }).await {
                Ok(_) => return Ok(Some(path)),
                Err(status) => fault = fault.or(Some(refused(status))),
            }
        }
        let Some(deeper) = keys.iter().find(|key| key.ends_with('/')) else { break };
        folder.push_str(deeper);
    }
    fault.map_or(Ok(None), Err)
}

impl fmt::Display for Federated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Federated { endpoint, rules, left_out, example } = self;
        writeln!(
            f,
            "Your Vault at {endpoint} is the backend `{BACKEND}`. What its token may read is here:\n"
        )?;
        for rule in rules {
            writeln!(f, "  {:<34} {}", rule.pattern, rule.template)?;
        }
        writeln!(f)?;
        match example {
            Ok(example) => writeln!(f, "  {example}")?,
            Err(why) => writeln!(f, "No secret was found to show: {why:#}.")?,
        }
        if !left_out.is_empty() {
            let names: Vec<String> = left_out.iter().map(|name| format!("{name:?}")).collect();
            let limits = format!("a path has only A-Z a-z 0-9 . _ - and a backend {MAX_RULES} rules");
            writeln!(f, "\nNot served: {}; {limits}.", names.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vault(variables: &[(&str, &str)]) -> anyhow::Result<Option<Vault>> {
        Vault::from_variables(|name| {
            variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_an_address_there_is_no_vault() {
        assert!(vault(&[]).unwrap().is_none());
        assert!(vault(&[("VAULT_ADDR", ""), ("VAULT_TOKEN", "t")]).unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_used_is_named_without_the_token() {
        let addr = ("VAULT_ADDR", "https://vault:8200");
        for (variables, named) in [
            (&[addr][..], "VAULT_TOKEN is not"),
            (&[("VAULT_ADDR", "vault:8200"), ("VAULT_TOKEN", "s.secret")], "VAULT_ADDR begins"),
            (&[addr, ("VAULT_TOKEN", "s.secret"), ("VAULT_SKIP_VERIFY", "si")], "VAULT_SKIP_VERIFY"),
            (&[addr, ("VAULT_TOKEN", "s.secret"), ("VAULT_CACERT", "/is/not/there")], "VAULT_CACERT"),
        ] {
            let error = format!("{:#}", vault(variables).unwrap_err());
            assert!(error.contains(named) && !error.contains("s.secret"), "{error}");
        }
    }

    #[test]
    fn the_settings_are_those_of_the_command_vault() {
        let set = [
            ("VAULT_ADDR", "https://vault:8200/"),
            ("VAULT_TOKEN", "s.secret"),
            ("VAULT_NAMESPACE", "team"),
            ("VAULT_SKIP_VERIFY", "1"),
        ];
        let vault = vault(&set).unwrap().unwrap();
        assert_eq!(vault.target.endpoint.to_string(), "https://vault:8200");
        assert_eq!(vault.target.namespace.as_deref(), Some("team"));
        assert!(!vault.target.tls.verify);
        assert!(!format!("{vault:?}").contains("s.secret"));
    }

    #[test]
    fn kv_mounts_whose_names_are_no_paths_are_left_out() {
        let mount = |kind: &str| MountAnswer { kind: kind.into() };
        let mounts = BTreeMap::from([
            ("secret/".into(), mount("kv")),
            ("team/eu/kv/".into(), mount("generic")),
            ("with space/".into(), mount("kv")),
            ("pki/".into(), mount("pki")),
        ]);
        let expected = Mounts {
            served: vec!["secret".into(), "team/eu/kv".into()],
            left_out: vec!["with space".into()],
        };
        assert_eq!(Mounts::of(mounts), expected);
    }

    #[test]
    fn rules_that_somebody_put_in_front_stay_there() {
        let rule = |pattern: &str| PathRule { pattern: pattern.into(), ..Default::default() };
        let backend = |rules: &[&str]| Backend {
            rules: rules.iter().map(|pattern| rule(pattern)).collect(),
            ..Default::default()
        };
        let existing = backend(&["external/vault/secret/app/**", "external/vault/secret/**"]);
        let change =
            brought_up_to_date(existing, backend(&["external/vault/kv/**", "external/vault/secret/**"]));
        let patterns: Vec<String> =
            change.backend.unwrap().rules.into_iter().map(|rule| rule.pattern).collect();
        assert_eq!(
            patterns,
            ["external/vault/secret/app/**", "external/vault/secret/**", "external/vault/kv/**"]
        );
    }
}
