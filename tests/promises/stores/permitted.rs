//! Permissions: the least that a store's administrator can give is enough, and what is missing is named.

use anyhow::{Context as _, Result, bail};
use scaivault_tests::fakes::azure::{Fault, Right, Side};
use scaivault_tests::fakes::gcp::Permission;
use scaivault_tests::planes::{Planes, Rest};
use scaivault_tests::servers::microburst::Microburst;
use scaivault_tests::stores::{Store, aws_credential, aws_policy, copied};
use scaivault_tests::wait;
use serde_json::{Value, json};

use super::{planes, readable, secret, with_stores};

const GET: &str = "secretsmanager:GetSecretValue";
const LIST: &str = "secretsmanager:ListSecrets";
const BATCH: &str = "secretsmanager:BatchGetSecretValue";
const DESCRIBE: &str = "secretsmanager:DescribeSecret";

/// A backend whose login is that of an IAM user with these rights and no others, so that nodes cannot have sessions.
async fn of_user(
    rest: &Rest,
    store: &Store,
    name: &str,
    actions: &[&str],
    settings: Value,
) -> Result<(String, Value)> {
    let key = store.moto()?.client()?.create_user(name, &aws_policy(actions)).await?;
    rest.put_data("infra/user", aws_credential(&key)).await?;
    let user = json!({ "credentials_path": "infra/user", "role_arn": null, "allow_static_on_nodes": true });
    let mut all = json!({ "config": user });
    scaivault_tests::planes::merge(&mut all, &settings);
    store.sync(rest, name, all).await
}

