//! Canaries: values that occur nowhere else take every way through the product. Afterwards every log, every file, every
//! metric and every audit row is searched for them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use reqwest::Method;
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{self, CREDENTIAL, Federated, Options, Rest, scaivault};
use scaivault_tests::{http, wait};
use serde_json::{Value, json};

use crate::backend_faults::Gate;

/// What every canary begins with; letters and digits, so that no encoding of text changes it.
pub(crate) const BIRD: &str = "kanarienvogelZ9";

fn canary() -> String {
    format!("{BIRD}{:032x}", rand::random::<u128>())
}

/// What is searched for: secrets in all the forms that they might have got out in.
#[derive(Default)]
pub(crate) struct Needles(Vec<(String, String)>);

impl Needles {
    pub(crate) fn add(&mut self, name: &str, secret: &str) {
        let mut add = |form: &str, text: String| self.0.push((format!("{name} {form}"), text));
        add("as it is", secret.to_owned());
        add("in hex", secret.bytes().map(|byte| format!("{byte:02x}")).collect());
        // Within base64 it depends on what comes before; whole groups of characters are the same whatever comes after.
        for before in 0..3 {
            let padded = [&vec![0; before], secret.as_bytes()].concat();
            let whole = padded.len() / 3 * 3;
            let skipped = if before == 0 { 0 } else { 4 };
            add("in base64", STANDARD.encode(&padded[..whole])[skipped..].to_owned());
            add("in base64 of URLs", URL_SAFE_NO_PAD.encode(&padded[..whole])[skipped..].to_owned());
        }
    }

    fn found_in(&self, text: &str) -> Vec<&str> {
        self.0.iter().filter(|(_, needle)| text.contains(needle)).map(|(name, _)| name.as_str()).collect()
    }

    pub(crate) fn assert_absent(&self, place: &str, text: &str) {
        assert_eq!(self.found_in(text), Vec::<&str>::new(), "in {place}");
    }
}

pub(crate) fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else {
            files.push(entry.path());
        }
    }
    Ok(files)
}

#[test]
fn the_search_finds_a_canary_in_every_form() {
    let (bird, mut needles) = (canary(), Needles::default());
    needles.add("a bird", BIRD);
    for text in [
        format!("x{bird}"),
        bird.bytes().map(|byte| format!("{byte:02x}")).collect(),
        STANDARD.encode(&bird),
        STANDARD.encode(format!("x{bird}")),
        STANDARD.encode(format!("xx{bird}")),
        URL_SAFE_NO_PAD.encode(format!("xxxxx{bird}")),
    ] {
        assert!(!needles.found_in(&text).is_empty(), "{text}");
    }
    assert!(needles.found_in(&STANDARD.encode("another bird")).is_empty());
}

/// Asks for what must be refused, and that without the canary.
async fn refused(rest: &Rest, method: Method, path: &str, body: String) -> Result<()> {
    let asked = format!("{method} {path} {}", &body[..body.len().min(100)]);
    let answer = rest.send(method, path, Some(body)).await?;
    ensure!(answer.status >= 400, "{asked} was not refused: {}", answer.text);
    ensure!(answer.status != 500, "{asked}: {}", answer.text);
    ensure!(!answer.text.contains(BIRD), "{asked}: {}", answer.text);
    Ok(())
}

/// Values of every kind come and go through the API.
async fn through_the_store(rest: &Rest) -> Result<()> {
    let values = [
        json!({ "data": { "password": canary(), "deep": { "key": canary() } } }),
        json!({ "data": { "value": canary() }, "secret_type": "text" }),
        json!({ "data": { "value": STANDARD.encode(canary()) }, "secret_type": "binary" }),
    ];
    for (path, value) in ["local/json", "local/text", "local/binary"].iter().zip(values) {
        let path = format!("/v1/secrets/{path}");
        rest.put(&path, value.clone()).await?.ok()?;
        assert_eq!(rest.get(&path).await?.ok()?["data"], value["data"]);
    }
    rest.put("/v1/secrets/local/json", json!({ "data": { "password": canary() } })).await?.ok()?;
    for path in
        ["local/json?version=1", "local/json?field=password", "local/json?versions=true", "local/?list=true"]
    {
        rest.get(&format!("/v1/secrets/{path}")).await?.ok().context(path)?;
    }
    assert_eq!(rest.delete("/v1/secrets/local/text").await?.status, 204);
    Ok(())
}

