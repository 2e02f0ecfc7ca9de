//! `bench`: what a request costs through ScaiVault, beside the least that it could cost.
//!
//! Figures are those of pairs that take turns, server on one core and generator on the other; see
//! `docs/performance.md`. Nothing is asserted.

mod cpu;
mod floors;
mod load;
mod pairs;
mod report;
mod subjects;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context as _, Result};

use crate::cpu::Pinning;
use crate::pairs::Extent;
use crate::report::Report;

const USAGE: &str = "\
usage: bench [--quick]

  Measures pairs, prints them as a table, and writes target/bench/report.json.
  --quick    fewer and shorter turns, under 40 seconds";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => measure(Extent { rounds: 8, turn: Duration::from_millis(1500) }),
        ["--quick"] => measure(Extent { rounds: 3, turn: Duration::from_millis(700) }),
        ["serve-tonic", address, answer] => floors::tonic(address, Path::new(answer)),
        ["serve-axum", address, answer] => floors::axum(address, Path::new(answer)),
        ["serve-passthrough", address, upstream] => floors::passthrough(address, upstream),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn measure(extent: Extent) -> Result<()> {
    let start = Instant::now();
    let pinning = Pinning::possible();
    let pairs = pairs::measure(extent, pinning).await?;
    let report = Report::new(extent, pinning, pairs);
    report.print()?;
    let folder = env::current_exe()?
        .parent()
        .and_then(Path::parent)
        .context("this program lies in a target folder")?
        .join("bench");
    fs::create_dir_all(&folder)?;
    let file = folder.join("report.json");
    fs::write(&file, report.to_json()?)?;
    eprintln!("{:.0} s; written to {}", start.elapsed().as_secs_f64(), file.display());
    Ok(())
}
