//! What runs for the demo, and its end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result};
use scaivault::dev::{self, Dev};
use scaivault_tests::ports;
use scaivault_tests::servers::openbao::{self, OpenBao};
use tokio::task::JoinHandle;

/// Where the API is, unless somebody else is there.
const USUAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8300);

/// OpenBao and the planes. Whatever has been started, however far, [`Stage::clear`] stops it in order.
#[derive(Default)]
pub(crate) struct Stage {
    openbao: Option<OpenBao>,
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
        if let Some(mut openbao) = self.openbao {
            // If it does not go by itself it is killed when it is dropped.
            drop(openbao.stop().await);
        }
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
