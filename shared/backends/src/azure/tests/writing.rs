//! Writes and deletions.

use scaivault_domain::secret::{Metadata, SecretValue};

use super::*;
use crate::Expected;
use crate::azure::write::TEXTS_ONLY;

fn draft(value: &str, expected: Expected) -> RemoteWrite {
    RemoteWrite {
        value: SecretValue::new(value.as_bytes().to_vec()),
        kind: Kind::Text,
        content_type: "text/plain".into(),
        metadata: Metadata::new(),
        expected,
    }
}

fn on(version: &str) -> Expected {
    Expected::Version(version.to_owned())
}

/// A listing of versions of `a`, each with its age in seconds.
fn versions(versions: &[(&str, i64)]) -> Reply {
    let version = |(version, at): &(&str, i64)| {
        let id = format!("https://acme.vault.azure.net/secrets/A/{version}");
        with(item("A", NOW + at), "/id", json!(id))
    };
    let items: Vec<_> = versions.iter().map(version).collect();
    ok(&json!({ "value": items, "nextLink": null }))
}

async fn write(script: Vec<Reply>, draft: &RemoteWrite) -> (Result<Written, BackendError>, Vec<String>) {
    let (server, azure) = replies(script).await;
    let written = azure.write(&lease(), &name("a"), draft).await;
    (written, requests(&server))
}

/// A write over version 1 while these were the versions before and after it.
async fn over(before: &[(&str, i64)], after: &[(&str, i64)]) -> Result<Written, BackendError> {
    let script =
        vec![versions(before), ok(&bundle("A", V1, "old")), ok(&bundle("A", V2, "new")), versions(after)];
    write(script, &draft("new", on(V1))).await.0
}

fn written(version: &str) -> Result<Written, BackendError> {
    Ok(Written { remote_version: version.to_owned(), metadata: None })
}

const LOST: Result<Written, BackendError> = Err(BackendError::PreconditionLost);

#[tokio::test]
async fn a_new_version_is_written_over_the_expected_one() {
    let script = vec![
        versions(&[(V1, 0)]),
        ok(&bundle("A", V1, "old")),
        ok(&bundle("A", V2, "new")),
        versions(&[(V2, 9), (V1, 0)]),
    ];
    let (outcome, requests) = write(script, &draft("n\"ü", on(V1))).await;
    assert_eq!(outcome, written(V2));
    let listing = "GET /secrets/a/versions?maxresults=25&api-version=7.4";
    let put = r#"PUT /secrets/a {"value":"n\"ü","tags":{},"attributes":{"enabled":true}}"#;
    assert_eq!(requests, [listing, "GET /secrets/a", put, listing]);
}

#[tokio::test]
async fn a_new_secret_is_written_where_none_was() {
    let script = vec![absent(), absent(), ok(&bundle("a", V1, "x")), versions(&[(V1, 0)])];
    assert_eq!(write(script, &draft("x", Expected::Absent)).await.0, written(V1));
    let nothing = ok(&json!({ "value": [], "nextLink": null }));
    let script = vec![nothing, absent(), ok(&bundle("a", V1, "x")), versions(&[(V1, 0)])];
    assert_eq!(write(script, &draft("x", Expected::Absent)).await.0, written(V1));
}

#[tokio::test]
async fn nothing_is_written_over_what_was_not_expected() {
    let off = || fault(403, "Forbidden", Some("SecretDisabled"));
    for (current, expected) in [
        (ok(&bundle("A", V2, "x")), on(V1)),
        (absent(), on(V1)),
        (off(), on(V1)),
        (ok(&bundle("A", V2, "x")), Expected::Absent),
        (off(), Expected::Absent),
    ] {
        let (outcome, requests) = write(vec![versions(&[(V1, 0)]), current], &draft("x", expected)).await;
        assert_eq!(outcome, LOST);
        assert_eq!(requests.len(), 2, "no PUT");
    }
}

#[tokio::test]
async fn a_deleted_name_is_not_taken() {
    let deleted = fault(409, "Conflict", Some("ObjectIsDeletedButRecoverable"));
    let script = vec![absent(), absent(), deleted];
    assert_eq!(write(script, &draft("x", Expected::Absent)).await.0, LOST);
}

#[tokio::test]
async fn an_expired_version_can_be_written_over() {
    let expired = with(bundle("A", V1, "old"), "/attributes/exp", json!(NOW));
    let script =
        vec![versions(&[(V1, 0)]), ok(&expired), ok(&bundle("A", V2, "new")), versions(&[(V2, 0), (V1, 0)])];
    assert_eq!(write(script, &draft("x", on(V1))).await.0, written(V2));
}

