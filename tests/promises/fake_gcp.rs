//! The fakes refuse what the real things refuse, and let in who can prove it.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::extract::State;
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Method, StatusCode};
use scaivault_domain::backend::KvVersion;
use scaivault_tests::fakes::clock::Clock;
use scaivault_tests::fakes::gcp::{AccountKey, Fault, Gcp, Operation, Permission};
use scaivault_tests::fakes::keys::SigningKey;
use scaivault_tests::fakes::kubernetes::Kubernetes;
use scaivault_tests::fakes::serving::{Bound, Serving};
use scaivault_tests::fakes::vault_logins::{AwsMount, AwsRole, GcpRole, GcpRoleType, Granted, VaultLogins};
use scaivault_tests::http;
use scaivault_tests::servers::openbao::{OpenBao, Options};
use serde_json::{Value, json};

const HOUR: Duration = Duration::from_secs(3600);
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const PROJECT: &str = "v1/projects/scaivault-tests";

/// A client of Google's with a bearer token.
struct Caller<'a> {
    gcp: &'a Gcp,
    bearer: String,
}

impl<'a> Caller<'a> {
    fn new(gcp: &'a Gcp, bearer: impl Into<String>) -> Self {
        Caller { gcp, bearer: bearer.into() }
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Result<(u16, Value)> {
        let request = http::client(None)?.request(method, format!("{}/{path}", self.gcp.url()));
        let answer = request.bearer_auth(&self.bearer).json(&body).send().await?;
        Ok((answer.status().as_u16(), answer.json().await?))
    }

    async fn get(&self, path: &str) -> Result<(u16, Value)> {
        self.call(Method::GET, &format!("{PROJECT}/{path}"), Value::Null).await
    }

    async fn post(&self, path: &str, body: Value) -> Result<(u16, Value)> {
        self.call(Method::POST, &format!("{PROJECT}/{path}"), body).await
    }

    async fn status(&self) -> Result<u16> {
        Ok(self.get("secrets").await?.0)
    }
}

/// What a client library signs for Secret Manager, with something changed.
fn self_signed(account: &AccountKey, changes: Value) -> String {
    let now = Clock::default().seconds();
    let mut claims = json!({
        "iss": account.email, "sub": account.email, "iat": now, "exp": now + 3600,
        "aud": "https://secretmanager.googleapis.com/",
    });
    for (name, value) in changes.as_object().into_iter().flatten() {
        claims[name] = value.clone();
    }
    account.key.sign(&claims)
}

async fn form(gcp: &Gcp, path: &str, fields: &[(&str, &str)]) -> Result<(u16, Value)> {
    let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    let request = http::client(None)?.post(format!("{}/{path}", gcp.url())).body(body);
    let answer = request.header("content-type", "application/x-www-form-urlencoded").send().await?;
    Ok((answer.status().as_u16(), answer.json().await?))
}

#[tokio::test]
async fn google_keeps_the_versions_of_a_secret_and_their_checksums() -> Result<()> {
    let gcp = Gcp::start().await?;
    let caller = Caller::new(&gcp, self_signed(&gcp.service_account("app")?, json!({})));
    let new = json!({ "replication": { "automatic": {} }, "labels": { "team": "core" } });
    let (status, secret) = caller.post("secrets?secretId=db", new.clone()).await?;
    assert_eq!((status, &secret["name"]), (200, &json!("projects/384650217903/secrets/db")));
    assert_eq!(caller.post("secrets?secretId=db", new.clone()).await?.0, 409);
    assert_eq!(caller.post("secrets?secretId=d.b", new).await?.0, 400);

    let empty = caller.get("secrets/db/versions/latest:access").await?.1;
    assert_eq!(
        empty["error"]["message"],
        "Secret [projects/384650217903/secrets/db] not found or has no versions."
    );
    let payload = |data: &[u8], crc: u32| json!({ "payload": { "data": STANDARD.encode(data), "dataCrc32c": crc.to_string() } });
    // The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
    let (status, _) = caller.post("secrets/db:addVersion", payload(b"123456789", 0xe306_9283)).await?;
    assert_eq!(status, 200);
    for refused in [payload(b"123456789", 1), payload(b"", 0), payload(&[0; 65_537], 0), json!({})] {
        assert_eq!(caller.post("secrets/db:addVersion", refused).await?.0, 400);
    }
    let (_, read) = caller.get("secrets/db/versions/latest:access").await?;
    assert_eq!(read["name"], "projects/384650217903/secrets/db/versions/1");
    assert_eq!(read["payload"], json!({ "data": "MTIzNDU2Nzg5", "dataCrc32c": "3808858755" }));

    let stale = json!({ "etag": "\"0\"" });
    assert_eq!(caller.post("secrets/db/versions/1:disable", stale).await?.0, 400);
    assert_eq!(caller.post("secrets/db/versions/1:disable", json!({})).await?.1["state"], "DISABLED");
    let (status, refused) = caller.get("secrets/db/versions/latest:access").await?;
    let error = &refused["error"];
    assert_eq!((status, &error["status"]), (400, &json!("FAILED_PRECONDITION")));
    let message = "Secret Version [projects/384650217903/secrets/db/versions/1] is in DISABLED state.";
    assert_eq!(error["message"], message);
    caller.post("secrets/db/versions/1:destroy", json!({})).await?;
    assert_eq!(caller.post("secrets/db/versions/1:enable", json!({})).await?.0, 400);

    let path = format!("{PROJECT}/secrets/db");
    let change = json!({ "labels": {}, "annotations": { "owner": "Core Team" } });
    let mask = format!("{path}?updateMask=labels,annotations");
    let (_, changed) = caller.call(Method::PATCH, &mask, change).await?;
    assert_eq!(
        (&changed["labels"], &changed["annotations"]),
        (&Value::Null, &json!({ "owner": "Core Team" }))
    );
    assert_eq!(caller.call(Method::DELETE, &format!("{path}?etag=%220%22"), Value::Null).await?.0, 400);
    assert_eq!(caller.call(Method::DELETE, &path, Value::Null).await?.0, 200);
    assert_eq!(caller.get("secrets/db").await?.0, 404);
    Ok(())
}

#[tokio::test]
async fn google_lists_in_pages_the_newest_first() -> Result<()> {
    let gcp = Gcp::start().await?;
    let caller = Caller::new(&gcp, self_signed(&gcp.service_account("app")?, json!({})));
    for number in 0..5 {
        gcp.secrets().put(&format!("s{number}"), "x")?;
    }
    gcp.regional("europe-west1").put("elsewhere", "x")?;
    gcp.secrets().set_labels("s3", &[("team", "core")])?;
    gcp.set_page_size(2);
    let (mut names, mut token) = (Vec::new(), String::new());
    loop {
        let (_, page) = caller.get(&format!("secrets?pageSize=100&pageToken={token}")).await?;
        assert_eq!(page["totalSize"], 5);
        let secrets = page["secrets"].as_array().context("a page of secrets")?;
        names.extend(
            secrets
                .iter()
                .filter_map(|secret| secret["name"].as_str()?.rsplit('/').next().map(str::to_owned)),
        );
        let Some(next) = page["nextPageToken"].as_str() else { break };
        token = next.to_owned();
    }
    assert_eq!(names, ["s4", "s3", "s2", "s1", "s0"]);
    assert_eq!(caller.get("secrets?pageToken=nonsense").await?.0, 400);
    let (_, filtered) = caller.get("secrets?filter=name:s3%20OR%20name:s4%20AND%20labels.team=core").await?;
    assert_eq!(filtered["secrets"].as_array().map(Vec::len), Some(1));
    let (_, regional) = caller.get("locations/europe-west1/secrets").await?;
    assert_eq!(
        regional["secrets"][0]["name"],
        "projects/384650217903/locations/europe-west1/secrets/elsewhere"
    );

    gcp.inject(Fault::RepeatedPageToken);
    let token = |page: Value| page["nextPageToken"].as_str().map(str::to_owned).context("another page");
    let first = token(caller.get("secrets").await?.1)?;
    assert_eq!(token(caller.get(&format!("secrets?pageToken={first}")).await?.1)?, first);
    gcp.inject(Fault::EndlessPages);
    let other = token(caller.get(&format!("secrets?pageToken={first}")).await?.1)?;
    assert_ne!(token(caller.get(&format!("secrets?pageToken={other}")).await?.1)?, other);
    Ok(())
}

#[tokio::test]
async fn google_takes_only_a_token_that_a_service_account_signed_for_it() -> Result<()> {
    let gcp = Gcp::start().await?;
    let (app, now) = (gcp.service_account("app")?, Clock::default().seconds());
    let status = async |changes: Value| Caller::new(&gcp, self_signed(&app, changes)).status().await;
    assert_eq!(status(json!({})).await?, 200);
    assert_eq!(status(json!({ "aud": null, "scope": SCOPE })).await?, 200);
    assert_eq!(status(json!({ "aud": null, "scope": "email" })).await?, 403);
    assert_eq!(status(json!({ "aud": "https://storage.googleapis.com/" })).await?, 401);
    assert_eq!(status(json!({ "exp": now + 3602 })).await?, 401);
    assert_eq!(status(json!({ "iat": now - 60, "exp": now - 1 })).await?, 401);
    assert_eq!(status(json!({ "sub": "somebody@example.com" })).await?, 401);
    let mut stranger = app.clone();
    stranger.key = SigningKey::new()?;
    assert_eq!(Caller::new(&gcp, self_signed(&stranger, json!({}))).status().await?, 401);
    assert_eq!(Caller::new(&gcp, "").status().await?, 401);

    gcp.secrets().put("db", "x")?;
    gcp.secrets().put("mine", "x")?;
    gcp.secrets().forbid("mine");
    let caller = Caller::new(&gcp, self_signed(&app, json!({})));
    assert_eq!(caller.get("secrets/mine/versions/latest:access").await?.0, 403);
    assert_eq!(caller.get("secrets/db/versions/latest:access").await?.0, 200);
    gcp.deny(&app.email, Permission::VersionsAccess);
    let (status, refused) = caller.get("secrets/db/versions/latest:access").await?;
    assert_eq!((status, &refused["error"]["status"]), (403, &json!("PERMISSION_DENIED")));
    assert_eq!(gcp.calls(Operation::AccessVersion), 3);
    gcp.revoke_key(&app);
    assert_eq!(caller.status().await?, 401);
    Ok(())
}

#[tokio::test]
async fn google_gives_access_tokens_for_assertions_and_on_machines() -> Result<()> {
    let gcp = Gcp::start().await?;
    let file: Value = serde_json::from_str(gcp.service_account("app")?.json())?;
    assert_eq!(
        (&file["type"], &file["token_uri"]),
        (&json!("service_account"), &json!(format!("{}/token", gcp.url())))
    );
    assert!(file["private_key"].as_str().is_some_and(|key| key.starts_with("-----BEGIN PRIVATE KEY-----\n")));

    let app = gcp.service_account("app")?;
    let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
    let exchange = async |audience: &str| {
        let assertion = self_signed(&app, json!({ "aud": audience, "scope": SCOPE }));
        form(&gcp, "token", &[("grant_type", grant), ("assertion", &assertion)]).await
    };
    assert_eq!(exchange("https://example.com/token").await?.1["error"], "invalid_grant");
    gcp.set_token_lifetime(Duration::from_secs(600));
    let (_, granted) = exchange(&format!("{}/token", gcp.url())).await?;
    assert_eq!((&granted["expires_in"], &granted["token_type"]), (&json!(600), &json!("Bearer")));
    let caller = Caller::new(&gcp, granted["access_token"].as_str().context("a token")?);
    assert_eq!(caller.status().await?, 200);
    gcp.revoke_tokens(&app.email);
    assert_eq!(caller.status().await?, 401);

    let account = format!("{}/computeMetadata/v1/instance/service-accounts/default", gcp.url());
    let ask = |value: &str| Ok::<_, anyhow::Error>(http::client(None)?.get(format!("{account}/{value}")));
    assert_eq!(ask("token")?.send().await?.status(), StatusCode::FORBIDDEN);
    let flavored = |value: &str| Ok::<_, anyhow::Error>(ask(value)?.header("Metadata-Flavor", "Google"));
    let proxied = flavored("token")?.header("X-Forwarded-For", "10.0.0.1").send().await?;
    assert_eq!(proxied.status(), StatusCode::FORBIDDEN);
    let answer = flavored("token")?.send().await?;
    assert_eq!(answer.headers()["metadata-flavor"], "Google");
    let token: Value = answer.json().await?;
    let machine = Caller::new(&gcp, token["access_token"].as_str().context("a token")?);
    assert_eq!(machine.status().await?, 200);
    gcp.advance(Duration::from_secs(601));
    assert_eq!(machine.status().await?, 401);
    assert_eq!(flavored("email")?.send().await?.text().await?, gcp.default_account());
    assert_eq!(flavored("identity")?.send().await?.status(), StatusCode::BAD_REQUEST);
    Ok(())
}

#[tokio::test]
async fn google_lets_a_workload_take_over_only_the_account_it_may() -> Result<()> {
    let gcp = Gcp::start().await?;
    let (app, issuer) = (gcp.service_account("app")?, SigningKey::new()?);
    let audience = gcp.trust_issuer("pool", "cluster", "https://issuer.example.com", &issuer);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("token");
    let now = Clock::default().seconds();
    let subject = |changes: (&str, Value)| {
        let mut claims = json!({
            "iss": "https://issuer.example.com", "sub": "workload", "aud": format!("https:{audience}"), "exp": now + 600,
        });
        claims[changes.0] = changes.1;
        issuer.sign(&claims)
    };
    let exchange = async |token: &str| {
        let fields = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:jwt"),
            ("audience", &audience),
            ("scope", SCOPE),
            ("subject_token", token),
        ];
        form(&gcp, "v1/token", &fields).await
    };
    for wrong in
        [("iss", json!("https://other.example.com")), ("aud", json!("other")), ("exp", json!(now - 1))]
    {
        assert_eq!(exchange(&subject(wrong)).await?.0, 400);
    }
    fs::write(&file, subject(("sub", json!("workload"))))?;
    let config: Value = serde_json::from_str(&gcp.external_account(&audience, &file, Some(&app.email)))?;
    let (_, federated) = exchange(&fs::read_to_string(&file)?).await?;
    let workload = Caller::new(&gcp, federated["access_token"].as_str().context("a token")?);
    assert_eq!(workload.status().await?, 403, "it has no permission of its own");

