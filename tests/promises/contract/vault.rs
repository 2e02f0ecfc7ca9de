//! OpenBao, with a mount of each version of the KV engine.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use scaivault_backends::{Lease, Material};
use scaivault_domain::backend::{Endpoint, KvVersion, Target, VaultTarget};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State};
use scaivault_tests::servers::openbao::{Admin, IssuedToken, OpenBao, Options};
use secrecy::SecretString;
use serde_json::json;
use serde_json::value::RawValue;

use super::capabilities::{
    Capabilities, Closes, Deleted, Empty, HistoryOfNobody, Json, NoSecrets, Pages, Surveys, Told, Unfit,
    Versions, Writes,
};
use super::{Provider, Store, keeps, suite};

pub(super) type Kv1 = Kv<1>;
pub(super) type Kv2 = Kv<2>;

/// Where the policies to paste are, which are those of the suite.
const PAGE: &str = include_str!("../../../docs/backends/hashicorp-vault.md");
/// The folder that they are for.
const FOLDER: &str = "prod";

/// One OpenBao; its stores are mounts.
struct Bao<const VERSION: u8> {
    server: OpenBao,
    mounts: AtomicUsize,
}

/// A mount of that version, with a token and a policy for it.
pub(super) struct Kv<const VERSION: u8> {
    socket: SocketAddr,
    admin: Admin,
    mount: String,
    token: IssuedToken,
}

impl<const VERSION: u8> Provider for Bao<VERSION> {
    type Store = Kv<VERSION>;

    async fn start() -> Result<Self> {
        Ok(Bao { server: OpenBao::start(Options::default()).await?, mounts: AtomicUsize::new(0) })
    }

    async fn store(&self, _: &str) -> Result<Kv<VERSION>> {
        let (admin, number) = (self.server.client()?, self.mounts.fetch_add(1, Ordering::Relaxed));
        let mount = format!("kv{number}");
        admin.enable_kv(&mount, if VERSION == 1 { KvVersion::V1 } else { KvVersion::V2 }).await?;
        let policy = Kv::<VERSION>::policy(&mount, "");
        admin.write_policy(&mount, &policy).await?;
        let token = admin.create_token(json!({ "policies": [mount], "ttl": "1h" })).await?;
        Ok(Kv { socket: self.server.socket(), admin, mount, token })
    }
}

fn encoded(leaf: &str) -> String {
    utf8_percent_encode(leaf, NON_ALPHANUMERIC).to_string()
}

impl<const VERSION: u8> Kv<VERSION> {
    /// What the documentation gives a role that reads and writes, and `more`.
    fn policy(mount: &str, more: &str) -> String {
        let blocks = PAGE.split("```hcl\n").skip(1).filter_map(|rest| rest.split("```").next());
        let blocks: Vec<_> = blocks.collect();
        let [version_2, openbao, version_1, _child] = blocks[..] else { panic!("four policies to paste") };
        let pasted = match VERSION {
            1 => version_1.replace("kv/", &format!("{mount}/")),
            _ => format!("{version_2}{openbao}").replace("secret/", &format!("{mount}/")),
        };
        format!("{pasted}\n{more}")
    }

    /// Where a secret lies in the mount.
    fn path(leaf: &str) -> String {
        format!("{FOLDER}/{leaf}")
    }
}

impl<const VERSION: u8> Store for Kv<VERSION> {
    const CAN: Capabilities = match VERSION {
        1 => Capabilities {
            title: "Vault KV v1",
            pages: Pages::One,
            surveys: Surveys::TellNames,
            versions: Versions::None,
            states: &[],
            deleted: Deleted::Never,
            metadata: Told::Never,
            unfit: Unfit::Nothing,
            empty_objects: Empty::Refused,
            json: Json::Sorted,
            writes: Writes::Never,
            ..KV2
        },
        _ => KV2,
    };

    fn socket(&self) -> SocketAddr {
        self.socket
    }

