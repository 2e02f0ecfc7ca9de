//! Dev mode serves the Vault that its visitor already uses, shows nobody the token, and starts whatever that Vault does.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

use anyhow::{Context as _, Result};
use scaivault::dev;
use scaivault_domain::backend::KvVersion;
use scaivault_tests::authority::Authority;
use scaivault_tests::planes::{Rest, scaivault};
use scaivault_tests::process::Process;
use scaivault_tests::servers::openbao::{self, Admin, OpenBao};
use scaivault_tests::{ports, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const DB: &str = "/v1/secrets/external/vault/secret/app/db";
/// A token of one who reads and lists, and may not make tokens.
const READER: &str = r#"
path "secret/*" { capabilities = ["read", "list"] }
path "team/kv/*" { capabilities = ["read", "list"] }
path "with space/*" { capabilities = ["read", "list"] }
"#;

/// `scaivault dev` as somebody starts it by hand.
struct Visit {
    process: Process,
    /// What it has printed when it was ready.
    printed: String,
    rest: Rest,
}

impl Visit {
    async fn start(folder: &TempDir, variables: &[(&str, &str)]) -> Result<Visit> {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::free())).to_string();
        let data = folder.path().join("data").display().to_string();
        let log = folder.path().join(format!("{listen}.log"));
        let mut dev = scaivault();
        dev.args(["dev", "--listen", &listen, "--data-dir", &data, "--log", "debug"]);
        dev.envs(variables.iter().copied());
        let mut process = Process::spawn(&mut dev, &log)?;
        let printed = wait::until("dev mode is ready", async || {
            process.ensure_running()?;
            let printed = fs::read_to_string(&log)?;
            Ok(printed.contains("Ctrl-C stops it.").then_some(printed))
        })
        .await?;
        let token =
            printed.lines().find_map(|line| line.split_once("SCAIVAULT_TOKEN=")).context("no token")?;
        let rest = Rest::new(format!("http://{listen}"), token.1)?;
        Ok(Visit { process, printed, rest })
    }

    async fn stop(self) -> Result<()> {
        assert!(self.process.stop().await?.success());
        Ok(())
    }

    /// The only line about the visitor's Vault.
    fn refusal(&self) -> Result<&str> {
        let mut lines = self.printed.lines().filter(|line| line.contains("Vault is not served here"));
        let line = lines.next().context(self.printed.clone())?;
        assert_eq!(lines.next(), None);
        Ok(line)
    }
}

async fn seed(admin: &Admin) -> Result<()> {
    admin.enable_kv("secret", KvVersion::V2).await?;
    admin.put("secret", "app/db", json!({ "password": "autumn" })).await?;
    admin.enable_kv("team/kv", KvVersion::V1).await?;
    admin.put_v1("team/kv", "eu/smtp", json!({ "host": "smtp" })).await?;
    admin.enable_kv("with space", KvVersion::V2).await?;
    admin.write_policy("reader", READER).await
}

async fn reader(admin: &Admin) -> Result<String> {
    Ok(admin.create_token(json!({ "policies": ["reader"], "ttl": "1h" })).await?.token)
}

/// Executes a line of the banner in a shell, as the visitor would.
fn execute(line: &str, rest: &Path, printed: &str) -> Result<String> {
    let exports: Vec<&str> = printed.lines().filter(|line| line.trim().starts_with("export ")).collect();
    let script = format!("{}\nPATH={}:$PATH\n{line}", exports.join("\n"), rest.display());
    let done = std::process::Command::new("sh").args(["-c", &script]).output()?;
    Ok(String::from_utf8(done.stdout)? + &String::from_utf8(done.stderr)?)
}

#[tokio::test]
async fn the_vault_of_the_visitor_is_served_and_its_token_shown_nowhere() -> Result<()> {
    let authority = Authority::new()?;
    let folder = tempfile::tempdir()?;
    let ca = folder.path().join("ca.pem");
    fs::write(&ca, authority.pem())?;
    let bao = OpenBao::start(openbao::Options::default().tls(authority)).await?;
    let admin = bao.client()?;
    seed(&admin).await?;
    let token = reader(&admin).await?;

    let (addr, ca) = (bao.addr(), ca.display().to_string());
    let variables = [("VAULT_ADDR", addr.as_str()), ("VAULT_TOKEN", token.as_str()), ("VAULT_CACERT", &ca)];
    let visit = Visit::start(&folder, &variables).await?;
    for promised in [
        "external/vault/secret/** ",
        "external/vault/team/kv/** ",
        "\n  scaivault get external/vault/secret/app/db\n",
        "Not served: \"with space\"",
    ] {
        assert!(visit.printed.contains(promised), "{promised}\n{}", visit.printed);
    }
    assert!(!visit.printed.contains(&token), "the token was printed");
    let program = scaivault();
    let programs = Path::new(program.get_program()).parent().context("a folder")?;
    let shown = execute("scaivault get external/vault/secret/app/db", programs, &visit.printed)?;
    assert!(shown.contains("autumn"), "{shown}");
    let smtp = visit.rest.get("/v1/secrets/external/vault/team/kv/eu/smtp").await?.ok()?;
    assert_eq!((&smtp["data"]["host"], &smtp["source"]), (&json!("smtp"), &json!("proxy")));
    visit.stop().await
}

