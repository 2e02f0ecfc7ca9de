//! The testbed itself: its servers are real, its faults happen, and nothing stays behind.

use std::time::Duration;

use anyhow::Result;
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_tests::authority::Authority;
use scaivault_tests::faults::{Fault, Proxy};
use scaivault_tests::servers::drongo::Drongo;
use scaivault_tests::servers::microburst::Microburst;
use scaivault_tests::servers::moto::{self, AccessKey, Moto};
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

fn allow(action: &str) -> Value {
    let statement = json!({ "Effect": "Allow", "Action": action, "Resource": "*" });
    json!({ "Version": "2012-10-17", "Statement": [statement] })
}

#[tokio::test]
async fn moto_lets_in_whom_it_knows_as_far_as_the_policy_says() -> Result<()> {
    let moto = Moto::start(moto::Options::default()).await?;
    let admin = moto.client()?;
    admin.create_secret("app/db", "one", &[("team", "core")]).await?;
    let key = admin.create_user("reader", &allow("secretsmanager:GetSecretValue")).await?;
    let reader = admin.with_key(key.clone());
    assert_eq!(reader.get_secret("app/db").await?, "one");

    let body = json!({ "SecretId": "app/db" });
    let refusals = [
        ("DescribeSecret", key.clone(), "AccessDenied"),
        ("GetSecretValue", AccessKey { secret: "wrong".into(), ..key.clone() }, "SignatureDoesNotMatch"),
        ("GetSecretValue", AccessKey { id: "AKIAWRONG".into(), ..key.clone() }, "InvalidClientTokenId"),
    ];
    for (operation, key, code) in refusals {
        let (status, answer) = admin.with_key(key).exchange(operation, body.clone()).await?;
        assert_eq!(status, 403);
        assert!(answer.contains(code), "{answer}");
    }

    let second = admin.create_access_key("reader").await?;
    admin.delete_access_key("reader", &key.id).await?;
    assert!(reader.get_secret("app/db").await.is_err());
    assert_eq!(admin.with_key(second).get_secret("app/db").await?, "one");
    Ok(())
}

#[tokio::test]
async fn moto_lends_a_role_to_whom_it_trusts() -> Result<()> {
    let moto = Moto::start(moto::Options::default()).await?;
    let admin = moto.client()?;
    admin.create_secret("app/db", "one", &[]).await?;
    let trusted = admin.with_key(admin.create_user("trusted", &allow("sts:AssumeRole")).await?);
    let other = admin.with_key(admin.create_user("other", &allow("sts:AssumeRole")).await?);
    let statement = json!({
        "Effect": "Allow",
        "Principal": { "AWS": trusted.caller().await? },
        "Action": "sts:AssumeRole",
    });
    let trust = json!({ "Version": "2012-10-17", "Statement": [statement] });
    let role = admin.create_role("reader", &trust, &allow("secretsmanager:GetSecretValue")).await?;

    assert!(trusted.get_secret("app/db").await.is_err());
    assert!(other.assume_role(&role, "session").await.is_err());
    let session = trusted.assume_role(&role, "session").await?;
    assert_eq!(admin.with_key(session.clone()).get_secret("app/db").await?, "one");
    let forged = AccessKey { session_token: Some("forged".into()), ..session };
    assert!(admin.with_key(forged).get_secret("app/db").await.is_err());
    Ok(())
}

#[tokio::test]
async fn moto_keeps_secrets_until_it_is_stopped() -> Result<()> {
    let mut moto = Moto::start(moto::Options::default().tls(Authority::new()?)).await?;
    let admin = moto.client()?;
    let first = admin.create_secret("app/db", "one", &[("team", "core")]).await?;
    let second = admin.put_secret("app/db", "two").await?;
    admin.tag_secret("app/db", &[("stage", "test")]).await?;
    admin.untag_secret("app/db", &["team"]).await?;
    let described = admin.describe_secret("app/db").await?;
    assert_eq!(described["Tags"], json!([{ "Key": "stage", "Value": "test" }]));
    assert_eq!(described["VersionIdsToStages"], json!({ first: ["AWSPREVIOUS"], second: ["AWSCURRENT"] }));

    admin.delete_secret("app/db").await?;
    assert!(admin.get_secret("app/db").await.is_err());
    admin.restore_secret("app/db").await?;
    let before = moto.calls()?;
    assert_eq!(admin.get_secret("app/db").await?, "two");
    assert_eq!(moto.calls()?, before + 1);
    admin.remove_secret("app/db").await?;
    assert!(admin.restore_secret("app/db").await.is_err());

    moto.stop().await?;
    assert!(admin.caller().await.is_err());
    moto.start_again().await?;
    assert!(moto.client()?.caller().await?.ends_with(":user/administrator"));
    Ok(())
}

#[tokio::test]
async fn microburst_throttles_on_demand() -> Result<()> {
    let moto = Moto::start(moto::Options::default()).await?;
    let proxy = Microburst::start(moto.socket(), moto.administrator()).await?;
    let admin = moto.client()?.at(proxy.addr());
    admin.create_secret("app/db", "one", &[]).await?;
    let throttled = async || -> Result<bool> {
        let (status, answer) = admin.exchange("GetSecretValue", json!({ "SecretId": "app/db" })).await?;
        let throttled = answer.contains("ThrottlingException");
        assert_eq!(status, if throttled { 400 } else { 200 }, "{answer}");
        Ok(throttled)
    };
    assert!(!throttled().await?);
    proxy.throttle("GetSecretValue").await?;
    assert!(throttled().await? && throttled().await?);
    admin.describe_secret("app/db").await?;
    proxy.heal().await?;
    assert!(!throttled().await?);
    proxy.throttle_times("GetSecretValue", 1).await?;
    assert!(throttled().await? && !throttled().await?);
    assert_eq!(proxy.calls().await?, 8);
    Ok(())
}

#[tokio::test]
async fn drongo_keeps_the_versions_of_a_secret() -> Result<()> {
    let drongo = Drongo::start().await?;
    let admin = drongo.client("project")?;
    assert_eq!(admin.access("db", "latest").await?, None);
    admin.create_secret("db", &[("team", "core")]).await?;
    assert_eq!(admin.add_version("db", b"one").await?, 1);
    assert_eq!(admin.add_version("db", b"\xff\0two").await?, 2);
    assert_eq!(admin.access("db", "latest").await?.as_deref(), Some(&b"\xff\0two"[..]));
    assert_eq!(drongo.client("other")?.access("db", "latest").await?, None);
    assert_eq!(admin.call(Method::GET, "secrets/db", None).await?["labels"], json!({ "team": "core" }));

    admin.disable_version("db", 2).await?;
    assert!(admin.access("db", "2").await.is_err());
    admin.enable_version("db", 2).await?;
    assert!(admin.access("db", "2").await?.is_some());
    admin.destroy_version("db", 1).await?;
    assert!(admin.access("db", "1").await.is_err());
    admin.delete_secret("db").await?;
    assert_eq!(admin.access("db", "2").await?, None);
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
