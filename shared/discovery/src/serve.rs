//! The control plane's loop around a [`Publisher`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use scaivault_domain::error::Reason;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, SecretKey};
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_proto::discovery::v1::{DeltaRequest, DeltaResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Instrument as _;

use crate::board::{NodeBoard, Session};
use crate::publisher::{
    Demands, Desired, Found, LeaseState, Mark, NextStep, Publisher, SecretChanges, Surveyed, Violation,
};
use crate::wire::LeaseRefusal;
use crate::{MAX_MESSAGE_BYTES, MAX_UNACKNOWLEDGED};

/// How often everything is diffed although nobody was woken.
const NET: Duration = Duration::from_secs(30);
/// How often everything that a node holds is compared although the feed said nothing: between half of it and one and a
/// half, so that nodes that came back together drift apart.
const COMPARE: Duration = Duration::from_secs(15 * 60);
/// How long the feed is left alone between two pages: commits come in thousands, and one page tells of many.
const FEED_PAUSE: Duration = Duration::from_millis(10);
/// About how many changes a page of the feed has.
const FEED_PAGE: usize = 1000;
/// How many secrets a page of a survey has.
const SURVEY_PAGE: usize = 1000;
/// How many bytes of values are read at once: with what is around them they make one message.
const READ_BYTES: usize = MAX_MESSAGE_BYTES * 3 / 4;
/// Most requests that are taken before the next diff.
const REQUESTS_PER_DIFF: usize = 64;

/// A node as its certificate names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// Its name.
    pub name: NodeName,
    /// What it may know of.
    pub tenants: Tenants,
}

/// The tenants of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tenants {
    /// Every tenant, also of the future.
    All,
    /// These.
    Only(BTreeSet<TenantId>),
}

impl Tenants {
    /// Whether `tenant` is among them.
    pub fn serves(&self, tenant: &TenantId) -> bool {
        match self {
            Tenants::All => true,
            Tenants::Only(tenants) => tenants.contains(tenant),
        }
    }
}

/// What a stream publishes.
///
/// [`desired`](Self::desired) is asked whenever [`wake`](Self::wake) moves, so a commit that only changes secrets must
/// not move it: secrets follow [`feed`](Self::feed), and are read one by one when a node wants them.
#[async_trait::async_trait]
pub trait Source: Send + Sync + 'static {
    /// Moves with every commit that concerns a view, a grant or a freshness, and whenever a lease changes.
    fn wake(&self) -> watch::Receiver<u64>;

    /// Everything that `node` should have now. Waits for no backend: a login that is under way is
    /// [`LeaseState::Pending`], and wakes when it is done. What the node's tenants do not cover is left out by the caller.
    ///
    /// # Errors
    /// A status that ends the stream; the node comes back.
    async fn desired(&self, node: &NodeIdentity, demands: &Demands) -> Result<Desired, Status>;

    /// The backend refused this lease; another is to be had, unless it is no longer the current one.
    async fn lease_refused(&self, node: &NodeIdentity, key: &LeaseKey, lease_id: &str);

    /// Moves with every commit, once [`changed`](Self::changed) can tell of it.
    fn feed(&self) -> watch::Receiver<Mark>;

    /// Which secrets changed after `cursor`, about `max` of them, whole commits. `None`: the feed does not reach back that
    /// far. The revision of a [`Desired`] is a cursor too.
    ///
    /// # Errors
    /// A status that ends the stream; the node comes back.
    async fn changed(&self, cursor: u64, max: usize) -> Result<Option<SecretChanges>, Status>;

    /// What these secrets are now, in the order of `keys`; never older than what [`changed`](Self::changed) told of. May
    /// stop short when the values have more than `enough` bytes, but tells of at least one.
    ///
    /// # Errors
    /// A status that ends the stream; the node comes back.
    async fn secrets(
        &self,
        node: &NodeIdentity,
        keys: &[SecretKey],
        enough: usize,
    ) -> Result<Vec<Found>, Status>;

    /// Every secret of a tenant after the path `after` of which [`secrets`](Self::secrets) would find a copy, in the order
    /// of paths. Exactly `max` of them, unless there are fewer. A tenant that is gone has none.
    ///
    /// # Errors
    /// A status that ends the stream; the node comes back.
    async fn survey(
        &self,
        tenant: &TenantId,
        after: Option<&SecretPath>,
        max: usize,
    ) -> Result<Vec<Surveyed>, Status>;
}

