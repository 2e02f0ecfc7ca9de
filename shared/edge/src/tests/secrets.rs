use http::Method;
use scaivault_proto::secrets::v1 as proto;
use scaivault_proto::secrets::v1::SecretType;
use serde_json::{Value, json};

use super::{call, front, get, refusal};

/// Big integers, an order that is not the alphabet's, spaces: what a parser would tidy up.
const AS_WRITTEN: &str = r#"{"z": 12345678901234567890123, "a":1.10,  "n":{"b.c":[1, 2]}}"#;

#[tokio::test]
async fn a_local_secret_answers_the_fields_of_the_contract() {
    let (fake, router) = front();
    fake.hold("app/db", SecretType::Json, br#"{"password":"x"}"#);
    let answer = get(&router, "/v1/secrets/app/db").await;
    assert_eq!(answer.status, 200);
    let expected = json!({
        "path": "app/db", "version": 3, "secret_type": "json", "data": {"password": "x"},
        "metadata": {"owner": "ops", "app": "db"}, "state": "active", "source": "local",
        "remote_version": null, "age": 0, "created_at": "2026-01-01T00:00:00.250Z",
    });
    assert_eq!(answer.json(), expected);
    for (name, value) in [
        ("etag", "\"v3\""),
        ("age", "0"),
        ("cache-control", "no-store"),
        ("content-type", "application/json"),
    ] {
        assert_eq!(answer.header(name), value);
    }
}

#[tokio::test]
async fn a_proxied_secret_has_no_version_but_the_backends() {
    let (fake, router) = front();
    fake.hold("external/a", SecretType::Json, b"{}");
    fake.secrets.lock().unwrap().entry("external/a".into()).and_modify(|secret| {
        secret.version = 0;
        secret.remote_version = "7".into();
        secret.source = proto::SecretSource::Proxy.into();
    });
    let answer = get(&router, "/v1/secrets/external/a").await;
    let body = answer.json();
    assert_eq!(
        (&body["version"], &body["remote_version"], &body["source"]),
        (&Value::Null, &json!("7"), &json!("proxy"))
    );
    assert_eq!(answer.header("etag"), "\"r7-1767225600250\"");
}

#[tokio::test]
async fn a_copy_tells_its_age_and_whether_that_is_too_great() {
    let (fake, router) = front();
    fake.hold("external/a", SecretType::Json, b"{}");
    let aged = |seconds, stale| {
        fake.secrets.lock().unwrap().entry("external/a".into()).and_modify(|secret| {
            secret.remote_version = "7".into();
            secret.source = proto::SecretSource::Sync.into();
            secret.age = Some(prost_types::Duration { seconds, nanos: 999_999_999 });
            secret.stale = stale;
        });
    };
    for (seconds, stale, header) in [(12, false, ""), (1200, true, "true")] {
        aged(seconds, stale);
        let answer = get(&router, "/v1/secrets/external/a").await;
        let body = answer.json();
        assert_eq!((&body["version"], &body["remote_version"]), (&json!(3), &json!("7")));
        assert_eq!(
            (&body["source"], &body["age"], &body["stale"]),
            (&json!("sync"), &json!(seconds), &json!(stale))
        );
        assert_eq!(answer.header("etag"), "\"v3\"");
        let known =
            call(&router, Method::GET, "/v1/secrets/external/a", &["if-none-match: \"v3\""], "").await;
        assert_eq!(known.status, 304);
        for answer in [answer, known] {
            assert_eq!(
                (answer.header("age"), answer.header("x-scaivault-stale")),
                (&*seconds.to_string(), header)
            );
        }
    }
}

#[tokio::test]
async fn a_reader_says_how_old_and_how_new_an_answer_may_be() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, b"{}");
    for (uri, headers, asked) in [
        ("/v1/secrets/a", &[][..], "max_age: None, min_version: 0"),
        (
            "/v1/secrets/a?min_version=2",
            &["cache-control: no-store, max-age=x"],
            "max_age: None, min_version: 2",
        ),
        (
            "/v1/secrets/a",
            &["cache-control: no-transform", "cache-control: max-age=30"],
            "max_age: Some(Duration { seconds: 30, nanos: 0 }), min_version: 0",
        ),
        (
            "/v1/secrets/a?field=x",
            &["cache-control: no-cache"],
            "max_age: Some(Duration { seconds: 0, nanos: 0 }), min_version: 0",
        ),
    ] {
        call(&router, Method::GET, uri, headers, "").await;
        assert!(fake.asked.lock().unwrap().contains(asked), "{uri} {headers:?}");
    }
    let wrong = get(&router, "/v1/secrets/a?min_version=0").await;
    assert_eq!(wrong.refusal(), refusal(400, "invalid_request", "/min_version"));
}

