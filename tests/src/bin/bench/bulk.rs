//! Many secrets in OpenBao, and the least that a program could do to have them all.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use scaivault_tests::http;
use serde_json::Value;

use crate::subjects::{Store, VAULT_TOKEN, value};

/// Secrets in a folder.
const FOLDER: usize = 1000;
/// Writes at the same time.
const WRITES: usize = 64;
/// Reads at the same time: as many as a sync makes.
pub(crate) const READS: usize = 16;

/// Secrets that are copied together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bulk {
    /// How many.
    pub(crate) secrets: usize,
    /// How often they are copied, each time by a new installation.
    pub(crate) rounds: usize,
}

impl Bulk {
    /// E.g. `10k`.
    pub(crate) fn label(self) -> String {
        format!("{}k", self.secrets / 1000)
    }

    /// The folder that they are in, and nothing else.
    pub(crate) fn root(self) -> String {
        format!("bulk/{}", self.label())
    }

    /// Their names below the root.
    pub(crate) fn names(self) -> impl Iterator<Item = String> {
        (0..self.secrets).map(|index| format!("{:03}/{:03}", index / FOLDER, index % FOLDER))
    }

    /// Writes all of them, and returns how long that took.
    pub(crate) async fn fill(self, store: &Store) -> Result<Duration> {
        let start = Instant::now();
        let root = self.root();
        let writes = self.names().map(async |name| {
            let path = format!("{root}/{name}");
            store.admin.put("secret", &path, value(&path)).await
        });
        let written: Vec<u64> = stream::iter(writes).buffer_unordered(WRITES).try_collect().await?;
        ensure!(written.iter().all(|version| *version == 1), "something was there before");
        Ok(start.elapsed())
    }

    /// Lists them and reads each, and parses what comes.
    pub(crate) async fn list_and_read(self, store: &Store) -> Result<Duration> {
        let client = http::client(None)?;
        let (addr, root) = (store.openbao.addr(), self.root());
        let get = async |url: String| {
            let answer = client.get(url).header(VAULT_TOKEN, &store.token).send().await?;
            let answer = answer.error_for_status()?.bytes().await?;
            anyhow::Ok(serde_json::from_slice::<Value>(&answer)?)
        };
        let start = Instant::now();
        let listing = get(format!("{addr}/v1/secret/detailed-metadata/{root}?scan=true")).await?;
        let keys = listing["data"]["keys"].as_array().map(Vec::as_slice).unwrap_or_default();
        let reads = keys.iter().filter_map(Value::as_str).map(async |name| {
            let secret = get(format!("{addr}/v1/secret/data/{root}/{name}")).await?;
            anyhow::Ok(secret["data"]["data"].is_object())
        });
        let read: Vec<bool> = stream::iter(reads).buffer_unordered(READS).try_collect().await?;
        let took = start.elapsed();
        ensure!(read.len() == self.secrets && read.iter().all(|is_there| *is_there), "{} read", read.len());
        Ok(took)
    }
}
