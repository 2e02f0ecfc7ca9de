use std::time::Duration;

use http_body_util::BodyExt as _;
use scaivault_domain::error::Violation;
use scaivault_domain::{Error, Reason};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{grpc, problem};

fn full(reason: Reason) -> Error {
    Error::field(reason, "/config/endpoint", "has no host")
        .violation("/name", "is required")
        .next("try something else")
        .retry_after(Duration::from_millis(1500))
}

#[test]
fn every_reason_survives_grpc_and_back() {
    for reason in Reason::ALL {
        let (sent, status) = (full(*reason), grpc::status(full(*reason)));
        assert_ne!(status.code(), Code::Ok);
        assert_eq!(status.get_error_details().error_info().unwrap().reason, reason.code().to_uppercase());
        let back = grpc::error(&status);
        assert_eq!(back.reason, sent.reason);
        assert_eq!(back.message, sent.message);
        assert_eq!(back.next_step, sent.next_step);
        assert_eq!(back.violations, sent.violations);
        assert_eq!(back.retry_after, sent.retry_after);
    }
}

#[test]
fn an_error_that_says_no_next_step_has_that_of_its_reason() {
    let back = grpc::error(&grpc::status(Error::new(Reason::NotFound, "no such thing")));
    assert_eq!(back.next_step.as_deref(), Some(Reason::NotFound.next_step()));
    assert_eq!((back.violations, back.retry_after), (Vec::<Violation>::new(), None));
}

#[tokio::test]
async fn every_reason_is_a_problem_with_all_it_knows() {
    for reason in Reason::ALL {
        let response = problem::response(&full(*reason), "req-1");
        assert!(response.status().is_client_error() || response.status().is_server_error());
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        assert_eq!(response.headers()["retry-after"], "2");
        let status = response.status().as_u16();
        assert_eq!(response.headers().contains_key("www-authenticate"), status == 401);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(Reason::from_code(body["code"].as_str().unwrap()), Some(*reason));
        assert_eq!(body["status"], status);
        assert_eq!(body["request_id"], "req-1");
        assert_eq!(body["next_step"], "try something else");
        assert_eq!(body["errors"][1], serde_json::json!({"pointer": "/name", "detail": "is required"}));
    }
}

#[test]
fn a_foreign_status_tells_its_text_only_if_the_caller_is_at_fault() {
    for code in (0..=16).map(Code::from) {
        let error = grpc::error(&Status::new(code, "connect to 10.0.0.1:8200"));
        let at_fault = problem::status(error.reason).is_client_error() && error.reason != Reason::RateLimited;
        assert_eq!(error.message.contains("10.0.0.1"), at_fault, "{code:?}");
    }
    let elsewhere = tonic_types::ErrorDetails::with_error_info("NOT_FOUND", "example.com", []);
    let status = Status::with_error_details(Code::Internal, "x", elsewhere);
    assert_eq!(grpc::error(&status).reason, Reason::Internal);
}

#[test]
fn the_refusals_of_sync_have_their_codes() {
    for (reason, code, status) in [
        (Reason::NotSynced, Code::NotFound, 404),
        (Reason::LocalAhead, Code::FailedPrecondition, 409),
        (Reason::TooStale, Code::Unavailable, 503),
    ] {
        assert_eq!((grpc::code(reason), problem::status(reason).as_u16()), (code, status), "{reason:?}");
    }
}