    fn target(&self, endpoint: Endpoint) -> Target {
        Target::HashicorpVault(VaultTarget::at(endpoint))
    }

    fn lease(&self) -> Lease {
        Lease {
            id: self.token.accessor.clone(),
            material: Material::VaultToken(SecretString::from(self.token.token.as_str())),
            expires_at: None,
            login_generation: 0,
        }
    }

    fn root(&self) -> Option<RemoteName> {
        Some(RemoteName::with_literal(format!("{}/{FOLDER}", self.mount), 2))
    }

    fn longest(&self) -> RemoteName {
        self.name(&"x".repeat(255))
    }

    async fn put(&self, leaf: &str, value: &[u8], _: Kind) -> Result<()> {
        let (value, path) = (str::from_utf8(value)?, Self::path(&encoded(leaf)));
        if VERSION == 1 {
            let value = RawValue::from_string(value.to_owned())?;
            return self.admin.put_v1_raw(&self.mount, &path, &value).await;
        }
        let value = RawValue::from_string(format!(r#"{{"data":{value}}}"#))?;
        self.admin.put_v1_raw(&self.mount, &format!("data/{path}"), &value).await
    }

    async fn change(&self, leaf: &str, to: State) -> Result<()> {
        match to {
            State::Deleted => self.admin.delete(&self.mount, &Self::path(leaf), &[1]).await,
            State::Destroyed => self.admin.destroy(&self.mount, &Self::path(leaf), &[1]).await,
            _ => bail!("KV has no such state"),
        }
    }

    async fn restore(&self, leaf: &str) -> Result<()> {
        self.admin.undelete(&self.mount, &Self::path(leaf), &[2]).await
    }

    async fn describe(&self, leaf: &str, metadata: &Metadata) -> Result<()> {
        self.admin.set_custom_metadata(&self.mount, &Self::path(leaf), json!(metadata)).await
    }

    async fn forbid(&self, leaf: &str) -> Result<()> {
        let infix = if VERSION == 1 { "" } else { "data/" };
        let closed = format!(r#"path "{}/{infix}{FOLDER}/{leaf}" {{ capabilities = ["deny"] }}"#, self.mount);
        self.admin.write_policy(&self.mount, &Self::policy(&self.mount, &closed)).await
    }

    async fn forbid_listing(&self) -> Result<()> {
        let policy = Self::policy(&self.mount, "").replace(r#", "list""#, "");
        let policy = policy.replace(r#"["list", "scan"]"#, r#"["deny"]"#);
        self.admin.write_policy(&self.mount, &policy).await
    }

    async fn revoke(&self) -> Result<()> {
        let accessor = json!({ "accessor": self.token.accessor });
        self.admin.call(Method::POST, "auth/token/revoke-accessor", Some(accessor)).await.map(drop)
    }
}

const KV2: Capabilities = Capabilities {
    title: "Vault KV v2",
    pages: Pages::Names { size: 1000 },
    surveys: Surveys::TellVersions,
    versions: Versions::All,
    states: &[State::Deleted, State::Destroyed],
    deleted: Deleted::As(State::Deleted),
    kinds: &[Kind::Json],
    empty: Empty::Refused,
    empty_objects: Empty::Carried,
    no_secrets: NoSecrets::Said,
    json: Json::SortedAndRounded,
    most_bytes: 1024 * 1024,
    good_names: &["a.b_c-d~e", "data", "a b", "%2F", "\u{e4}"],
    bad_names: &["", ".", "..", "a/../b", "a//b"],
    metadata: Told::ByReads,
    unfit: Unfit::LongKey(129),
    writes: Writes::Conditional,
    closes: Closes::OneSecret,
    history_of_nobody: HistoryOfNobody::NotFound,
};

#[tokio::test]
async fn vault_with_kv_version_2_keeps_the_contract() -> Result<()> {
    keeps::<Bao<2>>(suite()).await
}

#[tokio::test]
async fn vault_with_kv_version_1_keeps_the_contract() -> Result<()> {
    keeps::<Bao<1>>(suite()).await
}
