//! What runs for the demo, and its end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result};
use scaivault::dev::{self, Dev};
use scaivault_tests::fakes::azure::AzureFake;
use scaivault_tests::ports;
use scaivault_tests::servers::drongo::Drongo;
use scaivault_tests::servers::moto::{self, Moto};
use scaivault_tests::servers::openbao::{self, OpenBao};
use tokio::task::{self, JoinHandle};

/// Where the API is, unless somebody else is there.
const USUAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8300);

/// The stores and the planes. Whatever has been started, however far, [`Stage::clear`] stops it in order.
#[derive(Default)]
pub(crate) struct Stage {
    openbao: Option<OpenBao>,
    /// AWS Secrets Manager.
    pub(crate) moto: Beside<Moto>,
    /// Azure Key Vault.
    pub(crate) azure: Beside<AzureFake>,
    /// GCP Secret Manager.
    pub(crate) drongo: Beside<Drongo>,
    /// A task of its own: a start that is cut off half-way would leave its directory behind.
    starting: Option<JoinHandle<Result<Dev>>>,
    planes: Option<Dev>,
}

impl Stage {
    /// Starts an OpenBao that keeps its data over an outage.
    pub(crate) async fn openbao(&mut self) -> Result<&OpenBao> {
        let started = OpenBao::start(openbao::Options::default().on_disk()).await;
        Ok(self.openbao.insert(started.context("OpenBao does not run, and the demo needs one")?))
    }

    /// Begins to start the other stores, while OpenBao has its turn.
    pub(crate) fn begin_others(&mut self) {
        self.moto = Beside::begin(Moto::start(moto::Options::default()));
        self.azure = Beside::begin(AzureFake::start());
        self.drongo = Beside::begin(Drongo::start());
    }

    /// An outage begins: OpenBao stops.
    pub(crate) async fn stop_openbao(&mut self) -> Result<()> {
        self.openbao.as_mut().context("OpenBao was never started")?.stop().await
    }

    /// The outage ends: OpenBao is back at the same address.
    pub(crate) async fn start_openbao_again(&mut self) -> Result<()> {
        let openbao = self.openbao.as_mut().context("OpenBao was never started")?;
        openbao.start_again().await.context("OpenBao does not come back")
    }

    /// Starts both planes, at the usual address if it is free.
    pub(crate) async fn planes(&mut self) -> Result<&Dev> {
        let starting = self.starting.insert(tokio::spawn(start_planes()));
        let started = starting.await;
        self.starting = None;
        Ok(self.planes.insert(started?.context("ScaiVault does not start")?))
    }

    /// Stops everything.
    pub(crate) async fn clear(self) {
        let started = match self.starting {
            Some(starting) => starting.await.ok().and_then(Result::ok),
            None => self.planes,
        };
        if let Some(planes) = started {
            planes.stop().await;
        }
        // What does not go by itself is killed when it is dropped. The stand-in for Azure is in this process.
        drop(self.azure.end().await);
        if let Some(mut moto) = self.moto.end().await {
            drop(moto.stop().await);
        }
        if let Some(mut drongo) = self.drongo.end().await {
            drop(drongo.stop().await);
        }
        if let Some(mut openbao) = self.openbao {
            drop(openbao.stop().await);
        }
    }
}

/// A server that starts beside what is shown.
pub(crate) struct Beside<T> {
    starting: Option<JoinHandle<Result<T>>>,
    running: Option<T>,
}

impl<T> Default for Beside<T> {
    fn default() -> Self {
        Beside { starting: None, running: None }
    }
}

impl<T: 'static> Beside<T> {
    /// On this thread, within a `LocalSet`: waiting for a server is not `Send`.
    fn begin(start: impl Future<Output = Result<T>> + 'static) -> Self {
        Beside { starting: Some(task::spawn_local(start)), running: None }
    }

    /// Waits until it runs; an error says why it does not. To be asked once.
    pub(crate) async fn ready(&mut self) -> Result<&T> {
        let started = self.starting.as_mut().context("nobody has started it")?.await;
        self.starting = None;
        Ok(self.running.insert(started??))
    }

    /// The running server, to be stopped. A start that is under way is broken off, and what it made is gone.
    async fn end(self) -> Option<T> {
        let Some(starting) = self.starting else { return self.running };
        starting.abort();
        starting.await.ok().and_then(Result::ok)
    }
}

async fn start_planes() -> Result<Dev> {
    // Whoever took the usual address after we looked has it.
    if TcpListener::bind(USUAL).is_ok()
        && let Ok(planes) = start_planes_at(USUAL).await
    {
        return Ok(planes);
    }
    start_planes_at((Ipv4Addr::LOCALHOST, ports::free()).into()).await
}

async fn start_planes_at(listen: SocketAddr) -> Result<Dev> {
    dev::start(&dev::Options { listen, data_dir: None, egress_allow: Vec::new(), log: String::new() }).await
}

/// Whether this is the address that the documentation names.
pub(crate) fn is_usual(address: SocketAddr) -> bool {
    address == USUAL
}
