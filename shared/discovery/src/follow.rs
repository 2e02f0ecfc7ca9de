//! The node's loop around a [`Subscriber`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use scaivault_domain::time::Clock;
use scaivault_proto::discovery::v1::DeltaRequest;
use scaivault_proto::discovery::v1::discovery_service_client::DiscoveryServiceClient;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::subscriber::{Change, Demand, Subscriber};

/// The longest wait after the first failure; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait, and how long a stream must have lived for the next one to be tried at once.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Most demands that go into one message.
const DEMANDS_AT_ONCE: usize = 1024;

/// What the node does with what it is told.
pub trait Sink: Send + Sync {
    /// Applies changes in order and then wakes who waits for them; they are acknowledged when this returns. Everything
    /// up to `revision` of `epoch` is known here now. May come without changes.
    ///
    /// A new epoch starts revisions, generations and the revisions of stamps over; what is held stays in force.
    fn apply(&self, changes: Vec<Change>, epoch: &str, revision: u64);

    /// A stream is open.
    fn connected(&self);

    /// The stream has ended. What is held stays in force.
    fn disconnected(&self);

    /// The control plane does not know this node any more: nothing that is held may be used again.
    fn expelled(&self);
}

/// Follows the control plane until `shutdown`: keeps a stream open, applies what comes, passes demands on. Demands made
/// while there is no stream are made when there is one. `subscriber` knows what the node holds from before.
///
/// The channel should have HTTP/2 keepalive, so that a stream that died in silence is noticed.
pub async fn follow<F, E>(
    connect: impl Fn() -> F,
    subscriber: Subscriber,
    build: &str,
    clock: Arc<dyn Clock>,
    sink: Arc<dyn Sink>,
    demands: mpsc::Receiver<Demand>,
    shutdown: CancellationToken,
) where
    F: Future<Output = Result<DiscoveryServiceClient<Channel>, E>>,
    E: fmt::Display,
{
    let mut follower = Follower { subscriber, demands, build, clock, sink };
    let follow = async {
        let mut failures = 0;
        loop {
            let end = match follower.meanwhile(connect()).await {
                Ok(client) => {
                    let opened = Instant::now();
                    let end = follower.stream(client).await;
                    if end.code() == Code::Unauthenticated {
                        follower.subscriber = Subscriber::new();
                        follower.sink.expelled();
                    }
                    if opened.elapsed() >= LONGEST_WAIT {
                        failures = 0;
                    }
                    end.to_string()
                }
                Err(error) => error.to_string(),
            };
            let wait = wait_after(failures, rand::random());
            failures += 1;
            tracing::warn!("no stream to the control plane, next attempt in {wait:?}: {end}");
            follower.meanwhile(tokio::time::sleep(wait)).await;
        }
    };
    tokio::select! {
        biased;
        () = shutdown.cancelled() => {}
        () = follow => {}
    }
}

/// Full jitter: the nodes of a restarted control plane do not come back all at once.
fn wait_after(failures: u32, chance: f64) -> Duration {
    FIRST_WAIT.saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_WAIT).mul_f64(chance)
}

struct Follower<'a> {
    subscriber: Subscriber,
    demands: mpsc::Receiver<Demand>,
    build: &'a str,
    clock: Arc<dyn Clock>,
    sink: Arc<dyn Sink>,
}

/// Tells the sink that the stream has ended, however it does.
struct Connected<'a>(&'a dyn Sink);

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.disconnected();
    }
}

impl Follower<'_> {
    /// One stream; why it ended.
    async fn stream(&mut self, mut client: DiscoveryServiceClient<Channel>) -> Status {
        let (outbound, requests) = mpsc::channel(16);
        let mut opening = vec![self.subscriber.hello(self.build)];
        opening.extend(self.subscriber.resume());
        let requests = futures::stream::iter(opening).chain(ReceiverStream::new(requests));
        // Demands wait here for the answer to the opening, which the control plane gives at once.
        let mut inbound = match client.delta(requests).await {
            Ok(response) => response.into_inner(),
            Err(status) => return status,
        };
        let sink = self.sink.clone();
        sink.connected();
        let _connected = Connected(&*sink);
        tracing::info!("following the control plane");
        let mut batch = Vec::new();
        loop {
            let requests = tokio::select! {
                response = inbound.message() => match response {
                    Ok(Some(response)) => {
                        let applied = self.subscriber.handle(response, self.clock.now());
                        sink.apply(applied.changes, self.subscriber.epoch(), applied.revision);
                        vec![applied.reply]
                    }
                    Ok(None) => return Status::unavailable("the control plane ended the stream"),
                    Err(status) => return status,
                },
                1.. = self.demands.recv_many(&mut batch, DEMANDS_AT_ONCE) => self.subscriber.demand(batch.drain(..)),
            };
            if let Err(status) = send(&outbound, requests).await {
                return status;
            }
        }
    }

    /// Waits for `work` and keeps what is demanded meanwhile.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                done = &mut work => return done,
                1.. = self.demands.recv_many(&mut batch, DEMANDS_AT_ONCE) => {
                    self.subscriber.demand(batch.drain(..));
                }
            }
        }
    }
}

async fn send(outbound: &mpsc::Sender<DeltaRequest>, requests: Vec<DeltaRequest>) -> Result<(), Status> {
    for request in requests {
        outbound
            .send(request)
            .await
            .map_err(|_| Status::unavailable("the stream to the control plane ended"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_two_seconds() {
        let longest: Vec<_> = (0..6).map(|failures| wait_after(failures, 1.0).as_millis()).collect();
        assert_eq!(longest, [500, 1000, 2000, 2000, 2000, 2000]);
        assert_eq!(wait_after(u32::MAX, 0.5), LONGEST_WAIT / 2);
    }
}
