//! The figures, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use scaivault_domain::time::Clock as _;
use scaivault_telemetry::SystemClock;
use serde::{Serialize, Serializer};

use crate::clouds::{CloudSync, Reads};
use crate::cpu::Pinning;
use crate::pairs::{Extent, Pair};
use crate::syncs::{Memory, Sync};

/// The figure of proxied reads.
const ADDED: &str = "added p50 over the pass-through's";
/// Where the documentation has the figures.
const BEGIN: &str = "<!-- figures: written by `cargo xtask bench --docs` -->\n";
const END: &str = "<!-- end of figures -->\n";

/// What is written to `report.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    measured: String,
    cpu: String,
    /// Servers on core 0, the generator on core 1; OpenBao on both.
    pinned: bool,
    rounds: usize,
    turn_ms: u128,
    goals: Vec<Goal>,
    pairs: Vec<Pair>,
    syncs: Vec<Sync>,
    memory: Vec<Memory>,
    cloud_reads: Vec<Reads>,
    cloud_syncs: Vec<CloudSync>,
}

/// A figure that we want to be at a certain place.
#[derive(Debug, Serialize)]
struct Goal {
    name: String,
    /// What the figure is.
    figure: &'static str,
    value: f64,
    goal: Bound,
    met: bool,
}

/// Where a figure should be.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::AtLeast(bound) => write!(f, "≥ {bound}"),
            Bound::AtMost(bound) => write!(f, "≤ {bound}"),
        }
    }
}

impl Serialize for Bound {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Goal {
    fn new(name: &str, figure: &'static str, value: f64, goal: Bound) -> Goal {
        let met = match goal {
            Bound::AtLeast(bound) => value >= bound,
            Bound::AtMost(bound) => value <= bound,
        };
        Goal { name: name.to_owned(), figure, value, goal, met }
    }
}

/// Those of the stores of clouds.
fn cloud_goals(reads: &[Reads], syncs: &[CloudSync]) -> Vec<Goal> {
    let reads = reads.iter().filter_map(|pair| {
        let ratio = pair.added_p50_ms / pair.passthrough_added_p50_ms?;
        Some(Goal::new(&pair.name, ADDED, ratio, Bound::AtMost(1.1)))
    });
    let figure = "time over the loop's or the quota's, whichever is longer";
    let syncs = syncs
        .iter()
        .map(|cloud| Goal::new(&cloud.sync.name, figure, cloud.ratio_to_bound, Bound::AtMost(1.15)));
    reads.chain(syncs).collect()
}

fn goals(pairs: &[Pair], syncs: &[Sync], memory: &[Memory]) -> Vec<Goal> {
    let mut goals = Vec::new();
    let requests = "requests per CPU-second over the floor's";
    for (name, bound) in [("cached_grpc", 0.85), ("cached_rest", 0.6)] {
        let pair = pairs.iter().filter(|pair| pair.name == name);
        goals.extend(pair.map(|pair| Goal::new(name, requests, pair.ratio, Bound::AtLeast(bound))));
    }
    for (ours, simplest) in [
        ("proxied_read_added_p50_ms", "passthrough_added_p50_ms"),
        ("proxied_read_added_p50_ms_16", "passthrough_added_p50_ms_16"),
    ] {
        let added = |name: &str| pairs.iter().find(|pair| pair.name == name).map(|pair| pair.added_p50_ms);
        if let (Some(added), Some(simplest)) = (added(ours), added(simplest)) {
            goals.push(Goal::new(ours, ADDED, added / simplest, Bound::AtMost(1.1)));
        }
    }
    for sync in syncs {
        goals.push(Goal::new(&sync.name, "time over the loop's", sync.ratio, Bound::AtMost(1.3)));
        let figure = "calls of the first sync over its own";
        goals.push(Goal::new(&sync.unchanged.name, figure, sync.unchanged.fewer_calls, Bound::AtLeast(20.0)));
    }
    for node in memory {
        goals.push(Goal::new(&node.name, "MiB resident", mib(node.bytes), Bound::AtMost(64.0)));
    }
    goals
}

impl Report {
    /// The report of what has been measured just now.
    pub(crate) fn new(
        extent: Extent,
        pinning: Pinning,
        pairs: Vec<Pair>,
        (syncs, memory): (Vec<Sync>, Vec<Memory>),
        (cloud_reads, cloud_syncs): (Vec<Reads>, Vec<CloudSync>),
    ) -> Report {
        let mut goals = goals(&pairs, &syncs, &memory);
        goals.extend(cloud_goals(&cloud_reads, &cloud_syncs));
        Report {
            measured: SystemClock.now().to_string(),
            cpu: cpu().unwrap_or_else(|| "unknown".into()),
            pinned: pinning == Pinning::Pinned,
            rounds: extent.rounds,
            turn_ms: extent.turn.as_millis(),
            goals,
            pairs,
            syncs,
            memory,
            cloud_reads,
            cloud_syncs,
        }
    }

