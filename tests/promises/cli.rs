//! The command line: what people type works, and every failure says what to do next.

use std::fs;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use scaivault_tests::planes::{CREDENTIAL, Federated, Options, Planes, scaivault};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// A shell at a node.
struct Shell {
    addr: String,
    token: String,
}

/// What a command did.
#[derive(Debug)]
struct Told {
    exit: Option<i32>,
    out: String,
    err: String,
}

impl Shell {
    fn operator(planes: &Planes) -> Shell {
        Shell { addr: planes.node(0), token: planes.operator_token().to_owned() }
    }

    /// Runs `scaivault` with the words of `line`; what follows a `<` is its input.
    async fn run(&self, line: &str) -> Result<Told> {
        let (line, input) = line.split_once(" < ").unwrap_or((line, ""));
        let mut command = scaivault();
        command
            .args(line.split_whitespace())
            .env("SCAIVAULT_ADDR", &self.addr)
            .env("SCAIVAULT_TOKEN", &self.token);
        let mut command = Command::from(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut running = command.spawn()?;
        let mut stdin = running.stdin.take().context("a pipe")?;
        // Whoever does not read its input may be gone before it is written.
        drop(stdin.write_all(input.as_bytes()).await);
        drop(stdin);
        let ended = running.wait_with_output().await?;
        Ok(Told {
            exit: ended.status.code(),
            out: String::from_utf8(ended.stdout)?,
            err: String::from_utf8(ended.stderr)?,
        })
    }

    /// The output of a command that must succeed.
    async fn ok(&self, line: &str) -> Result<String> {
        let told = self.run(line).await?;
        ensure!(told.exit == Some(0), "{line}: {told:?}");
        Ok(told.out)
    }

    async fn json(&self, line: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&format!("{line} -o json")).await?)?)
    }
}

#[tokio::test]
async fn secrets_are_written_read_listed_and_deleted() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let shell = Shell::operator(&planes);
    shell.ok("put apps/db user=app password=one").await?;
    shell.ok("put apps/db user=app password=two").await?;
    assert_eq!(shell.ok("get apps/db --field password").await?.trim_end(), "two");
    assert_eq!(shell.ok("get apps/db --field password --version 1").await?.trim_end(), "one");
    let shown = shell.json("get apps/db").await?;
    assert_eq!(
        (&shown["version"], &shown["data"]),
        (&json!(2), &json!({ "user": "app", "password": "two" }))
    );
    assert!(shell.ok("get apps/db").await?.contains("two"));
    assert!(shell.ok("list").await?.contains("apps/"));
    assert!(shell.ok("list apps/").await?.contains("db"));
    assert_eq!(shell.json("versions apps/db").await?.to_string().matches("active").count(), 2);
    shell.ok("delete apps/db").await?;
    let gone = shell.run("get apps/db").await?;
    assert_eq!(gone.exit, Some(2));
    assert!(gone.err.contains("code: not_active") && gone.err.contains("next: "), "{gone:?}");
    Ok(())
}

#[tokio::test]
async fn a_backend_is_added_shown_changed_and_removed() -> Result<()> {
    let federated = Federated::start().await?;
    let shell = Shell::operator(&federated.planes);
    assert_eq!(shell.ok("get external/hashicorp/app/db --field password").await?.trim_end(), "three");
    shell.ok("backend remove openbao").await?;
    assert_eq!(shell.run("get external/hashicorp/app/db").await?.exit, Some(2));
    let endpoint = format!("http://{}", federated.network.addr());
    let add = format!(
        "backend add again --type hashicorp-vault --endpoint {endpoint} --auth-method approle \
         --auth-config-path {CREDENTIAL} --map old/**=secret/data/**"
    );
    shell.ok(&add).await?;
    assert_eq!(shell.ok("get old/app/db --field password").await?.trim_end(), "three");
    shell.ok("backend set again --name vault --map new/**=secret/data/**").await?;
    assert_eq!(shell.ok("get new/app/db --field password").await?.trim_end(), "three");
    assert!(shell.ok("backend list").await?.contains("vault"));
    assert_eq!(
        shell.json("backend show vault").await?["path_mapping"],
        json!({ "new/**": "secret/data/**" })
    );
    wait::until("it is healthy", async || {
        Ok((shell.json("backend status vault").await?["status"] == "healthy").then_some(()))
    })
    .await?;
    let file = tempfile::NamedTempFile::new()?;
    let configuration = json!({
        "name": "filed", "type": "hashicorp-vault", "path_mapping": { "filed/**": "secret/data/**" }, "mode": "proxy",
        "config": { "endpoint": endpoint, "auth_method": "approle", "auth_config_path": CREDENTIAL },
    });
    fs::write(file.path(), configuration.to_string())?;
    shell.ok(&format!("backend add --file {}", file.path().display())).await?;
    assert_eq!(shell.ok("get filed/top --field value").await?.trim_end(), "top");
    Ok(())
}

