//! The testbed itself: its servers are real, its faults happen, and nothing stays behind.

use std::time::Duration;

use anyhow::Result;
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_tests::authority::Authority;
use scaivault_tests::faults::{Fault, Proxy};
use scaivault_tests::servers::openbao::{OpenBao, Options};
use scaivault_tests::{http, wait};
use serde_json::{Value, json};
use tokio::net::TcpStream;

#[tokio::test]
async fn openbao_keeps_the_versions_of_a_secret() -> Result<()> {
    let bao = OpenBao::start(Options::default().audited()).await?;
    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    assert_eq!(admin.put("secret", "app/a b", json!({ "user": "one" })).await?, 1);
    assert_eq!(admin.put("secret", "app/a b", json!({ "user": "two" })).await?, 2);
    admin.set_custom_metadata("secret", "app/a b", json!({ "team": "core" })).await?;

    let read = admin.call(Method::GET, "secret/data/app/a b", None).await?;
    assert_eq!(read["data"]["data"], json!({ "user": "two" }));
    assert_eq!(read["data"]["metadata"]["custom_metadata"], json!({ "team": "core" }));

    admin.destroy("secret", "app/a b", &[1]).await?;
    admin.delete("secret", "app/a b", &[2]).await?;
    assert_eq!(admin.read("secret/data/app/a b").await?, None);
    let reads = bao.requests()?.into_iter().filter(|request| request == "read secret/data/app/a b");
    assert_eq!(reads.count(), 2);
    Ok(())
}

#[tokio::test]
async fn openbao_lets_an_application_in_where_its_policy_says() -> Result<()> {
    let bao = OpenBao::start(Options::default()).await?;
    bao.client()?.create_namespace("team").await?;
    let admin = bao.client()?.in_namespace("team");
    admin.enable_kv("kv", KvVersion::V1).await?;
    admin.put_v1("kv", "app/db", json!({ "user": "one" })).await?;
    admin.put_v1("kv", "other", json!({ "user": "two" })).await?;
    admin.write_policy("app", "path \"kv/app/*\" { capabilities = [\"read\"] }").await?;
    admin.enable_auth("approle", "approle").await?;
    let settings = json!({ "token_policies": ["app"], "token_ttl": "1h", "token_num_uses": 10 });
    let role = admin.create_approle("approle", "app", settings).await?;

    let credentials = json!({ "role_id": role.role_id, "secret_id": role.secret_id });
    let login = admin.call(Method::POST, "auth/approle/login", Some(credentials)).await?;
    let app = admin.with_token(login["auth"]["client_token"].as_str().unwrap());
    assert_eq!(app.read("kv/app/db").await?.unwrap()["data"], json!({ "user": "one" }));
    assert!(app.read("kv/other").await.is_err());

    admin.revoke_accessor(login["auth"]["accessor"].as_str().unwrap()).await?;
    assert!(app.read("kv/app/db").await.is_err());
    let child = admin.create_token(json!({ "policies": ["app"], "ttl": "1h" })).await?;
    assert!(admin.with_token(&child.token).read("kv/app/db").await?.is_some());
    admin.revoke_token(&child.token).await?;
    assert!(admin.with_token(&child.token).read("kv/app/db").await.is_err());
    Ok(())
}

#[tokio::test]
async fn openbao_on_disk_serves_the_same_after_a_restart() -> Result<()> {
    let mut bao = OpenBao::start(Options::default().on_disk().tls(Authority::new()?)).await?;
    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    admin.put("secret", "app", json!({ "user": "one" })).await?;
    bao.stop().await?;
    assert!(admin.read("secret/data/app").await.is_err());
    bao.start_again().await?;
    assert_eq!(admin.read("secret/data/app").await?.unwrap()["data"]["data"], json!({ "user": "one" }));
    assert!(http::client(None)?.get(bao.addr()).send().await.is_err(), "only its authority vouches for it");
    Ok(())
}

#[tokio::test]
async fn a_frozen_openbao_answers_when_it_goes_on() -> Result<()> {
    let bao = OpenBao::start(Options::default()).await?;
    let admin = bao.client()?;
    bao.pause().await?;
    let mut answer = tokio::spawn(async move { admin.read("sys/health").await });
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut answer).await.is_err());
    bao.resume()?;
    assert!(answer.await??.is_some());
    Ok(())
}

#[tokio::test]
async fn a_dropped_openbao_is_gone() -> Result<()> {
    let bao = OpenBao::start(Options::default()).await?;
    let address = bao.socket();
    drop(bao);
    assert!(TcpStream::connect(address).await.is_err());
    Ok(())
}

/// A backend, a proxy in front of it, and a client that keeps its connections.
async fn behind_a_proxy() -> Result<(OpenBao, Proxy, reqwest::Client, String)> {
    let bao = OpenBao::start(Options::default()).await?;
    let proxy = Proxy::start(bao.socket()).await?;
    let url = format!("http://{}/v1/sys/health", proxy.addr());
    Ok((bao, proxy, http::client(None)?, url))
}

async fn healthy(client: &reqwest::Client, url: &str) -> Result<bool> {
    let health: Value = client.get(url).send().await?.json().await?;
    Ok(health["sealed"] == false)
}

#[tokio::test]
async fn faults_happen_to_open_connections_and_heal() -> Result<()> {
    let (_bao, proxy, client, url) = behind_a_proxy().await?;
    assert!(healthy(&client, &url).await?);
    assert!(healthy(&client, &url).await?);
    assert_eq!(proxy.connections(), 1);
    assert_eq!(proxy.requests(), ["GET /v1/sys/health"; 2]);

    let headers = vec![("Retry-After", "7")];
    proxy.set(Fault::Answer { status: 429, headers, body: "slow down".into() }).await?;
    let throttled = client.get(&url).send().await?;
    assert_eq!(throttled.status(), 429);
    assert_eq!(throttled.headers()["retry-after"], "7");
    assert_eq!(throttled.text().await?, "slow down");

    for fault in [Fault::Garbage, Fault::Truncate, Fault::Cut] {
        proxy.set(fault.clone()).await?;
        assert!(healthy(&client, &url).await.is_err(), "{fault:?}");
        proxy.set(Fault::Pass).await?;
        assert!(healthy(&client, &url).await?, "after {fault:?}");
    }

    proxy.set(Fault::Refuse).await?;
    assert!(healthy(&client, &url).await?, "open connections go on");
    assert!(TcpStream::connect(proxy.addr()).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_blackhole_holds_everything_back_until_it_heals() -> Result<()> {
    let (_bao, proxy, client, url) = behind_a_proxy().await?;
    assert!(healthy(&client, &url).await?);
    proxy.set(Fault::Blackhole).await?;
    let mut answer = tokio::spawn(async move { healthy(&client, &url).await });
    wait::until("the request has left", async || Ok((proxy.requests().len() == 2).then_some(()))).await?;
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut answer).await.is_err());
    proxy.set(Fault::Pass).await?;
    assert!(answer.await??);
    Ok(())
}

#[tokio::test]
async fn a_delay_is_felt() -> Result<()> {
    let (_bao, proxy, client, url) = behind_a_proxy().await?;
    let delay = Duration::from_millis(150);
    proxy.set(Fault::Delay(delay)).await?;
    let start = tokio::time::Instant::now();
    assert!(healthy(&client, &url).await?);
    assert!(start.elapsed() >= delay);
    Ok(())
}
