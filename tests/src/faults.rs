//! A proxy on loopback that can be told to misbehave, in front of a backend or between the planes.
//!
//! It forwards bytes and knows just enough HTTP/1 to count requests and to answer one itself, so that TLS can pass
//! through it as well.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use crate::ports;

/// What a proxy does with its connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it forwards.
    Pass,
    /// New connections are refused, open ones go on.
    Refuse,
    /// Open connections are closed and new ones refused.
    Cut,
    /// Connections open and stay open, but nothing gets through; afterwards what was sent meanwhile arrives, as it does
    /// when a network heals.
    Blackhole,
    /// Whatever the client sends is held back for so long.
    Delay(Duration),
    /// Every HTTP/1 request is answered with this status, and never reaches the server.
    Answer {
        /// The status, e.g. `429`.
        status: u16,
        /// Headers besides `Content-Length` and `Connection`.
        headers: Vec<(&'static str, &'static str)>,
        /// The body.
        body: String,
    },
    /// Every request is answered with bytes that are no protocol.
    Garbage,
    /// The server's answer is forwarded but for its last bytes, and the connection closed.
    Truncate,
}

impl Fault {
    /// [`Fault::Answer`] with an empty body.
    pub fn status(status: u16) -> Fault {
        Fault::Answer { status, headers: Vec::new(), body: String::new() }
    }
}

/// A proxy in front of one address.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    orders: mpsc::Sender<Order>,
    traffic: Arc<Mutex<Traffic>>,
    task: JoinHandle<()>,
}

/// A fault, and whom to tell that it is in force.
type Order = (Fault, oneshot::Sender<io::Result<()>>);

#[derive(Debug, Default)]
struct Traffic {
    connections: usize,
    requests: Vec<String>,
}