    let url = config["service_account_impersonation_url"].as_str().context("a URL")?;
    let path = url.strip_prefix(gcp.url()).context("our URL")?.trim_start_matches('/');
    let wish = json!({ "scope": [SCOPE], "lifetime": "600s" });
    assert_eq!(workload.call(Method::POST, path, wish.clone()).await?.0, 403);
    gcp.allow_impersonation(&Gcp::workload("pool", "workload"), &app.email);
    let (_, taken) = workload.call(Method::POST, path, wish).await?;
    let account = Caller::new(&gcp, taken["accessToken"].as_str().context("a token")?);
    assert_eq!(account.status().await?, 200);
    Ok(())
}

#[tokio::test]
async fn googles_faults_happen_and_end() -> Result<()> {
    let gcp = Gcp::start().await?;
    let caller = Caller::new(&gcp, self_signed(&gcp.service_account("app")?, json!({})));
    gcp.secrets().put("db", "123456789")?;
    let access = || caller.get("secrets/db/versions/latest:access");
    gcp.inject_times(Operation::AccessVersion, Fault::Status(503), 1);
    assert_eq!((access().await?.0, access().await?.0), (503, 200));
    gcp.inject(Fault::Throttled { retry_after: Some(Duration::from_secs(7)) });
    let answer = http::client(None)?.get(format!("{}/{PROJECT}/secrets", gcp.url())).send().await?;
    assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (429, &"7".parse()?));
    for unreadable in [Fault::Garbage, Fault::Truncated] {
        gcp.inject(unreadable);
        assert!(access().await.is_err(), "{unreadable:?}");
    }
    gcp.inject(Fault::WrongChecksum);
    assert_eq!(access().await?.1["payload"]["dataCrc32c"], "3808858754");
    gcp.inject(Fault::Huge { bytes: 1_000_000 });
    assert_eq!(access().await?.1["padding"].as_str().map(str::len), Some(1_000_000 - 14));
    gcp.inject_on(Operation::AccessVersion, Fault::Hang);
    assert!(tokio::time::timeout(Duration::from_millis(200), access()).await.is_err());
    gcp.heal();
    assert_eq!(access().await?.0, 200);
    Ok(())
}

