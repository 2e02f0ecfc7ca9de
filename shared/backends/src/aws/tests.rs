use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use scaivault_domain::backend::{AwsRegion, Endpoint, Tls};
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::time::Timestamp;
use secrecy::SecretString;
use serde_json::{Value as Json, json};

use super::*;
use crate::budget::{Budget, Cost, Limit, Quotas, Rate};
use crate::guard::{Guard, Limits, Retry};
use crate::survey::Surveyed;
use crate::testing::{Reply, Server, egress, with_header};
use crate::{EntryKind, Expected, RemoteEntry};

mod write;

const V1: &str = "11111111-1111-1111-1111-111111111111";
const V2: &str = "22222222-2222-2222-2222-222222222222";
const V3: &str = "33333333-3333-3333-3333-333333333333";
const ARN: &str = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:prod/db-AbCdEf";

fn lease(id: &str) -> Lease {
    let material = Material::AwsKeys {
        access_key_id: "AKIDEXAMPLE".into(),
        secret_access_key: SecretString::from("wJalrXUtnFEMI"),
        session_token: Some(SecretString::from("session/token+==")),
    };
    Lease { id: id.into(), material, expires_at: None, login_generation: 0 }
}

/// `prod/**` with everything behind it captured.
fn name(text: &str) -> RemoteName {
    RemoteName::with_literal(text, 1)
}

fn names(texts: &[&str]) -> Vec<RemoteName> {
    texts.iter().copied().map(name).collect()
}

fn ok(body: &Json) -> Reply {
    with_header(200, "x-amzn-requestid: 1", &body.to_string())
}

fn refusal(code: &str) -> Reply {
    refusal_with(code, "of no use to a program, and may name a secret")
}

fn refusal_with(code: &str, message: &str) -> Reply {
    with_header(400, "x-amzn-requestid: 1", &json!({"__type": code, "Message": message}).to_string())
}

/// A value of `prod/db`.
fn value(fields: Json) -> Json {
    let mut value = json!({"ARN": ARN, "Name": "prod/db", "VersionId": V1, "VersionStages": ["AWSCURRENT"],
        "CreatedDate": 1_767_225_600.5});
    let (Json::Object(value_fields), Json::Object(fields)) = (&mut value, fields) else {
        panic!("no objects")
    };
    value_fields.extend(fields);
    value
}

/// The action of a request, and what it was asked with.
fn parse(request: &str) -> (String, Json) {
    let (head, body) = request.split_once("\r\n\r\n").expect("a head and a body");
    let target = head.lines().find_map(|line| line.strip_prefix("x-amz-target: secretsmanager."));
    (target.expect("an action").to_owned(), serde_json::from_str(body).expect("a body of JSON"))
}

struct Fake {
    server: Server,
    aws: AwsBackend,
}

impl Fake {
    async fn start(reply: impl Fn(&str, &Json) -> Reply + Send + Sync + 'static) -> Self {
        let server = Server::start_with_heads(move |_, request| {
            let (action, body) = parse(request);
            reply(&action, &body)
        })
        .await;
        let endpoint = Endpoint::parse("endpoint", &format!("http://{}", server.address)).expect("a URL");
        let region = AwsRegion::parse("region", "eu-central-1").expect("a region");
        let target = AwsTarget { region, endpoint: Some(endpoint), tls: Tls::default() };
        Fake { server, aws: AwsBackend::connect(&target, &egress()).expect("a usable target") }
    }

    /// Answers everything with the same bytes.
    async fn saying(status: u16, header: &'static str, body: &str) -> Self {
        let body = body.to_owned();
        Self::start(move |_, _| with_header(status, header, &body)).await
    }

    fn requests(&self) -> Vec<(String, Json)> {
        self.server.heads().iter().map(|request| parse(request)).collect()
    }

    fn actions(&self) -> Vec<String> {
        self.requests().into_iter().map(|(action, _)| action).collect()
    }

    async fn read(&self) -> Result<RemoteSecret, BackendError> {
        self.aws.read(&lease("a"), &name("prod/db")).await
    }
}

