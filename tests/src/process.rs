//! A server as a child process that never stays behind.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::wait;

/// A running server: killed when dropped, and also when this process dies without dropping it.
#[derive(Debug)]
pub struct Process {
    server: Child,
    /// Kills the server when our end of its stdin is closed, which the kernel does however we die.
    watchdog: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a server; what it prints is appended to `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // A group of their own, so that Ctrl-C reaches us alone and we decide what ends in which order.
        let mut server =
            command.process_group(0).spawn().with_context(|| format!("cannot start {command:?}"))?;
        let watchdog = Command::new("sh")
            .args(["-c", "read -r _; kill -KILL \"$1\"", "watchdog", &server.id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        match watchdog {
            Ok(watchdog) => Ok(Process { server, watchdog, log: log.to_owned() }),
            Err(error) => {
                server.kill()?;
                server.wait()?;
                Err(error).context("cannot start sh")
            }
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.server.id()
    }

    /// Asks it to shut down, and does not wait.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn terminate(&self) -> Result<()> {
        self.signal("-TERM")
    }

    /// Freezes it: connections stay open, nothing is answered. Returns once every thread stands still.
    ///
    /// # Errors
    /// If the process is gone.
    pub async fn pause(&self) -> Result<()> {
        self.signal("-STOP")?;
        let threads = format!("/proc/{}/task", self.id());
        wait::until("the server is frozen", async || {
            for thread in fs::read_dir(&threads)? {
                // A thread may end meanwhile. Its state follows its name, which is in brackets.
                let Ok(stat) = fs::read_to_string(thread?.path().join("stat")) else { return Ok(None) };
                if !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .await
    }

    /// Lets it go on after [`Process::pause`].
    ///
    /// # Errors
    /// If the process is gone.
    pub fn resume(&self) -> Result<()> {
        self.signal("-CONT")
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.server.try_wait()?)
    }

    /// Fails, with the end of the log, if the process has ended.
    ///
    /// # Errors
    /// See above.
    pub fn ensure_running(&mut self) -> Result<()> {
        let Some(status) = self.ended()? else { return Ok(()) };
        let log = fs::read_to_string(&self.log)?;
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n");
        anyhow::bail!("the server ended with {status}; its last words:\n{end}")
    }

    /// Asks it to shut down and waits until it has.
    ///
    /// # Errors
    /// If it does not.
    pub async fn stop(mut self) -> Result<ExitStatus> {
        self.resume()?;
        self.terminate()?;
        wait::until("the server has shut down", async || self.ended()).await
    }

    fn signal(&self, name: &str) -> Result<()> {
        let id = self.id().to_string();
        let status = Command::new("kill").args([name, &id]).stderr(Stdio::null()).status()?;
        ensure!(status.success(), "kill {name} {id}: {status}");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The watchdog first: once the server is reaped its id may be another's.
        drop(self.watchdog.kill());
        drop(self.watchdog.wait());
        drop(self.server.kill());
        drop(self.server.wait());
    }
}
