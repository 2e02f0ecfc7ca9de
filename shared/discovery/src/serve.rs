//! The control plane's loop around a [`Publisher`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use scaivault_domain::error::Reason;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_proto::discovery::v1::{DeltaRequest, DeltaResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Instrument as _;

use crate::MAX_UNACKNOWLEDGED;
use crate::board::{NodeBoard, Session};
use crate::publisher::{Demands, Desired, LeaseState, NextStep, Publisher, Violation};
use crate::wire::LeaseRefusal;

/// How often everything is diffed although nobody was woken.
const NET: Duration = Duration::from_secs(30);
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
#[async_trait::async_trait]
pub trait Source: Send + Sync + 'static {
    /// Changes with every commit, and whenever a lease does.
    fn wake(&self) -> watch::Receiver<u64>;

    /// Everything that `node` should have now. Waits for no backend: a login that is under way is
    /// [`LeaseState::Pending`], and wakes when it is done. What the node's tenants do not cover is left out by the caller.
    ///
    /// # Errors
    /// A status that ends the stream; the node comes back.
    async fn desired(&self, node: &NodeIdentity, demands: &Demands) -> Result<Desired, Status>;

    /// The backend refused this lease; another is to be had, unless it is no longer the current one.
    async fn lease_refused(&self, node: &NodeIdentity, key: &LeaseKey, lease_id: &str);
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
            () = shutdown.cancelled() => Err(Status::unavailable("the control plane is shutting down")),
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
    let mut wake = source.wake();
    let mut net = tokio::time::interval(NET);
    net.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // What the plan is made of until the node has caught up with it.
    let mut desired = None;
    loop {
        let mut next = NextStep::Diff;
        tokio::select! {
            requests = inbound.next() => {
                let Some(requests) = requests else { return Ok(()) };
                next = NextStep::Wait;
                for request in requests {
                    next = next.max(hear(source, session, node, &mut publisher, request?).await?);
                }
                session.show(&publisher);
            }
            woken = wake.changed() => woken.map_err(|_| Status::unavailable("the control plane is shutting down"))?,
            _ = net.tick() => {}
        }
        if next == NextStep::Wait || !publisher.resumed() {
            continue;
        }
        if next == NextStep::Diff || desired.is_none() {
            desired = Some(restricted(source.desired(node, publisher.demands()).await?, &node.tenants));
        }
        let responses = desired.as_ref().map_or_else(Vec::new, |desired| publisher.plan(desired));
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