async fn read(fields: Json) -> Result<RemoteSecret, BackendError> {
    Fake::start(move |_, _| ok(&value(fields.clone()))).await.read().await
}

async fn failure(status: u16, header: &'static str, body: &str) -> BackendError {
    Fake::saying(status, header, body).await.read().await.expect_err("a failure")
}

#[tokio::test]
async fn a_read_is_one_signed_call_and_the_value_is_kept_byte_for_byte() {
    let text = r#"{"n":123456789012345678901234567890,"b":1.10,"a":"<ä>"}"#;
    let fake = Fake::start(move |_, _| ok(&value(json!({"SecretString": text})))).await;
    let secret = fake.read().await.expect("a value");
    assert_eq!(secret.value.expose(), text.as_bytes());
    assert_eq!(
        (secret.kind, &*secret.remote_version, &*secret.content_type),
        (Kind::Json, V1, "application/json")
    );
    assert_eq!(secret.created, Some(Timestamp::from_millis(1_767_225_600_500)));
    assert_eq!(secret.metadata, None);
    let asked = json!({"SecretId": "prod/db", "VersionStage": "AWSCURRENT"});
    assert_eq!(fake.requests(), [("GetSecretValue".to_owned(), asked)]);
    let head = &fake.server.heads()[0];
    for part in [
        "Credential=AKIDEXAMPLE/",
        "/eu-central-1/secretsmanager/aws4_request",
        "x-amz-security-token: session/token+==",
        "content-type: application/x-amz-json-1.1",
    ] {
        assert!(head.contains(part), "{part} in {head}");
    }
}

