//! Command lines for another shell. Each is executed before it counts as shown.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::process::Command;
use tokio::time::timeout;
use xtask::tools;

use crate::clouds::Cloud;
use crate::story::{COPIED, Demo, SECRET};
use crate::transcript::Transcript;

/// How many lines of an output are shown.
const SHOWN: usize = 16;
const PATIENCE: Duration = Duration::from_secs(20);

/// The programs that the lines use, as far as they are there.
pub(crate) struct Tools {
    curl: Option<PathBuf>,
    grpcurl: Option<PathBuf>,
    scaivault: Option<PathBuf>,
}

impl Tools {
    /// What is on this machine.
    pub(crate) fn at_hand() -> Tools {
        Tools {
            curl: on_path("curl"),
            grpcurl: on_path("grpcurl").or_else(|| tools::GRPCURL.installed()),
            scaivault: beside_us("scaivault"),
        }
    }

    /// The same, but a grpcurl is installed if there is none.
    pub(crate) async fn complete() -> Result<Tools> {
        let mut tools = Tools::at_hand();
        if tools.grpcurl.is_none() {
            match tokio::task::spawn_blocking(|| tools::GRPCURL.install()).await? {
                Ok(installed) => tools.grpcurl = Some(installed),
                // The demo can do without.
                Err(error) => eprintln!("{error}"),
            }
        }
        Ok(tools)
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let found = env::split_paths(&path).any(|folder| folder.join(program).is_file());
    found.then(|| program.into())
}

fn beside_us(program: &str) -> Option<PathBuf> {
    Some(env::current_exe().ok()?.with_file_name(program)).filter(|file| file.is_file())
}

/// A command line, and what its output must contain.
struct Line {
    what: String,
    command: String,
    proof: &'static str,
}

fn line(what: &str, command: impl Into<String>, proof: &'static str) -> Line {
    Line { what: what.to_owned(), command: command.into(), proof }
}

fn curl_lines(curl: &str, clouds: &[Cloud]) -> Vec<Line> {
    let read = |route: &str| {
        format!("{curl} -sS -H \"Authorization: Bearer $SCAIVAULT_TOKEN\" \\\n  $SCAIVAULT_ADDR{route}")
    };
    let write = |route: &str, body: &str| {
        let header = "-H \"Content-Type: application/json\"";
        format!("{} \\\n  -X PUT {header} -d '{body}'", read(route))
    };
    let (remote, local) = (format!("/v1/secrets/{SECRET}"), "/v1/secrets/demo/hello");
    let copied = format!("/v1/secrets/{COPIED}");
    let status = "/v1/federation/backends/$BACKEND/status";
    let report = "/v1/federation/backends/$COPY/syncs/$RUN";
    let mut lines = vec![
        line("REST: read a secret of OpenBao", read(&remote), r#""source":"proxy""#),
        line(
            "REST: write to it; refused, for it belongs to OpenBao",
            write(&remote, r#"{"data":{"password":"winter"}}"#),
            r#""code":"federated_read_only""#,
        ),
        line("REST: look at the backend of OpenBao", read(status), r#""status":"healthy""#),
        line("REST: read a copy, from ScaiVault's own store", read(&copied), r#""source":"sync""#),
        line("REST: what the first sync copied and left out", read(report), r#""reason":"charset""#),
        line(
            "REST: write a secret of ScaiVault's own, and read it",
            write(local, r#"{"data":{"greeting":"hello"}}"#),
            r#""version":"#,
        ),
        line("", read(local), r#""source":"local""#),
    ];
    let clouds = clouds.iter().map(|cloud| Line {
        what: format!("REST: the same request reads {}", cloud.title),
        command: read(&format!("/v1/secrets/{}", cloud.path)),
        proof: cloud.proof,
    });
    // After what is read of OpenBao and cannot be written there.
    lines.splice(2..2, clouds);
    lines
}

fn grpcurl_lines(grpcurl: &str) -> Vec<Line> {
    let address = "${SCAIVAULT_ADDR#http://}";
    vec![
        line(
            "gRPC: ask the server for its services",
            format!("{grpcurl} \\\n  -plaintext {address} list"),
            "scaivault.secrets.v1.SecretsService",
        ),
        line(
            "gRPC: read the secret of OpenBao; its value is bytes, which are base64 in JSON",
            format!(
                "{grpcurl} \\\n  -plaintext -H \"Authorization: Bearer $SCAIVAULT_TOKEN\" \
                 -d '{{\"path\":\"{SECRET}\"}}' \\\n  {address} scaivault.secrets.v1.SecretsService/Get"
            ),
            "SECRET_SOURCE_PROXY",
        ),
    ]
}

fn scaivault_lines(scaivault: &str) -> Vec<Line> {
    vec![
        line("The command line: read a secret of OpenBao", format!("{scaivault} get {SECRET}"), "autumn"),
        line("List what lies beside it", format!("{scaivault} list external/hashicorp/app"), "stripe"),
        line("List the backends", format!("{scaivault} backend list"), "hashicorp-copy"),
        line("Look at the backend", format!("{scaivault} backend status $BACKEND"), "healthy"),
        line(
            "Try its address, login, listing and reading; no value is read",
            format!("{scaivault} backend test $BACKEND"),
            "the credential may read",
        ),
        line(
            "See what the sync copied, and what it left out and why",
            format!("{scaivault} backend sync-report $COPY $RUN"),
            "with space  charset",
        ),
        line("Sync now", format!("{scaivault} backend sync $COPY --wait"), "complete"),
        line("Read a copy", format!("{scaivault} get {COPIED}"), "sync"),
        line("See who did what", format!("{scaivault} audit tail -n 5"), "secret."),
    ]
}

/// Executes and shows every line, and returns how many did not do what they should.
pub(crate) async fn show(demo: &Demo, tools: &Tools, title: &str, out: &mut Transcript) -> Result<usize> {
    out.step(title)?;
    out.blank()?;
    out.command(&format!("export SCAIVAULT_ADDR={}", demo.address))?;
    out.command(&format!("export SCAIVAULT_TOKEN={}", demo.token))?;
    out.command(&format!("export BACKEND={} COPY={}", demo.backend, demo.copy))?;
    out.command(&format!("export RUN={}", demo.run))?;

    let mut failed = 0;
    let program = |path: &Option<PathBuf>| path.as_deref().map(shell_word);
    if let Some(curl) = program(&tools.curl) {
        failed += show_all(curl_lines(&curl, &demo.clouds), demo, out).await?;
    } else {
        note(out, "There is no curl on this machine: install it to try REST by hand.")?;
    }
    if let Some(grpcurl) = program(&tools.grpcurl) {
        failed += show_all(grpcurl_lines(&grpcurl), demo, out).await?;
    } else {
        note(
            out,
            "There is no grpcurl on this machine: `cargo xtask demo --once` installs one and shows gRPC.",
        )?;
    }
    if let Some(scaivault) = program(&tools.scaivault) {
        failed += show_all(scaivault_lines(&scaivault), demo, out).await?;
    } else {
        note(out, "The program `scaivault` is not built: `cargo build --workspace --bins`.")?;
    }
    Ok(failed)
}

fn note(out: &Transcript, text: &str) -> Result<()> {
    out.blank()?;
    out.comment(text)
}

async fn show_all(lines: Vec<Line>, demo: &Demo, out: &Transcript) -> Result<usize> {
    let mut failed = 0;
    for line in lines {
        if !line.what.is_empty() {
            note(out, &line.what)?;
        }
        out.command(&line.command)?;
        let output = execute(&line.command, demo).await?;
        let printed: Vec<&str> = output.lines().filter(|line| !line.trim().is_empty()).collect();
        for line in printed.iter().take(SHOWN) {
            out.output(line)?;
        }
        if printed.len() > SHOWN {
            out.output("…")?;
        }
        if !output.contains(line.proof) {
            failed += 1;
            out.failure(&format!("FAILED: `{}` should be in what it printed", line.proof))?;
        }
    }
    Ok(failed)
}

/// Executes a line as another shell would after the exports; returns what it printed.
async fn execute(line: &str, demo: &Demo) -> Result<String> {
    let mut shell = Command::new("sh");
    shell.args(["-c", line]);
    shell.env("SCAIVAULT_ADDR", &demo.address).env("SCAIVAULT_TOKEN", &demo.token);
    shell.env("BACKEND", &demo.backend).env("COPY", &demo.copy).env("RUN", &demo.run);
    let done = timeout(PATIENCE, shell.kill_on_drop(true).output());
    let done = done.await.with_context(|| format!("`{line}` took longer than {PATIENCE:?}"))??;
    Ok(String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr))
}

/// A path as one word of a shell.
fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+".contains(&byte);
    if path.bytes().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_a_shell() {
        assert_eq!(shell_word(Path::new("/a/b-1.0/c")), "/a/b-1.0/c");
        assert_eq!(shell_word(Path::new("/my work/it's")), r"'/my work/it'\''s'");
    }
}