#[tokio::test]
async fn a_second_start_takes_the_new_token_and_keeps_the_rules_that_were_made() -> Result<()> {
    let bao = OpenBao::start(openbao::Options::default()).await?;
    let admin = bao.client()?;
    seed(&admin).await?;
    let folder = tempfile::tempdir()?;
    let (addr, first) = (bao.addr(), reader(&admin).await?);
    let visit = Visit::start(&folder, &[("VAULT_ADDR", &addr), ("VAULT_TOKEN", &first)]).await?;
    assert_eq!(visit.rest.get(DB).await?.status, 200);
    let backends = visit.rest.get("/v1/federation/backends").await?.ok()?;
    let id = backends["backends"][0]["id"].as_str().context("no backend")?.to_owned();
    let route = format!("/v1/federation/backends/{id}");
    let copied = json!({
        "pattern": "external/vault/secret/app/**",
        "template": "secret/app/**",
        "mode": "sync",
        "sync_interval": "1s",
    });
    let proxied = json!({ "pattern": "external/vault/secret/**", "template": "secret/**" });
    let rules = json!({ "path_mapping": [copied, proxied] });
    visit.rest.patch(&route, rules).await?.ok()?;
    visit.stop().await?;

    admin.revoke_token(&first).await?;
    let second = reader(&admin).await?;
    let visit = Visit::start(&folder, &[("VAULT_ADDR", &addr), ("VAULT_TOKEN", &second)]).await?;
    assert!(visit.printed.contains("external/vault/team/kv/** "), "{}", visit.printed);
    let rules = visit.rest.get(&route).await?.ok()?["rules"].clone();
    let patterns: Vec<&Value> =
        rules.as_array().context("no rules")?.iter().map(|rule| &rule["pattern"]).collect();
    assert_eq!(
        patterns,
        ["external/vault/secret/app/**", "external/vault/secret/**", "external/vault/team/kv/**"]
    );
    assert_eq!(rules[0]["mode"], "sync");
    assert_eq!(visit.rest.get(DB).await?.status, 200);
    let elsewhere = bao.addr().replace("127.0.0.1", "localhost");
    visit.stop().await?;

    // The token of one server is not sent to another.
    let visit = Visit::start(&folder, &[("VAULT_ADDR", &elsewhere), ("VAULT_TOKEN", &second)]).await?;
    assert!(visit.refusal()?.contains(&addr), "{}", visit.refusal()?);
    assert_eq!(visit.rest.get(DB).await?.status, 200);
    visit.stop().await
}

#[tokio::test]
async fn dev_mode_starts_without_the_vault_and_says_why_in_one_line() -> Result<()> {
    let bao = OpenBao::start(openbao::Options::default()).await?;
    let admin = bao.client()?;
    let addr = bao.addr();
    let nobody = admin.create_token(json!({ "policies": ["default"], "ttl": "1h" })).await?.token;
    let nothing_there = format!("http://127.0.0.1:{}", ports::free());
    for (variables, why) in [
        (&[("VAULT_ADDR", addr.as_str())][..], "VAULT_TOKEN is not"),
        (&[("VAULT_ADDR", "127.0.0.1:8200"), ("VAULT_TOKEN", &nobody)], "VAULT_ADDR"),
        (&[("VAULT_ADDR", &nothing_there), ("VAULT_TOKEN", &nobody)], "cannot be reached"),
        (&[("VAULT_ADDR", &addr), ("VAULT_TOKEN", "s.unknown")], "refuses VAULT_TOKEN"),
        (&[("VAULT_ADDR", &addr), ("VAULT_TOKEN", &nobody)], "no KV mount"),
    ] {
        let folder = tempfile::tempdir()?;
        let visit = Visit::start(&folder, variables).await?;
        assert!(visit.refusal()?.contains(why), "{why}: {}", visit.refusal()?);
        assert!(!visit.printed.contains(&nobody) && !visit.printed.contains("s.unknown"));
        assert_eq!(visit.rest.get("/v1/federation/backends").await?.ok()?["backends"], json!([]));
        visit.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_node_that_does_not_start_leaves_no_control_plane_behind() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let options = |listen| {
        let data_dir = Some(folder.path().to_owned());
        dev::Options { listen, data_dir, egress_allow: Vec::new(), log: String::new() }
    };
    let refused = dev::start(&options(taken.local_addr()?)).await;
    assert!(refused.is_err(), "its address is taken");
    // The store can be opened by one process at a time, and once.
    let started = dev::start(&options((Ipv4Addr::LOCALHOST, ports::free()).into())).await?;
    started.stop().await;
    Ok(())
}
