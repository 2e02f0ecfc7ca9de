//! The demo shows what it promises, and leaves nothing behind.

use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};

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

/// Fails if a process has this folder in its command line or environment, or anything lies in it.
fn ensure_nothing_left(temporary: &TempDir) -> Result<()> {
    let folder = temporary.path().to_str().context("a path of UTF-8")?;
    let mentions = |file: &Path| {
        fs::read(file).is_ok_and(|text| text.windows(folder.len()).any(|window| window == folder.as_bytes()))
    };
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        let left = ["cmdline", "environ"].iter().any(|file| mentions(&process.join(file)));
        ensure!(!left, "{} is still there", process.display());
    }
    let files: Vec<_> = fs::read_dir(temporary.path())?.collect();
    ensure!(files.is_empty(), "{files:?} are still there");
    Ok(())
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
        "scaivault.secrets.v1.SecretsService/Get\n#   {",
        "SECRET_SOURCE_PROXY",
        "get external/hashicorp/app/db\n#   path:",
        "Nothing of them is left.",
    ] {
        assert!(printed.contains(promised), "{promised}\n{printed}");
    }
    assert!(!printed.contains('\x1b'), "colour without a terminal");
    ensure_nothing_left(&temporary)
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
        ensure_nothing_left(&temporary)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_demo_that_is_stopped_while_it_starts_leaves_nothing() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let mut demo = demo(&temporary).stdout(Stdio::piped()).spawn()?;
    let id = demo.id().context("it has just been started")?.to_string();
    wait::until("the planes begin to start", async || {
        Ok((fs::read_dir(temporary.path())?.count() >= 2).then_some(()))
    })
    .await?;
    Command::new("kill").args(["-INT", &id]).status().await?;
    let ended = wait::until("the demo has ended", async || Ok(demo.try_wait()?)).await?;
    assert!(ended.success(), "{ended}");
    ensure_nothing_left(&temporary)
}
