//! `backend test`, and `--validate-only` of `backend add` and `backend set`.

use std::path::PathBuf;

use clap::Args;
use scaivault_domain::time::format_duration;
use scaivault_edge::json::{self, BackendJson, BackendTest as TestJson};
use scaivault_proto::federation::v1::{
    Backend, BackendCheck, BackendTest, CreateBackendRequest, TestBackendRequest,
};
use serde::Serialize;
use std::time::Duration;

use super::settings::read_file;
use super::{Reference, reference, shown};
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, table};

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Name or id of the backend.
    #[arg(
        value_name = "NAME|ID",
        value_parser = reference,
        required_unless_present = "file",
        conflicts_with = "file"
    )]
    backend: Option<Reference>,
    /// A configuration that is not stored, as JSON with the fields of the REST API; it stays like that.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Test {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let test = match (self.backend, self.file) {
            (Some(backend), _) => {
                let request = TestBackendRequest { id: backend.id(to).await? };
                to.federation().test_backend(request).await?.into_inner().test
            }
            (None, Some(file)) => {
                let (backend, consent) = json::parse_backend(read_file(&file)?.as_bytes())?;
                let request = CreateBackendRequest {
                    backend: Some(backend),
                    adopt: consent.adopt,
                    validate_only: true,
                };
                to.federation().create_backend(request).await?.into_inner().test
            }
            (None, None) => None,
        };
        let test = test.ok_or_else(not_tested)?;
        output.show(&TestJson::from(test.clone()), || to_text(&test))?;
        verdict(&test)
    }
}

/// What would have been stored, and how it was tested.
#[derive(Serialize)]
struct Validated {
    backend: BackendJson,
    test: TestJson,
}

/// Shows what `--validate-only` came to.
pub(super) fn show_validated(
    backend: Option<Backend>,
    test: Option<BackendTest>,
    output: &mut Output<'_>,
) -> Result<(), Failure> {
    let (backend, test) = backend.zip(test).ok_or_else(not_tested)?;
    let validated = Validated { backend: shown(backend)?, test: TestJson::from(test.clone()) };
    output.show(&validated, || to_text(&test))?;
    output.note("nothing was stored")?;
    verdict(&test)
}

fn not_tested() -> Failure {
    Failure::strange_answer("no test")
}

fn to_text(test: &BackendTest) -> String {
    let rows = test.checks.iter().map(|check| {
        let took = check.latency_ms.map(|ms| format_duration(Duration::from_millis(ms)));
        [check.name.clone(), word(check), took.unwrap_or_default(), check.detail.clone()]
    });
    let mut text = table(["check", "outcome", "took", "found"], rows);
    let steps = test.checks.iter().filter(|check| !check.next_step.is_empty());
    let steps: Vec<_> = steps.map(|check| [check.name.clone(), check.next_step.clone()]).collect();
    if !steps.is_empty() {
        text.push('\n');
        text.push_str(&table(["for", "do"], steps));
    }
    text
}

fn word(check: &BackendCheck) -> String {
    // What is to be looked at first stands out without colours.
    if check.outcome == "failed" { check.outcome.to_uppercase() } else { check.outcome.clone() }
}

/// The exit code of a test.
fn verdict(test: &BackendTest) -> Result<(), Failure> {
    if test.passed {
        return Ok(());
    }
    let failed: Vec<_> = test.checks.iter().filter(|check| check.outcome == "failed").collect();
    let names: Vec<_> = failed.iter().map(|check| format!("`{}`", check.name)).collect();
    let next = failed.iter().map(|check| check.next_step.as_str()).find(|step| !step.is_empty());
    Err(Failure::server(
        format!("the test failed: {}", names.join(", ")),
        next.unwrap_or("see what the checks found"),
    ))
}