#[tokio::test]
async fn a_real_openbao_lets_in_whom_kubernetes_vouches_for() -> Result<()> {
    let (kubernetes, bao) = (Kubernetes::start().await?, OpenBao::start(Options::default()).await?);
    let admin = bao.client()?;
    admin.enable_auth("kubernetes", "kubernetes").await?;
    let config = json!({
        "kubernetes_host": kubernetes.host(),
        "kubernetes_ca_cert": kubernetes.ca_pem(),
        "token_reviewer_jwt": kubernetes.reviewer_token(),
        "disable_local_ca_jwt": true,
    });
    admin.call(Method::POST, "auth/kubernetes/config", Some(config)).await?;
    let role = json!({
        "bound_service_account_names": ["app"], "bound_service_account_namespaces": ["team"],
        "audience": "vault", "policies": ["default"],
    });
    admin.call(Method::POST, "auth/kubernetes/role/app", Some(role)).await?;
    let login = async |token: &str| {
        admin.call(Method::POST, "auth/kubernetes/login", Some(json!({ "role": "app", "jwt": token }))).await
    };
    let token = kubernetes.mint("team", "app", HOUR, &["vault"]);
    let auth = login(&token).await?["auth"].take();
    assert_eq!(auth["metadata"]["service_account_name"], "app");
    assert_eq!(kubernetes.reviews(), 1);

    let forged = Kubernetes::start().await?.mint("team", "app", HOUR, &["vault"]);
    assert!(login(&forged).await.is_err(), "another cluster's");
    assert!(login(&kubernetes.mint("team", "app", HOUR, &["other"])).await.is_err(), "for somebody else");
    assert!(login(&kubernetes.mint("team", "other", HOUR, &["vault"])).await.is_err(), "another account's");
    kubernetes.revoke(&token);
    assert!(login(&token).await.is_err(), "revoked");

    let ca = kubernetes.ca_pem();
    let review = http::client(Some(&ca))?;
    let url = format!("{}/apis/authentication.k8s.io/v1/tokenreviews", kubernetes.host());
    let body = json!({ "spec": { "token": token } });
    assert_eq!(review.post(&url).json(&body).send().await?.status(), StatusCode::UNAUTHORIZED);
    let nobody = kubernetes.mint("team", "other", HOUR, &[]);
    assert_eq!(
        review.post(&url).json(&body).bearer_auth(nobody).send().await?.status(),
        StatusCode::FORBIDDEN
    );
    Ok(())
}