    /// The content of `report.json`.
    pub(crate) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// The tables, which are good to read as they are.
    pub(crate) fn to_markdown(&self) -> String {
        let pinned = if self.pinned { "servers on core 0, generator on core 1" } else { "not pinned" };
        let mut text = format!("Measured at {} on {}, {pinned}.\n", self.measured, self.cpu);
        let tables = [
            self.goals(),
            self.pairs(),
            self.syncs(),
            self.unchanged(),
            self.memory(),
            self.cloud_reads(),
            self.cloud_syncs(),
            self.cloud_calls(),
        ];
        for table in tables {
            text.push('\n');
            text.push_str(&table.to_string());
        }
        text
    }

    /// Puts the tables into the documentation.
    pub(crate) fn write_into(&self, file: &Path) -> Result<()> {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let (before, rest) = text.split_once(BEGIN).context("the documentation has no place for figures")?;
        let (_, after) = rest.split_once(END).context("the documentation has no end of figures")?;
        Ok(fs::write(file, format!("{before}{BEGIN}\n{}\n{END}{after}", self.to_markdown()))?)
    }

    fn goals(&self) -> Table {
        let mut table = Table::new(["goal", "figure", "is", "should be", "met"]);
        for Goal { name, figure, value, goal, met } in &self.goals {
            let met = if *met { "yes" } else { "no" };
            table.row([code(name), (*figure).into(), short(*value), goal.to_string(), met.into()]);
        }
        table
    }

    fn pairs(&self) -> Table {
        let mut table = Table::new([
            "reads of 1 KiB",
            "in flight",
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
        ]);
        for pair in &self.pairs {
            table.row([
                code(pair.name),
                pair.in_flight.to_string(),
                format!("{:.1}", pair.cpu_us),
                pair.floor_cpu_us.map_or("–".into(), |cpu| format!("{cpu:.1}")),
                format!("{:.2}", pair.ratio),
                format!("{:.0}", pair.requests_per_cpu_second),
                format!("{:.3}", pair.p50_ms),
                format!("{:.3}", pair.floor_p50_ms),
                format!("{:+.3}", pair.added_p50_ms),
                format!("{:.3}", pair.mean_ms),
                format!("{:.3}", pair.floor_mean_ms),
                format!("{:.3}", pair.p99_ms),
            ]);
        }
        table
    }

    fn syncs(&self) -> Table {
        let mut table = Table::new([
            "first sync",
            "secrets",
            "s",
            "loop",
            "ratio",
            "CPU µs a secret",
            "loop",
            "peak MiB",
            "calls",
        ]);
        for sync in &self.syncs {
            table.row([
                code(&sync.name),
                sync.secrets.to_string(),
                format!("{:.2}", sync.seconds),
                format!("{:.2}", sync.floor_seconds),
                format!("{:.2}", sync.ratio),
                format!("{:.0}", sync.cpu_us),
                format!("{:.0}", sync.floor_cpu_us),
                format!("{:.0}", mib(sync.peak_bytes)),
                calls(&sync.calls),
            ]);
        }
        table
    }

    fn unchanged(&self) -> Table {
        let mut table =
            Table::new(["unchanged cycle", "secrets", "s", "times faster", "times fewer calls", "calls"]);
        for sync in &self.syncs {
            table.row([
                code(&sync.unchanged.name),
                sync.secrets.to_string(),
                format!("{:.3}", sync.unchanged.seconds),
                format!("{:.0}", sync.unchanged.faster),
                format!("{:.0}", sync.unchanged.fewer_calls),
                calls(&sync.unchanged.calls),
            ]);
        }
        table
    }

    fn memory(&self) -> Table {
        let mut table = Table::new([
            "node memory",
            "secrets",
            "MiB",
            "without program",
            "peak MiB",
            "MiB on disk",
            "s to get them",
        ]);
        for node in &self.memory {
            table.row([
                code(&node.name),
                node.secrets.to_string(),
                format!("{:.1}", mib(node.bytes)),
                format!("{:.1}", mib(node.own_bytes)),
                format!("{:.1}", mib(node.peak_bytes)),
                format!("{:.0}", mib(node.disk_bytes)),
                format!("{:.1}", node.prefetch_seconds),
            ]);
        }
        table
    }