#[tokio::test]
async fn a_value_has_the_kind_of_its_field() {
    for (fields, kind, bytes) in [
        (json!({"SecretString": ""}), Kind::Text, &b""[..]),
        (json!({"SecretString": "[1]"}), Kind::Text, b"[1]"),
        (json!({"SecretString": r#"{"a":1,"a":2}"#}), Kind::Text, br#"{"a":1,"a":2}"#),
        (json!({"SecretBinary": "AP8="}), Kind::Binary, b"\x00\xff"),
        (json!({"SecretBinary": "e30="}), Kind::Binary, b"{}"),
    ] {
        let secret = read(fields).await.expect("a value");
        assert_eq!((secret.kind, secret.value.expose()), (kind, bytes));
    }
    assert_eq!(read(json!({})).await.err(), Some(NO_JSON_OF_AWS));
}

#[tokio::test]
async fn another_secret_than_the_one_asked_for_is_never_given() {
    let other = json!({"Name": "prod/db-AbCdEf", "SecretString": "x"});
    assert_eq!(read(other).await.err(), Some(BackendError::NotFound));
    let fake = Fake::start(|_, _| ok(&value(json!({"Name": "prod/x", "SecretString": "x"})))).await;
    let by_arn = |arn: &str| RemoteName::new(arn);
    assert!(fake.aws.read(&lease("a"), &by_arn(ARN)).await.is_ok(), "by its ARN it is another name's");
    let partial = fake.aws.read(&lease("a"), &by_arn(ARN.strip_suffix("-AbCdEf").expect("it ends so"))).await;
    assert_eq!(partial.err(), Some(BackendError::NotFound));
}

#[tokio::test]
async fn a_name_that_aws_cannot_have_is_not_asked_for() {
    let fake = Fake::start(|_, _| refusal("InternalServiceError")).await;
    for text in ["", "a b", "ä", "prod/db?x", &"a".repeat(513), "arn:aws:s3:::bucket"] {
        let outcome = fake.aws.read(&lease("a"), &name(text)).await;
        assert_eq!(outcome.err(), Some(BackendError::Unrepresentable), "{text}");
    }
    assert_eq!(fake.actions(), Vec::<String>::new());
}

#[tokio::test]
async fn every_error_code_says_what_to_do() {
    for (code, error) in [
        ("ResourceNotFoundException", BackendError::NotFound),
        ("AccessDeniedException", BackendError::Forbidden),
        ("com.amazonaws.secretsmanager#AccessDeniedException:http://x", BackendError::Forbidden),
        ("DecryptionFailure", BackendError::Forbidden),
        ("ThrottlingException", BackendError::Throttled { retry_after: None }),
        ("ThrottledException", BackendError::Throttled { retry_after: None }),
        ("TooManyRequestsException", BackendError::Throttled { retry_after: None }),
        ("RequestLimitExceeded", BackendError::Throttled { retry_after: None }),
        ("ExpiredTokenException", BackendError::LoginExpired),
        ("UnrecognizedClientException", BackendError::LoginExpired),
        ("InvalidClientTokenId", BackendError::LoginExpired),
        ("InvalidSignatureException", BackendError::LoginExpired),
        ("InternalServiceError", BackendError::Server { status: 500 }),
        ("InvalidParameterException", BackendError::InvalidAnswer("it takes the request for malformed")),
    ] {
        let fake = Fake::start(move |_, _| refusal(code)).await;
        assert_eq!(fake.read().await.err(), Some(error), "{code}");
    }
    let message = "You can't perform this operation on the secret because it was marked for deletion.";
    let fake = Fake::start(move |_, _| refusal_with("InvalidRequestException", message)).await;
    assert_eq!(fake.read().await.err(), Some(BackendError::NotActive(State::Deleted)));
    let fake = Fake::start(move |_, _| refusal("InvalidRequestException")).await;
    assert!(matches!(fake.read().await, Err(BackendError::InvalidAnswer(_))));
}

#[tokio::test]
async fn what_is_no_json_counts_by_its_status_and_the_code_in_it() {
    let xml = |code: &str| {
        format!("<ErrorResponse><Errors><Error><Code>{code}</Code></Error></Errors></ErrorResponse>")
    };
    let plain = "content-language: en";
    assert_eq!(failure(403, plain, &xml("InvalidClientTokenId")).await, BackendError::LoginExpired);
    assert_eq!(failure(403, plain, &xml("SignatureDoesNotMatch")).await, BackendError::LoginExpired);
    assert_eq!(failure(403, plain, &xml("AccessDenied")).await, BackendError::Forbidden);
    assert_eq!(failure(403, plain, "<html>no</html>").await, BackendError::Forbidden);
    assert_eq!(failure(401, plain, "").await, BackendError::LoginExpired);
    assert_eq!(failure(503, plain, "<html>busy</html>").await, BackendError::Server { status: 503 });
    assert_eq!(failure(429, plain, "").await, BackendError::Throttled { retry_after: None });
    let after = Some(Duration::from_secs(7));
    assert_eq!(failure(429, "retry-after: 7", "{}").await, BackendError::Throttled { retry_after: after });
    assert!(matches!(failure(404, plain, "nginx").await, BackendError::InvalidAnswer(_)));
    assert!(matches!(
        failure(302, "location: http://127.0.0.1:1/", "").await,
        BackendError::InvalidAnswer(_)
    ));
}

#[tokio::test]
async fn garbage_is_an_invalid_answer() {
    let deep = format!("{{\"x\":{}", "[".repeat(200_000));
    let deep_tags = format!(r#"{{"SecretString":{}"#, "{\"a\":".repeat(200_000));
    for body in
        ["", "null", "[]", "<html>", "{", r#"{"Name":7}"#, r#"{"Name":"prod/db"}"#, &*deep, &*deep_tags]
    {
        let error = failure(200, "x-amzn-requestid: 1", body).await;
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{error:?} for {:.20}", body);
    }
    assert!(matches!(failure(200, "content-encoding: gzip", "x").await, BackendError::InvalidAnswer(_)));
    let huge = value(json!({"SecretString": "x".repeat(2 * 1024 * 1024)})).to_string();
    assert_eq!(failure(200, "x-amzn-requestid: 1", &huge).await, BackendError::TooLarge);
}

#[tokio::test]
async fn a_broken_connection_is_told_apart_from_a_broken_answer() {
    let fake = Fake::start(|_, _| Reply::Bytes(Vec::new())).await;
    assert!(matches!(fake.read().await, Err(BackendError::Unreachable(_))));
    let fake = Fake::start(|_, _| Reply::Bytes(b"SSH-2.0-x\r\n\r\n".to_vec())).await;
    assert_eq!(fake.read().await.err(), Some(BackendError::InvalidAnswer("no HTTP")));
    let cut =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: 900\r\n\r\n{\"Na";
    let fake = Fake::start(|_, _| Reply::Bytes(cut.to_vec())).await;
    assert_eq!(fake.read().await.err(), Some(BackendError::InvalidAnswer("it ended early")));
}

#[tokio::test]
async fn a_failed_call_is_not_made_again_by_the_sdk() {
    let fake = Fake::saying(500, "x-amzn-requestid: 1", r#"{"__type":"InternalServiceError"}"#).await;
    assert_eq!(fake.read().await.err(), Some(BackendError::Server { status: 500 }));
    assert_eq!(fake.actions(), ["GetSecretValue"]);
}

#[tokio::test]
async fn a_new_lease_signs_with_its_own_keys() {
    let fake = Fake::start(|_, _| ok(&value(json!({"SecretString": "x"})))).await;
    for (id, key) in [("a", "AKID1"), ("b", "AKID2"), ("a", "AKID1")] {
        let mut lease = lease(id);
        let Material::AwsKeys { access_key_id, .. } = &mut lease.material else { panic!("other keys") };
        *access_key_id = key.to_owned();
        fake.aws.read(&lease, &name("prod/db")).await.expect("a value");
        let head = fake.server.heads().pop().expect("a request");
        assert!(head.contains(&format!("Credential={key}/")), "{head}");
    }
}

#[tokio::test]
async fn keys_that_no_header_can_carry_are_refused_without_a_call() {
    let fake = Fake::start(|_, _| ok(&json!({}))).await;
    for bad in ["", "a\nb", "a b", "ä"] {
        let mut lease = lease("a");
        let Material::AwsKeys { session_token, .. } = &mut lease.material else { panic!("other keys") };
        *session_token = Some(SecretString::from(bad));
        let outcome = fake.aws.probe(&lease).await;
        assert!(matches!(outcome, Err(BackendError::InvalidConfig(_))), "{bad:?}");
    }
    let foreign = crate::testing::lease("a vault token");
    assert_eq!(fake.aws.probe(&foreign).await, Err(BackendError::FOREIGN_LEASE));
    assert_eq!(fake.actions(), Vec::<String>::new());
}

#[tokio::test]
async fn nothing_prints_a_key() {
    let fake = Fake::start(|_, _| ok(&value(json!({"SecretString": "x"})))).await;
    fake.read().await.expect("a value");
    let shown = format!("{:?}", fake.aws);
    assert!(!shown.contains("wJalr") && !shown.contains("AKID") && !shown.contains("session/"), "{shown}");
}

#[tokio::test]
async fn every_call_for_a_history_is_counted() {
    let fake = Fake::start(|action, body| match (action, body["NextToken"].as_str()) {
        ("ListSecretVersionIds", None) => {
            ok(&json!({"ARN": ARN, "Name": "prod/db", "Versions": [], "NextToken": "1"}))
        }
        ("ListSecretVersionIds", Some(_)) => ok(&json!({"ARN": ARN, "Name": "prod/db", "Versions": [
            {"VersionId": V1, "VersionStages": ["AWSCURRENT"], "CreatedDate": 1}]})),
        _ => ok(&json!({"ARN": ARN, "Name": "prod/db"})),
    })
    .await;
    let rate = Limit::Rate(Rate::per(1000, Duration::from_secs(24 * 3600)));
    let budget = Arc::new(Budget::new(Quotas { values: rate, metadata: rate, lists: rate, batches: rate }));
    let (guard, lease, db) = (Guard::new(Limits::default()), lease("a"), name("prod/db"));
    let cost = Cost::one(&budget, Quota::Metadata);
    let history = guard.call(Retry::NEVER, cost, Duration::from_secs(5), || fake.aws.history(&lease, &db));
    assert_eq!(history.await.map(|versions| versions.len()), Ok(1));
    assert_eq!(fake.actions(), ["ListSecretVersionIds", "ListSecretVersionIds", "DescribeSecret"]);
    let left: Vec<_> = budget.remaining().iter().map(|remaining| remaining.now.floor()).collect();
    assert_eq!(left, [99.0, 98.0, 100.0, 100.0]);
}

#[tokio::test]
async fn history_has_what_is_or_was_current_oldest_first() {
    let entry =
        |id: &str, stages: &[&str]| json!({"VersionId": id, "VersionStages": stages, "CreatedDate": 1});
    let pages = move |_: &str, body: &Json| {
        let mut page = match body["NextToken"].as_str() {
            None => {
                json!({"Versions": [entry(V2, &["AWSCURRENT"]), entry(V3, &["AWSPENDING"])], "NextToken": "n"})
            }
            Some(_) => json!({"Versions": [entry(V1, &["AWSPREVIOUS"])], "NextToken": ""}),
        };
        page["Name"] = "prod/db".into();
        page["ARN"] = ARN.into();
        ok(&page)
    };
    let fake = Fake::start(pages).await;
    let history = fake.aws.history(&lease("a"), &name("prod/db")).await.expect("a history");
    let version = |id: &str| RemoteVersion {
        remote_version: id.into(),
        state: State::Active,
        created: Some(Timestamp::from_millis(1000)),
    };
    assert_eq!(history, [version(V1), version(V2)]);
    assert_eq!(fake.requests()[0].1["IncludeDeprecated"], json!(false));
    let endless = Fake::start(|_, _| ok(&json!({"Name": "prod/db", "NextToken": "n"}))).await;
    let outcome = endless.aws.history(&lease("a"), &name("prod/db")).await;
    assert!(matches!(outcome, Err(BackendError::InvalidAnswer(_))));
}

#[tokio::test]
async fn a_version_is_read_by_its_id_and_never_while_it_is_pending() {
    for (fields, outcome) in [
        (json!({"VersionId": V2, "VersionStages": ["AWSPREVIOUS"]}), None),
        (json!({"VersionId": V2, "VersionStages": ["AWSPENDING"]}), Some(BackendError::NotFound)),
        (json!({"VersionId": V1}), Some(BackendError::InvalidAnswer("another version than was asked for"))),
    ] {
        let mut fields = fields;
        fields["SecretString"] = "x".into();
        let fake = Fake::start(move |_, _| ok(&value(fields.clone()))).await;
        let read = fake.aws.read_version(&lease("a"), &name("prod/db"), V2).await;
        assert_eq!(read.err(), outcome);
        assert_eq!(fake.requests()[0].1, json!({"SecretId": "prod/db", "VersionId": V2}));
        for no_id in ["", "7", "a\n"] {
            let read = fake.aws.read_version(&lease("a"), &name("prod/db"), no_id).await;
            assert_eq!(read.err(), Some(BackendError::NotFound), "without a call");
        }
        assert_eq!(fake.actions().len(), 1);
    }
}

#[tokio::test]
async fn whether_a_value_may_be_read_is_found_out_without_one() {
    for (code, outcome) in [
        ("ResourceNotFoundException", Ok(())),
        ("AccessDeniedException", Err(BackendError::Forbidden)),
        ("ExpiredTokenException", Err(BackendError::LoginExpired)),
    ] {
        let fake = Fake::start(move |_, _| refusal(code)).await;
        assert_eq!(fake.aws.may_read(&lease("a"), &name("prod/db")).await, outcome);
        let version = fake.requests()[0].1["VersionId"].as_str().expect("a version").to_owned();
        assert!(VERSION_ID.contains(&version.len()), "{version}");
    }
}

#[tokio::test]
async fn a_probe_proves_the_lease_and_no_permission() {
    for (reply, outcome) in [
        (None, Ok(())),
        (Some("AccessDeniedException"), Ok(())),
        (Some("UnrecognizedClientException"), Err(BackendError::LoginExpired)),
        (Some("ThrottlingException"), Err(BackendError::Throttled { retry_after: None })),
    ] {
        let fake =
            Fake::start(move |_, _| reply.map_or_else(|| ok(&json!({"SecretList": []})), refusal)).await;
        assert_eq!(fake.aws.probe(&lease("a")).await, outcome);
        assert_eq!(fake.requests(), [("ListSecrets".to_owned(), json!({"MaxResults": 1}))]);
    }
}

/// A secret of a listing, with `V1` as its current version.
fn listed(name: &str) -> Json {
    let versions = json!({V1: ["AWSCURRENT"], V2: ["AWSPREVIOUS"], V3: ["AWSPENDING"]});
    json!({"Name": name, "SecretVersionsToStages": versions,
        "Tags": [{"Key": "owner", "Value": "ops"}, {"Key": "aws:cloudformation:stack-id", "Value": "s"}]})
}

fn tree(root: Option<&str>) -> Step {
    Step::Tree(root.map(RemoteName::new))
}

async fn survey(fake: &Fake, root: Option<&str>) -> Result<Vec<Surveyed>, BackendError> {
    let calls = Calls::default();
    let (mut open, mut found) = (vec![tree(root)], Vec::new());
    while let Some(step) = open.pop() {
        let step = fake.aws.survey(&lease("a"), &step, &calls).await?;
        found.extend(step.page.secrets);
        open.extend(step.next);
    }
    assert_eq!(calls.snapshot().values().sum::<u64>(), fake.actions().len() as u64);
    Ok(found)
}

#[tokio::test]
async fn a_survey_gives_what_is_below_the_root_with_versions_and_tags() {
    let fake = Fake::start(|_, body| match body["NextToken"].as_str() {
        None => ok(&json!({"SecretList": [listed("prod/a/data/x"), listed("prod"), listed("product/x")], "NextToken": "1"})),
        // With a filter AWS may give nothing for a while.
        Some("1") => ok(&json!({"SecretList": [], "NextToken": "2"})),
        Some(_) => ok(&json!({"SecretList": [
            {"Name": "prod/none"}, {"Name": "prod/staged", "SecretVersionsToStages": {V1: ["AWSPENDING"]}},
            {"Name": "prod/gone", "DeletedDate": 1, "SecretVersionsToStages": {V1: ["AWSCURRENT"]}},
            listed("prod//b")]})),
    })
    .await;
    let found = survey(&fake, Some("prod")).await.expect("a survey");
    let there: Vec<_> = found.iter().map(|secret| secret.name.clone()).collect();
    assert_eq!(there, [name("prod/a/data/x"), name("prod//b")]);
    assert_eq!(found[0].metadata, Some(Metadata::from([("owner".into(), "ops".into())])));
    let first = &fake.requests()[0].1;
    assert_eq!(first["Filters"], json!([{"Key": "name", "Values": ["prod/"]}]));
    assert_eq!((&first["MaxResults"], first.get("IncludePlannedDeletion")), (&json!(100), None));
    assert_eq!(fake.actions(), ["ListSecrets"; 3]);
}

#[tokio::test]
async fn a_read_gives_the_token_that_the_survey_gave() {
    let fake = Fake::start(|action, _| match action {
        "ListSecrets" => ok(&json!({"SecretList": [listed("prod/db")]})),
        _ => ok(&value(json!({"SecretString": "x"}))),
    })
    .await;
    let surveyed = survey(&fake, Some("prod")).await.expect("a survey").remove(0);
    let secret = RemoteSecret { metadata: surveyed.metadata, ..fake.read().await.expect("a value") };
    assert!(surveyed.seen.is_some());
    assert_eq!(secret.seen(), surveyed.seen);
}

#[tokio::test]
async fn a_survey_of_everything_has_no_filter() {
    let fake = Fake::start(|_, _| ok(&json!({"SecretList": [listed("a/b")]}))).await;
    let found = survey(&fake, None).await.expect("a survey");
    assert_eq!(found[0].name, RemoteName::with_literal("a/b", 0));
    assert_eq!(fake.requests()[0].1, json!({"MaxResults": 100}));
}

#[tokio::test]
async fn an_unfinished_listing_never_looks_complete() {
    let counted = Arc::new(AtomicUsize::new(0));
    let next = move || counted.fetch_add(1, Ordering::SeqCst).to_string();
    let circle = Fake::start(|_, _| ok(&json!({"SecretList": [listed("prod/a")], "NextToken": "1"}))).await;
    assert!(matches!(survey(&circle, Some("prod")).await, Err(BackendError::InvalidAnswer(_))));
    let empty = Fake::start(move |_, _| ok(&json!({"SecretList": [], "NextToken": next()}))).await;
    assert!(matches!(survey(&empty, Some("prod")).await, Err(BackendError::InvalidAnswer(_))));
    for body in ["{}", "null", "", r#"{"SecretList":null}"#, r#"{"SecretList":[{}]}"#, r#"{"SecretList":[{"#]
    {
        let fake = Fake::saying(200, "x-amzn-requestid: 1", body).await;
        assert!(matches!(survey(&fake, Some("prod")).await, Err(BackendError::InvalidAnswer(_))), "{body}");
        let list = fake.aws.list(&lease("a"), None, None).await;
        assert!(matches!(list, Err(BackendError::InvalidAnswer(_))), "{body}");
    }
    for (code, error) in [
        ("AccessDeniedException", BackendError::Forbidden),
        ("ThrottlingException", BackendError::Throttled { retry_after: None }),
        (
            "InvalidNextTokenException",
            BackendError::InvalidAnswer("it no longer knows where the listing stood"),
        ),
    ] {
        let fake = Fake::start(move |_, body| match body["NextToken"].as_str() {
            None => ok(&json!({"SecretList": [listed("prod/a")], "NextToken": "1"})),
            Some(_) => refusal(code),
        })
        .await;
        assert_eq!(survey(&fake, Some("prod")).await, Err(error), "{code}");
    }
}

#[tokio::test]
async fn a_secret_named_by_its_arn_is_described_or_left_to_be_read() {
    let described = |deleted: Option<u32>| {
        json!({"ARN": ARN, "Name": "prod/db", "DeletedDate": deleted, "VersionIdsToStages": {V1: ["AWSCURRENT"]},
            "Tags": [{"Key": "a", "Value": "b"}]})
    };
    let fake = Fake::start(move |_, _| ok(&described(None))).await;
    let found = survey(&fake, Some(ARN)).await.expect("a survey");
    assert_eq!(found[0].name, RemoteName::new(ARN));
    assert_eq!(found[0].seen.as_ref().map(|seen| &*seen.remote_version), Some(V1));
    assert_eq!(fake.actions(), ["DescribeSecret"]);
    let fake = Fake::start(move |_, _| ok(&described(Some(1)))).await;
    assert_eq!(survey(&fake, Some(ARN)).await, Ok(vec![]));
    let fake = Fake::start(|_, _| refusal("ResourceNotFoundException")).await;
    assert_eq!(survey(&fake, Some(ARN)).await, Ok(vec![]));
    let fake = Fake::start(|_, _| refusal("AccessDeniedException")).await;
    let unseen = Surveyed { name: RemoteName::new(ARN), seen: None, metadata: None };
    assert_eq!(survey(&fake, Some(ARN)).await, Ok(vec![unseen]));
}

#[tokio::test]
async fn a_listing_goes_on_where_it_stopped() {
    let fake = Fake::start(|_, body| match body["NextToken"].as_str() {
        None => ok(&json!({"SecretList": [listed("prod/a/b")], "NextToken": "1"})),
        Some(_) => ok(&json!({"SecretList": [listed("prod/c")]})),
    })
    .await;
    let folder = RemoteName::new("prod");
    let first = fake.aws.list(&lease("a"), Some(&folder), None).await.expect("a page");
    let entry = |text: &str| RemoteEntry { name: name(text), kind: EntryKind::Secret };
    assert_eq!(first.entries, [entry("prod/a/b")]);
    let second = fake.aws.list(&lease("a"), Some(&folder), first.next.as_ref()).await.expect("a page");
    assert_eq!((second.entries, second.next), (vec![entry("prod/c")], None));
    let nowhere = fake.aws.list(&lease("a"), Some(&RemoteName::new("a b")), None).await.expect("a page");
    assert_eq!((nowhere.entries, fake.actions().len()), (vec![], 2), "without a call");
}

#[tokio::test]
async fn many_are_read_with_one_call_each_with_an_outcome_of_its_own() {
    let fake = Fake::start(|action, body| match action {
        "BatchGetSecretValue" => ok(&json!({
            "SecretValues": [value(json!({"SecretString": "1"})), value(json!({"Name": "prod/old", "VersionStages": ["AWSPREVIOUS"], "SecretString": "0"}))],
            "Errors": [
                {"SecretId": "prod/closed", "ErrorCode": "AccessDeniedException", "Message": "no"},
                {"SecretId": "prod/none", "ErrorCode": "ResourceNotFoundException", "Message": "no"},
                {"SecretId": "prod/gone", "ErrorCode": "InvalidRequestException", "Message": "it was marked for deletion."}]})),
        _ => ok(&value(json!({"Name": body["SecretId"], "SecretString": "2", "VersionId": V2}))),
    })
    .await;
    let asked = names(&["prod/none", "prod/db", "prod/closed", "prod/gone", "a b", "prod/late", "prod/old"]);
    let answers = fake.aws.read_many(&lease("a"), &asked).await.expect("answers");
    let versions: Vec<_> =
        answers.into_iter().map(|answer| answer.map(|secret| secret.remote_version)).collect();
    assert_eq!(
        versions,
        [
            Err(BackendError::NotFound),
            Ok(V1.to_owned()),
            Err(BackendError::Forbidden),
            Err(BackendError::NotActive(State::Deleted)),
            Err(BackendError::Unrepresentable),
            Err(NOT_AMONG_THEM),
            Err(NOT_AMONG_THEM),
        ],
        "what was left out of the answer, or is not current, is left to a call of its own"
    );
    assert_eq!(fake.actions(), ["BatchGetSecretValue"]);
    let ids = json!(["prod/none", "prod/db", "prod/closed", "prod/gone", "prod/late", "prod/old"]);
    assert_eq!(fake.requests()[0].1, json!({"SecretIdList": ids}));
}

#[tokio::test]
async fn a_failure_of_all_of_them_is_no_reason_for_as_many_calls() {
    let fake = Fake::start(|_, _| refusal("ResourceNotFoundException")).await;
    let failed = fake.aws.read_many(&lease("a"), &names(&["prod/a", "prod/b"])).await;
    assert_eq!(failed.map(drop), Err(BackendError::NotFound));
    assert_eq!(fake.actions(), ["BatchGetSecretValue"]);
}

#[tokio::test(start_paused = true)]
async fn a_forbidden_batch_is_tried_again_after_ten_minutes_or_with_a_new_lease() {
    let fake = Fake::start(|_, _| refusal("AccessDeniedException")).await;
    let both = names(&["prod/a", "prod/b"]);
    let ask = |lease: Lease| {
        let (fake, both) = (&fake, &both);
        async move { (fake.aws.read_many(&lease, both).await.is_err(), fake.actions().len()) }
    };
    assert_eq!(fake.aws.most_at_once(), 20);
    assert_eq!(ask(lease("a")).await, (true, 1));
    assert_eq!(fake.aws.most_at_once(), 1);
    assert_eq!(ask(lease("a")).await, (true, 1), "without a call");
    tokio::time::advance(REFUSAL_IS_TRUSTED_FOR).await;
    assert_eq!(fake.aws.most_at_once(), 20);
    assert_eq!(ask(lease("a")).await, (true, 2));
    assert_eq!(ask(lease("b")).await, (true, 3));
}

#[tokio::test]
async fn a_request_leaves_for_the_endpoint_alone() {
    let fake = Fake::start(|_, _| ok(&json!({"SecretList": []}))).await;
    let elsewhere = fake.aws.config.to_builder().endpoint_url("http://127.0.0.1:1");
    let keys = credentials(&lease("a")).expect("keys");
    let client = Client::from_conf(elsewhere.credentials_provider(keys).build());
    let error = client.list_secrets().send().await.expect_err("a refusal");
    let refused = BackendError::InvalidConfig("a request to another host than the endpoint");
    assert_eq!(aws_failure(&error), refused);
}
