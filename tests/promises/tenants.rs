//! Tenants and tokens: nobody reaches what is another's, and what was taken away is gone everywhere.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_domain::time::Timestamp;
use scaivault_tests::planes::{self, CREDENTIAL, Options, Planes, Rest};
use scaivault_tests::servers::openbao::{self, OpenBao};
use scaivault_tests::wait;
use serde_json::{Value, json};

const ALL: [&str; 6] =
    ["secrets:read", "secrets:write", "federation:read", "federation:write", "audit:read", "admin"];

/// Makes a tenant, and a token that may do everything in it.
async fn tenant(operator: &Rest, name: &str) -> Result<Rest> {
    operator.post("/v1/tenants", json!({ "id": name, "display_name": name })).await?.ok()?;
    let wanted = json!({ "subject": format!("{name}-admin"), "scopes": ALL, "policies": ["root"] });
    let issued = operator.in_tenant(name)?.post("/v1/tokens", wanted).await?.ok()?;
    operator.with_token(issued["token"].as_str().context("token")?)
}

/// A path's rules: one pattern, everything allowed.
fn everything(pattern: &str) -> Value {
    json!([{ "path": pattern, "capabilities": ["read", "list", "write", "delete"] }])
}

#[tokio::test]
async fn the_same_names_in_two_tenants_are_two_things() -> Result<()> {
    let (bao, planes) =
        tokio::try_join!(OpenBao::start(openbao::Options::default()), Planes::start(Options::default()))?;
    let (admin, operator) = (bao.client()?, planes.rest(0)?);
    let credential = planes::application(&admin, r#"path "+/data/*" { capabilities = ["read"] }"#).await?;
    let mut tenants = Vec::new();
    for name in ["acme", "globex"] {
        admin.enable_kv(name, KvVersion::V2).await?;
        admin.put(name, "x", json!({ "is": name })).await?;
        let rest = tenant(&operator, name).await?;
        rest.put_data("own", json!({ "is": name })).await?;
        rest.put_data(CREDENTIAL, credential.clone()).await?;
        let mapping = json!({ "shared/**": format!("{name}/data/**") });
        let backend = rest.create_backend("vault", &bao.addr(), CREDENTIAL, mapping).await?;
        let token = rest.issue("app", &["secrets:read"], everything("**")).await?.accessor;
        tenants.push((name, rest, backend, token));
    }
    for (name, rest, ..) in &tenants {
        for path in ["own", "shared/x"] {
            assert_eq!(rest.get(&format!("/v1/secrets/{path}")).await?.ok()?["data"]["is"], *name, "{path}");
        }
        // Only an operator names a tenant, and for it the other's paths are just there.
        assert_eq!(
            rest.in_tenant("default")?.get("/v1/secrets/own").await?.refusal(),
            (403, "permission_denied")
        );
        let named = operator.in_tenant(name)?.get("/v1/secrets/shared/x").await?.ok()?;
        assert_eq!(named["data"]["is"], *name);
    }
    assert_eq!(operator.get("/v1/secrets/own").await?.status, 404);
    let nobody = operator.in_tenant("nobody")?.get("/v1/secrets/own").await?;
    assert!([403, 404].contains(&nobody.status), "{}", nobody.text);

    let [(_, acme, ..), (_, globex, backend, token)] = &tenants[..] else { anyhow::bail!("two tenants") };
    globex.put("/v1/policies/theirs", json!({ "rules": everything("**") })).await?.ok()?;
    let backend = format!("/v1/federation/backends/{backend}");
    for (method, path, body) in [
        (Method::GET, backend.clone(), None),
        (Method::PATCH, backend.clone(), Some(json!({ "enabled": false }))),
        (Method::DELETE, backend.clone(), None),
        (Method::GET, format!("{backend}/status"), None),
        (Method::POST, format!("{backend}/sync"), Some(json!({}))),
        (Method::GET, format!("/v1/tokens/{token}"), None),
        (Method::POST, format!("/v1/tokens/{token}/renew"), Some(json!({ "ttl": "1h" }))),
        (Method::DELETE, format!("/v1/tokens/{token}"), None),
        (Method::GET, "/v1/policies/theirs".into(), None),
        (Method::DELETE, "/v1/policies/theirs".into(), None),
    ] {
        let answer = acme.send(method.clone(), &path, body.map(|body| body.to_string())).await?;
        assert_eq!(answer.refusal(), (404, "not_found"), "{method} {path}: {}", answer.text);
    }
    for path in
        ["/v1/federation/backends", "/v1/tokens", "/v1/policies", "/v1/federation/events", "/v1/audit"]
    {
        let listed = acme.get(path).await?;
        assert_eq!(listed.status, 200);
        for foreign in ["globex", "theirs", token, backend.rsplit('/').next().context("id")?] {
            assert!(!listed.text.contains(foreign), "{path} shows {foreign}: {}", listed.text);
        }
    }
    for path in ["/v1/tenants", "/v1/nodes"] {
        assert_eq!(acme.get(path).await?.refusal(), (403, "permission_denied"), "{path}");
    }
    assert_eq!(globex.get("/v1/secrets/shared/x").await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn scopes_say_which_api_and_policies_which_paths_and_deny_wins() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    for path in ["app/a", "app/closed/b"] {
        rest.put_data(path, json!({})).await?;
    }
    let rules = json!([
        { "path": "app/**", "capabilities": ["read", "write"] },
        { "path": "app/closed/**", "capabilities": ["read", "write"], "effect": "deny" },
    ]);
    let app = rest.with_token(&rest.issue("app", &["secrets:read"], rules).await?.token)?;
    let denied = (403, "permission_denied");
    assert_eq!(app.get("/v1/secrets/app/a").await?.status, 200);
    assert_eq!(app.get("/v1/secrets/app/none").await?.status, 404);
    assert_eq!(
        app.put("/v1/secrets/app/a", json!({ "data": {} })).await?.refusal(),
        denied,
        "no scope to write"
    );
    let mut refusals = Vec::new();
    // Whether something is there is not told: existing or not, closed or never opened.
    for path in ["app/closed/b", "app/closed/none", "other", "app"] {
        let mut refused = app.get(&format!("/v1/secrets/{path}")).await?;
        assert_eq!(refused.refusal(), denied, "{path}");
        refused.json["request_id"].take();
        refusals.push(refused.json);
        assert_eq!(app.get(&format!("/v1/secrets/{path}?versions=true")).await?.refusal(), denied, "{path}");
    }
    assert!(refusals.windows(2).all(|pair| pair[0] == pair[1]), "{refusals:#?}");
    for path in
        ["/v1/federation/backends", "/v1/policies", "/v1/tokens", "/v1/tenants", "/v1/nodes", "/v1/audit"]
    {
        assert_eq!(app.get(path).await?.refusal(), denied, "{path}");
    }
    for token in ["", "svt_nonsense", &planes.operator_token().replace("svt_", "svt-")] {
        let stranger = rest.with_token(token)?;
        assert_eq!(stranger.get("/v1/secrets/app/a").await?.refusal(), (401, "unauthenticated"), "{token}");
    }
    assert_eq!(rest.without_token().get("/v1/secrets/app/a").await?.header("www-authenticate"), "Bearer");
    Ok(())
}

#[tokio::test]
async fn a_child_is_never_more_than_its_parent_and_ends_with_it() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    let parent = rest.issue("parent", &["secrets:read", "admin"], everything("app/**")).await?;
    let by_parent = rest.with_token(&parent.token)?;
    let child = |scopes: &[&str], policies: &[&str], ttl: &str| json!({ "subject": "child", "scopes": scopes, "policies": policies, "ttl": ttl });
    for (wanted, pointer) in [
        (child(&["operator"], &["parent"], "1h"), "/scopes"),
        (child(&["secrets:write"], &["parent"], "1h"), "/scopes"),
        (child(&["secrets:read"], &["root"], "1h"), "/policies"),
        (child(&["secrets:read"], &["parent"], "0s"), "/ttl"),
    ] {
        let refused = by_parent.post("/v1/tokens", wanted.clone()).await?;
        assert_eq!(
            (refused.refusal(), refused.pointers()),
            ((403, "permission_denied"), vec![pointer]),
            "{wanted}"
        );
    }
    let parents_end = rest.get(&format!("/v1/tokens/{}", parent.accessor)).await?.ok()?["expires_at"].clone();
    let made = by_parent.post("/v1/tokens", child(&["secrets:read"], &["parent"], "9999h")).await?.ok()?;
    assert_eq!(made["expires_at"], parents_end);
    let by_child = rest.with_token(made["token"].as_str().context("token")?)?;
    assert_eq!(by_child.get("/v1/tokens/self").await?.ok()?["parent"], json!(parent.accessor));
    assert_eq!(by_child.get("/v1/secrets/app/x").await?.status, 404);
    assert_eq!(
        by_child.post("/v1/tokens/self/renew", json!({ "ttl": "9999h" })).await?.ok()?["expires_at"],
        parents_end
    );

    let revoked = rest.delete(&format!("/v1/tokens/{}", parent.accessor)).await?.ok()?;
    assert_eq!(revoked["revoked"], 2);
    for gone in [&by_parent, &by_child] {
        assert_eq!(gone.get("/v1/secrets/app/x").await?.refusal(), (401, "unauthenticated"));
    }
    Ok(())
}

#[tokio::test]
async fn a_token_that_an_operator_made_in_another_tenant_ends_with_the_operators() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    let acme = tenant(&rest, "acme").await?;
    let wanted =
        json!({ "subject": "second", "scopes": ["operator", "admin", "secrets:read"], "policies": ["root"] });
    let second = rest.post("/v1/tokens", wanted).await?.ok()?;
    let by_second = rest.with_token(second["token"].as_str().context("token")?)?;
    let wanted = json!({ "subject": "child", "scopes": ["secrets:read"], "policies": ["root"] });
    let child = by_second.in_tenant("acme")?.post("/v1/tokens", wanted).await?.ok()?;
    let by_child = rest.with_token(child["token"].as_str().context("token")?)?;
    assert_eq!(by_child.get("/v1/secrets/x").await?.status, 404);
    let renew = format!("/v1/tokens/{}/renew", child["accessor"].as_str().context("accessor")?);
    let renewed = acme.post(&renew, json!({ "ttl": "9999h" })).await?.ok()?;
    assert_eq!(renewed["expires_at"], second["expires_at"], "a child never outlives its parent");

    rest.delete(&format!("/v1/tokens/{}", second["accessor"].as_str().context("accessor")?)).await?.ok()?;
    assert_eq!(by_second.get("/v1/secrets/x").await?.status, 401);
    assert_eq!(by_child.get("/v1/secrets/x").await?.status, 401, "children are revoked with their parent");
    Ok(())
}