#[tokio::test]
async fn what_came_in_between_is_noticed() {
    assert_eq!(over(&[(V1, 0)], &[(V1, 0), (V3, 5), (V2, 9)]).await, LOST);
    // In the same second nobody can say which one was first.
    assert_eq!(over(&[(V1, 0)], &[(V1, 0), (V3, 9), (V2, 9)]).await, LOST);
    assert_eq!(over(&[(V1, 0)], &[(V3, 0), (V1, 0), (V2, 0)]).await, LOST);
    assert_eq!(over(&[(V1, 0)], &[(V1, 0), (V2, 9), (V3, 10)]).await, written(V2), "it came later");
    // Versions from before are no rivals, whatever their second.
    assert_eq!(over(&[(V3, 0), (V1, 0)], &[(V3, 0), (V2, 0), (V1, 0)]).await, written(V2));
}

#[tokio::test]
async fn another_secret_made_at_the_same_time_is_noticed() {
    let script = vec![absent(), absent(), ok(&bundle("a", V2, "x")), versions(&[(V1, 0), (V2, 0)])];
    assert_eq!(write(script, &draft("x", Expected::Absent)).await.0, LOST);
}

#[tokio::test]
async fn where_versions_may_not_be_listed_nothing_is_written() {
    let script = vec![fault(403, "Forbidden", Some("ForbiddenByRbac"))];
    let (outcome, requests) = write(script, &draft("x", on(V1))).await;
    assert_eq!((outcome, requests.len()), (Err(BackendError::Forbidden), 1));
}

#[tokio::test]
async fn a_write_whose_rank_stays_unknown_is_one_without_an_answer() {
    let begun = || vec![versions(&[(V1, 0)]), ok(&bundle("A", V1, "old")), ok(&bundle("A", V2, "new"))];
    let throttled = || raw(429, "retry-after: 0\r\n", "");
    let mut script = begun();
    script.extend([throttled(), throttled(), versions(&[(V1, 0), (V2, 9)])]);
    assert_eq!(write(script, &draft("x", on(V1))).await.0, written(V2));
    let mut script = begun();
    script.extend([throttled(), throttled(), throttled()]);
    assert_eq!(write(script, &draft("x", on(V1))).await.0, Err(BackendError::Timeout));
}

#[tokio::test]
async fn refused_writes_say_why() {
    for (reply, error) in [
        (fault(403, "Forbidden", Some("ForbiddenByRbac")), BackendError::Forbidden),
        (fault(401, "Unauthorized", None), BackendError::LoginExpired),
        (
            raw(429, "retry-after: 3\r\n", ""),
            BackendError::Throttled { retry_after: Some(Duration::from_secs(3)) },
        ),
        (fault(400, "BadParameter", None), BackendError::InvalidAnswer("it takes the request for malformed")),
    ] {
        let script = vec![versions(&[(V1, 0)]), ok(&bundle("A", V1, "old")), reply];
        assert_eq!(write(script, &draft("x", on(V1))).await.0, Err(error));
    }
}

#[tokio::test]
async fn what_key_vault_cannot_carry_is_not_sent() {
    let large = draft(&"x".repeat(25 * 1024 + 1), on(V1));
    let binary = RemoteWrite { kind: Kind::Binary, ..draft("x", on(V1)) };
    let not_text = RemoteWrite { value: SecretValue::new(vec![0xff]), ..draft("", on(V1)) };
    for (draft, error) in [
        (large, BackendError::ValueTooLarge { most: 25 * 1024 }),
        (binary, TEXTS_ONLY),
        (not_text, TEXTS_ONLY),
    ] {
        let (outcome, requests) = write(Vec::new(), &draft).await;
        assert_eq!((outcome, requests.len()), (Err(error), 0));
    }
    let (outcome, _) = write(
        vec![
            versions(&[(V1, 0)]),
            ok(&bundle("A", V1, "")),
            ok(&bundle("A", V2, "")),
            versions(&[(V1, 0), (V2, 1)]),
        ],
        &draft(&"\"".repeat(25 * 1024), on(V1)),
    )
    .await;
    assert_eq!(outcome, written(V2), "the largest one is carried");
}

/// What is put over a secret with this content type and these tags.
async fn put_over(
    content_type: Option<&str>,
    tags: Value,
    draft: &RemoteWrite,
) -> (Option<BackendError>, Value) {
    let current = with(bundle("A", V1, "old"), "/contentType", json!(content_type));
    let current = with(current, "/tags", tags);
    let script =
        vec![versions(&[(V1, 0)]), ok(&current), ok(&bundle("A", V2, "new")), versions(&[(V1, 0), (V2, 9)])];
    let (outcome, requests) = write(script, draft).await;
    let put = requests[2].strip_prefix("PUT /secrets/a ").expect("the third one is the PUT");
    (outcome.expect("a write").metadata, serde_json::from_str(put).expect("JSON"))
}

