//! The fake of Azure refuses what Azure refuses: otherwise what is proven against it is worth nothing.

use std::time::Duration;

use anyhow::{Context as _, Result};
use aws_lc_rs::digest;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use reqwest::header::{CONTENT_TYPE, DATE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Client, Method, Response};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use scaivault_domain::time::Clock as _;
use scaivault_telemetry::SystemClock;
use scaivault_tests::authority::Authority;
use scaivault_tests::fakes::azure::{
    ALL_RIGHTS, AppCertificate, AzureFake, ClientSecret, Draft, Fault, Identity, Operation, Right, Side,
};
use scaivault_tests::http;
use serde_json::{Value, json};
use url::form_urlencoded::Serializer;

const SCOPE: &str = "https://vault.azure.net/.default";

/// A fake, and a client of it with a token.
struct Azure {
    fake: AzureFake,
    http: Client,
    token: String,
}

impl Azure {
    async fn with(rights: &[Right]) -> Result<Azure> {
        let (fake, http) = (AzureFake::start().await?, http::client(None)?);
        let token = log_in(&fake, &http, &fake.register_app(rights)).await?;
        let token = token["access_token"].as_str().context("no token")?.to_owned();
        Ok(Azure { fake, http, token })
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Result<Response> {
        let url = format!("{}{path}", self.fake.url());
        let request = self.http.request(method, url).bearer_auth(&self.token);
        Ok(request.body(body.map(|body| body.to_string()).unwrap_or_default()).send().await?)
    }

    async fn get(&self, path: &str) -> Result<(u16, Value)> {
        taken(self.send(Method::GET, path, None).await?).await
    }

    async fn page(&self, link: &str) -> Result<Value> {
        Ok(self.http.get(link).bearer_auth(&self.token).send().await?.json().await?)
    }

    fn secrets(&self) -> String {
        format!("{}/secrets?api-version=7.4", self.fake.url())
    }
}

async fn taken(response: Response) -> Result<(u16, Value)> {
    Ok((response.status().as_u16(), response.json().await?))
}

async fn ask_for_token(fake: &AzureFake, http: &Client, form: &[(&str, &str)]) -> Result<Value> {
    let body = Serializer::new(String::new())
        .append_pair("grant_type", "client_credentials")
        .extend_pairs(form)
        .finish();
    let request = http.post(fake.token_endpoint()).body(body);
    Ok(request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").send().await?.json().await?)
}

async fn log_in(fake: &AzureFake, http: &Client, app: &ClientSecret) -> Result<Value> {
    let form = [("client_id", &*app.client_id), ("client_secret", &*app.client_secret), ("scope", SCOPE)];
    ask_for_token(fake, http, &form).await
}

fn now() -> i64 {
    SystemClock.now().as_millis() / 1000
}

#[tokio::test]
async fn azure_gives_no_token_for_a_wrong_secret_app_or_scope() -> Result<()> {
    let (fake, http) = (AzureFake::start().await?, http::client(None)?);
    let app = fake.register_app(&ALL_RIGHTS);
    let issued = log_in(&fake, &http, &app).await?;
    assert_eq!(issued["expires_in"], 3599);

    let wrong = ClientSecret { client_secret: "wrong".into(), ..app.clone() };
    let refused = log_in(&fake, &http, &wrong).await?;
    assert_eq!((&refused["error"], &refused["error_codes"]), (&json!("invalid_client"), &json!([7_000_215])));
    let unknown = ClientSecret { client_id: "nobody".into(), ..app.clone() };
    assert_eq!(log_in(&fake, &http, &unknown).await?["error_codes"], json!([700_016]));
    let form = [("client_id", &*app.client_id), ("client_secret", &*app.client_secret), ("scope", "vault")];
    assert_eq!(ask_for_token(&fake, &http, &form).await?["error"], "invalid_scope");

    let rotated = ClientSecret { client_secret: fake.rotate_secret(&app.client_id), ..app.clone() };
    assert_eq!(log_in(&fake, &http, &app).await?["error_codes"], json!([7_000_215]));
    assert!(log_in(&fake, &http, &rotated).await?["access_token"].is_string());
    assert_eq!(fake.calls(Operation::Token), 6);
    Ok(())
}

/// A client assertion as Microsoft documents it, signed with `key`.
fn assertion(key: &AppCertificate, header: Value, claims: Value) -> Result<String> {
    let key =
        RsaKeyPair::from_pkcs8(PrivatePkcs8KeyDer::from_pem_slice(key.key.as_bytes())?.secret_pkcs8_der())?;
    let encoding: &dyn RsaEncoding =
        if header["alg"] == "PS256" { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
    let part = |part: Value| URL_SAFE_NO_PAD.encode(part.to_string());
    let signed = format!("{}.{}", part(header), part(claims));
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(encoding, &SystemRandom::new(), signed.as_bytes(), &mut signature)?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

#[tokio::test]
async fn azure_takes_only_an_assertion_of_the_registered_key_for_itself_and_for_now() -> Result<()> {
    let (fake, http) = (AzureFake::start().await?, http::client(None)?);
    let (ours, other) = (AppCertificate::generate()?, AppCertificate::generate()?);
    let id = fake.register_app_with_certificate(&ours.certificate, &ALL_RIGHTS)?;
    let der = CertificateDer::from_pem_slice(ours.certificate.as_bytes())?;
    let sha1 = STANDARD.encode(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &der));
    let sha256 = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, &der));
    let rs256 = json!({ "alg": "RS256", "typ": "JWT", "x5t": sha1 });
    let ps256 = json!({ "alg": "PS256", "typ": "JWT", "x5t#S256": sha256 });
    let nameless = json!({ "alg": "RS256", "typ": "JWT" });
    let right = json!({ "aud": fake.token_endpoint(), "iss": id, "sub": id, "jti": "1", "exp": now() + 300 });
    let with = |name: &str, value: Value| {
        let mut claims = right.clone();
        claims[name] = value;
        claims
    };

    for (key, header, claims, refusal) in [
        (&ours, &rs256, right.clone(), None),
        (&ours, &ps256, right.clone(), None),
        (&other, &rs256, right.clone(), Some(700_027)),
        (&other, &ps256, right.clone(), Some(700_027)),
        (&ours, &nameless, right.clone(), Some(700_027)),
        (&ours, &rs256, with("exp", (now() - 301).into()), Some(700_024)),
        (&ours, &rs256, with("aud", "https://example.com".into()), Some(700_023)),
        (&ours, &rs256, with("sub", "somebody".into()), Some(700_021)),
        (&ours, &rs256, with("jti", Value::Null), Some(50_027)),
    ] {
        let assertion = assertion(key, header.clone(), claims)?;
        let form = [
            ("client_id", &*id),
            ("scope", SCOPE),
            ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
            ("client_assertion", &*assertion),
        ];
        let answer = ask_for_token(&fake, &http, &form).await?;
        assert_eq!(answer["error_codes"][0].as_u64(), refusal, "{answer}");
        assert_eq!(answer["access_token"].is_string(), refusal.is_none(), "{answer}");
    }
    Ok(())
}

#[tokio::test]
async fn azure_asks_for_a_valid_token_of_its_own_directory() -> Result<()> {
    let mut azure = Azure::with(&ALL_RIGHTS).await?;
    azure.fake.put("db", "one");
    let path = "/secrets/db?api-version=7.4";
    assert_eq!(azure.get(path).await?.1["value"], "one");
    assert_eq!(azure.get("/secrets/db").await?.1["error"]["code"], "BadParameter");

    azure.fake.advance(Duration::from_secs(3599));
    assert_eq!(azure.get(path).await?.0, 401, "it expired");
    let app = azure.fake.register_app(&ALL_RIGHTS);
    azure.token = log_in(&azure.fake, &azure.http, &app).await?["access_token"].as_str().unwrap().into();
    assert_eq!(azure.get(path).await?.0, 200);
    azure.fake.revoke_tokens();
    let refused = azure.send(Method::GET, path, None).await?;
    let challenge = refused.headers()[WWW_AUTHENTICATE].to_str()?;
    let (url, tenant) = (azure.fake.url(), azure.fake.tenant());
    let expected = format!("Bearer authorization=\"{url}/{tenant}\", resource=\"https://vault.azure.net\"");
    assert_eq!((refused.status().as_u16(), challenge), (401, &*expected));
    Ok(())
}

#[tokio::test]
async fn azure_gives_a_managed_identity_a_token_for_what_it_asks_for_only() -> Result<()> {
    let mut azure = Azure::with(&[]).await?;
    azure.fake.put("db", "one");
    let user = azure.fake.register_identity(Identity::User, &ALL_RIGHTS);
    let url = format!("{}/metadata/identity/oauth2/token?api-version=2018-02-01", azure.fake.url());
    let ask = |query: &str| azure.http.get(format!("{url}&resource=https://{query}"));

    let query = format!("vault.azure.net&client_id={user}");
    assert_eq!(taken(ask(&query).send().await?).await?.0, 400, "without the header");
    let forwarded = ask(&query).header("Metadata", "true").header("X-Forwarded-For", "10.0.0.1");
    assert_eq!(taken(forwarded.send().await?).await?.0, 400);
    let system = ask("vault.azure.net").header("Metadata", "true").send().await?;
    assert_eq!(taken(system).await?.1["error_description"], "Identity not found");

    let granted = taken(ask(&query).header("Metadata", "true").send().await?).await?.1;
    assert_eq!(granted["expires_in"], "3599");
    let elsewhere = format!("management.azure.com&client_id={user}");
    let other = taken(ask(&elsewhere).header("Metadata", "true").send().await?).await?.1;
    azure.token = granted["access_token"].as_str().unwrap().to_owned();
    assert_eq!(azure.get("/secrets/db?api-version=7.4").await?.0, 200);
    azure.token = other["access_token"].as_str().unwrap().to_owned();
    let (status, refused) = azure.get("/secrets/db?api-version=7.4").await?;
    let message =
        "AKV10022: Invalid audience. Expected https://vault.azure.net, found: https://management.azure.com.";
    assert_eq!((status, &refused["error"]["message"]), (401, &json!(message)));
    Ok(())
}

#[tokio::test]
async fn azure_lets_an_application_do_what_its_role_says() -> Result<()> {
    let azure = Azure::with(&[Right::List]).await?;
    azure.fake.put("db", "one");
    assert_eq!(azure.get("/secrets?api-version=7.4").await?.0, 200);
    let (status, refused) = azure.get("/secrets/db?api-version=7.4").await?;
    assert_eq!((status, &refused["error"]["innererror"]["code"]), (403, &json!("ForbiddenByRbac")));
    let put = azure.send(Method::PUT, "/secrets/db?api-version=7.4", Some(json!({ "value": "two" }))).await?;
    assert_eq!(put.status(), 403);
    assert_eq!(azure.send(Method::DELETE, "/secrets/db?api-version=7.4", None).await?.status(), 403);
    assert_eq!(azure.fake.versions("db").len(), 1);
    Ok(())
}

#[tokio::test]
async fn azure_keeps_versions_states_and_the_first_spelling_of_a_name() -> Result<()> {
    let azure = Azure::with(&ALL_RIGHTS).await?;
    let put = async |name: &str, body: Value| {
        taken(azure.send(Method::PUT, &format!("/secrets/{name}?api-version=7.4"), Some(body)).await?).await
    };
    let first = put("Db-Password", json!({ "value": "one", "tags": { "team": "core" } })).await?.1;
    let body = json!({ "value": "two", "contentType": "text/plain", "attributes": { "exp": 1 } });
    put("db-password", body).await?;
    let old = &azure.fake.versions("DB-PASSWORD")[0];
    assert_eq!(first["id"], format!("{}/secrets/Db-Password/{old}", azure.fake.url()));
    let read = azure.get(&format!("/secrets/db-password/{old}?api-version=7.4")).await?.1;
    assert_eq!((&read["value"], &read["tags"]["team"]), (&json!("one"), &json!("core")));
    let read = azure.get("/secrets/db-password/?api-version=7.4").await?.1;
    assert_eq!(
        (&read["value"], &read["attributes"]["exp"]),
        (&json!("two"), &json!(1)),
        "expired, yet served"
    );
    assert!(read["id"].as_str().unwrap().contains("/Db-Password/"));

    let off = json!({ "attributes": { "enabled": false } });
    let patch = async |path: &str| azure.send(Method::PATCH, path, Some(off.clone())).await;
    assert_eq!(patch("/secrets/db-password?api-version=7.4").await?.status(), 405);
    let new = azure.fake.current("db-password").unwrap().0;
    assert_eq!(patch(&format!("/secrets/db-password/{new}?api-version=7.4")).await?.status(), 200);
    let (status, refused) = azure.get("/secrets/db-password?api-version=7.4").await?;
    assert_eq!((status, &refused["error"]["innererror"]["code"]), (403, &json!("SecretDisabled")));

    azure.send(Method::DELETE, "/secrets/db-password?api-version=7.4", None).await?;
    let (status, refused) = azure.get("/secrets/db-password?api-version=7.4").await?;
    assert_eq!((status, &refused["error"]["code"]), (404, &json!("SecretNotFound")));
    let (status, refused) = put("db-password", json!({ "value": "three" })).await?;
    let code = json!("ObjectIsDeletedButRecoverable");
    assert_eq!((status, &refused["error"]["innererror"]["code"]), (409, &code));
    azure.send(Method::POST, "/deletedsecrets/db-password/recover?api-version=7.4", None).await?;
    assert_eq!(azure.fake.versions("db-password").len(), 2);
    assert_eq!(put("a_b", json!({ "value": "" })).await?.0, 400);
    assert_eq!(put("large", json!({ "value": "a".repeat(25 * 1024 + 1) })).await?.0, 400);
    Ok(())
}

#[tokio::test]
async fn azure_lists_25_secrets_a_page_without_values_or_versions() -> Result<()> {
    let azure = Azure::with(&[Right::List]).await?;
    for number in 0..26 {
        azure.fake.put_with(&format!("s-{number:02}"), Draft { disabled: number == 0, ..Draft::of("x") });
    }
    let first = azure.page(&azure.secrets()).await?;
    assert_eq!(first["value"].as_array().unwrap().len(), 25);
    let item = &first["value"][0];
    assert_eq!(item["id"], format!("{}/secrets/s-00", azure.fake.url()));
    assert_eq!((&item["attributes"]["enabled"], item.get("value")), (&json!(false), None));
    let second = azure.page(first["nextLink"].as_str().unwrap()).await?;
    assert_eq!((second["value"].as_array().unwrap().len(), &second["nextLink"]), (1, &Value::Null));
    assert_eq!(azure.get("/secrets?api-version=7.4&maxresults=26").await?.0, 400);
    assert_eq!(azure.fake.calls(Operation::List), 3);
    Ok(())
}

#[tokio::test]
async fn azure_dates_its_answers_by_its_own_clock() -> Result<()> {
    let azure = Azure::with(&ALL_RIGHTS).await?;
    azure.fake.advance(Duration::from_secs(60));
    azure.fake.put("db", "secret");
    let response = azure.send(Method::GET, "/secrets/db?api-version=7.4", None).await?;
    let date = response.headers().get_all(DATE).iter().map(|date| date.to_str().unwrap_or_default());
    let [date] = date.collect::<Vec<_>>()[..] else { anyhow::bail!("one date") };
    let date = jiff::fmt::rfc2822::parse(date)?.timestamp().as_second();
    assert!((58..65).contains(&(date - now())), "{}", date - now());
    let created = taken(response).await?.1["attributes"]["created"].as_i64().context("a time")?;
    assert!((0..=5).contains(&(date - created)), "{date} {created}");
    Ok(())
}

#[tokio::test]
async fn azure_misbehaves_as_it_is_told() -> Result<()> {
    let azure = Azure::with(&ALL_RIGHTS).await?;
    azure.fake.put("db", "one");
    let path = "/secrets/db?api-version=7.4";
    let set = |fault| azure.fake.set_fault(Side::Vault, fault);

    azure.fake.set_fault_times(Side::Vault, Fault::Throttled { retry_after: Some(7) }, 1);
    let throttled = azure.send(Method::GET, path, None).await?;
    assert_eq!((throttled.status().as_u16(), &throttled.headers()[RETRY_AFTER]), (429, &"7".parse()?));
    assert_eq!(azure.get(path).await?.0, 200, "the fault was for one request");
    set(Fault::Status(503));
    assert_eq!(azure.get(path).await?.0, 503);
    for fault in [Fault::Truncated, Fault::Garbage, Fault::WrongContentType] {
        set(fault.clone());
        assert!(azure.get(path).await.is_err(), "{fault:?}");
    }
    set(Fault::HugeBody(1_000_000));
    assert_eq!(azure.get(path).await?.1["value"].as_str().unwrap().len(), 1_000_000);
    set(Fault::Hang);
    assert!(tokio::time::timeout(Duration::from_millis(100), azure.get(path)).await.is_err());
    set(Fault::ForbidName("DB".into()));
    assert_eq!(azure.get(path).await?.0, 403);
    set(Fault::ForbidList);
    assert_eq!((azure.get(path).await?.0, azure.get("/secrets?api-version=7.4").await?.0), (200, 403));
    Ok(())
}

#[tokio::test]
async fn azure_pages_lead_astray_as_they_are_told() -> Result<()> {
    let azure = Azure::with(&[Right::List]).await?;
    azure.fake.put("a", "x");
    azure.fake.put("b", "x");
    let list = format!("{}&maxresults=1", azure.secrets());
    let mut seen = Vec::new();
    for fault in [Fault::EmptyPages, Fault::RepeatingPages, Fault::EndlessPages] {
        azure.fake.set_fault(Side::Vault, fault);
        let (mut link, mut names) = (list.clone(), Vec::new());
        for _ in 0..4 {
            let page = azure.page(&link).await?;
            let id = page["value"][0]["id"].as_str();
            names.push(id.map_or("", |id| id.rsplit('/').next().unwrap()).to_owned());
            link = page["nextLink"].as_str().unwrap_or("").to_owned();
        }
        seen.push((names.join(" "), link.is_empty()));
    }
    let endless = "endless-0-0 endless-1-0 endless-2-0 endless-3-0";
    let expected = [(" a  b", true), ("a a a a", false), (endless, false)];
    assert_eq!(seen, expected.map(|(names, ended)| (names.to_owned(), ended)));
    azure.fake.set_fault(Side::Vault, Fault::NextLinkTo("http://127.0.0.1:1".into()));
    let page = azure.page(&list).await?;
    assert!(page["nextLink"].as_str().unwrap().starts_with("http://127.0.0.1:1/secrets?"));
    Ok(())
}

#[tokio::test]
async fn azure_is_served_over_tls_too() -> Result<()> {
    let authority = Authority::new()?;
    let fake = AzureFake::start_tls(&authority).await?;
    let app = fake.register_app(&ALL_RIGHTS);
    assert!(log_in(&fake, &http::client(Some(&authority.pem()))?, &app).await?["access_token"].is_string());
    assert!(log_in(&fake, &http::client(None)?, &app).await.is_err(), "only its authority vouches for it");
    Ok(())
}