async fn through_the_backend(federated: &Federated, rest: &Rest) -> Result<()> {
    let value = json!({ "password": canary() });
    federated.bao.client()?.put("secret", "app/canary", value.clone()).await?;
    let path = "/v1/secrets/external/hashicorp/app/canary";
    for rest in [rest, &federated.planes.control_plane_rest()?] {
        assert_eq!(rest.get(path).await?.ok()?["data"], value);
        assert_eq!(rest.get(&format!("{path}?field=password")).await?.ok()?["value"], value["password"]);
        let paths = json!({ "paths": ["external/hashicorp/app/canary", "local/json", "local/none"] });
        let batch = rest.post("/v1/secrets", paths).await?;
        assert!(batch.text.matches(BIRD).count() == 2, "{}", batch.text);
    }
    Ok(())
}

/// The backend once more, copied: its secrets are in the store, and on the disk of each node. The copies go on being
/// compared with it, also when it tells what it should not.
async fn through_the_copies(federated: &Federated, rest: &Rest) -> Result<()> {
    let value = json!({ "password": canary(), "long": canary().repeat(1000) });
    federated.bao.client()?.put("secret", "app/copied", value.clone()).await?;
    let endpoint = format!("http://{}", federated.network.addr());
    let mut backend =
        planes::backend("copies", &endpoint, CREDENTIAL, json!({ "copies/**": "secret/data/**" }));
    let settings = json!({ "mode": "sync", "sync_interval": "1s", "prefetch": true });
    planes::merge(&mut backend, &settings);
    let id = rest.configure(backend).await?;
    let report = rest.sync(&id).await?;
    ensure!(!report.to_string().contains(BIRD), "{report}");
    for rest in [rest, &federated.planes.control_plane_rest()?] {
        let copy = rest.get("/v1/secrets/copies/app/copied").await?.ok()?;
        assert_eq!((&copy["data"], &copy["source"]), (&value, &json!("sync")));
        rest.get("/v1/secrets/copies/app/copied?versions=true").await?.ok()?;
    }
    let status = rest.status(&id).await?;
    ensure!(!status.to_string().contains(BIRD), "{status}");
    Ok(())
}

