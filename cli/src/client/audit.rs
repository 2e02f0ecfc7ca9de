//! `audit tail | query`: who did what.

use std::time::Duration;

use clap::{Args, Subcommand};
use scaivault_domain::time::{Clock as _, Timestamp};
use scaivault_proto::admin::v1::{AuditRow, QueryAuditRequest};
use scaivault_telemetry::SystemClock;
use serde::Serialize;

use super::{events::POLL, wire};
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, line, table};
use crate::parse::{self, Moment};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the last rows, and with -f what is added from now on.
    Tail(Tail),
    /// Print every row that fits.
    Query(Query),
}

#[derive(Debug, Args)]
pub(crate) struct Filter {
    /// Only this path, or what lies below it if it ends in /.
    #[arg(long, default_value = "", hide_default_value = true)]
    path: String,
    /// Only what this principal did.
    #[arg(long, value_name = "SUBJECT", default_value = "", hide_default_value = true)]
    principal: String,
}

#[derive(Debug, Args)]
pub(crate) struct Tail {
    #[command(flatten)]
    filter: Filter,
    /// Go on with what is added from now on.
    #[arg(short, long)]
    follow: bool,
    /// How many rows at most, before following.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    lines: usize,
    /// From when on: a time, or how long ago.
    #[arg(long, value_name = "TIME|DURATION", default_value = "1h", value_parser = parse::moment)]
    since: Moment,
}

#[derive(Debug, Args)]
pub(crate) struct Query {
    #[command(flatten)]
    filter: Filter,
    /// From when on: a time, or how long ago; the beginning if nothing is said.
    #[arg(long, value_name = "TIME|DURATION", value_parser = parse::moment)]
    since: Option<Moment>,
    /// Before when: a time, or how long ago.
    #[arg(long, value_name = "TIME|DURATION", value_parser = parse::moment)]
    until: Option<Moment>,
    /// How many rows at most.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    limit: usize,
}

/// One row with the names of the API.
#[derive(Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    principal: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    accessor: String,
    action: String,
    path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    backend: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    remote_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    #[serde(skip_serializing_if = "String::is_empty")]
    remote_version: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    source: String,
    outcome: String,
    latency_us: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    request_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    trace_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    node: String,
}

impl From<AuditRow> for Row {
    fn from(row: AuditRow) -> Self {
        let latency = wire::duration(row.latency).unwrap_or_default();
        Row {
            time: wire::time(row.time),
            principal: row.principal,
            accessor: row.accessor,
            action: row.action,
            path: row.path,
            backend: row.backend,
            remote_name: row.remote_name,
            version: Some(row.version).filter(|version| *version > 0),
            remote_version: row.remote_version,
            source: row.source,
            outcome: row.outcome,
            latency_us: u64::try_from(latency.as_micros()).unwrap_or(u64::MAX),
            request_id: row.request_id,
            trace_id: row.trace_id,
            node: row.node,
        }
    }
}

const COLUMNS: [&str; 7] = ["time", "principal", "action", "path", "outcome", "backend", "latency"];

impl Row {
    fn columns(&self) -> [String; 7] {
        [
            self.time.clone().unwrap_or_default(),
            self.principal.clone(),
            self.action.clone(),
            self.path.clone(),
            self.outcome.clone(),
            self.backend.clone(),
            format!("{:?}", Duration::from_micros(self.latency_us)),
        ]
    }

    fn to_line(&self) -> String {
        let [time, principal, action, path, outcome, backend, latency] = self.columns();
        line([
            (&time, 24),
            (&principal, 16),
            (&action, 14),
            (&path, 32),
            (&outcome, 18),
            (&backend, 20),
            (&latency, 0),
        ])
    }
}

/// A place in the trail that moves on as rows are read.
struct Reader {
    request: QueryAuditRequest,
}

/// What came next in the trail.
struct Read {
    rows: Vec<Row>,
    /// Whether nothing more is there yet.
    at_end: bool,
}

impl Reader {
    fn new(filter: Filter, since: Option<Timestamp>, until: Option<Timestamp>) -> Self {
        Reader {
            request: QueryAuditRequest {
                start_time: since.map(wire::to_time),
                end_time: until.map(wire::to_time),
                path: filter.path,
                principal: filter.principal,
                page_size: wire::PAGE,
                page_token: String::new(),
            },
        }
    }

    /// The next rows. A page without rows that fit is the end only if the trail did not move on.
    async fn next(&mut self, to: &Connection) -> Result<Read, Failure> {
        let answer = to.admin().query_audit(self.request.clone()).await?.into_inner();
        let before = std::mem::replace(&mut self.request.page_token, answer.next_page_token);
        let at_end = answer.rows.is_empty() && before == self.request.page_token;
        Ok(Read { rows: answer.rows.into_iter().map(Row::from).collect(), at_end })
    }
}

impl Command {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        match self {
            Command::Tail(tail) => tail.run(to, output).await,
            Command::Query(query) => query.run(to, output).await,
        }
    }
}

impl Tail {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let mut reader = Reader::new(self.filter, Some(self.since.before(SystemClock.now())), None);
        let mut rows: Vec<Row> = Vec::new();
        loop {
            let read = reader.next(to).await?;
            rows.extend(read.rows);
            in_order_of_time(&mut rows);
            rows.drain(..rows.len().saturating_sub(self.lines));
            if read.at_end {
                break;
            }
        }
        loop {
            in_order_of_time(&mut rows);
            for row in rows {
                output.show_next(&row, || row.to_line())?;
            }
            if !self.follow {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
            rows = reader.next(to).await?.rows;
        }
    }
}

/// The trail is read in the order in which rows arrived at the control plane: a node ships what it did in parcels.
fn in_order_of_time(rows: &mut [Row]) {
    rows.sort_by(|a, b| a.time.cmp(&b.time));
}

#[derive(Serialize)]
struct Rows {
    rows: Vec<Row>,
}

impl Query {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let now = SystemClock.now();
        let at = |moment: Option<Moment>| moment.map(|moment| moment.before(now));
        let mut reader = Reader::new(self.filter, at(self.since), at(self.until));
        let mut found = Rows { rows: Vec::new() };
        loop {
            let read = reader.next(to).await?;
            found.rows.extend(read.rows);
            if found.rows.len() > self.limit {
                found.rows.truncate(self.limit);
                output
                    .note(&format!("only the first {} rows; narrow the time or raise --limit", self.limit))?;
                break;
            }
            if read.at_end {
                break;
            }
        }
        in_order_of_time(&mut found.rows);
        output.show(&found, || table(COLUMNS, found.rows.iter().map(Row::columns)))
    }
}