fn granted() -> Granted {
    Granted { policies: vec!["app".to_owned()], ttl: HOUR }
}

/// An OpenBao with a secret, behind the logins that it has not.
async fn behind_logins() -> Result<(OpenBao, VaultLogins, reqwest::Client)> {
    let bao = OpenBao::start(Options::default()).await?;
    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    admin.put("secret", "db", json!({ "user": "one" })).await?;
    admin.write_policy("app", "path \"secret/data/*\" { capabilities = [\"read\"] }").await?;
    let logins = VaultLogins::in_front_of(&bao).await?;
    Ok((bao, logins, http::client(None)?))
}

async fn login(
    client: &reqwest::Client,
    logins: &VaultLogins,
    mount: &str,
    body: &Value,
) -> Result<Option<String>> {
    let answer = client.post(format!("{}/v1/auth/{mount}/login", logins.addr())).json(body).send().await?;
    let answer: Value = answer.json().await?;
    Ok(answer["auth"]["client_token"].as_str().map(str::to_owned))
}

#[tokio::test]
async fn a_vault_login_with_google_takes_a_token_for_its_role_alone() -> Result<()> {
    let ((_bao, logins, client), gcp) = (behind_logins().await?, Gcp::start().await?);
    let (app, other, now) =
        (gcp.service_account("app")?, gcp.service_account("other")?, Clock::default().seconds());
    let role = |kind, account: &str| GcpRole {
        kind,
        bound_service_accounts: vec![account.to_owned()],
        granted: granted(),
    };
    let machines = role(GcpRoleType::Gce, &gcp.default_account());
    let roles = [("iam".to_owned(), role(GcpRoleType::Iam, &app.email)), ("gce".to_owned(), machines)];
    logins.enable_gcp("gcp", &gcp, BTreeMap::from(roles));

    let signed = |account: &AccountKey, audience: &str, lifetime: i64| {
        let claims = json!({ "sub": account.email, "aud": audience, "exp": now + lifetime });
        json!({ "role": "iam", "jwt": account.key.sign(&claims) })
    };
    let token = login(&client, &logins, "gcp", &signed(&app, "vault/iam", 890)).await?.context("a token")?;
    let read = client
        .get(format!("{}/v1/secret/data/db", logins.addr()))
        .header("X-Vault-Token", &token)
        .send()
        .await?;
    assert_eq!(read.json::<Value>().await?["data"]["data"], json!({ "user": "one" }));
    let own =
        client.get(format!("{}/v1/auth/token/lookup-self", logins.addr())).header("X-Vault-Token", &token);
    let own: Value = own.send().await?.json().await?;
    assert_eq!(own["data"]["meta"]["service_account_email"], json!(app.email));

    let refused =
        [signed(&app, "vault/gce", 890), signed(&app, "vault/iam", 3000), signed(&app, "vault/iam", -1)];
    for refused in refused.into_iter().chain([signed(&other, "vault/iam", 890)]) {
        assert_eq!(login(&client, &logins, "gcp", &refused).await?, None);
    }
    let machine = async |audience: &str, format: &str| {
        let path = format!("instance/service-accounts/default/identity?audience={audience}&format={format}");
        let request = client.get(format!("{}/computeMetadata/v1/{path}", gcp.url()));
        let token = request.header("Metadata-Flavor", "Google").send().await?.text().await?;
        login(&client, &logins, "gcp", &json!({ "role": "gce", "jwt": token })).await
    };
    assert!(machine("http://vault/gce", "full").await?.is_some());
    assert_eq!(machine("http://vault/gce", "standard").await?, None);
    assert_eq!(machine("http://vault/iam", "full").await?, None);
    assert_eq!((logins.logins().len(), logins.refused()), (2, 6));
    Ok(())
}

