//! `demo`: both planes in front of a real OpenBao and of what other stores there are, what they do step by step, and
//! command lines to go on with.
//!
//! Every command line that is printed was executed by the demo first, with the output that stands below it.

mod clouds;
mod lines;
mod live;
mod stage;
mod story;
mod transcript;

use std::env;
use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use scaivault_telemetry::{Format, TelemetryConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

use crate::lines::Tools;
use crate::live::Trail;
use crate::stage::Stage;
use crate::transcript::Transcript;

const USAGE: &str = "\
usage: demo [--once]

  Starts OpenBao, other stores and both planes on loopback, shows what they do, and stays until Ctrl-C.
  --once    the same, but ends after the last command line";

#[derive(Clone, Copy)]
enum Run {
    Once,
    Stay,
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let run = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Run::Stay,
        ["--once"] => Run::Once,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match start(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn start(run: Run) -> Result<()> {
    LocalSet::new().run_until(start_here(run)).await
}

async fn start_here(run: Run) -> Result<()> {
    scaivault_telemetry::init(TelemetryConfig { format: Format::Pretty, filter: Some("error".into()) })?;
    // Before anything is started that would be left behind.
    let told_to_stop = told_to_stop()?;
    let mut stage = Stage::default();
    let mut transcript = Transcript::stdout();
    let shown = tokio::select! {
        shown = show(run, &mut stage, &mut transcript) => shown,
        told = told_to_stop => match run {
            Run::Once => Err(anyhow!("interrupted")),
            Run::Stay => told,
        },
    };
    stage.clear().await;
    shown?;
    transcript.blank()?;
    transcript.text("Stopped: the stores, the control plane and the node. Nothing of them is left.")
}

async fn show(run: Run, stage: &mut Stage, transcript: &mut Transcript) -> Result<()> {
    let (tools, title) = match run {
        Run::Once => (Tools::complete().await?, "What can be pasted into another shell while a demo stays"),
        Run::Stay => (Tools::at_hand(), "Now you: paste this into another shell"),
    };
    let demo = story::tell(stage, transcript).await?;
    let mut trail = Trail::open(&demo)?;
    trail.catch_up(&demo).await?;
    let failed = lines::show(&demo, &tools, title, transcript).await?;
    match run {
        Run::Once if failed > 0 => bail!("{failed} of the command lines did not do what they should"),
        Run::Once => Ok(()),
        Run::Stay => trail.follow(transcript).await,
    }
}

/// Ctrl-C, `kill`, or the end of the terminal.
fn told_to_stop() -> Result<impl Future<Output = Result<()>>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        Ok(())
    })
}