#[tokio::test]
async fn a_token_ends_when_its_time_is_over_unless_it_is_renewed() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    let wanted = json!({ "subject": "short", "scopes": ["secrets:read"], "policies": ["root"], "ttl": "2s" });
    let mut short = Vec::new();
    for _ in 0..2 {
        let made = rest.post("/v1/tokens", wanted.clone()).await?.ok()?;
        short.push(rest.with_token(made["token"].as_str().context("token")?)?);
    }
    // By itself a token gets as much time again as it had, and no more; an administrator gives it any.
    let long = json!({ "ttl": "1h" });
    let by_itself = short[1].post("/v1/tokens/self/renew", long.clone()).await?.ok()?;
    let renew = format!("/v1/tokens/{}/renew", by_itself["accessor"].as_str().context("accessor")?);
    let by_admin = rest.post(&renew, long).await?.ok()?;
    let times = [&by_itself["created_at"], &by_itself["expires_at"], &by_admin["expires_at"]];
    let times = times.map(|time| Timestamp::parse(time.as_str().unwrap_or_default()));
    let [Some(created), Some(soon), Some(late)] = times else { anyhow::bail!("no times: {times:?}") };
    assert!(
        soon.since(created) < Duration::from_secs(60) && late.since(created) >= Duration::from_secs(3600)
    );
    assert_eq!(short[0].get("/v1/secrets/x").await?.status, 404);
    wait::until("the token is over", async || {
        Ok((short[0].get("/v1/secrets/x").await?.status == 401).then_some(()))
    })
    .await?;
    assert_eq!(short[1].get("/v1/secrets/x").await?.status, 404);
    assert_eq!(short[1].delete("/v1/tokens/self").await?.ok()?["revoked"], 1);
    assert_eq!(short[1].get("/v1/secrets/x").await?.status, 401);
    Ok(())
}

