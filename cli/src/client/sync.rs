//! `backend sync | syncs | sync-report | sync-cancel`, and what `backend status` says of syncs.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use scaivault_domain::sync::RunId;
use scaivault_domain::time::format_duration;
use scaivault_proto::federation::v1 as proto;
use serde::Serialize;
use tokio::time::{sleep, timeout};

use super::backend::{Named, Reference};
use super::wire;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, details, printable, table};
use crate::parse;

/// How often a waiting command asks how far the run is.
const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(crate) struct Sync {
    #[command(flatten)]
    named: Named,
    /// Wait for the end of the run; at most this long, if a duration is given.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, value_parser = parse::duration)]
    wait: Option<Option<Duration>>,
    /// Consent to the deletions that this run held back.
    #[arg(long, value_name = "RUN", value_parser = run_id)]
    allow_deletes: Option<RunId>,
}

#[derive(Debug, Args)]
pub(crate) struct OfRun {
    #[command(flatten)]
    named: Named,
    /// Id of the run; the latest one if left out.
    #[arg(value_name = "RUN", value_parser = run_id)]
    run: Option<RunId>,
}

fn run_id(text: &str) -> Result<RunId, String> {
    RunId::parse(text).map_err(|_| "is no id of a run; `scaivault backend syncs` shows those".to_owned())
}

/// A run with the names of the REST API.
#[derive(Serialize)]
struct Run {
    run_id: String,
    backend_id: String,
    trigger: String,
    started_at: Option<String>,
    ended_at: Option<String>,
    outcome: Option<String>,
    listed: u64,
    mapped: u64,
    unchanged: u64,
    created: u64,
    updated: u64,
    tombstoned: u64,
    local_ahead: u64,
    conflicts: u64,
    skipped_count: u64,
    failed_count: u64,
    calls: BTreeMap<String, u64>,
    held_back: Option<HeldBack>,
    class: Option<String>,
    message: String,
    progress: Option<Progress>,
    #[serde(skip)]
    took: String,
}

#[derive(Serialize)]
struct HeldBack {
    deletions: u64,
    known: u64,
}

#[derive(Serialize)]
struct Progress {
    phase: String,
    listed: u64,
    done: u64,
    total: u64,
}

fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

impl From<proto::SyncProgress> for Progress {
    fn from(progress: proto::SyncProgress) -> Self {
        let proto::SyncProgress { phase, listed, done, total } = progress;
        Progress { phase, listed, done, total }
    }
}

impl Progress {
    fn to_text(&self) -> String {
        match self.total {
            0 => format!("{}, {} names listed", self.phase, self.listed),
            total => format!("{}, {} of {total}", self.phase, self.done),
        }
    }
}

impl From<proto::SyncRun> for Run {
    fn from(run: proto::SyncRun) -> Self {
        let counts = run.counts.unwrap_or_default();
        Run {
            took: took(&run),
            run_id: run.run_id,
            backend_id: run.backend_id,
            trigger: run.trigger,
            started_at: wire::time(run.start_time),
            ended_at: wire::time(run.end_time),
            outcome: given(run.outcome),
            listed: counts.listed,
            mapped: counts.mapped,
            unchanged: counts.unchanged,
            created: counts.created,
            updated: counts.updated,
            tombstoned: counts.tombstoned,
            local_ahead: counts.local_ahead,
            conflicts: counts.conflicts,
            skipped_count: counts.skipped,
            failed_count: counts.failed,
            calls: run.calls.into_iter().collect(),
            held_back: run.held_back.map(|held| HeldBack { deletions: held.deletions, known: held.known }),
            class: given(run.class),
            message: run.message,
            progress: run.progress.map(Progress::from),
        }
    }
}

fn took(run: &proto::SyncRun) -> String {
    let millis = |time: prost_types::Timestamp| time.seconds * 1000 + i64::from(time.nanos) / 1_000_000;
    let Some((start, end)) = run.start_time.zip(run.end_time) else { return String::new() };
    format_duration(Duration::from_millis(u64::try_from(millis(end) - millis(start)).unwrap_or_default()))
}

impl Run {
    fn outcome(&self) -> &str {
        self.outcome.as_deref().unwrap_or("running")
    }

