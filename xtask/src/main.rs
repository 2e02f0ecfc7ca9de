//! `cargo xtask`: the repository's own commands.
#![expect(clippy::print_stdout, reason = "the last line of `test` is its result")]

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fmt, process};

use xtask::tools;

const USAGE: &str = "\
usage: cargo xtask <command>

  demo [--once]    start stores and both planes, and show what they do
  test [--fast]    lint, build and run the tests; --fast: only what needs no tool and no server
  lint             format, dependencies, protos, clippy
  bench [...]      build for release and measure
  proto-baseline   take the protos as they are as what `lint` compares with";

const PROTO_BASELINE: &str = "proto/baseline.binpb";

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["demo", args @ ..] => demo(args),
        ["test"] => test(Extent::Full),
        ["test", "--fast"] => test(Extent::Fast),
        ["lint"] => lint(&mut Stages::default()),
        ["bench", args @ ..] => bench(args),
        ["proto-baseline"] => proto_baseline(),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &[&str]) -> Result {
    tools::OPENBAO.install()?;
    for server in [tools::MOTO, tools::DRONGO] {
        // The demo does without what cannot be had, and says so.
        if let Err(error) = server.install() {
            eprintln!("{error}");
        }
    }
    eprintln!("building (some minutes the first time) …");
    run(&mut cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
    become_program(command(&built("debug", "demo")?).args(args))
}

fn bench(args: &[&str]) -> Result {
    servers()?;
    eprintln!("building for release (some minutes the first time) …");
    let mut build = cargo(&["build", "--quiet", "--workspace", "--bins", "--release"]);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // As the image is built: the cipher at rest is twice as fast when it need not ask the processor what it can do.
        build.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-cpu=x86-64-v3");
    }
    run(&mut build)?;
    become_program(command(&built("release", "bench")?).args(args))
}

fn servers() -> Result {
    for server in tools::SERVERS {
        server.install()?;
    }
    Ok(())
}

fn lint(stages: &mut Stages) -> Result {
    stages.run("format", format)?;
    stages.run("dependencies", || {
        let deny = tools::CARGO_DENY.install()?;
        run(command(&deny).args(["--log-level", "error", "check", "bans", "licenses", "sources"]))
    })?;
    stages.run("protos", || {
        let buf = tools::BUF.install()?;
        run(command(&buf).arg("lint"))?;
        if root().join(PROTO_BASELINE).exists() {
            run(command(&buf).args(["breaking", "--against", PROTO_BASELINE]))?;
        }
        Ok(())
    })?;
    stages.run("build with lints", build_with_lints)
}

fn format() -> Result {
    run(&mut cargo(&["fmt", "--all", "--check"]))
}

fn proto_baseline() -> Result {
    let buf = tools::BUF.install()?;
    run(command(&buf).args(["build", "--exclude-source-info", "--output", PROTO_BASELINE]))
}

#[derive(Clone, Copy)]
enum Extent {
    Full,
    Fast,
}

fn test(extent: Extent) -> Result {
    let mut stages = Stages::default();
    let tests: &[&str] = match extent {
        Extent::Full => {
            lint(&mut stages)?;
            stages.run("servers", servers)?;
            &[]
        }
        Extent::Fast => {
            stages.run("format", format)?;
            stages.run("build with lints", build_with_lints)?;
            &["--lib", "--bins"]
        }
    };
    let mut totals = Totals::default();
    let passed = stages.run("tests", || {
        let mut command = with_lints(&["test", "--quiet", "--workspace", "--no-fail-fast"]);
        let mut cargo = command.args(tests).stdout(Stdio::piped()).spawn()?;
        for line in BufReader::new(cargo.stdout.take().expect("it is piped")).lines() {
            let line = line?;
            println!("{line}");
            totals.add(&line);
        }
        if cargo.wait()?.success() { Ok(()) } else { Err("tests failed, see above".into()) }
    });
    eprintln!("{stages}");
    let verdict = match passed {
        Ok(()) if totals.passed == 0 => Err("no test was executed".into()),
        passed => passed,
    };
    // The totals are the last line, whatever happened.
    if let Err(error) = &verdict {
        eprintln!("error: {error}");
    }
    println!("{totals}");
    process::exit(i32::from(verdict.is_err()))
}

/// What the runners of all test binaries counted.
#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
}

impl Totals {
    /// Takes `test result: ok. 12 passed; 0 failed; …` into account, and no other line.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        for (count, kind) in result.split(['.', ';']).filter_map(|part| part.trim().split_once(' ')) {
            match kind {
                "passed" => self.passed += count.parse().unwrap_or(0),
                "failed" => self.failed += count.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Says what is going on, and afterwards what took how long.
#[derive(Default)]
struct Stages(Vec<(&'static str, Duration)>);

impl Stages {
    fn run<T>(&mut self, name: &'static str, stage: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("{name} …");
        let start = Instant::now();
        let result = stage();
        self.0.push((name, start.elapsed()));
        result
    }
}

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages = self.0.iter().map(|(name, took)| format!("{name} {:.1} s", took.as_secs_f64()));
        f.write_str(&stages.collect::<Vec<_>>().join(" · "))
    }
}

/// Builds all binaries and tests, each workspace crate by clippy, so that lints and code come from one build.
fn build_with_lints() -> Result {
    run(&mut with_lints(&["build", "--quiet", "--workspace", "--all-targets"]))
}

/// Whatever follows [`build_with_lints`] takes the same flags, or everything would be built again.
fn with_lints(args: &[&str]) -> Command {
    let mut cargo = cargo(args);
    cargo.env("RUSTC_WORKSPACE_WRAPPER", "clippy-driver");
    cargo.env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    cargo
}

fn cargo(args: &[&str]) -> Command {
    let mut cargo = command(Path::new("cargo"));
    cargo.args(args);
    // What `cargo run` told us about our own package is no business of the build scripts.
    for (name, _) in env::vars_os() {
        let inherited = |prefix: &str| name.to_string_lossy().starts_with(prefix);
        if inherited("CARGO_PKG_") || inherited("CARGO_MANIFEST_") {
            cargo.env_remove(name);
        }
    }
    cargo
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

fn run(command: &mut Command) -> Result {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{}: {status}", shown(command)).into()),
        Err(error) => Err(format!("{} does not start: {error}", shown(command)).into()),
    }
}

/// Goes on as this program, so that whoever stops us by a signal stops it and not its parent alone.
fn become_program(command: &mut Command) -> Result {
    let error = command.exec();
    Err(format!("{} does not start: {error}", shown(command)).into())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root")
}

/// A binary of the workspace, in the target folder that this program itself was built into.
fn built(profile: &str, name: &str) -> Result<PathBuf> {
    let own = env::current_exe()?;
    let target = own.parent().and_then(Path::parent).ok_or("this program lies in a target folder")?;
    Ok(target.join(profile).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_those_of_all_runners() {
        let mut totals = Totals::default();
        totals.add(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s",
        );
        totals.add("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        totals.add("test nothing ... 7 passed; ok");
        assert_eq!(totals.to_string(), "15 passed, 2 failed");
    }
}
