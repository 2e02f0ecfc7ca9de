//! Readers that read again as soon as they are answered.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use scaivault_proto::secrets::v1::GetRequest;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_tests::planes::Authenticated;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// One of the readers that are in flight together.
pub(crate) trait Reader {
    /// Reads once, and makes sure that it was given something.
    async fn read(&mut self) -> Result<()>;
}

/// Lets every reader read for so long, and returns what each read took.
pub(crate) async fn read_for<R: Reader>(readers: &mut [R], time: Duration) -> Result<Vec<Duration>> {
    let end = Instant::now() + time;
    let reading = readers.iter_mut().map(async |reader| {
        let mut took = Vec::new();
        let mut start = Instant::now();
        while start < end {
            reader.read().await?;
            let answered = Instant::now();
            took.push(answered - start);
            start = answered;
        }
        anyhow::Ok(took)
    });
    Ok(try_join_all(reading).await?.concat())
}

/// Reads over a connection of its own with the least HTTP/1.1 that does: the generator must not be what is measured.
pub(crate) struct Plain {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Plain {
    /// Will GET `path` with a token.
    pub(crate) async fn connect(address: SocketAddr, path: &str, token: &str) -> Result<Plain> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\n\r\n");
        Ok(Plain { stream, request: request.into_bytes(), answer: Vec::with_capacity(8192) })
    }

    /// The length of the whole answer, once its head is there.
    fn expected(&self) -> Result<Option<usize>> {
        let Some(end) = self.answer.windows(4).position(|window| window == b"\r\n\r\n") else {
            return Ok(None);
        };
        let head = str::from_utf8(&self.answer[..end])?;
        ensure!(head.starts_with("HTTP/1.1 200 "), "{}", head.lines().next().unwrap_or_default());
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then_some(value)
        });
        Ok(Some(end + 4 + length.context("an answer without a length")?.parse::<usize>()?))
    }
}

impl Reader for Plain {
    async fn read(&mut self) -> Result<()> {
        self.stream.write_all(&self.request).await?;
        self.answer.clear();
        let mut expected = None;
        while expected.is_none_or(|length| self.answer.len() < length) {
            ensure!(self.stream.read_buf(&mut self.answer).await? > 0, "the server closed the connection");
            expected = self.expected()?;
        }
        Ok(())
    }
}

/// Reads by gRPC.
pub(crate) struct Grpc {
    /// Several share a connection.
    pub(crate) client: SecretsServiceClient<Authenticated>,
    /// What it reads.
    pub(crate) path: String,
}

impl Reader for Grpc {
    async fn read(&mut self) -> Result<()> {
        let answer = self.client.get(GetRequest { path: self.path.clone(), ..Default::default() }).await?;
        ensure!(answer.get_ref().secret.is_some(), "an answer without a secret");
        Ok(())
    }
}

/// Reads with the HTTP client that is also used towards backends.
pub(crate) struct Http {
    /// Shared by all readers of an arm.
    pub(crate) client: reqwest::Client,
    /// What it reads.
    pub(crate) url: String,
    /// What it shows to be let in.
    pub(crate) header: (&'static str, String),
}

impl Reader for Http {
    async fn read(&mut self) -> Result<()> {
        let (name, value) = &self.header;
        let answer = self.client.get(&self.url).header(*name, value).send().await?.error_for_status()?;
        ensure!(!answer.bytes().await?.is_empty(), "an empty answer");
        Ok(())
    }
}
