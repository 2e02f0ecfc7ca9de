//! What is measured: both planes with secrets and a backend, and the servers that they are compared with.

use std::net::SocketAddr;
use std::path::Path;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_proto::secrets::v1::GetRequest;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_tests::planes::{Authenticated, Bearer, Rest};
use scaivault_tests::servers::openbao::{self, Admin, AppRole, OpenBao};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tonic::transport::Endpoint;

use crate::cpu::Pinning;
use crate::planes::{ControlPlane, Server, loopback};

/// The header with a token of the Vault API.
pub(crate) const VAULT_TOKEN: &str = "x-vault-token";
/// Bytes of a value.
const SIZE: usize = 1024;
/// `scan` is what lets OpenBao list a whole tree at once; Vault knows nothing of it.
const POLICY: &str = r#"path "secret/*" { capabilities = ["read", "list", "scan"] }"#;

/// Where secrets are read through the backend.
pub(crate) const PROXIED: &str = "external/hashicorp";
/// Where copies of the same secrets are.
pub(crate) const COPIED: &str = "copies";

/// The remote store.
pub(crate) struct Store {
    pub(crate) openbao: OpenBao,
    pub(crate) admin: Admin,
    /// What ScaiVault logs in with.
    pub(crate) role: AppRole,
    /// A token of it from the same login as ScaiVault's: the root token would be checked with less work.
    pub(crate) token: String,
}

impl Store {
    /// Starts an empty one.
    pub(crate) async fn start() -> Result<Store> {
        let openbao = OpenBao::start(openbao::Options::default()).await?;
        let admin = openbao.client()?;
        admin.enable_kv("secret", KvVersion::V2).await?;
        admin.write_policy("scaivault", POLICY).await?;
        admin.enable_auth("approle", "approle").await?;
        let settings = json!({ "token_policies": ["scaivault"], "token_ttl": "2h" });
        let role = admin.create_approle("approle", "scaivault", settings).await?;
        let credential = json!({ "role_id": role.role_id, "secret_id": role.secret_id });
        let login = admin.call(Method::POST, "auth/approle/login", Some(credential)).await?;
        let token = login["auth"]["client_token"].as_str().context("a login without a token")?.to_owned();
        Ok(Store { openbao, admin, role, token })
    }
}

/// A value of 1 KiB that begins with `mark`.
pub(crate) fn value(mark: &str) -> Value {
    json!({ "value": format!("{mark:x<width$}", width = SIZE - r#"{"value":""}"#.len()) })
}

/// Everything that runs while reads are measured.
pub(crate) struct Subjects {
    pub(crate) control_plane: ControlPlane,
    pub(crate) node: Server,
    /// A bare tonic service.
    pub(crate) tonic: Server,
    /// A bare axum handler.
    pub(crate) axum: Server,
    /// axum and reqwest in front of OpenBao.
    pub(crate) passthrough: Server,
}

/// The secrets that `readers` read, each its own: the node makes one backend call of equal reads.
pub(crate) fn name(reader: usize) -> String {
    format!("bench/{reader:02}")
}

impl Subjects {
    /// Starts and seeds everything, for at most so many readers.
    pub(crate) async fn start(
        store: &Store,
        folder: &Path,
        readers: usize,
        pinning: Pinning,
    ) -> Result<Subjects> {
        let control_plane = ControlPlane::start(&folder.join("reads"), pinning).await?;
        let node = control_plane.node("node").await?;
        control_plane.put_credential(&store.role).await?;
        for reader in 0..readers {
            store.admin.put("secret", &name(reader), value(&name(reader))).await?;
        }
        let endpoint = store.openbao.addr();
        control_plane.proxy(&endpoint, json!({ format!("{PROXIED}/**"): "secret/data/**" })).await?;
        let run = control_plane.sync(&endpoint, json!({ format!("{COPIED}/**"): "secret/data/**" })).await?;
        ensure!(run.ended().await?.created == readers, "not every secret was copied");
        let rest = Rest::new(format!("http://{}", node.address), &control_plane.token)?;
        for reader in 0..readers {
            for (folder, source) in [(PROXIED, "proxy"), (COPIED, "sync")] {
                let path = format!("/v1/secrets/{folder}/{}", name(reader));
                wait::until("the node serves it", async || {
                    Ok((rest.get(&path).await?.json["source"] == source).then_some(()))
                })
                .await
                .with_context(|| path.clone())?;
            }
        }

        // The floors give the bytes that ScaiVault gave.
        let copy = format!("{COPIED}/{}", name(0));
        let answer = folder.join("answer.json");
        fs::write(&answer, rest.get(&format!("/v1/secrets/{copy}")).await?.text)?;
        let message = folder.join("answer.bin");
        let asked = GetRequest { path: copy, ..Default::default() };
        let given = grpc(node.address, &control_plane.token)?.get(asked).await?.into_inner();
        fs::write(&message, given.encode_to_vec())?;

        let floor = async |mode: &'static str, argument: String| {
            let address = loopback();
            let args = [mode, &address.to_string(), &argument];
            Server::start(&env::current_exe()?, &args, address, pinning, &folder.join(mode)).await
        };
        Ok(Subjects {
            tonic: floor("serve-tonic", message.display().to_string()).await?,
            axum: floor("serve-axum", answer.display().to_string()).await?,
            passthrough: floor("serve-passthrough", endpoint).await?,
            control_plane,
            node,
        })
    }
}

/// A gRPC client with a connection of its own.
pub(crate) fn grpc(address: SocketAddr, token: &str) -> Result<SecretsServiceClient<Authenticated>> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    Ok(SecretsServiceClient::with_interceptor(channel, Bearer::new(token)?))
}
