//! AWS, Azure and GCP behind the planes: what is promised of every store is tried with each of them.

mod isolated;
mod naming;
mod permitted;
mod proxied;
mod refused;
mod secured;
mod synced;

use anyhow::Result;
use scaivault_tests::planes::{Options, Planes, Rest};
use scaivault_tests::wait;

const BACKENDS: &str = "/v1/federation/backends";

/// Planes with one node, and the operator's client of it.
async fn planes() -> Result<(Planes, Rest)> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    Ok((planes, rest))
}

/// The path of the API for a secret.
fn secret(path: &str) -> String {
    format!("/v1/secrets/{path}")
}

/// Waits until the node serves the backend: this secret of it can be read.
async fn readable(rest: &Rest, path: &str) -> Result<()> {
    let mut last = String::new();
    let served = wait::until("the secret can be read", async || {
        let answer = rest.get(&secret(path)).await?;
        last.clone_from(&answer.text);
        Ok((answer.status == 200).then_some(()))
    })
    .await;
    anyhow::Context::with_context(served, || format!("{path}: {last}"))
}

/// The names that a listing of a folder shows.
async fn keys(rest: &Rest, folder: &str) -> Result<Vec<String>> {
    let list = rest.get(&format!("/v1/secrets/{folder}?list=true")).await?.ok()?;
    Ok(serde_json::from_value(list["keys"].clone())?)
}

/// The same test for each of the stores.
macro_rules! with_stores {
    ($($store:ident),+: $promise:ident) => {
        mod $promise {
            $(
                #[tokio::test]
                async fn $store() -> anyhow::Result<()> {
                    super::$promise(scaivault_tests::stores::Store::$store().await?).await
                }
            )+
        }
    };
}
use with_stores;