    fn to_text(&self) -> String {
        let counts = [
            ("listed", self.listed),
            ("mapped", self.mapped),
            ("unchanged", self.unchanged),
            ("created", self.created),
            ("updated", self.updated),
            ("deleted", self.tombstoned),
            ("ahead here", self.local_ahead),
            ("in conflict", self.conflicts),
            ("skipped", self.skipped_count),
            ("failed", self.failed_count),
        ];
        let counts =
            counts.iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{count} {name}"));
        let calls = self.calls.iter().map(|(operation, count)| format!("{count} {operation}"));
        let held_back = |held: &HeldBack| {
            let HeldBack { deletions, known } = held;
            format!("{deletions} deletions of {known} known paths, until somebody consents")
        };
        details([
            ("run", self.run_id.clone()),
            ("trigger", self.trigger.clone()),
            ("started", self.started_at.clone().unwrap_or_default()),
            ("took", self.took.clone()),
            ("outcome", self.outcome().to_owned()),
            ("progress", self.progress.as_ref().map(Progress::to_text).unwrap_or_default()),
            ("paths", counts.collect::<Vec<_>>().join(", ")),
            ("calls", calls.collect::<Vec<_>>().join(", ")),
            ("held back", self.held_back.as_ref().map(held_back).unwrap_or_default()),
            ("class", self.class.clone().unwrap_or_default()),
            ("message", self.message.clone()),
        ])
    }

    /// The run as the exit code tells it.
    fn verdict(&self, backend: &Reference) -> Result<(), Failure> {
        let run = &self.run_id;
        let report = format!("`scaivault backend sync-report {backend} {run}` says what and why");
        match (self.outcome(), &self.held_back) {
            ("complete", _) => Ok(()),
            ("partial", Some(held)) => Err(Failure::differences(
                format!("the sync held back {} deletions", held.deletions),
                consent(&backend.to_string(), run),
            )),
            ("partial", None) => Err(Failure::differences("the sync left something out", report)),
            ("cancelled", _) => Err(Failure::server(
                "somebody ended the sync before its end",
                format!("`scaivault backend sync {backend} --wait` starts another"),
            )),
            _ => Err(Failure::server(
                format!("the sync failed: {}", self.message),
                format!("`scaivault backend status {backend}` shows how the backend is"),
            )),
        }
    }
}

fn consent(backend: &str, run: &str) -> String {
    format!(
        "bring the secrets back in the store, or consent to their deletion: \
         `scaivault backend sync {backend} --allow-deletes {run}`"
    )
}

/// How far a run is, drawn where a person sees it.
struct Drawn(ProgressBar);

impl Drawn {
    fn new(output: &Output<'_>) -> Self {
        let target = if output.watched { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Drawn(ProgressBar::with_draw_target(None, target).with_finish(ProgressFinish::AndClear))
    }

    fn draw(&self, progress: &proto::SyncProgress) {
        let phase = printable(&progress.phase).into_owned();
        let template = match progress.total {
            0 => "{spinner} {msg}",
            _ => "{spinner} {msg} [{bar:30}] {pos}/{len}",
        };
        self.0.set_style(ProgressStyle::with_template(template).expect("the templates are well-formed"));
        match progress.total {
            0 => self.0.set_message(format!("{phase}, {} names", progress.listed)),
            total => {
                self.0.set_length(total);
                self.0.set_position(progress.done);
                self.0.set_message(phase);
            }
        }
        // Drawn by this thread alone: another would wait for ever for the lock on standard error that we hold.
        self.0.tick();
    }
}

impl Sync {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let backend = &self.named.backend;
        let id = backend.id(to).await?;
        let request = proto::SyncBackendRequest {
            id: id.clone(),
            wait: None,
            allow_deletes: self.allow_deletes.map(String::from).unwrap_or_default(),
        };
        let started = to.federation().sync_backend(request).await?.into_inner().run;
        let started = started.ok_or_else(no_run)?;
        let Some(longest) = self.wait else {
            let run = Run::from(started);
            output.show(&run, || run.to_text())?;
            return output.note(&format!(
                "`scaivault backend sync-report {backend} {}` shows how far it is",
                run.run_id
            ));
        };
        let run_id = started.run_id;
        let request =
            proto::GetSyncRequest { id, run_id: run_id.clone(), page_size: 1, ..Default::default() };
        let ended = ended(to, request, Drawn::new(output));
        let run = match longest {
            None => ended.await?,
            Some(longest) => timeout(longest, ended).await.unwrap_or_else(|_| {
                Err(Failure::server(
                    format!("{run_id} is still running"),
                    format!("`scaivault backend sync {backend} --wait` goes on waiting for it"),
                ))
            })?,
        };
        let run = Run::from(run);
        output.show(&run, || run.to_text())?;
        run.verdict(backend)
    }
}

