use scaivault_domain::secret::SecretValue;

use super::*;
use crate::SecretBackend as _;
use crate::testing::{Reply, Server, json, lease, with_header};
use crate::vault::tests::{DENIED, LOOKUP, MOUNTS, V1, name, vault};

const V2: &str = r#"{"data":{"path":"kv/","type":"kv","options":{"version":"2"}}}"#;
const LOST: &str = r#"{"errors":["check-and-set parameter did not match the current version"]}"#;
const DATA: &str = "POST /v1/kv/data/app";
const METADATA: &str = "GET /v1/kv/metadata/app";
const PATCH: &str = "PATCH /v1/kv/metadata/app";
const DELETE: &str = "POST /v1/kv/delete/app";

/// A server with a mount `kv` that answers by method and path, and its adapter.
async fn store(
    mount: &'static str,
    reply: impl Fn(&str) -> Reply + Send + Sync + 'static,
) -> (Server, VaultBackend) {
    let server = Server::start_with_heads(move |path, head| match path {
        _ if path.starts_with(MOUNTS) => json(200, mount),
        LOOKUP => json(200, r#"{"data":{}}"#),
        _ => reply(&head.split(' ').take(2).collect::<Vec<_>>().join(" ")),
    })
    .await;
    let vault = vault(&server.target());
    (server, vault)
}

fn made(version: u64, metadata: &str) -> Reply {
    json(200, &format!(r#"{{"data":{{"version":{version}{metadata}}}}}"#))
}

fn known(version: u64, deleted: &str, metadata: &str) -> Reply {
    json(
        200,
        &format!(
            r#"{{"data":{{"current_version":{version},"custom_metadata":{metadata},"versions":{{"{version}":{{
                "created_time":"2026-01-01T00:00:00Z","deletion_time":"{deleted}","destroyed":false}}}}}}}}"#
        ),
    )
}

fn to_write(value: &str, expected: Expected, metadata: &[(&str, &str)]) -> RemoteWrite {
    RemoteWrite {
        value: SecretValue::new(value.as_bytes().to_vec()),
        kind: Kind::Json,
        content_type: "application/json".into(),
        metadata: metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        expected,
    }
}

fn on(version: &str) -> Expected {
    Expected::Version(version.to_owned())
}

async fn write(vault: &VaultBackend, write: &RemoteWrite) -> Result<Written, BackendError> {
    vault.write(&lease("t"), &name("kv/data/app"), write).await
}

/// The bodies of the requests that were sent with `method`.
fn bodies(server: &Server, method: &str) -> Vec<String> {
    let heads = server.heads().into_iter().filter(|head| head.starts_with(method));
    heads.filter_map(|head| Some(head.split_once("\r\n\r\n")?.1.to_owned())).collect()
}

