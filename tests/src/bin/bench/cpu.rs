//! Which core runs what, and how much of it and of the memory.

use std::path::Path;
use std::process::{self, Command, Stdio};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};
use scaivault_tests::process::Process;

const SERVER: &str = "0";
const GENERATOR: &str = "1";
/// Where `utime` is after the name in `/proc/<pid>/stat`, with `stime` behind it; both in hundredths of a second.
const USER_TIME: usize = 11;

/// Whether servers and generator have a core each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pinning {
    /// Servers on core 0, the generator on core 1; OpenBao on both.
    Pinned,
    /// The kernel places them.
    Free,
}

impl Pinning {
    /// What this machine can do.
    pub(crate) fn possible() -> Pinning {
        let taskset = Command::new("taskset").args(["-c", GENERATOR, "true"]).stderr(Stdio::null()).status();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        if cores > 1 && taskset.is_ok_and(|status| status.success()) {
            return Pinning::Pinned;
        }
        eprintln!(
            "without `taskset` (util-linux) or a second core nothing is pinned, and figures are noisier"
        );
        Pinning::Free
    }

    /// Gives the generator, which is this program, its core. What it starts from now on inherits that.
    pub(crate) fn pin_generator(self) -> Result<()> {
        if self == Pinning::Pinned {
            let mut taskset = Command::new("taskset");
            taskset.args(["--all-tasks", "--cpu-list", "--pid", GENERATOR, &process::id().to_string()]);
            let pinned = taskset.stdout(Stdio::null()).status()?;
            ensure!(pinned.success(), "taskset: {pinned}");
        }
        Ok(())
    }
}

/// Starts a server on its core.
pub(crate) fn serve(program: &Path, args: &[&str], pinning: Pinning, log: &Path) -> Result<Process> {
    let mut command = match pinning {
        Pinning::Free => Command::new(program),
        Pinning::Pinned => {
            let mut taskset = Command::new("taskset");
            taskset.args(["-c", SERVER]).arg(program);
            taskset
        }
    };
    Process::spawn(command.args(args), log)
}

/// The CPU time that a process has had so far, from the scheduler's own accounting.
pub(crate) fn used(process: u32) -> Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end meanwhile.
        let Ok(schedstat) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let run: &str = schedstat.split(' ').next().unwrap_or_default();
        nanos += run.parse::<u64>().context("this kernel keeps no schedstat")?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// The same with the time of threads that have ended, which only hundredths of seconds are kept of.
pub(crate) fn used_by_all(process: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name of the program, in brackets, may have anything in it.
    let (_, fields) = stat.rsplit_once(") ").context("no stat of a process")?;
    let ticks = fields.split(' ').skip(USER_TIME).take(2).map(str::parse::<u64>);
    let ticks = ticks.sum::<Result<u64, _>>().context("this kernel keeps no stat")?;
    Ok(Duration::from_millis(ticks * 10))
}

/// Memory of a process that is resident now.
pub(crate) fn resident(process: u32) -> Result<u64> {
    status(process, "VmRSS")
}

/// That part of it which is not just a file that was mapped, such as the program.
pub(crate) fn resident_own(process: u32) -> Result<u64> {
    status(process, "RssAnon")
}

/// The most memory of a process that was resident at any time.
pub(crate) fn resident_peak(process: u32) -> Result<u64> {
    status(process, "VmHWM")
}

/// Bytes.
fn status(process: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .with_context(|| format!("this kernel tells no {name}"))?;
    Ok(kib.parse::<u64>()? << 10)
}