#[tokio::test]
async fn json_goes_in_and_out_byte_for_byte() {
    let (fake, router) = front();
    let body = format!(r#"{{"data":{AS_WRITTEN},"secret_type":"json"}}"#);
    let put = call(&router, Method::PUT, "/v1/secrets/a", &["content-type: application/json"], &body).await;
    assert_eq!((put.status.as_u16(), put.header("etag")), (201, "\"v1\""));
    assert_eq!(put.header("x-scaivault-revision"), "41");
    assert_eq!(put.json(), json!({"path": "a", "version": 1, "created_at": "2026-01-01T00:00:00.250Z"}));
    assert_eq!(fake.secrets.lock().unwrap()["a"].value, AS_WRITTEN);
    let got = get(&router, "/v1/secrets/a").await;
    let text = std::str::from_utf8(&got.body).unwrap();
    assert!(text.contains(&format!(r#""data":{AS_WRITTEN},"#)), "{text}");
    let again = call(&router, Method::PUT, "/v1/secrets/a", &[], &body).await;
    assert_eq!((again.status.as_u16(), again.header("etag")), (200, "\"v2\""));
}

#[tokio::test]
async fn a_key_twice_reaches_the_service_which_refuses_it() {
    let (fake, router) = front();
    call(&router, Method::PUT, "/v1/secrets/a", &[], r#"{"data":{"k":1,"k":2}}"#).await;
    assert_eq!(fake.secrets.lock().unwrap()["a"].value, r#"{"k":1,"k":2}"#);
}

#[tokio::test]
async fn text_and_binary_are_a_value_in_data() {
    let (fake, router) = front();
    let text =
        r#"{"data":{"value":"a\"é"},"secret_type":"text","metadata":{"k":"v"},"content_type":"text/x"}"#;
    assert_eq!(call(&router, Method::PUT, "/v1/secrets/t", &[], text).await.status, 201);
    assert_eq!(fake.secrets.lock().unwrap()["t"].value, "a\"é");
    let body = get(&router, "/v1/secrets/t").await.json();
    assert_eq!((&body["data"], &body["metadata"]), (&json!({"value": "a\"é"}), &json!({"k": "v"})));
    assert_eq!((&body["content_type"], body.get("encoding")), (&json!("text/x"), None));

    let binary = r#"{"data":{"value":"AP8="},"secret_type":"binary","encoding":"base64"}"#;
    assert_eq!(call(&router, Method::PUT, "/v1/secrets/b", &[], binary).await.status, 201);
    assert_eq!(fake.secrets.lock().unwrap()["b"].value.as_ref(), [0, 255]);
    let body = get(&router, "/v1/secrets/b").await.json();
    assert_eq!((&body["data"], &body["encoding"]), (&json!({"value": "AP8="}), &json!("base64")));
    assert_eq!(get(&router, "/v1/secrets/b?field=value").await.json()["value"], "AP8=");
}

#[tokio::test]
async fn a_wrong_body_is_refused_by_its_pointer_and_without_its_value() {
    let (_, router) = front();
    for (body, pointer) in [
        ("", ""),
        ("[]", ""),
        (r#"{"data":{"p":"canary"},"secret_typ":"json"}"#, "/secret_typ"),
        (r#"{"secret_type":"json"}"#, "/data"),
        (r#"{"data":{},"secret_type":"canary"}"#, "/secret_type"),
        (r#"{"data":{},"metadata":{"k":["canary"]}}"#, "/metadata/k"),
        (r#"{"data":{},"metadata":{"k":"1","k":"2"}}"#, "/metadata"),
        (r#"{"data":"canary","secret_type":"text"}"#, "/data"),
        (r#"{"data":{"value":7},"secret_type":"text"}"#, "/data/value"),
        (r#"{"data":{"value":"a","canary":1},"secret_type":"text"}"#, "/data/canary"),
        (r#"{"data":{"value":"canary!"},"secret_type":"binary"}"#, "/data/value"),
        (r#"{"data":{"value":"AP8"},"secret_type":"binary"}"#, "/data/value"),
        (r#"{"data":{},"encoding":"base64"}"#, "/encoding"),
    ] {
        let answer = call(&router, Method::PUT, "/v1/secrets/a", &[], body).await;
        assert_eq!(answer.refusal(), refusal(400, "invalid_request", pointer), "{body}");
        if !pointer.contains("canary") {
            assert!(!String::from_utf8_lossy(&answer.body).contains("canary"), "{body}");
        }
    }
    let form = ["content-type: application/x-www-form-urlencoded"];
    let answer = call(&router, Method::PUT, "/v1/secrets/a", &form, r#"{"data":{}}"#).await;
    assert_eq!(answer.refusal(), refusal(400, "invalid_request", "/Content-Type"));
}

#[tokio::test]
async fn a_path_is_taken_as_it_stands_in_the_url() {
    let (fake, router) = front();
    fake.hold("a/b", SecretType::Json, b"{}");
    for path in ["a%2Fb", "a/%62", "a//b", "/a/b", "a/b/", "a/../a/b", "./a/b", "a/b;x", "%00", ""] {
        let answer = get(&router, &format!("/v1/secrets/{path}")).await;
        assert_eq!(answer.refusal(), refusal(400, "invalid_path", "/path"), "{path}");
    }
    assert_eq!(get(&router, "/v1/secrets/a/b").await.status, 200);
}

#[tokio::test]
async fn a_write_happens_only_to_the_version_that_was_named() {
    let (_, router) = front();
    let put =
        async |header: &str| call(&router, Method::PUT, "/v1/secrets/a", &[header], r#"{"data":{}}"#).await;
    assert_eq!(put("if-match: \"v1\"").await.refusal(), refusal(412, "precondition_failed", ""));
    assert_eq!(put("if-none-match: *").await.status, 201);
    assert_eq!(put("if-none-match: *").await.status, 412);
    assert_eq!(put("if-match: \"v1\"").await.status, 200);
    assert_eq!(put("if-match: v2").await.refusal(), refusal(400, "invalid_request", "/If-Match"));
}

#[tokio::test]
async fn a_reader_that_has_the_version_is_told_so() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, b"{}");
    let answer = call(&router, Method::GET, "/v1/secrets/a", &["if-none-match: \"v3\""], "").await;
    assert_eq!((answer.status.as_u16(), answer.body.len(), answer.header("etag")), (304, 0, "\"v3\""));
    assert_eq!(call(&router, Method::GET, "/v1/secrets/a", &["if-none-match: \"v2\""], "").await.status, 200);
}

#[tokio::test]
async fn one_field_is_answered_as_it_is_written() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, AS_WRITTEN.as_bytes());
    let answer = get(&router, "/v1/secrets/a?field=z").await;
    assert_eq!(answer.body, r#"{"path":"a","version":3,"field":"z","value":12345678901234567890123}"#);
    assert_eq!(get(&router, "/v1/secrets/a?field=n.b.c&version=2").await.json()["value"], json!([1, 2]));
    let missing = get(&router, "/v1/secrets/a?field=n.x").await;
    assert_eq!(missing.refusal(), refusal(404, "not_found", "/field"));
    assert!(missing.json()["detail"].as_str().unwrap().contains("n.x"));
}

#[tokio::test]
async fn folders_are_listed_page_by_page() {
    let (_, router) = front();
    let body = get(&router, "/v1/secrets/a/b/?list=true&page_size=7&page_token=t%2B").await.json();
    assert_eq!(body, json!({"keys": ["folder=a/b/", "size=7", "token=t+"], "next_page_token": "next"}));
    assert_eq!(get(&router, "/v1/secrets/?list=true").await.json()["keys"][0], "folder=");
    for path in ["a//", "a%2F/", "../"] {
        let answer = get(&router, &format!("/v1/secrets/{path}?list=true")).await;
        assert_eq!(answer.refusal(), refusal(400, "invalid_path", "/path"), "{path}");
    }
}

#[tokio::test]
async fn versions_are_listed_without_values() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, b"{}");
    let versions = get(&router, "/v1/secrets/a?versions=true").await.json()["versions"].clone();
    assert_eq!((&versions[0]["version"], &versions[0]["remote_version"]), (&json!(3), &Value::Null));
    assert_eq!((&versions[1]["version"], &versions[1]["state"]), (&Value::Null, &json!("destroyed")));
}

#[tokio::test]
async fn unknown_and_contradicting_parameters_are_named() {
    let (_, router) = front();
    for (uri, pointer) in [
        ("/v1/secrets/a?verzion=2", "/verzion"),
        ("/v1/secrets/a?version=two", "/version"),
        ("/v1/secrets/a?page_size=2", "/page_size"),
        ("/v1/secrets/a/?list=true&version=2", "/version"),
        ("/v1/secrets/a?versions=true&field=x", "/field"),
        ("/v1/secrets/a/?list=yes", "/list"),
    ] {
        assert_eq!(get(&router, uri).await.refusal(), refusal(400, "invalid_request", pointer), "{uri}");
    }
    let put = call(&router, Method::PUT, "/v1/secrets/a?version=1", &[], r#"{"data":{}}"#).await;
    assert_eq!(put.refusal(), refusal(400, "invalid_request", "/version"));
}

#[tokio::test]
async fn a_batch_has_an_outcome_for_every_path() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, AS_WRITTEN.as_bytes());
    let answer = call(&router, Method::POST, "/v1/secrets", &[], r#"{"paths":["a","denied","b"]}"#).await;
    let results = answer.json()["results"].clone();
    assert_eq!((&results[0]["secret"]["path"], results[0].get("error")), (&json!("a"), None));
    let denied = json!({"path": "denied", "error":
        {"code": "permission_denied", "detail": "no policy allows it", "status": 403}});
    assert_eq!(results[1], denied);
    assert_eq!(results[2]["error"]["status"], 404);
    assert!(String::from_utf8_lossy(&answer.body).contains(AS_WRITTEN));
}

#[tokio::test]
async fn a_delete_answers_nothing() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, b"{}");
    let answer = call(&router, Method::DELETE, "/v1/secrets/a", &[], "").await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0));
    assert_eq!(answer.header("x-scaivault-revision"), "41");
    assert_eq!(get(&router, "/v1/secrets/a").await.refusal(), refusal(404, "not_found", ""));
}

#[tokio::test]
async fn a_value_that_is_not_what_its_type_says_never_becomes_our_json() {
    let (fake, router) = front();
    fake.hold("j", SecretType::Json, br#"{},"state":"forged""#);
    fake.hold("t", SecretType::Text, &[0xff]);
    for path in ["j", "t"] {
        let answer = get(&router, &format!("/v1/secrets/{path}")).await;
        assert_eq!(answer.refusal(), refusal(500, "internal", ""), "{path}");
    }
}

#[tokio::test]
async fn only_the_listed_headers_become_metadata() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, b"{}");
    let headers = [
        "authorization: Bearer svt_x",
        "x-scaivault-tenant: acme",
        "x-request-id: r-1",
        "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "tracestate: a=b",
        "connection: close",
        "host: vault",
        "te: gzip",
        "cookie: c",
    ];
    call(&router, Method::GET, "/v1/secrets/a", &headers, "").await;
    let metadata = fake.metadata.lock().unwrap();
    let mut names: Vec<_> = metadata.keys().map(|name| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["authorization", "traceparent", "tracestate", "x-request-id", "x-scaivault-tenant"]);
    assert!(metadata["authorization"].is_sensitive());
    let context = fake.context.lock().unwrap().clone().unwrap();
    assert_eq!(context.request_id, "r-1");
    assert_eq!(context.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
}