#[tokio::test]
async fn policies_and_tokens_are_handed_out_and_the_trail_tells_it() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let shell = Shell::operator(&planes);
    shell.ok("put app/x v=1").await?;
    // Words are split at spaces here, so the rule comes from a file.
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), r#"{"rules":[{"path":"app/**","capabilities":["read"],"effect":"allow"}]}"#)?;
    shell.ok(&format!("policy put reader --file {}", file.path().display())).await?;
    assert!(shell.ok("policy get reader").await?.contains("app/**"));
    let made = shell.json("token create --subject ci --scope secrets:read --policy reader --ttl 1h").await?;
    let ci = Shell { token: made["token"].as_str().context("token")?.to_owned(), ..Shell::operator(&planes) };
    assert_eq!(ci.ok("get app/x --field v").await?.trim_end(), "1");
    let refused = ci.run("put app/x v=2").await?;
    assert_eq!(refused.exit, Some(2));
    assert!(refused.err.contains("permission_denied") && refused.err.contains("next: "), "{refused:?}");
    assert!(ci.ok("token lookup").await?.contains("reader"));
    let accessor = made["accessor"].as_str().context("accessor")?;
    shell.ok(&format!("token revoke {accessor}")).await?;
    let over = ci.run("get app/x").await?;
    assert_eq!(over.exit, Some(2));
    assert!(over.err.contains("unauthenticated") && over.err.contains("next: "), "{over:?}");
    wait::until("the trail tells it", async || {
        let tail = shell.ok("audit tail -n 100").await?;
        Ok((tail.contains("secret.read") && tail.contains("ci") && tail.contains("permission_denied"))
            .then_some(()))
    })
    .await
}

#[tokio::test]
async fn every_failure_has_its_exit_code_and_a_next_step() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let shell = Shell::operator(&planes);
    for (line, exit, told) in [
        ("get", 1, "Usage"),
        ("get a//b", 1, "a//b"),
        ("put x", 1, ""),
        ("frobnicate", 1, "frobnicate"),
        ("get no/such", 2, "code: not_found"),
        ("backend show nothing", 2, "`scaivault backend list`"),
        ("backend add half --type hashicorp-vault", 1, "--endpoint"),
        ("get x --addr http://127.0.0.1:1", 2, "SCAIVAULT_ADDR"),
        ("get x --addr nonsense", 1, "SCAIVAULT_ADDR"),
        ("get x --token-file /no/such/file", 1, "--token-file"),
        ("health --addr http://127.0.0.1:1", 2, "next: "),
    ] {
        let answer = shell.run(line).await?;
        assert_eq!(answer.exit, Some(exit), "{line}: {answer:?}");
        assert!(answer.err.contains(told) && answer.out.is_empty(), "{line}: {answer:?}");
        assert!(answer.err.contains("next: ") || answer.err.contains("--help"), "{line}: {answer:?}");
        assert!(!answer.err.contains(&shell.token), "{line}");
    }
    let nobody = Shell { token: String::new(), ..Shell::operator(&planes) };
    let refused = nobody.run("get x").await?;
    assert_eq!(refused.exit, Some(1));
    assert!(refused.err.contains("SCAIVAULT_TOKEN"), "{refused:?}");
    nobody.ok("health").await.map(drop)
}