/// The run when it has ended.
async fn ended(
    to: &Connection,
    request: proto::GetSyncRequest,
    drawn: Drawn,
) -> Result<proto::SyncRun, Failure> {
    loop {
        let run = to.federation().get_sync(request.clone()).await?.into_inner().run.ok_or_else(no_run)?;
        if !run.outcome.is_empty() {
            return Ok(run);
        }
        if let Some(progress) = &run.progress {
            drawn.draw(progress);
        }
        sleep(POLL).await;
    }
}

fn no_run() -> Failure {
    Failure::strange_answer("no run")
}

#[derive(Serialize)]
struct Runs {
    syncs: Vec<Run>,
}

/// Shows the last runs of a backend.
pub(super) async fn list(
    backend: &Reference,
    to: &Connection,
    output: &mut Output<'_>,
) -> Result<(), Failure> {
    let id = backend.id(to).await?;
    let runs = wire::all(async |page_token| {
        let request = proto::ListSyncsRequest { id: id.clone(), page_size: wire::PAGE, page_token };
        let answer = to.federation().list_syncs(request).await?.into_inner();
        Ok((answer.syncs, answer.next_page_token))
    });
    let runs = Runs { syncs: runs.await?.into_iter().map(Run::from).collect() };
    output.show(&runs, || {
        let rows = runs.syncs.iter().map(|run| {
            [
                run.run_id.clone(),
                run.trigger.clone(),
                run.started_at.clone().unwrap_or_default(),
                run.took.clone(),
                run.outcome().to_owned(),
                (run.created + run.updated + run.tombstoned).to_string(),
                run.skipped_count.to_string(),
                run.failed_count.to_string(),
            ]
        });
        table(["run", "trigger", "started", "took", "outcome", "changed", "skipped", "failed"], rows)
    })
}

/// A run and what it left out.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    run: Run,
    skipped: Vec<LeftOut>,
    failed: Vec<LeftOut>,
}

#[derive(Serialize)]
struct LeftOut {
    path: Option<String>,
    remote_name: String,
    reason: String,
    detail: String,
}

impl From<proto::SkippedPath> for LeftOut {
    fn from(skipped: proto::SkippedPath) -> Self {
        let proto::SkippedPath { path, remote_name, reason, detail } = skipped;
        LeftOut { path: given(path), remote_name, reason, detail }
    }
}

impl LeftOut {
    fn row(&self, what: &str) -> [String; 5] {
        let path = self.path.clone().unwrap_or_else(|| "-".to_owned());
        [what.to_owned(), path, self.remote_name.clone(), self.reason.clone(), self.detail.clone()]
    }
}