    fn cloud_reads(&self) -> Table {
        let mut table = Table::new([
            "reads of clouds, 1 in flight",
            "store",
            "direct read",
            "p50 ms",
            "direct",
            "ratio",
            "added",
            "pass-through added",
            "store's CPU ms",
        ]);
        for pair in &self.cloud_reads {
            table.row([
                code(&pair.name),
                pair.store.into(),
                pair.direct.into(),
                format!("{:.3}", pair.p50_ms),
                format!("{:.3}", pair.direct_p50_ms),
                format!("{:.2}", pair.ratio),
                format!("{:+.3}", pair.added_p50_ms),
                pair.passthrough_added_p50_ms.map_or("–".into(), |added| format!("{added:+.3}")),
                format!("{:.3}", pair.store_cpu_ms),
            ]);
        }
        table
    }

    fn cloud_syncs(&self) -> Table {
        let mut table = Table::new([
            "first sync of clouds",
            "secrets",
            "s",
            "loop",
            "ratio",
            "s by the quota",
            "CPU µs a secret",
            "loop",
            "store's CPU s",
            "loop",
        ]);
        for CloudSync { sync, store_cpu_seconds, floor_store_cpu_seconds, quota_seconds, .. } in
            &self.cloud_syncs
        {
            table.row([
                code(&sync.name),
                sync.secrets.to_string(),
                format!("{:.2}", sync.seconds),
                format!("{:.2}", sync.floor_seconds),
                format!("{:.2}", sync.ratio),
                format!("{quota_seconds:.2}"),
                format!("{:.0}", sync.cpu_us),
                format!("{:.0}", sync.floor_cpu_us),
                format!("{store_cpu_seconds:.2}"),
                format!("{floor_store_cpu_seconds:.2}"),
            ]);
        }
        table
    }

    fn cloud_calls(&self) -> Table {
        let mut table = Table::new(["calls of a sync", "secrets", "first", "unchanged", "unchanged s"]);
        for CloudSync { sync, .. } in &self.cloud_syncs {
            table.row([
                code(&sync.name),
                sync.secrets.to_string(),
                calls(&sync.calls),
                calls(&sync.unchanged.calls),
                format!("{:.3}", sync.unchanged.seconds),
            ]);
        }
        table
    }
}

/// A table of Markdown, its columns as wide as they must be.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new<const N: usize>(head: [&str; N]) -> Table {
        Table { rows: vec![head.map(str::to_owned).into()] }
    }

    fn row<const N: usize>(&mut self, row: [String; N]) {
        self.rows.push(row.into());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
        for (index, row) in self.rows.iter().enumerate() {
            for (column, cell) in row.iter().enumerate() {
                write!(f, "| {cell:<width$} ", width = width(column))?;
            }
            writeln!(f, "|")?;
            if index == 0 {
                for column in 0..columns {
                    write!(f, "|{:-<width$}", "", width = width(column) + 2)?;
                }
                writeln!(f, "|")?;
            }
        }
        Ok(())
    }
}

fn code(name: &str) -> String {
    format!("`{name}`")
}

fn calls(calls: &BTreeMap<String, u64>) -> String {
    let mut text = String::new();
    for (operation, count) in calls {
        let comma = if text.is_empty() { "" } else { ", " };
        let _infallible = write!(text, "{comma}{count} {operation}");
    }
    text
}

/// With as many digits as tell something.
fn short(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a size of memory is far below 2^52")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}

/// What the kernel calls the processor.
fn cpu() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, model) = info.lines().find(|line| line.starts_with("model name"))?.split_once(": ")?;
    Some(model.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_on_its_side_of_the_bound() {
        let met = |value, bound| Goal::new("name", "figure", value, bound).met;
        assert!(met(0.9, Bound::AtLeast(0.85)) && !met(0.8, Bound::AtLeast(0.85)));
        assert!(met(1.2, Bound::AtMost(1.3)) && !met(1.4, Bound::AtMost(1.3)));
        assert!(!met(f64::NAN, Bound::AtMost(1.3)));
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["µs", "b"]);
        table.row(["long".into(), "1".into()]);
        assert_eq!(table.to_string(), "| µs   | b   |\n|------|-----|\n| long | 1   |\n");
    }
}