#[tokio::test]
async fn get_and_list_are_enough_in_aws_and_batches_are_used_where_they_are_allowed() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::aws().await?;
    for path in ["app/db", "app/api", "top"] {
        store.put(&store.name(path), "value").await?;
    }
    for (name, actions, calls) in [
        // To find out that there are no batches takes one.
        ("least", &[GET, LIST][..], json!({ "list": 1, "batch": 1, "read": 3 })),
        ("most", &[GET, LIST, BATCH][..], json!({ "list": 1, "batch": 1 })),
    ] {
        let proxied = format!("{name}-proxied");
        let mut proxy = store.rule(&proxied);
        proxy["mode"] = json!("proxy");
        let rules = json!({ "path_mapping": [store.rule(name), proxy] });
        let (id, report) = of_user(&rest, &store, name, actions, rules).await?;
        assert_eq!((&report["outcome"], &report["created"]), (&json!("complete"), &json!(3)), "{report}");
        let copy = copied(&rest, &secret(&format!("{name}/app/db"))).await?;
        assert_eq!(copy["data"], json!({ "value": "value" }));
        readable(&rest, &format!("{proxied}/app/api")).await?;
        assert_eq!(report["calls"], calls, "{report}");
        store.put(&store.name("app/db"), "other").await?;
        store.put(&store.name("app/api"), "other").await?;
        let report = rest.sync(&id).await?;
        assert_eq!((&report["outcome"], &report["updated"]), (&json!("complete"), &json!(2)), "{report}");
        let batches = report["calls"]["batch"].as_u64().unwrap_or(0);
        assert_eq!(batches, u64::from(name == "most"), "a refusal is not asked for again: {report}");
        for path in ["app/db", "app/api"] {
            store.put(&store.name(path), "value").await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn what_an_arn_names_is_described_where_that_is_allowed_and_read_where_it_is_not() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::aws().await?;
    store.put("elsewhere/db", "value").await?;
    store.set_metadata("elsewhere/db", &[("team", "core")]).await?;
    let described = store.moto()?.client()?.describe_secret("elsewhere/db").await?;
    let arn = described["ARN"].as_str().context("an ARN")?;
    for (name, actions, metadata, calls) in [
        ("least", &[GET, LIST][..], json!({}), json!({ "metadata": 1, "read": 1 })),
        ("most", &[GET, LIST, DESCRIBE][..], json!({ "team": "core" }), json!({ "metadata": 1 })),
    ] {
        let rules = json!({ "path_mapping": [{ "pattern": name, "template": arn }] });
        let (id, report) = of_user(&rest, &store, name, actions, rules).await?;
        assert_eq!((&report["outcome"], &report["created"]), (&json!("complete"), &json!(1)), "{report}");
        let copy = copied(&rest, &secret(name)).await?;
        assert_eq!((&copy["data"], &copy["metadata"]), (&json!({ "value": "value" }), &metadata));
        let report = rest.sync(&id).await?;
        assert_eq!((&report["outcome"], &report["unchanged"]), (&json!("complete"), &json!(1)), "{report}");
        assert_eq!(report["calls"], calls, "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn access_and_list_are_enough_in_gcp() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::gcp().await?;
    let Store::Gcp(gcp) = &store else { bail!("it is GCP") };
    for permission in Permission::ALL {
        if !matches!(permission, Permission::SecretsList | Permission::VersionsAccess) {
            gcp.fake.deny(&gcp.account.email, permission);
        }
    }
    store.put(&store.name("app/db"), "value").await?;
    let (_, report) = store.sync(&rest, "copied", json!({})).await?;
    assert_eq!((&report["outcome"], &report["created"]), (&json!("complete"), &json!(1)), "{report}");
    copied(&rest, &secret("copied/app/db")).await?;
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/app/db").await
}

/// A store whose login may not list, and the permission that it lacks in the store's own words.
async fn without_list(rest: &Rest, store: &Store) -> Result<(String, &'static str)> {
    let permission = match store {
        Store::Aws(_) => {
            let (id, report) = of_user(rest, store, "there", &[GET], json!({})).await?;
            assert_eq!(report["outcome"], "failed", "{report}");
            return Ok((id, LIST));
        }
        Store::Azure(azure) => {
            azure.fake.set_rights(&azure.app.client_id, &[Right::Get]);
            "Key Vault Secrets User"
        }
        Store::Gcp(gcp) => {
            gcp.fake.deny(&gcp.account.email, Permission::SecretsList);
            "secretmanager.secrets.list"
        }
        Store::Drongo(_) => bail!("drongo has no permissions"),
    };
    Ok((store.sync(rest, "there", json!({})).await?.0, permission))
}

async fn without_list_reads_go_on_and_sync_says_what_it_lacks(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    store.put(&store.name("app/db"), "value").await?;
    let (id, permission) = without_list(&rest, &store).await?;
    let report = rest.sync(&id).await?;
    assert_eq!((&report["outcome"], &report["class"]), (&json!("failed"), &json!("forbidden")), "{report}");
    let message = report["message"].as_str().context("a message")?;
    assert!(message.contains(permission), "{message}");
    let status = wait::until("the backend was probed", async || {
        Ok(Some(rest.status(&id).await?).filter(|status| status["status"] != "pending"))
    })
    .await?;
    assert_eq!(status["status"], "degraded", "{status}");
    assert!(status["reason"].as_str().is_some_and(|reason| reason.contains(permission)), "{status}");
    rest.patch(&format!("{}/{id}", super::BACKENDS), json!({ "mode": "proxy" })).await?.ok()?;
    readable(&rest, "there/app/db").await?;
    let listing = rest.get("/v1/secrets/there/?list=true").await?;
    assert_eq!(listing.refusal(), (502, "backend_forbidden"), "{}", listing.text);
    let next = listing.json["next_step"].as_str().context("a next step")?;
    assert!(next.contains(permission), "{next}");
    Ok(())
}
with_stores!(aws, azure, gcp: without_list_reads_go_on_and_sync_says_what_it_lacks);

async fn a_secret_that_is_closed_is_skipped_and_the_others_are_not(store: Store) -> Result<()> {
    let (_planes, rest): (Planes, Rest) = planes().await?;
    for path in ["app/db", "app/api", "top"] {
        store.put(&store.name(path), "value").await?;
    }
    let name = store.name("top");
    let (mut settings, mut in_front) = (json!({}), None);
    match &store {
        Store::Azure(azure) => azure.fake.set_fault(Side::Vault, Fault::ForbidName(name.clone())),
        Store::Gcp(gcp) => gcp.fake.secrets().forbid(&name),
        Store::Aws(aws) => {
            // moto knows no policies about single secrets, so a proxy in front of it says what AWS would.
            let proxy = Microburst::start(aws.moto.socket(), aws.moto.administrator()).await?;
            for (operation, body) in
                [("GetSecretValue", format!("SecretId == '{name}'")), ("BatchGetSecretValue", "@".into())]
            {
                let error = json!({ "code": "AccessDeniedException", "message": "not authorized" });
                let rule = json!({ "service": "secretsmanager", "operation": operation, "body": body, "error": error });
                proxy.add_rule(rule).await?;
            }
            settings = json!({ "config": { "endpoint": proxy.addr() } });
            in_front = Some(proxy);
        }
        Store::Drongo(_) => bail!("drongo has no permissions"),
    }
    let (_, report) = store.sync(&rest, "there", settings.clone()).await?;
    assert_eq!((&report["outcome"], &report["created"]), (&json!("partial"), &json!(2)), "{report}");
    let skipped = &report["skipped"][0];
    assert_eq!(
        (&report["skipped_count"], &skipped["reason"], &skipped["path"]),
        (&json!(1), &json!("forbidden"), &json!("there/top")),
        "{report}"
    );
    copied(&rest, &secret("there/app/db")).await?;
    let closed = rest.get(&secret("there/top")).await?;
    assert_eq!(closed.refusal(), (404, "not_synced"), "{}", closed.text);
    assert!(closed.text.contains("forbidden"), "{}", closed.text);

    store.federate(&rest, "proxied", settings).await?;
    readable(&rest, "proxied/app/db").await?;
    assert_eq!(rest.get(&secret("proxied/top")).await?.refusal(), (502, "backend_forbidden"));
    drop(in_front);
    Ok(())
}
with_stores!(aws, azure, gcp: a_secret_that_is_closed_is_skipped_and_the_others_are_not);
