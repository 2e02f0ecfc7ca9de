//! The demo shows what it promises, and leaves nothing behind.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use scaivault_tests::wait;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

/// The demo, with a folder of its own for everything temporary.
fn demo(temporary: &TempDir) -> Command {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_demo"));
    demo.env("TMPDIR", temporary.path()).kill_on_drop(true);
    demo
}

/// Fails if a process works in this folder or has it in its command line or environment, or anything lies in it. What was
/// killed as the last thing that the demo did may take a moment to be gone.
async fn ensure_nothing_left(temporary: &TempDir) -> Result<()> {
    let folder = temporary.path().to_str().context("a path of UTF-8")?;
    let gone = wait::until("nothing of the demo runs any more", async || {
        Ok(of_folder(folder)?.is_empty().then_some(()))
    });
    gone.await.with_context(|| format!("{:?}", of_folder(folder)))?;
    let files: Vec<_> = fs::read_dir(temporary.path())?.collect();
    ensure!(files.is_empty(), "{files:?} are still there");
    Ok(())
}

/// The processes that have to do with a folder.
fn of_folder(folder: &str) -> Result<Vec<PathBuf>> {
    let mentions = |file: &Path| {
        fs::read(file).is_ok_and(|text| text.windows(folder.len()).any(|window| window == folder.as_bytes()))
    };
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        // Of a folder that is gone the path stays, with a remark behind it.
        let works_there = fs::read_link(process.join("cwd"))
            .is_ok_and(|works| works.to_str().is_some_and(|works| works.starts_with(folder)));
        if works_there || ["cmdline", "environ"].iter().any(|file| mentions(&process.join(file))) {
            found.push(process);
        }
    }
    Ok(found)
}

#[tokio::test]
async fn the_demo_runs_every_line_that_it_prints() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let Output { status, stdout, stderr } = demo(&temporary).arg("--once").output().await?;
    let (printed, errors) = (String::from_utf8(stdout)?, String::from_utf8(stderr)?);
    assert!(status.success(), "{status}\n{printed}\n{errors}");
    for promised in [
        "export SCAIVAULT_ADDR=http://127.0.0.1:",
        "  $SCAIVAULT_ADDR/v1/secrets/external/hashicorp/app/db\n#   {\"path\":\"external/hashicorp/app/db\"",
        "\"code\":\"federated_read_only\"",
        "left out: \"secret/data/app/with space\", reason \"charset\"",
        "  $SCAIVAULT_ADDR/v1/secrets/external/copy/app/db\n#   {\"path\":\"external/copy/app/db\"",
        "backend sync-report $COPY $RUN\n#   run:",
        "backend_unreachable",
        "Azure Key Vault: a stand-in, for no server of it exists, at http://127.0.0.1:",
        "{\"access_key_id\":\"…\",\"secret_access_key\":\"…\"}",
        "complete: 3 listed, 3 created, 0 unchanged, 0 skipped; calls: ",
        "200, {\"password\":\"heron\",\"user\":\"app\"}, source sync",
        "OK, {\"password\":\"heron\",\"user\":\"app\"}, source sync",
        "200, {\"password\":\"kestrel\",\"user\":\"app\"}, source proxy",
        "OK, {\"password\":\"kestrel\",\"user\":\"app\"}, source proxy",
        "200, {\"password\":\"plover\",\"user\":\"app\"}, source proxy",
        "OK, {\"password\":\"plover\",\"user\":\"app\"}, source proxy",
        "> GET /v1/secrets/external/azure/App/DB\n    < 404, unrepresentable",
        "  $SCAIVAULT_ADDR/v1/secrets/external/aws/app/db\n#   {\"path\":\"external/aws/app/db\"",
        "  $SCAIVAULT_ADDR/v1/secrets/external/azure/app/db\n#   {\"path\":\"external/azure/app/db\"",
        "  $SCAIVAULT_ADDR/v1/secrets/external/gcp/app/db\n#   {\"path\":\"external/gcp/app/db\"",
        "backend list\n#   NAME",
        "scaivault.secrets.v1.SecretsService/Get\n#   {",
        "SECRET_SOURCE_PROXY",
        "get external/hashicorp/app/db\n#   path:",
        "Nothing of them is left.",
    ] {
        assert!(printed.contains(promised), "{promised}\n{printed}");
    }
    assert!(!printed.contains('\x1b'), "colour without a terminal");
    for secret in ["PRIVATE KEY", "AKIA"] {
        assert!(!printed.contains(secret), "a credential is printed\n{printed}");
    }
    ensure_nothing_left(&temporary).await
}