#[tokio::test]
async fn a_write_names_the_version_that_it_comes_after_and_keeps_the_bytes() {
    let value = r#"{ "b":1.0,"a":[9007199254740992, -0] }"#;
    for (expected, cas) in [(Expected::Absent, 0), (on("7"), 7)] {
        let (server, vault) = store(V2, move |_| made(cas + 1, r#","custom_metadata":null"#)).await;
        let written = write(&vault, &to_write(value, expected, &[])).await;
        let version = (cas + 1).to_string();
        assert_eq!(written, Ok(Written { remote_version: version, metadata: None }));
        assert_eq!(bodies(&server, "POST"), [format!(r#"{{"options":{{"cas":{cas}}},"data":{value}}}"#)]);
    }
}

#[tokio::test]
async fn a_version_that_is_not_the_expected_one_is_not_written_over() {
    let (_server, vault) = store(V2, |_| json(400, LOST)).await;
    assert_eq!(write(&vault, &to_write("{}", on("7"), &[])).await, Err(BackendError::PreconditionLost));
    let (_server, vault) = store(V2, |_| json(400, r#"{"errors":["no data provided"]}"#)).await;
    let malformed = write(&vault, &to_write("{}", on("7"), &[])).await;
    assert!(matches!(malformed, Err(BackendError::InvalidAnswer(_))));
    let (server, vault) = store(V2, |_| Reply::Silence).await;
    for none in ["", "0", "latest", "-1"] {
        assert_eq!(write(&vault, &to_write("{}", on(none), &[])).await, Err(BackendError::PreconditionLost));
    }
    assert_eq!(bodies(&server, "POST"), [] as [String; 0]);
}

#[tokio::test]
async fn what_kv_cannot_hold_is_refused_before_it_is_sent() {
    let (server, vault) = store(V2, |_| Reply::Silence).await;
    let text = RemoteWrite { kind: Kind::Text, ..to_write("{}", Expected::Absent, &[]) };
    assert_eq!(write(&vault, &text).await, Err(OBJECTS_ONLY));
    for value in ["[]", "", r#"{"a":1,"a":2}"#] {
        assert_eq!(
            write(&vault, &to_write(value, Expected::Absent, &[])).await,
            Err(OBJECTS_ONLY),
            "{value}"
        );
    }
    let large = format!(r#"{{"a":"{}"}}"#, "x".repeat(MOST_BYTES));
    let refused = write(&vault, &to_write(&large, Expected::Absent, &[])).await;
    assert_eq!(refused, Err(BackendError::ValueTooLarge { most: MOST_BYTES }));
    let rounded = to_write(r#"{"a":9007199254740993}"#, Expected::Absent, &[]);
    assert_eq!(write(&vault, &rounded).await, Err(ROUNDED));
    assert_eq!(server.paths(), [] as [String; 0]);
}

#[test]
fn numbers_that_a_float_would_change_are_told() {
    for kept in
        ["0", "-0", "0.0e5", "1.10", "0.1", "-12.5e3", "1e21", "9007199254740992", "1.7976931348623157e308"]
    {
        assert!(is_kept(kept), "{kept}");
    }
    for changed in
        ["9007199254740993", "123456789012345678901234567890", "0.12345678901234567890", "1e400", "1e-400"]
    {
        assert!(!is_kept(changed), "{changed}");
    }
    let json = br#"{"12":"34 \" 56 \\","a":[7,-8.5e+1,{"b":90}],"c":true}"#;
    assert_eq!(numbers(json).collect::<Vec<_>>(), ["7", "-8.5e+1", "90"]);
}

#[tokio::test]
async fn version_1_is_never_written() {
    let (server, vault) = store(V1, |_| Reply::Silence).await;
    for expected in [Expected::Absent, on("1"), on("")] {
        assert_eq!(write(&vault, &to_write("{}", expected, &[])).await, Err(NO_CONDITIONS));
    }
    assert_eq!(vault.delete(&lease("t"), &name("kv/data/app"), "").await, Err(NO_CONDITIONS));
    assert!(server.paths().iter().all(|path| path.starts_with(MOUNTS)), "{:?}", server.paths());
}

#[tokio::test]
async fn only_the_metadata_that_differs_is_patched() {
    let (server, vault) = store(V2, |call| match call {
        DATA => made(8, r#","custom_metadata":{"same":"1","old":"2","gone":"3"}"#),
        PATCH => with_header(204, "x: y", ""),
        _ => json(404, r#"{"errors":[]}"#),
    })
    .await;
    let wanted = to_write("{}", on("7"), &[("same", "1"), ("old", "new"), ("more", "4")]);
    assert_eq!(write(&vault, &wanted).await.map(|written| written.metadata), Ok(None));
    assert_eq!(bodies(&server, "PATCH"), [r#"{"custom_metadata":{"gone":null,"more":"4","old":"new"}}"#]);
    let head = server.heads().into_iter().find(|head| head.starts_with("PATCH")).expect("it was sent");
    assert!(head.to_ascii_lowercase().contains("content-type: application/merge-patch+json\r\n"), "{head}");

    let same = to_write("{}", on("7"), &[("same", "1"), ("old", "2"), ("gone", "3")]);
    assert_eq!(write(&vault, &same).await.map(|written| written.metadata), Ok(None));
    assert_eq!(bodies(&server, "PATCH").len(), 1, "nothing differs");
}

#[tokio::test]
async fn servers_and_policies_without_patch_get_the_whole_metadata() {
    let long = "k".repeat(129);
    for refusal in [(405, "{}"), (404, r#"{"errors":[]}"#), (403, DENIED)] {
        // This server does not tell the metadata with a version.
        let there = format!(r#"{{"gone":"1","{long}":"2"}}"#);
        let (server, vault) = store(V2, move |call| match call {
            DATA => made(8, ""),
            METADATA => known(8, "", &there),
            PATCH => json(refusal.0, refusal.1),
            _ => with_header(204, "x: y", ""),
        })
        .await;
        let written = write(&vault, &to_write("{}", on("7"), &[("a", "b")])).await;
        assert_eq!(written.map(|written| written.metadata), Ok(None), "{refusal:?}");
        let whole = format!(r#"{{"custom_metadata":{{"a":"b","{long}":"2"}}}}"#);
        assert_eq!(bodies(&server, "POST").last(), Some(&whole), "what could not be read stays");
    }
}

#[tokio::test]
async fn a_value_is_written_even_if_its_metadata_is_not() {
    let (_server, vault) = store(V2, |call| match call {
        DATA => made(1, r#","custom_metadata":null"#),
        _ => json(403, DENIED),
    })
    .await;
    let written = write(&vault, &to_write("{}", Expected::Absent, &[("a", "b")])).await;
    let expected = Written { remote_version: "1".into(), metadata: Some(BackendError::Forbidden) };
    assert_eq!(written, Ok(expected));
}

#[tokio::test]
async fn a_deletion_names_its_version() {
    let (server, vault) = store(V2, |call| match call {
        METADATA => known(7, "", "null"),
        DELETE => with_header(204, "x: y", ""),
        _ => Reply::Silence,
    })
    .await;
    let delete = async |version| vault.delete(&lease("t"), &name("kv/data/app"), version).await;
    assert_eq!(delete("6").await, Err(BackendError::PreconditionLost));
    assert_eq!(bodies(&server, "POST"), [] as [String; 0]);
    assert_eq!(delete("7").await, Ok(()));
    assert_eq!(bodies(&server, "POST"), [r#"{"versions":[7]}"#]);
}

#[tokio::test]
async fn what_is_deleted_already_is_left_so() {
    let (server, vault) = store(V2, |_| known(7, "2026-01-02T00:00:00Z", "null")).await;
    assert_eq!(vault.delete(&lease("t"), &name("kv/data/app"), "7").await, Ok(()));
    assert_eq!(bodies(&server, "POST"), [] as [String; 0]);
}

#[tokio::test]
async fn where_metadata_is_closed_a_read_tells_the_version_that_is_deleted() {
    let value = r#"{"data":{"data":{"a":1},"metadata":{"created_time":"2026-01-01T00:00:00Z","deletion_time":"",
        "destroyed":false,"version":7}}}"#;
    let (server, vault) = store(V2, move |call| match call {
        METADATA => json(403, DENIED),
        DELETE => with_header(204, "x: y", ""),
        _ => json(200, value),
    })
    .await;
    assert_eq!(vault.delete(&lease("t"), &name("kv/data/app"), "7").await, Ok(()));
    assert_eq!(bodies(&server, "POST"), [r#"{"versions":[7]}"#]);
}

#[tokio::test]
async fn whether_a_value_may_be_read_is_asked_with_a_version_that_nobody_made() {
    for (reply, expected) in [
        (r#"404 {"errors":[]}"#, Ok(())),
        (r#"403 {"errors":["permission denied"]}"#, Err(BackendError::Forbidden)),
        (r#"404 {"errors":["no handler"]}"#, Err(BackendError::InvalidConfig("no such mount or namespace"))),
    ] {
        let (status, body) = reply.split_once(' ').expect("two parts");
        let status = status.parse().expect("a number");
        let (server, vault) = store(V2, move |_| json(status, body)).await;
        assert_eq!(vault.may_read(&lease("t"), &name("kv/data/app")).await, expected, "{reply}");
        assert!(server.paths().contains(&"/v1/kv/data/app?version=4294967295".to_owned()));
    }
}

#[tokio::test]
async fn on_version_1_the_capabilities_tell_whether_a_value_may_be_read() {
    for (capability, expected) in [
        ("read", Ok(())),
        ("root", Ok(())),
        ("list", Err(BackendError::Forbidden)),
        ("deny", Err(BackendError::Forbidden)),
    ] {
        let (server, vault) =
            store(V1, move |_| json(200, &format!(r#"{{"data":{{"capabilities":["{capability}"]}}}}"#)))
                .await;
        assert_eq!(vault.may_read(&lease("t"), &name("kv/a b")).await, expected, "{capability}");
        assert_eq!(bodies(&server, "POST /v1/sys/capabilities-self"), [r#"{"paths":["kv/a b"]}"#]);
    }
}

#[tokio::test]
async fn a_login_page_is_no_valid_token() {
    let server = Server::start(|_| json(200, "{}")).await;
    let probe = vault(&server.target()).probe(&lease("t")).await;
    assert_eq!(probe, Err(NO_JSON_OF_VAULT));
}