/// An STS that believes everybody, and keeps what it was sent.
async fn credulous_sts() -> Result<(String, Arc<Mutex<Vec<HeaderMap>>>, Serving)> {
    let (bound, seen) = (Bound::plain().await?, Arc::<Mutex<Vec<HeaderMap>>>::default());
    let answer = async |State(seen): State<Arc<Mutex<Vec<HeaderMap>>>>, headers: HeaderMap| {
        seen.lock().expect("nobody panics holding it").push(headers);
        "<GetCallerIdentityResponse><GetCallerIdentityResult>\
         <Arn>arn:aws:sts::123456789012:assumed-role/app/session</Arn><UserId>AROA1:session</UserId>\
         <Account>123456789012</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"
    };
    let url = bound.url();
    Ok((url, seen.clone(), bound.serve(Router::new().fallback(answer).with_state(seen))))
}

#[tokio::test]
async fn a_vault_login_with_aws_must_be_signed_for_this_vault() -> Result<()> {
    let ((_bao, logins, client), (sts, seen, _sts)) = (behind_logins().await?, credulous_sts().await?);
    let role = |principal: &str| AwsRole { bound_principals: vec![principal.to_owned()], granted: granted() };
    let roles = [
        ("app".to_owned(), role("arn:aws:iam::123456789012:role/app")),
        ("other".to_owned(), role("arn:aws:iam::123456789012:role/other")),
    ];
    logins.enable_aws(
        "aws",
        AwsMount { sts, server_id: "vault.example.com".into(), roles: BTreeMap::from(roles) },
    );
    let signed = |role: &str, signed_headers: &str, server_id: Value, body: &str| {
        let authorization =
            format!("AWS4-HMAC-SHA256 Credential=x, SignedHeaders={signed_headers}, Signature=x");
        let headers = json!({ "Authorization": [authorization], "X-Vault-AWS-IAM-Server-ID": server_id });
        json!({
            "role": role,
            "iam_http_request_method": "POST",
            "iam_request_url": STANDARD.encode("https://sts.eu-west-1.amazonaws.com/"),
            "iam_request_body": STANDARD.encode(body),
            "iam_request_headers": STANDARD.encode(headers.to_string()),
        })
    };
    let (all, id) = ("host;x-vault-aws-iam-server-id", || json!(["vault.example.com"]));
    let body = "Action=GetCallerIdentity&Version=2011-06-15";
    let attempt = async |request: Value| login(&client, &logins, "aws", &request).await;
    assert_eq!(attempt(signed("app", "host", id(), body)).await?, None, "not covered by the signature");
    assert_eq!(
        attempt(signed("app", all, json!("other.example.com"), body)).await?,
        None,
        "for another server"
    );
    assert_eq!(attempt(signed("app", all, json!([]), body)).await?, None, "for none");
    assert_eq!(attempt(signed("app", all, id(), "Action=AssumeRole&Version=2011-06-15")).await?, None);
    assert!(seen.lock().unwrap().is_empty(), "STS is not asked in vain");
    assert_eq!(attempt(signed("other", all, id(), body)).await?, None, "another role's");

    assert!(attempt(signed("app", all, id(), body)).await?.is_some());
    assert_eq!(
        seen.lock().unwrap()[1]["host"],
        "sts.eu-west-1.amazonaws.com",
        "the host that was signed for"
    );
    assert_eq!(logins.logins()[0].principal, "arn:aws:iam::123456789012:role/app");
    Ok(())
}