impl Proxy {
    /// Starts one that forwards to `upstream`.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(upstream: SocketAddr) -> Result<Proxy> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::free()));
        let (orders, inbox) = mpsc::channel(1);
        let front = Front {
            addr,
            upstream,
            listener: Some(TcpListener::bind(addr).await?),
            fault: watch::Sender::new(Fault::Pass),
            traffic: Arc::default(),
            connections: JoinSet::new(),
        };
        Ok(Proxy { addr, orders, traffic: front.traffic.clone(), task: tokio::spawn(front.serve(inbox)) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Behaves like this from now on, on open connections too; returns once it does.
    ///
    /// # Errors
    /// If it cannot listen again.
    pub async fn set(&self, fault: Fault) -> Result<()> {
        let (done, in_force) = oneshot::channel();
        self.orders.send((fault, done)).await.context("the proxy's task is gone")?;
        Ok(in_force.await??)
    }

    /// How many connections it has accepted.
    pub fn connections(&self) -> usize {
        self.traffic().connections
    }

    /// The HTTP/1 requests it has seen, oldest first, e.g. `GET /v1/secret/data/app`; none inside TLS.
    pub fn requests(&self) -> Vec<String> {
        self.traffic().requests.clone()
    }

    fn traffic(&self) -> MutexGuard<'_, Traffic> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The accepting side.
struct Front {
    addr: SocketAddr,
    upstream: SocketAddr,
    /// There is none while connections are refused: only the kernel can refuse.
    listener: Option<TcpListener>,
    fault: watch::Sender<Fault>,
    traffic: Arc<Mutex<Traffic>>,
    connections: JoinSet<io::Result<()>>,
}

impl Front {
    async fn serve(mut self, mut orders: mpsc::Receiver<Order>) {
        loop {
            tokio::select! {
                order = orders.recv() => {
                    let Some((fault, done)) = order else { return };
                    let in_force = self.obey(fault).await;
                    // Nobody waits any more: fine.
                    drop(done.send(in_force));
                }
                Some(client) = accept(self.listener.as_ref()) => {
                    self.traffic.lock().unwrap_or_else(PoisonError::into_inner).connections += 1;
                    let connection = Connection {
                        upstream: self.upstream,
                        fault: self.fault.subscribe(),
                        traffic: self.traffic.clone(),
                    };
                    self.connections.spawn(connection.forward(client));
                }
                Some(_ended) = self.connections.join_next() => {}
            }
        }
    }

    async fn obey(&mut self, fault: Fault) -> io::Result<()> {
        match fault {
            Fault::Refuse => self.listener = None,
            Fault::Cut => {
                self.listener = None;
                self.connections.shutdown().await;
            }
            _ if self.listener.is_none() => self.listener = Some(TcpListener::bind(self.addr).await?),
            _ => {}
        }
        self.fault.send_replace(fault);
        Ok(())
    }
}

async fn accept(listener: Option<&TcpListener>) -> Option<TcpStream> {
    listener?.accept().await.ok().map(|(client, _)| client)
}

#[derive(Clone)]
struct Connection {
    upstream: SocketAddr,
    fault: watch::Receiver<Fault>,
    traffic: Arc<Mutex<Traffic>>,
}

/// What becomes of what one side sent.
enum Next {
    /// The other side gets it.
    Forward(Vec<u8>),
    /// The client gets this, and the connection is closed.
    Last(Vec<u8>),
}

impl Connection {
    async fn forward(mut self, mut client: TcpStream) -> io::Result<()> {
        // The server is called when there is something for it: it may be down while the fault answers in its place.
        let last = match self.next_from_client(&mut client).await {
            Next::Forward(first) => {
                let mut server = TcpStream::connect(self.upstream).await?;
                server.write_all(&first).await?;
                self.exchange(&mut client, &mut server).await?
            }
            Next::Last(last) => last,
        };
        client.write_all(&last).await?;
        client.shutdown().await?;
        // Closing with unread bytes would take the last ones away from the client.
        tokio::io::copy(&mut client, &mut tokio::io::sink()).await.map(drop)
    }

    /// Forwards both ways until one side closes or a fault ends it, and returns what the client gets last.
    async fn exchange(&self, client: &mut TcpStream, server: &mut TcpStream) -> io::Result<Vec<u8>> {
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let requests = async {
            let mut connection = self.clone();
            loop {
                match connection.next_from_client(&mut from_client).await {
                    Next::Forward(bytes) => to_server.write_all(&bytes).await?,
                    Next::Last(last) => return Ok(last),
                }
            }
        };
        let answers = async {
            let mut connection = self.clone();
            loop {
                match connection.next_from_server(&mut from_server).await {
                    Next::Forward(bytes) => to_client.write_all(&bytes).await?,
                    Next::Last(last) => return Ok(last),
                }
            }
        };
        tokio::select! { last = requests => last, last = answers => last }
    }

    async fn next_from_client(&mut self, client: &mut (impl AsyncRead + Unpin)) -> Next {
        let bytes = read(client).await;
        if let Some(request) = request_line(&bytes) {
            self.traffic.lock().unwrap_or_else(PoisonError::into_inner).requests.push(request);
        }
        match self.fault().await {
            _ if bytes.is_empty() => Next::Last(bytes),
            Fault::Answer { status, headers, body } => Next::Last(answer(status, &headers, &body)),
            Fault::Garbage => Next::Last(vec![0xfe; 512]),
            Fault::Delay(delay) => {
                sleep(delay).await;
                Next::Forward(bytes)
            }
            _ => Next::Forward(bytes),
        }
    }

    async fn next_from_server(&mut self, server: &mut (impl AsyncRead + Unpin)) -> Next {
        let mut bytes = read(server).await;
        match self.fault().await {
            _ if bytes.is_empty() => Next::Last(bytes),
            Fault::Truncate => {
                bytes.truncate(bytes.len().saturating_sub(10));
                Next::Last(bytes)
            }
            _ => Next::Forward(bytes),
        }
    }

    /// The fault in force; during a blackhole it takes until that is over, so that not even a close gets through.
    async fn fault(&mut self) -> Fault {
        match self.fault.wait_for(|fault| *fault != Fault::Blackhole).await {
            Ok(fault) => fault.clone(),
            Err(_) => Fault::Cut,
        }
    }
}

/// What arrives next; nothing at the end, or if the connection broke.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = vec![0; 64 * 1024];
    let length = from.read(&mut bytes).await.unwrap_or(0);
    bytes.truncate(length);
    bytes
}

/// A client without pipelining begins a new segment with each request.
fn request_line(bytes: &[u8]) -> Option<String> {
    let end = bytes.windows(2).position(|window| window == b"\r\n")?;
    str::from_utf8(&bytes[..end]).ok()?.strip_suffix(" HTTP/1.1").map(str::to_owned)
}

fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut answer =
        format!("HTTP/1.1 {status} Fault\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
    for (name, value) in headers {
        answer += &format!("{name}: {value}\r\n");
    }
    answer += "\r\n";
    answer += body;
    answer.into_bytes()
}
