//! What a node holds: leases, in its memory only. Never what leases are made from.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};

use anyhow::{Context as _, Result, ensure};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use scaivault_domain::backend::KvVersion;
use scaivault_tests::fakes::azure::{ALL_RIGHTS, AppCertificate, AzureFake, Operation};
use scaivault_tests::fakes::gcp::{Gcp, PROJECT};
use scaivault_tests::planes::{self, Options, POLICY, Planes, Rest};
use scaivault_tests::servers::openbao::{self, OpenBao};
use scaivault_tests::wait;
use serde_json::{Value, json};

use super::aws::{self, Aws};
use super::gcp;
use super::{SECRET, VALUE, path};
use crate::backend_faults::Gate;
use crate::canary::{Needles, files_below};

/// Bytes that are looked for, and what they are.
#[derive(Default)]
struct Wanted(Vec<(String, Vec<u8>)>);

impl Wanted {
    fn text(&mut self, name: &str, text: &Value) -> Result<()> {
        let text = text.as_str().filter(|text| text.len() >= 20).with_context(|| format!("no {name}"))?;
        self.0.push((name.to_owned(), text.as_bytes().to_vec()));
        Ok(())
    }

    /// A private key: each line of its PEM, and its numbers, which are the same in every encoding.
    fn key(&mut self, name: &str, pem: &Value) -> Result<()> {
        let pem = pem.as_str().with_context(|| format!("no {name}"))?;
        let body = pem.lines().filter(|line| line.len() >= 60 && !line.starts_with("-----"));
        for (number, line) in body.enumerate().skip(1) {
            self.0.push((format!("{name}, line {number}"), line.as_bytes().to_vec()));
        }
        let der = PrivateKeyDer::from_pem_slice(pem.as_bytes())?;
        let der = der.secret_der();
        // The private exponent and the primes are in the second half.
        for (number, part) in der[der.len() / 2..].chunks_exact(48).enumerate() {
            self.0.push((format!("{name}, part {number}"), part.to_vec()));
        }
        Ok(())
    }

    /// What is in `bytes`: in one go, for a process has a lot of them.
    fn found_in<'a>(&'a self, bytes: &[u8]) -> Vec<&'a str> {
        let mut begins = vec![false; 1 << 16];
        let pair = |bytes: &[u8]| usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        self.0.iter().for_each(|(_, wanted)| begins[pair(wanted)] = true);
        let mut found = Vec::new();
        for (at, two) in bytes.windows(2).enumerate() {
            if begins[pair(two)] {
                let here = self.0.iter().filter(|(_, wanted)| bytes[at..].starts_with(wanted));
                found.extend(here.map(|(name, _)| name.as_str()));
            }
        }
        found
    }
}

#[test]
fn the_search_finds_a_key_in_every_form() -> Result<()> {
    let (key, other) = (AppCertificate::generate()?.key, AppCertificate::generate()?.key);
    let mut wanted = Wanted::default();
    wanted.key("a key", &json!(key))?;
    let der = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    let body: String = key.lines().filter(|line| !line.starts_with("-----")).collect();
    for form in [key.as_bytes(), der.secret_der(), body.as_bytes(), json!(key).to_string().as_bytes()] {
        assert!(!wanted.found_in(form).is_empty());
    }
    assert!(wanted.found_in(other.as_bytes()).is_empty());
    Ok(())
}

/// All that a process can read and write, region by region.
fn memory(process: u32) -> Result<Vec<Vec<u8>>> {
    let mut memory = File::open(format!("/proc/{process}/mem"))?;
    let mut regions = Vec::new();
    for line in fs::read_to_string(format!("/proc/{process}/maps"))?.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        if !rights.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-').context("no range")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        memory.seek(SeekFrom::Start(from))?;
        let mut region = Vec::new();
        // Some of the kernel's own cannot be read.
        if (&mut memory).take(to - from).read_to_end(&mut region).is_ok() {
            regions.push(region);
        }
    }
    Ok(regions)
}

async fn configure(
    rest: &Rest,
    name: &str,
    mut backend: Value,
    field: &str,
    credential: &Value,
) -> Result<()> {
    let stored = format!("infra/{name}");
    rest.put_data(&stored, credential.clone()).await?;
    backend["config"][field] = json!(stored);
    let template = if backend["type"] == "hashicorp-vault" { "secret/data/*" } else { "*" };
    let more = json!({ "name": name, "mode": "proxy", "path_mapping": { format!("{name}/*"): template } });
    planes::merge(&mut backend, &more);
    rest.configure(backend).await.map(drop)
}