#[tokio::test]
async fn a_content_type_stays_what_it_was() {
    let typed =
        |content_type: &'static str| RemoteWrite { content_type: content_type.into(), ..draft("x", on(V1)) };
    for (was, draft, put) in [
        (None, typed("text/plain"), Value::Null),
        (None, typed("text/x"), json!("text/x")),
        (Some("text/x"), typed("text/x"), json!("text/x")),
        (Some("text/x"), typed("text/plain"), json!("text/plain")),
        (Some(""), typed("text/plain"), Value::Null),
    ] {
        assert_eq!(put_over(was, json!({}), &draft).await.1["contentType"], put, "{was:?}");
    }
    let long = RemoteWrite { content_type: "x".repeat(256).into(), ..draft("x", on(V1)) };
    let script = vec![versions(&[(V1, 0)]), ok(&bundle("A", V1, "old"))];
    assert_eq!(
        write(script, &long).await.0,
        Err(BackendError::Unsupported("its media types have at most 255 characters"))
    );
}

#[tokio::test]
async fn tags_become_the_metadata_and_those_that_we_cannot_keep_stay() {
    let long = "k".repeat(129);
    let metadata = Metadata::from([("owner".into(), "dev".into()), ("new".into(), "1".into())]);
    let draft = RemoteWrite { metadata, ..draft("x", on(V1)) };
    let (dropped, put) = put_over(None, json!({ "owner": "ops", "old": "1", &*long: "v" }), &draft).await;
    assert_eq!(put["tags"], json!({ "owner": "dev", "new": "1", &*long: "v" }));
    assert_eq!(dropped, None);
}

#[tokio::test]
async fn tags_beyond_fifteen_are_told_and_the_value_is_written() {
    let metadata: Metadata = (10..26).map(|n| (format!("k{n}"), "v".to_owned())).collect();
    let draft = RemoteWrite { metadata, ..draft("x", on(V1)) };
    let (dropped, put) = put_over(None, json!({ "k10": "old" }), &draft).await;
    let tags = put["tags"].as_object().expect("tags");
    assert_eq!((tags.len(), &tags["k10"]), (15, &json!("v")));
    assert_eq!(
        dropped,
        Some(BackendError::Unsupported("a secret has at most 15 tags of 512 + 512 characters"))
    );
}

async fn delete(script: Vec<Reply>, expected: &str) -> (Result<(), BackendError>, Vec<String>) {
    let (server, azure) = replies(script).await;
    let outcome = azure.delete(&lease(), &name("a"), expected).await;
    (outcome, requests(&server))
}

#[tokio::test]
async fn the_expected_version_is_deleted() {
    let deleted =
        with(bundle("A", V1, ""), "/recoveryId", json!("https://acme.vault.azure.net/deletedsecrets/A"));
    let (outcome, requests) = delete(vec![ok(&bundle("A", V1, "x")), ok(&deleted)], V1).await;
    assert_eq!(outcome, Ok(()));
    assert_eq!(requests, ["GET /secrets/a", "DELETE /secrets/a"]);
}

#[tokio::test]
async fn nothing_else_is_deleted() {
    let lost = Err(BackendError::PreconditionLost);
    assert_eq!(delete(vec![ok(&bundle("A", V2, "x"))], V1).await.0, lost);
    assert_eq!(delete(vec![fault(403, "Forbidden", Some("SecretDisabled"))], V1).await.0, lost);
    assert_eq!(delete(vec![absent()], V1).await.0, Err(BackendError::NotFound));
    let in_between = vec![ok(&bundle("A", V1, "x")), ok(&bundle("A", V2, ""))];
    assert_eq!(delete(in_between, V1).await.0, lost);
    let busy = vec![ok(&bundle("A", V1, "x")), fault(409, "Conflict", Some("ObjectIsBeingDeleted"))];
    assert_eq!(delete(busy, V1).await.0, lost);
}

#[tokio::test]
async fn nothing_is_deleted_for_good() {
    let current = with(bundle("A", V1, "x"), "/attributes/recoveryLevel", json!("Purgeable"));
    let (outcome, requests) = delete(vec![ok(&current)], V1).await;
    assert!(matches!(outcome, Err(BackendError::InvalidConfig(_))));
    assert_eq!(requests.len(), 1);
}