#[tokio::test]
async fn a_store_whose_server_cannot_be_installed_is_left_out_and_the_demo_says_why() -> Result<()> {
    let tools = tempfile::tempdir()?;
    let openbao = tokio::task::spawn_blocking(|| xtask::tools::OPENBAO.install_folder()).await??;
    fs::create_dir(tools.path().join("tools"))?;
    symlink(&openbao, tools.path().join("tools").join(openbao.file_name().context("a folder of its own")?))?;
    // A Python that is too old for everything.
    let python = tools.path().join("python3");
    fs::write(&python, "#!/bin/sh\necho Python 3.9.2\nexit 1\n")?;
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755))?;
    let usual = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([tools.path().to_owned()].into_iter().chain(env::split_paths(&usual)))?;

    let temporary = tempfile::tempdir()?;
    let mut demo = demo(&temporary);
    demo.arg("--once").env("SCAIVAULT_TOOLS", tools.path()).env("PATH", path);
    let Output { status, stdout, stderr } = demo.output().await?;
    let (printed, errors) = (String::from_utf8(stdout)?, String::from_utf8(stderr)?);
    assert!(status.success(), "{status}\n{printed}\n{errors}");
    for promised in [
        "AWS Secrets Manager: left out, cannot install moto",
        "GCP Secret Manager: left out, cannot install drongo",
        "it needs Python 3.10 to 3.14 (here is Python 3.9.2)",
        "200, {\"password\":\"kestrel\",\"user\":\"app\"}, source proxy",
    ] {
        assert!(printed.contains(promised), "{promised}\n{printed}");
    }
    for absent in ["external/aws", "external/gcp"] {
        assert!(!printed.contains(absent), "{absent}\n{printed}");
    }
    ensure_nothing_left(&temporary).await
}

#[tokio::test]
async fn ctrl_c_ends_the_demo_and_everything_that_it_started() -> Result<()> {
    for signal in ["-INT", "-TERM"] {
        let temporary = tempfile::tempdir()?;
        let mut demo = demo(&temporary).stdout(Stdio::piped()).spawn()?;
        let mut printed = BufReader::new(demo.stdout.take().context("it is piped")?).lines();
        while let Some(line) = printed.next_line().await?
            && !line.starts_with("Every read from now on")
        {}
        let id = demo.id().context("it has ended by itself")?.to_string();
        Command::new("kill").args([signal, &id]).status().await?;
        let ended = wait::until("the demo has ended", async || Ok(demo.try_wait()?)).await?;
        assert!(ended.success(), "{signal}: {ended}");
        ensure_nothing_left(&temporary).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_demo_that_is_stopped_while_it_starts_leaves_nothing() -> Result<()> {
    // Folders of the stores that start, and then one of the planes.
    for folders in [1, 4] {
        let temporary = tempfile::tempdir()?;
        let mut demo = demo(&temporary).stdout(Stdio::piped()).spawn()?;
        let id = demo.id().context("it has just been started")?.to_string();
        wait::until("it has begun to start", async || {
            Ok((fs::read_dir(temporary.path())?.count() >= folders).then_some(()))
        })
        .await?;
        Command::new("kill").args(["-INT", &id]).status().await?;
        let ended = wait::until("the demo has ended", async || Ok(demo.try_wait()?)).await?;
        assert!(ended.success(), "{folders}: {ended}");
        ensure_nothing_left(&temporary).await?;
    }
    Ok(())
}
