//! `events`: what happened to backends, as CloudEvents.

use std::time::Duration;

use clap::Args;
use scaivault_proto::federation::v1::{Event, ListEventsRequest};
use serde::Serialize;
use serde_json::value::RawValue;

use super::wire;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, line, table};

/// How often a follower asks for what is new.
pub(super) const POLL: Duration = Duration::from_secs(1);

/// What happened to backends.
#[derive(Debug, Args)]
pub(crate) struct Events {
    #[command(flatten)]
    follow: Follow,
}

#[derive(Debug, Args)]
pub(crate) struct Follow {
    /// Go on with what happens from now on.
    #[arg(short, long)]
    follow: bool,
}

/// A CloudEvent 1.0.
#[derive(Serialize)]
struct CloudEvent {
    specversion: &'static str,
    id: String,
    source: String,
    #[serde(rename = "type")]
    kind: String,
    subject: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    datacontenttype: &'static str,
    data: Box<RawValue>,
}

impl TryFrom<Event> for CloudEvent {
    type Error = Failure;

    fn try_from(event: Event) -> Result<Self, Failure> {
        Ok(CloudEvent {
            specversion: "1.0",
            id: event.id,
            source: event.source,
            kind: event.r#type,
            subject: event.subject,
            time: wire::time(event.time),
            datacontenttype: "application/json",
            data: RawValue::from_string(event.data)
                .map_err(|_| Failure::strange_answer("an event whose data is no JSON"))?,
        })
    }
}

impl Events {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        show(to, None, &self.follow, output).await
    }
}

#[derive(Serialize)]
struct EventList {
    events: Vec<CloudEvent>,
}

/// Shows the events of one backend, or of all.
pub(super) async fn show(
    to: &Connection,
    backend: Option<&str>,
    follow: &Follow,
    output: &mut Output<'_>,
) -> Result<(), Failure> {
    let mut position = String::new();
    let mut events = Vec::new();
    loop {
        let request = ListEventsRequest { page_size: wire::PAGE, page_token: position.clone() };
        let answer = to.federation().list_events(request).await?.into_inner();
        let end = answer.events.is_empty() && answer.next_page_token == position;
        position = answer.next_page_token;
        for event in answer.events.into_iter().filter(|event| backend.is_none_or(|id| is_of(event, id))) {
            let event = CloudEvent::try_from(event)?;
            if follow.follow {
                output.show_next(&event, || event.to_line())?;
            } else {
                events.push(event);
            }
        }
        match (end, follow.follow) {
            (true, true) => tokio::time::sleep(POLL).await,
            (true, false) => break,
            (false, _) => {}
        }
    }
    let list = EventList { events };
    output.show(&list, || {
        table(["time", "type", "backend", "data"], list.events.iter().map(CloudEvent::columns))
    })
}

fn is_of(event: &Event, backend: &str) -> bool {
    event.source.rsplit('/').next() == Some(backend)
}

impl CloudEvent {
    fn columns(&self) -> [String; 4] {
        let time = self.time.clone().unwrap_or_default();
        [time, self.kind.clone(), self.subject.clone(), self.data.get().to_owned()]
    }

    fn to_line(&self) -> String {
        let [time, kind, subject, data] = self.columns();
        line([(&time, 24), (&kind, 30), (&subject, 20), (&data, 0)])
    }
}