impl OfRun {
    /// Shows the report of the run.
    pub(super) async fn report(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let (id, run_id) = self.ids(to).await?;
        let (mut run, mut skipped, mut failed) = (None, Vec::new(), Vec::new());
        let mut page_token = String::new();
        loop {
            let (id, run_id) = (id.clone(), run_id.clone());
            let request = proto::GetSyncRequest { id, run_id, page_size: wire::PAGE, page_token };
            let page = to.federation().get_sync(request).await?.into_inner();
            run = page.run.or(run);
            skipped.extend(page.skipped.into_iter().map(LeftOut::from));
            failed.extend(page.failed.into_iter().map(LeftOut::from));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let report = Report { run: run.ok_or_else(no_run)?.into(), skipped, failed };
        output.show(&report, || {
            let rows = report.skipped.iter().map(|one| one.row("skipped"));
            let mut rows = rows.chain(report.failed.iter().map(|one| one.row("failed"))).peekable();
            let left_out = match rows.peek() {
                None => String::new(),
                Some(_) => {
                    format!("\n{}", table(["left out", "path", "remote name", "reason", "detail"], rows))
                }
            };
            format!("{}{left_out}", report.run.to_text())
        })
    }

    /// Ends the run.
    pub(super) async fn cancel(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let (id, run_id) = self.ids(to).await?;
        let answer = to.federation().cancel_sync(proto::CancelSyncRequest { id, run_id }).await?;
        let run = Run::from(answer.into_inner().run.ok_or_else(no_run)?);
        output.show(&run, || run.to_text())
    }

    /// The ids of the backend and of the run.
    async fn ids(&self, to: &Connection) -> Result<(String, String), Failure> {
        let id = self.named.backend.id(to).await?;
        if let Some(run) = &self.run {
            return Ok((id, run.to_string()));
        }
        let request = proto::ListSyncsRequest { id: id.clone(), page_size: 1, page_token: String::new() };
        let latest = to.federation().list_syncs(request).await?.into_inner().syncs.into_iter().next();
        let latest = latest.ok_or_else(|| {
            let backend = &self.named.backend;
            Failure::server(
                format!("{backend} was never synced"),
                format!("`scaivault backend sync {backend}` starts a sync"),
            )
        })?;
        Ok((id, latest.run_id))
    }
}

/// How the sync of a backend stands, with the names of the REST API.
#[derive(Serialize)]
pub(super) struct State {
    last_sync: Option<String>,
    last_sync_duration_ms: Option<u64>,
    secrets_synced: u64,
    last_attempt: Option<String>,
    last_outcome: Option<String>,
    sync_failures: u32,
    oldest_value_age_s: Option<u64>,
    next_sync: Option<String>,
    running: Option<Run>,
    skipped: u64,
    held_back_run: Option<String>,
}

impl From<proto::SyncStatus> for State {
    fn from(sync: proto::SyncStatus) -> Self {
        State {
            last_sync_duration_ms: sync.last_sync.map(|_| sync.last_sync_duration_ms),
            last_sync: wire::time(sync.last_sync),
            secrets_synced: sync.secrets_synced,
            last_attempt: wire::time(sync.last_attempt),
            last_outcome: given(sync.last_outcome),
            sync_failures: sync.consecutive_failures,
            oldest_value_age_s: wire::duration(sync.oldest_value_age).map(|age| age.as_secs()),
            next_sync: wire::time(sync.next_sync),
            running: sync.running.map(Run::from),
            skipped: sync.skipped,
            held_back_run: given(sync.held_back_run),
        }
    }
}

impl State {
    /// The part of the status of `backend` that is about its sync.
    pub(super) fn to_text(&self, backend: &str) -> String {
        let took = |ms| format!(" (took {})", format_duration(Duration::from_millis(ms)));
        let took = self.last_sync_duration_ms.map(took).unwrap_or_default();
        let age = |age| format!(", the oldest compared {} ago", format_duration(Duration::from_secs(age)));
        let age = self.oldest_value_age_s.map(age).unwrap_or_default();
        let running = |run: &Run| {
            let progress = run.progress.as_ref().map(|progress| format!(": {}", progress.to_text()));
            format!("{}{}", run.run_id, progress.unwrap_or_default())
        };
        let counted = |count: u64, next: &str| match count {
            0 => String::new(),
            _ => format!("{count}{next}"),
        };
        let text = details([
            ("last sync", self.last_sync.as_ref().map_or("never".to_owned(), |at| format!("{at}{took}"))),
            ("last attempt", self.last_attempt.clone().unwrap_or_default()),
            ("outcome", self.last_outcome.clone().unwrap_or_default()),
            ("failed syncs", counted(self.sync_failures.into(), " in a row")),
            ("copies", format!("{}{age}", self.secrets_synced)),
            ("next sync", self.next_sync.clone().unwrap_or_default()),
            ("running", self.running.as_ref().map(running).unwrap_or_default()),
            (
                "skipped",
                counted(self.skipped, &format!("; `scaivault backend sync-report {backend}` says why")),
            ),
            ("deletions held back", self.held_back_run.clone().unwrap_or_default()),
            ("next", self.held_back_run.as_ref().map(|run| consent(backend, run)).unwrap_or_default()),
        ]);
        format!("{text}\n")
    }
}