#[tokio::test]
async fn a_node_holds_no_root_credential() -> Result<()> {
    let (bao, aws, azure, gcp, mut planes) = tokio::try_join!(
        OpenBao::start(openbao::Options::default()),
        Aws::start(),
        AzureFake::start(),
        Gcp::start(),
        Planes::start(Options::default().log("debug")),
    )?;
    let mut aws = aws;
    // What is configured goes over the control plane's own API: a node that passes a request on has seen it.
    let (rest, node) = (planes.control_plane_rest()?, planes.rest(0)?);
    let mut roots = Wanted::default();

    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    admin.put("secret", SECRET, json!({ "password": VALUE })).await?;
    let gate = Gate::open(bao.socket(), "/v1/nothing").await?;
    let approle = planes::application(&admin, POLICY).await?;
    roots.text("the role's secret_id", &approle["secret_id"])?;
    let vault = json!({
        "type": "hashicorp-vault", "config": { "endpoint": gate.addr(), "auth_method": "approle" },
    });
    configure(&rest, "vault", vault, "auth_config_path", &approle).await?;

    let keys = aws::stored(&aws.new_key().await?);
    roots.text("AWS's secret_access_key", &keys["secret_access_key"])?;
    configure(&rest, "aws", aws.backend(&json!({})), "credentials_path", &keys).await?;

    azure.put(SECRET, VALUE);
    let app = azure.register_app(&ALL_RIGHTS);
    let secret = json!({
        "tenant_id": azure.tenant(), "client_id": app.client_id, "client_secret": app.client_secret,
    });
    roots.text("Azure's client_secret", &secret["client_secret"])?;
    let with = |method: &str| {
        let config = json!({ "vault_url": azure.url(), "authority": azure.url(), "auth_method": method });
        json!({ "type": "azure-key-vault", "config": config })
    };
    configure(&rest, "azure-secret", with("client_secret"), "credentials_path", &secret).await?;
    let certificate = AppCertificate::generate()?;
    let client_id = azure.register_app_with_certificate(&certificate.certificate, &ALL_RIGHTS)?;
    let certificate = json!({
        "tenant_id": azure.tenant(), "client_id": client_id,
        "certificate_pem": certificate.certificate, "private_key_pem": certificate.key,
    });
    roots.key("Azure's private_key_pem", &certificate["private_key_pem"])?;
    configure(&rest, "azure-certificate", with("certificate"), "credentials_path", &certificate).await?;

    gcp.secrets().put(SECRET, VALUE)?;
    let account = gcp::file(&gcp.service_account("reader")?)?;
    roots.key("GCP's private_key", &account["private_key"])?;
    let google = json!({
        "type": "google-secret-manager", "config": { "project_id": PROJECT, "endpoint": gcp.url() },
    });
    configure(&rest, "gcp", google, "credentials_path", &account).await?;

    // Every backend is in use at the node.
    let backends = ["vault", "aws", "azure-secret", "azure-certificate", "gcp"];
    for backend in backends {
        let read = async || Ok((node.get(&path(backend)).await?.status == 200).then_some(()));
        wait::until(backend, read).await?;
    }
    ensure!(azure.calls(Operation::Token) >= 2, "the applications log in");
    let mut leases = Wanted::default();
    for token in gate.tokens() {
        leases.text("a token of Vault", &json!(token))?;
    }
    ensure!(leases.0.len() == 1, "one lease, of the node: {}", leases.0.len());

    let process = planes.nodes[0].process()?.id();
    let regions = memory(process)?;
    let bytes: usize = regions.iter().map(Vec::len).sum();
    ensure!(bytes > 1 << 20, "the node's memory was searched: {bytes} bytes");
    let held = regions.iter().any(|region| !leases.found_in(region).is_empty());
    ensure!(held, "the search does not find the lease that the node has");
    for region in &regions {
        let found = roots.found_in(region);
        ensure!(found.is_empty(), "a node holds {found:?}");
    }
    println!("{bytes} bytes of a node were searched for {} needles", roots.0.len());

    // Neither is on its disk or in its log, also after it has written what it had.
    planes.nodes[0].stop().await?;
    let mut needles = Needles::default();
    for (name, bytes) in roots.0.iter().chain(&leases.0) {
        if let Ok(text) = std::str::from_utf8(bytes) {
            needles.add(name, text);
        }
    }
    needles.assert_absent("the node's log", &planes.nodes[0].log()?);
    let mut searched = 0;
    for file in files_below(planes.nodes[0].dir())? {
        let bytes = fs::read(&file)?;
        searched += bytes.len();
        needles.assert_absent(&file.display().to_string(), &String::from_utf8_lossy(&bytes));
        for wanted in [&roots, &leases] {
            let found = wanted.found_in(&bytes);
            ensure!(found.is_empty(), "{} has {found:?}", file.display());
        }
    }
    ensure!(searched > 1 << 10, "the node's files were searched: {searched} bytes");
    Ok(())
}