/// Requests that are wrong somewhere beside their secret.
async fn through_wrong_requests(planes: &planes::Planes, rest: &Rest) -> Result<()> {
    let (bird, path) = (canary(), "/v1/secrets/local/wrong");
    for body in [
        format!(r#"{{"data":{{"password":"{bird}""#),
        format!(r#"{{"data":{{}},"extra":"{bird}"}}"#),
        format!(r#"{{"data":"{bird}"}}"#),
        format!(r#"{{"data":{{"value":"{bird}"}},"secret_type":"{bird}"}}"#),
        format!(r#"{{"data":{{"value":1,"password":"{bird}"}},"secret_type":"text"}}"#),
        format!(r#"{{"data":{{"value":"{bird}!"}},"secret_type":"binary"}}"#),
        format!(r#"{{"data":{{"value":"{bird}"}},"encoding":"base64"}}"#),
        format!(r#"{{"data":{{"a":"{bird}"}},"metadata":{{"a":["{bird}"]}}}}"#),
        format!(r#"{{"data":{{"a":"{bird}"}},"data":{{"a":"{bird}"}}}}"#),
        format!("\u{feff}{bird}"),
    ] {
        refused(rest, Method::PUT, path, body).await?;
    }
    // With a client of its own: the connection of a body that nobody reads to its end is closed.
    let huge = format!(r#"{{"data":{{"a":"{}"}}}}"#, bird.repeat((3 << 20) / bird.len()));
    refused(&planes.rest(0)?, Method::PUT, path, huge).await?;
    let body = || json!({ "data": { "password": bird } }).to_string();
    refused(rest, Method::PUT, "/v1/secrets/external/hashicorp/app/db", body()).await?;
    refused(rest, Method::PUT, "/v1/secrets/local//wrong", body()).await?;
    refused(rest, Method::POST, path, body()).await?;
    refused(rest, Method::PUT, "/v1/elsewhere", body()).await?;
    refused(&rest.with_header("if-match", "\"v7\"")?, Method::PUT, path, body()).await?;
    refused(&rest.without_token(), Method::PUT, path, body()).await?;
    refused(&rest.with_token(&bird)?, Method::PUT, path, body()).await?;
    refused(&rest.with_token(&format!("svt_{bird}"))?, Method::PUT, path, body()).await?;
    let reader = rest.issue("reader", &["secrets:read"], json!([])).await?;
    refused(&rest.with_token(&reader.token)?, Method::PUT, path, body()).await?;
    let plain = http::client(None)?
        .put(format!("{}{path}", planes.node(0)))
        .bearer_auth(planes.operator_token())
        .header("content-type", "text/plain")
        .body(bird.clone());
    assert!(!plain.send().await?.text().await?.contains(BIRD));

    // Somebody who takes the configuration for the place of a credential.
    let wrong = |field: &str, value: String| {
        let mut backend =
            planes::backend("wrong", "https://vault.internal", CREDENTIAL, json!({ "w/**": "s/**" }));
        backend["config"][field] = json!(value);
        backend.to_string()
    };
    for (field, value) in [
        ("secret_id", bird.clone()),
        ("endpoint", format!("https://user:{bird}@vault.internal")),
        ("endpoint", format!("https://vault.internal/?token={bird}")),
        ("ca_cert", format!("-----BEGIN CERTIFICATE-----\n{bird}\n-----END CERTIFICATE-----")),
        ("namespace", format!("a\n{bird}")),
        ("timeout", bird.clone()),
        ("auth_method", bird.clone()),
    ] {
        refused(rest, Method::POST, "/v1/federation/backends", wrong(field, value)).await.context(field)?;
    }
    Ok(())
}

/// A backend whose answers carry what they should not, to reads and to logins.
async fn through_the_faults_of_a_backend(federated: &Federated, rest: &Rest) -> Result<()> {
    let bird: &'static str = canary().leak();
    let told = json!({
        "errors": [bird], "warnings": [bird], "auth": bird,
        "data": { "data": bird, "password": bird, "id": bird },
    });
    let control_plane = federated.planes.control_plane_rest()?;
    let endpoint = format!("http://{}", federated.network.addr());
    for status in [200, 301, 400, 403, 404, 405, 412, 429, 500, 503] {
        for body in [told.to_string(), bird.to_owned()] {
            let headers = vec![("Content-Type", "application/json"), ("Location", bird), ("X-Told", bird)];
            federated.network.set(Fault::Answer { status, headers, body }).await?;
            for rest in [rest, &control_plane] {
                let answer = rest.get("/v1/secrets/external/hashicorp/app/db").await?;
                ensure!(answer.status >= 400 && !answer.text.contains(BIRD), "{status}: {}", answer.text);
            }
        }
        // A backend of its own, so that there is a login.
        let mapping = json!({ format!("sick-{status}/**"): "secret/data/**" });
        let id = rest.create_backend(&format!("sick-{status}"), &endpoint, CREDENTIAL, mapping).await?;
        let answer = rest.get(&format!("/v1/secrets/sick-{status}/app/db")).await?;
        ensure!(answer.status >= 400 && !answer.text.contains(BIRD), "{status}: {}", answer.text);
        let told = rest.get(&format!("/v1/federation/backends/{id}/status")).await?;
        ensure!(!told.text.contains(BIRD), "{status}: {}", told.text);
    }
    federated.network.set(Fault::Pass).await
}

/// The command line, when it has something to complain about.
async fn through_the_command_line(federated: &Federated, needles: &Needles) -> Result<()> {
    let (node, operator) = (federated.planes.node(0), federated.planes.operator_token());
    let bird = canary();
    let pair = format!("password={bird}");
    let complaints: &[(&[&str], &str, &str)] = &[
        (&["put", "local/by-cli", &pair], &node, operator),
        (&["put", "external/hashicorp/app/db", &pair], &node, operator),
        (&["put", "local//wrong", &pair], &node, operator),
        (&["put", "local/wrong", &pair, "--nonsense"], &node, operator),
        (&["put", "local/wrong", &pair], "http://127.0.0.1:1", operator),
        (&["put", "local/wrong", &pair], &node, &bird),
        (&["get", "local/wrong"], &node, operator),
        (&["get", "local/json", "--field", "none"], &node, operator),
    ];
    for (arguments, addr, token) in complaints {
        let mut command = tokio::process::Command::from(scaivault());
        command.args(*arguments).env("SCAIVAULT_ADDR", addr).env("SCAIVAULT_TOKEN", token);
        let told = command.output().await?;
        let told = [told.stdout, told.stderr].concat();
        needles.assert_absent(&arguments[..2].join(" "), &String::from_utf8_lossy(&told));
    }
    Ok(())
}

/// Configures a backend with a static token, behind a gate that notes what reads come with.
async fn through_a_token(federated: &Federated, rest: &Rest, gate: &Gate) -> Result<()> {
    for (name, token) in [("token", federated.bao.root_token()), ("none", &canary())] {
        let credential = format!("infra/{name}");
        rest.put_data(&credential, json!({ "token": token })).await?;
        let mut backend =
            planes::backend(name, &gate.addr(), &credential, json!({ format!("{name}/**"): "secret/**" }));
        backend["config"]["auth_method"] = json!("token");
        rest.post("/v1/federation/backends", backend).await?.ok()?;
        let answer = rest.get(&format!("/v1/secrets/{name}/app/db")).await?;
        assert_eq!(answer.status == 200, name == "token", "{}", answer.text);
    }
    Ok(())
}

#[tokio::test]
async fn no_secret_is_found_where_it_does_not_belong() -> Result<()> {
    let mut federated = Federated::start_with(Options::default().log("debug")).await?;
    let rest = federated.planes.rest(0)?;
    let gate = Gate::open(federated.bao.socket(), "/v1/nothing").await?;
    let credential = rest.get(&format!("/v1/secrets/{CREDENTIAL}")).await?.ok()?;
    let issued = rest.issue("canary", &["secrets:read"], json!([])).await?;
    let join_token = fs::read_to_string(federated.planes.join_token("node-0"))?;
    let invitation = URL_SAFE_NO_PAD.decode(join_token.trim_start_matches("svj_"))?;
    let invitation: Value = serde_json::from_slice(&invitation)?;

    let mut needles = Needles::default();
    needles.add("a canary", BIRD);
    for (name, secret) in [
        ("the role_id", &credential["data"]["role_id"]),
        ("the secret_id", &credential["data"]["secret_id"]),
        ("the operator token", &json!(federated.planes.operator_token())),
        ("an issued token", &json!(issued.token)),
        ("the join token", &json!(join_token)),
        ("the join secret", &invitation["secret"]),
        ("the root token of OpenBao", &json!(federated.bao.root_token())),
    ] {
        needles.add(name, secret.as_str().filter(|text| text.len() > 10).context(name)?);
    }

    through_the_store(&rest).await?;
    through_the_backend(&federated, &rest).await?;
    through_the_copies(&federated, &rest).await?;
    through_a_token(&federated, &rest, &gate).await?;
    through_wrong_requests(&federated.planes, &rest).await?;
    through_the_faults_of_a_backend(&federated, &rest).await?;
    through_the_command_line(&federated, &needles).await?;
    for lease in gate.tokens() {
        needles.add("a lease", &lease);
    }

    let control_plane = federated.planes.control_plane_rest()?;
    let marked = rest.with_header("x-request-id", "the-last-one")?;
    assert_eq!(marked.get("/v1/secrets/token/app/db").await?.status, 200);
    let rows = wait::until("every row has arrived", async || {
        let rows = control_plane.audit().await?;
        Ok(rows.iter().any(|row| row["request_id"] == "the-last-one").then_some(rows))
    })
    .await?;
    needles.assert_absent("the audit trail", &json!(rows).to_string());
    for plane in [&rest, &control_plane] {
        needles.assert_absent("the metrics", &plane.get("/metrics").await?.text);
        needles.assert_absent("the events", &plane.get("/v1/federation/events").await?.text);
        needles.assert_absent("the backends", &plane.get("/v1/federation/backends").await?.text);
    }

    // Stopped, so that whatever they keep back is written.
    for node in &mut federated.planes.nodes {
        node.stop().await?;
    }
    federated.planes.control_plane.stop().await?;
    for (log, text) in federated.planes.logs()? {
        assert!(text.contains("DEBUG"), "{} is not in detail", log.display());
        for (number, line) in text.lines().enumerate() {
            needles.assert_absent(&format!("{}:{}: {line}", log.display(), number + 1), line);
        }
    }
    let mut searched = 0;
    for dir in federated.planes.dirs() {
        for file in files_below(&dir)? {
            let bytes = fs::read(&file)?;
            searched += bytes.len();
            needles.assert_absent(&file.display().to_string(), &String::from_utf8_lossy(&bytes));
        }
    }
    assert!(searched > 1 << 16, "the files of both planes were searched: {searched} bytes");
    Ok(())
}