#[tokio::test]
async fn what_is_taken_away_is_gone_on_every_node_within_five_seconds() -> Result<()> {
    let planes = Planes::start(Options::default().nodes(2)).await?;
    let (rest, other) = (planes.rest(0)?, planes.rest(1)?);
    rest.put_data("app/x", json!({})).await?;
    let app = rest.issue("app", &["secrets:read"], everything("app/**")).await?;
    let (here, there) = (rest.with_token(&app.token)?, other.with_token(&app.token)?);
    let until = async |status: u16| -> Result<Duration> {
        let start = tokio::time::Instant::now();
        // The node that took the change has it in force when it answers; the others follow.
        assert_eq!(here.get("/v1/secrets/app/x").await?.status, status);
        let follow = wait::until("the other node follows", async || {
            Ok((there.get("/v1/secrets/app/x").await?.status == status).then_some(()))
        });
        tokio::time::timeout(Duration::from_secs(5), follow).await.context("it took five seconds")??;
        Ok(start.elapsed())
    };
    until(200).await?;
    rest.put("/v1/policies/app", json!({ "rules": everything("nothing/**") })).await?.ok()?;
    let changed = until(403).await?;
    rest.put("/v1/policies/app", json!({ "rules": everything("app/**") })).await?.ok()?;
    until(200).await?;
    rest.delete(&format!("/v1/tokens/{}", app.accessor)).await?.ok()?;
    println!("a policy: {changed:?}, a revocation: {:?}", until(401).await?);
    Ok(())
}
