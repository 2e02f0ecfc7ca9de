//! What is measured: both planes with secrets and a backend, and the servers that they are compared with.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_proto::secrets::v1::GetRequest;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_tests::planes::{Authenticated, Bearer, Rest};
use scaivault_tests::process::Process;
use scaivault_tests::servers::openbao::{self, OpenBao};
use scaivault_tests::{ports, wait};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tonic::transport::Endpoint;

use crate::cpu::{self, Pinning};

/// The header with a token of the Vault API.
pub(crate) const VAULT_TOKEN: &str = "x-vault-token";
/// Bytes of a value.
const SIZE: usize = 1024;
const CREDENTIAL: &str = "infra/hashicorp/approle";

/// A server under load.
pub(crate) struct Server {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    process: Process,
}

impl Server {
    /// The process that is charged for its requests.
    pub(crate) fn process(&self) -> u32 {
        self.process.id()
    }
}

/// Everything that runs during the bench.
pub(crate) struct Subjects {
    /// Both planes in one process: what it uses is the price of the whole path.
    pub(crate) scaivault: Server,
    /// The operator's token.
    pub(crate) token: String,
    /// A bare tonic service.
    pub(crate) tonic: Server,
    /// A bare axum handler.
    pub(crate) axum: Server,
    /// axum and reqwest in front of OpenBao.
    pub(crate) passthrough: Server,
    /// The remote store.
    pub(crate) openbao: OpenBao,
    /// A token of it from the same login as ScaiVault's: the root token would be checked with less work.
    pub(crate) vault_token: String,
    _folder: TempDir,
}

/// The secrets that `readers` read, each its own: the node makes one backend call of equal reads.
pub(crate) fn name(reader: usize) -> String {
    format!("bench/{reader:02}")
}

impl Subjects {
    /// Starts and seeds everything, for at most so many readers.
    pub(crate) async fn start(readers: usize, pinning: Pinning) -> Result<Subjects> {
        let folder = tempfile::Builder::new().prefix("bench-").tempdir()?;
        let openbao = OpenBao::start(openbao::Options::default()).await?;
        let (scaivault, token) = planes(folder.path(), pinning).await?;
        let rest = Rest::new(format!("http://{}", scaivault.address), &token)?;
        let vault_token = seed(&openbao, &rest, readers).await?;

        // The floors give the bytes that ScaiVault gave.
        let answer = folder.path().join("answer.json");
        fs::write(&answer, rest.get(&format!("/v1/secrets/{}", name(0))).await?.text)?;
        let message = folder.path().join("answer.bin");
        let asked = GetRequest { path: name(0), ..Default::default() };
        fs::write(&message, grpc(scaivault.address, &token)?.get(asked).await?.into_inner().encode_to_vec())?;

        let floor = async |mode: &'static str, argument: String| {
            let address = loopback();
            let args = [mode, &address.to_string(), &argument];
            let log = folder.path().join(mode);
            let process = cpu::serve(&env::current_exe()?, &args, pinning, &log)?;
            listening(address, process).await
        };
        Ok(Subjects {
            tonic: floor("serve-tonic", message.display().to_string()).await?,
            axum: floor("serve-axum", answer.display().to_string()).await?,
            passthrough: floor("serve-passthrough", openbao.addr()).await?,
            scaivault,
            token,
            openbao,
            vault_token,
            _folder: folder,
        })
    }
}

/// A gRPC client with a connection of its own.
pub(crate) fn grpc(address: SocketAddr, token: &str) -> Result<SecretsServiceClient<Authenticated>> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    Ok(SecretsServiceClient::with_interceptor(channel, Bearer::new(token)?))
}

async fn planes(folder: &Path, pinning: Pinning) -> Result<(Server, String)> {
    let (address, data) = (loopback(), folder.join("planes"));
    let listen = address.to_string();
    let args = ["dev", "--listen", &listen, "--data-dir", &data.display().to_string()];
    let server =
        listening(address, cpu::serve(&program()?, &args, pinning, &folder.join("planes.log"))?).await?;
    let token = fs::read_to_string(data.join("operator-token"))?.trim().to_owned();
    let rest = Rest::new(format!("http://{listen}"), &token)?;
    wait::until("the node is ready", async || Ok((rest.get("/readyz").await?.status == 200).then_some(())))
        .await?;
    Ok((server, token))
}

/// `scaivault`, built with this program.
fn program() -> Result<PathBuf> {
    let program = env::current_exe()?.with_file_name("scaivault");
    ensure!(program.is_file(), "{} is not built: use `cargo xtask bench`", program.display());
    Ok(program)
}

/// Returns a token of OpenBao.
async fn seed(openbao: &OpenBao, rest: &Rest, readers: usize) -> Result<String> {
    let value = json!({ "value": "x".repeat(SIZE - r#"{"value":""}"#.len()) });
    let admin = openbao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    for reader in 0..readers {
        admin.put("secret", &name(reader), value.clone()).await?;
        rest.put(&format!("/v1/secrets/{}", name(reader)), json!({ "data": value })).await?.ok()?;
    }
    admin.write_policy("scaivault", r#"path "secret/*" { capabilities = ["read"] }"#).await?;
    admin.enable_auth("approle", "approle").await?;
    let settings = json!({ "token_policies": ["scaivault"], "token_ttl": "1h" });
    let role = admin.create_approle("approle", "scaivault", settings).await?;
    let credential = json!({ "role_id": role.role_id, "secret_id": role.secret_id });
    rest.put(&format!("/v1/secrets/{CREDENTIAL}"), json!({ "data": credential })).await?.ok()?;
    let backend = json!({
        "name": "openbao",
        "type": "hashicorp-vault",
        "config": { "endpoint": openbao.addr(), "auth_method": "approle", "auth_config_path": CREDENTIAL },
        "path_mapping": { "external/hashicorp/**": "secret/data/**" },
        "mode": "proxy",
    });
    rest.post("/v1/federation/backends", backend).await?.ok()?;
    let login = admin.call(Method::POST, "auth/approle/login", Some(credential)).await?;
    Ok(login["auth"]["client_token"].as_str().context("a login without a token")?.to_owned())
}

async fn listening(address: SocketAddr, mut process: Process) -> Result<Server> {
    wait::until("the server listens", async || {
        process.ensure_running()?;
        Ok(TcpStream::connect(address).await.ok().map(drop))
    })
    .await
    .with_context(|| format!("at {address}"))?;
    Ok(Server { address, process })
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, ports::free()).into()
}
