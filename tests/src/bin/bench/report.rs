//! The figures, for people and for programs.

use std::fs;
use std::io::{self, Write as _};

use anyhow::Result;
use scaivault_domain::time::Clock as _;
use scaivault_telemetry::SystemClock;
use serde::Serialize;

use crate::cpu::Pinning;
use crate::pairs::{Extent, Pair};

/// What is written to `report.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    measured: String,
    cpu: String,
    /// Servers on core 0, the generator on core 1; OpenBao on both.
    pinned: bool,
    rounds: usize,
    turn_ms: u128,
    pairs: Vec<Pair>,
}

impl Report {
    /// The report of what has been measured just now.
    pub(crate) fn new(extent: Extent, pinning: Pinning, pairs: Vec<Pair>) -> Report {
        Report {
            measured: SystemClock.now().to_string(),
            cpu: cpu().unwrap_or_else(|| "unknown".into()),
            pinned: pinning == Pinning::Pinned,
            rounds: extent.rounds,
            turn_ms: extent.turn.as_millis(),
            pairs,
        }
    }

    /// The file's content.
    pub(crate) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Prints the table.
    pub(crate) fn print(&self) -> Result<()> {
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "\n{:<29}{:>7}{:>9}{:>8}{:>7}{:>11}{:>9}{:>8}{:>8}{:>9}{:>8}{:>9}",
            "1 KiB values",
            "flight",
            "CPU µs",
            "floor",
            "ratio",
            "req/CPU-s",
            "p50 ms",
            "floor",
            "added",
            "mean ms",
            "floor",
            "p99 ms",
        )?;
        for pair in &self.pairs {
            writeln!(
                out,
                "{:<29}{:>7}{:>9.1}{:>8}{:>7.2}{:>11.0}{:>9.3}{:>8.3}{:>+8.3}{:>9.3}{:>8.3}{:>9.3}",
                pair.name,
                pair.in_flight,
                pair.cpu_us,
                pair.floor_cpu_us.map_or("-".into(), |cpu| format!("{cpu:.1}")),
                pair.ratio,
                pair.requests_per_cpu_second,
                pair.p50_ms,
                pair.floor_p50_ms,
                pair.added_p50_ms,
                pair.mean_ms,
                pair.floor_mean_ms,
                pair.p99_ms,
            )?;
        }
        writeln!(
            out,
            "\nratio: the floor's CPU per request over ours for cached_*, its p50 over ours for the others"
        )?;
        let pinned = if self.pinned { "servers on core 0, generator on core 1" } else { "not pinned" };
        writeln!(out, "{}, {}, {pinned}", self.measured, self.cpu)?;
        Ok(out.flush()?)
    }
}

/// What the kernel calls the processor.
fn cpu() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, model) = info.lines().find(|line| line.starts_with("model name"))?.split_once(": ")?;
    Some(model.to_owned())
}
