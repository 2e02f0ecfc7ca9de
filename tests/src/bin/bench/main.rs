//! `bench`: what a request costs through ScaiVault, beside the least that it could cost.
//!
//! Figures are those of pairs that take turns, server on one core and generator on the other; see
//! `docs/performance.md`. Nothing is asserted.

mod bulk;
mod clouds;
mod cpu;
mod direct;
mod fakes;
mod floors;
mod load;
mod pairs;
mod planes;
mod report;
mod subjects;
mod syncs;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context as _, Result};

use crate::bulk::Bulk;
use crate::clouds::Clouds;
use crate::cpu::Pinning;
use crate::pairs::Extent;
use crate::report::Report;
use crate::subjects::Store;

const USAGE: &str = "\
usage: bench [--quick | --docs]

  Measures, prints tables, and writes target/bench/report.json.
  --quick    fewer and shorter turns, and few secrets, under a minute
  --docs     puts the tables into docs/performance.md, too";

const WHOLE: Extent = Extent {
    rounds: 8,
    turn: Duration::from_millis(1500),
    bulks: &[Bulk { secrets: 10_000, rounds: 3 }, Bulk { secrets: 100_000, rounds: 1 }],
    clouds: clouds::Extent { turns: 6, turn: Duration::from_millis(1000), secrets: 2000, rounds: 3 },
};
const QUICK: Extent = Extent {
    rounds: 3,
    turn: Duration::from_millis(700),
    bulks: &[Bulk { secrets: 1000, rounds: 2 }],
    clouds: clouds::Extent { turns: 2, turn: Duration::from_millis(500), secrets: 200, rounds: 1 },
};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => measure(WHOLE).map(drop),
        ["--quick"] => measure(QUICK).map(drop),
        ["--docs"] => measure(WHOLE).and_then(|report| report.write_into(&docs())),
        ["serve-tonic", address, answer] => floors::tonic(address, Path::new(answer)),
        ["serve-axum", address, answer] => floors::axum(address, Path::new(answer)),
        ["serve-passthrough", address, upstream] => floors::passthrough(address, upstream),
        ["serve-azure", file, secrets] => fakes::azure(Path::new(file), secrets),
        ["serve-gcp", file, secrets] => fakes::gcp(Path::new(file), secrets),
        ["serve-far", file, upstream] => clouds::far(Path::new(file), upstream),
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

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs").join("performance.md")
}

#[tokio::main(flavor = "current_thread")]
async fn measure(extent: Extent) -> Result<Report> {
    let start = Instant::now();
    let pinning = Pinning::possible();
    let folder = tempfile::Builder::new().prefix("bench-").tempdir()?;
    eprintln!("starting OpenBao, moto, the fakes, both planes and the servers to compare with …");
    let store = Store::start().await?;
    let clouds = Clouds::start(extent.clouds, folder.path()).await?;
    pinning.pin_generator()?;
    let pairs = pairs::measure(extent, &store, folder.path(), pinning).await?;
    let clouds = clouds.measure(extent.clouds, folder.path(), pinning).await?;
    let syncs = syncs::measure(extent.bulks, &store, folder.path(), pinning).await?;
    let report = Report::new(extent, pinning, pairs, syncs, clouds);
    writeln!(io::stdout(), "\n{}", report.to_markdown())?;
    let folder = env::current_exe()?
        .parent()
        .and_then(Path::parent)
        .context("this program lies in a target folder")?
        .join("bench");
    fs::create_dir_all(&folder)?;
    let file = folder.join("report.json");
    fs::write(&file, report.to_json()?)?;
    eprintln!("{:.0} s; written to {}", start.elapsed().as_secs_f64(), file.display());
    Ok(report)
}