/// Serves one node's stream. A second stream of the same node replaces the first.
pub fn delta_stream(
    source: Arc<dyn Source>,
    board: Arc<NodeBoard>,
    node: NodeIdentity,
    inbound: impl Stream<Item = Result<DeltaRequest, Status>> + Send + Unpin + 'static,
    shutdown: CancellationToken,
) -> impl Stream<Item = Result<DeltaResponse, Status>> + Send + 'static {
    // No send ever waits: there is room for every response that may be unacknowledged, and for the end. Otherwise each
    // side could wait for the other to read.
    let (outbound, responses) = mpsc::channel(MAX_UNACKNOWLEDGED + 1);
    let session = board.connect(&node);
    let span = tracing::info_span!("delta_stream", node.name = %node.name);
    let serve = async move {
        let publish = publish(&*source, &session, &node, inbound, &outbound);
        let end = tokio::select! {
            biased;
            () = shutdown.cancelled() => Err(shutting_down()),
            () = session.replaced() => Err(Status::aborted("the node opened another stream")),
            () = outbound.closed() => Ok(()),
            end = publish => end,
        };
        if let Err(status) = end {
            tracing::info!(code = ?status.code(), "the stream of {} ends: {}", node.name, status.message());
            // The node may be gone already.
            let _ = outbound.try_send(Err(status));
        }
    };
    tokio::spawn(serve.instrument(span));
    ReceiverStream::new(responses)
}

/// `Ok` when the node ends the stream.
async fn publish(
    source: &dyn Source,
    session: &Session,
    node: &NodeIdentity,
    inbound: impl Stream<Item = Result<DeltaRequest, Status>> + Unpin,
    outbound: &mpsc::Sender<Result<DeltaResponse, Status>>,
) -> Result<(), Status> {
    let mut inbound = inbound.ready_chunks(REQUESTS_PER_DIFF);
    let mut publisher = Publisher::new();
    let (mut wake, mut feed) = (source.wake(), source.feed());
    let mut net = interval(NET);
    net.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let between = COMPARE.mul_f64(0.5 + rand::random::<f64>());
    let mut compare = interval_at(Instant::now() + between, between);
    let mut next_page = Instant::now();
    // What the plan is made of until the node has caught up with it.
    let mut desired = None;
    loop {
        let (mut next, mut follow) = (NextStep::Wait, false);
        tokio::select! {
            requests = inbound.next() => {
                let Some(requests) = requests else { return Ok(()) };
                for request in requests {
                    next = next.max(hear(source, session, node, &mut publisher, request?).await?);
                }
                session.show(&publisher);
            }
            woken = wake.changed() => {
                woken.map_err(|_| shutting_down())?;
                next = NextStep::Diff;
            }
            _ = net.tick() => next = NextStep::Diff,
            _ = compare.tick() => publisher.compare(),
            moved = moved(&mut feed, next_page, publisher.cursor()) => {
                moved?;
                follow = true;
            }
            () = std::future::ready(()), if publisher.busy() => {}
        }
        if !publisher.resumed() {
            continue;
        }
        publisher.mark(*feed.borrow_and_update());
        if follow {
            follow_feed(source, &mut publisher).await?;
            next_page = Instant::now() + FEED_PAUSE;
        }
        if next == NextStep::Diff || publisher.adrift() {
            desired = Some(restricted(source.desired(node, publisher.demands()).await?, &node.tenants));
        }
        if let Some((tenant, after)) = publisher.page() {
            let page = source.survey(&tenant, after.as_ref(), SURVEY_PAGE).await?;
            publisher.surveyed(page, SURVEY_PAGE);
        }
        look(source, node, &mut publisher).await?;
        let responses = publisher.plan(desired.as_ref(), session.now());
        if !publisher.behind() {
            desired = None;
        }
        if responses.is_empty() {
            continue;
        }
        session.show(&publisher);
        for response in responses {
            if outbound.send(Ok(response)).await.is_err() {
                return Ok(());
            }
        }
    }
}

