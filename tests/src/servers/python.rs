//! Servers written in Python: one process each, in memory, in an environment of its own.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, ExitStatus};
use std::{env, path::Path};

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tokio::net::TcpStream;
use xtask::tools::Tool;

use crate::process::Process;
use crate::{ports, wait};

/// A module that serves on a port.
#[derive(Debug)]
pub(super) struct Server {
    command: Command,
    folder: TempDir,
    port: u16,
    process: Option<Process>,
}

impl Server {
    /// Installs `tool` if need be and gets ready to run its `module`; [`Server::start`] does.
    pub(super) async fn new(tool: Tool, module: &str) -> Result<Server> {
        let packages = tokio::task::spawn_blocking(move || tool.install_folder()).await??;
        let folder = tempfile::Builder::new().prefix(module).tempdir()?;
        let mut command = Command::new("python3");
        // Without our environment, which may hold a proxy or real credentials, and without the packages of this
        // machine (-S), so that what runs is what is pinned.
        command.args(["-S", "-m", module]).env_clear().current_dir(folder.path());
        // What chooses among several Pythons reads these.
        command.envs(["PATH", "HOME"].iter().filter_map(|name| Some((name, env::var_os(name)?))));
        command.env("PYTHONPATH", packages).env("PYTHONDONTWRITEBYTECODE", "1");
        Ok(Server { command, folder, port: ports::free(), process: None })
    }

    /// To add arguments and environment.
    pub(super) fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// A folder of its own, gone with it.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn socket(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub(super) async fn start(&mut self) -> Result<()> {
        let mut process = Process::spawn(&mut self.command, &self.folder.path().join("log"))?;
        let socket = self.socket();
        wait::until("the server listens", async || {
            process.ensure_running()?;
            Ok(TcpStream::connect(socket).await.ok().map(drop))
        })
        .await?;
        self.process = Some(process);
        Ok(())
    }

    pub(super) async fn stop(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            let _: ExitStatus = process.stop().await?;
        }
        Ok(())
    }

    pub(super) async fn pause(&self) -> Result<()> {
        self.running()?.pause().await
    }

    pub(super) fn resume(&self) -> Result<()> {
        self.running()?.resume()
    }

    /// The id of its process.
    pub(super) fn process(&self) -> Result<u32> {
        Ok(self.running()?.id())
    }

    /// What it has printed since the first start.
    pub(super) fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.path().join("log"))?)
    }

    fn running(&self) -> Result<&Process> {
        self.process.as_ref().context("the server does not run")
    }
}
