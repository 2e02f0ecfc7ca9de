//! Rows of the audit trail as they arrive.

use std::time::Duration;

use anyhow::Result;
use scaivault_domain::time::{Clock as _, Timestamp};
use scaivault_proto::admin::v1::admin_service_client::AdminServiceClient;
use scaivault_proto::admin::v1::{AuditRow, QueryAuditRequest};
use scaivault_telemetry::SystemClock;
use scaivault_tests::planes::{Authenticated, Bearer};
use scaivault_tests::wait;
use tonic::transport::Endpoint;

use crate::story::{Demo, SECRET};
use crate::transcript::Transcript;

const POLL: Duration = Duration::from_millis(250);
const READ: &str = "secret.read";

/// A place in the audit trail.
pub(crate) struct Trail {
    admin: AdminServiceClient<Authenticated>,
    page_token: String,
}

impl Trail {
    /// At the beginning.
    pub(crate) fn open(demo: &Demo) -> Result<Trail> {
        let channel = Endpoint::from_shared(demo.address.clone())?.connect_lazy();
        let admin = AdminServiceClient::with_interceptor(channel, Bearer::new(&demo.token)?);
        Ok(Trail { admin, page_token: String::new() })
    }

    /// Waits until the reads so far have arrived from the node.
    pub(crate) async fn catch_up(&mut self, demo: &Demo) -> Result<()> {
        let last = demo.clouds.last().map_or(SECRET, |cloud| cloud.path);
        wait::until("the node's audit rows have arrived", async || {
            let rows = self.next().await?;
            let arrived = rows.iter().any(|row| row.path == last && row.action == READ);
            Ok(arrived.then_some(()))
        })
        .await
    }

    /// Prints every read from now on.
    pub(crate) async fn follow(mut self, out: &mut Transcript) -> Result<()> {
        // What the command lines read arrives only now, but has been shown.
        let start = SystemClock.now();
        out.blank()?;
        out.headline("Every read from now on, by whomever. Ctrl-C stops everything.")?;
        loop {
            for row in self.next().await?.iter().filter(|row| row.action == READ && time(row) >= start) {
                out.text(&line(row))?;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn next(&mut self) -> Result<Vec<AuditRow>> {
        let request = QueryAuditRequest { page_token: self.page_token.clone(), ..Default::default() };
        let answer = self.admin.query_audit(request).await?.into_inner();
        self.page_token = answer.next_page_token;
        Ok(answer.rows)
    }
}

fn time(row: &AuditRow) -> Timestamp {
    let millis = row.time.map(|time| time.seconds * 1000 + i64::from(time.nanos) / 1_000_000);
    Timestamp::from_millis(millis.unwrap_or_default())
}

fn line(row: &AuditRow) -> String {
    let time = time(row).to_string();
    let clock = time.split(['T', 'Z']).nth(1).unwrap_or_default();
    let latency = row.latency.and_then(|latency| Duration::try_from(latency).ok()).unwrap_or_default();
    let source = if row.source.is_empty() { "-" } else { &row.source };
    format!(
        "{clock}  {:<10} {:<36} {source:<6} {:<20} {:>6.1} ms",
        row.principal,
        row.path,
        row.outcome,
        latency.as_secs_f64() * 1000.0,
    )
}