fn shutting_down() -> Status {
    Status::unavailable("the control plane is shutting down")
}

/// Waits until the feed has something behind `cursor`, and may be read.
async fn moved(
    feed: &mut watch::Receiver<Mark>,
    next_page: Instant,
    cursor: Option<u64>,
) -> Result<(), Status> {
    tokio::time::sleep_until(next_page).await;
    match cursor {
        Some(_) => Ok(()),
        None => feed.changed().await.map_err(|_| shutting_down()),
    }
}

/// Takes the next page of the feed, if any of it may concern the node.
async fn follow_feed(source: &dyn Source, publisher: &mut Publisher) -> Result<(), Status> {
    let Some(cursor) = publisher.cursor() else { return Ok(()) };
    match source.changed(cursor, FEED_PAGE).await? {
        Some(page) if page.next <= cursor => return Err(Status::internal("the feed stands still")),
        Some(page) => publisher.changed(&page),
        None => publisher.feed_lost(),
    }
    Ok(())
}

/// Looks at the next secrets, of which there may be none.
async fn look(source: &dyn Source, node: &NodeIdentity, publisher: &mut Publisher) -> Result<(), Status> {
    // Nobody has a copy of what belongs to other tenants than the node's.
    let (keys, foreign): (Vec<_>, Vec<_>) =
        publisher.reads().into_iter().partition(|key| node.tenants.serves(&key.tenant));
    publisher.found(foreign.into_iter().map(|key| (key, Err(Absence::NotFound))));
    if keys.is_empty() {
        return Ok(());
    }
    let found = source.secrets(node, &keys, READ_BYTES).await?;
    if found.is_empty() {
        return Err(Status::internal("secrets were looked at, and nothing was found out"));
    }
    publisher.found(keys.into_iter().zip(found));
    Ok(())
}

async fn hear(
    source: &dyn Source,
    session: &Session,
    node: &NodeIdentity,
    publisher: &mut Publisher,
    request: DeltaRequest,
) -> Result<NextStep, Status> {
    session.seen();
    let heard = publisher.on_request(request).map_err(|violation| match violation {
        Violation::TooManyDemands => Status::resource_exhausted(violation.to_string()),
        _ => Status::invalid_argument(violation.to_string()),
    })?;
    for refusal in &heard.refusals {
        tracing::warn!(
            tenant = refusal.tenant,
            "node {} refused what it was sent: {}",
            node.name,
            refusal.message
        );
        session.refused(&refusal.message);
    }
    for (key, id) in &heard.refused_leases {
        if node.tenants.serves(&key.tenant) {
            source.lease_refused(node, key, id).await;
        }
    }
    Ok(heard.next)
}

/// Leaves out what belongs to other tenants than the node's, whatever the source thought.
fn restricted(mut desired: Desired, tenants: &Tenants) -> Desired {
    desired.views.retain(|tenant, _| tenants.serves(tenant));
    desired.freshness.retain(|key, _| tenants.serves(&key.tenant));
    for grant in desired.grants.values_mut() {
        grant.take_if(|(_, caller)| !tenants.serves(&caller.tenant));
    }
    for (key, lease) in &mut desired.leases {
        if !tenants.serves(&key.tenant) {
            *lease = LeaseState::Refused(LeaseRefusal {
                reason: Some(Reason::NotFound),
                message: "this node does not serve the tenant".to_owned(),
                retry_after: None,
            });
        }
    }
    desired
}
