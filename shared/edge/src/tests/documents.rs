use std::collections::BTreeSet;

use http::Method;
use serde_json::Value;

use super::{call, front, get};

/// Every operation of the document: path with names filled in, method, and the operation itself.
async fn operations(router: &axum::Router) -> Vec<(String, Method, Value)> {
    let document = get(router, "/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let path = path
            .replace("{path}", "a/b")
            .replace("{id}", "i")
            .replace("{run}", "r")
            .replace("{name}", "n")
            .replace("{accessor}", "a");
        assert!(!path.contains('{'), "{path}");
        for (method, operation) in item.as_object().unwrap() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            operations.push((path.clone(), method, operation.clone()));
        }
    }
    operations
}

#[tokio::test]
async fn the_document_has_exactly_the_methods_that_are_served() {
    let (_, router) = front();
    let operations = operations(&router).await;
    assert!(operations.len() > 25, "{}", operations.len());
    for path in operations.iter().map(|(path, _, _)| path).collect::<BTreeSet<_>>() {
        let documented: BTreeSet<_> = operations
            .iter()
            .filter(|(p, _, _)| p == path)
            .map(|(_, method, _)| method.as_str().to_owned())
            .collect();
        // A method that no route has makes the server tell which ones there are.
        let refused = call(&router, Method::TRACE, path, &[], "").await;
        assert_eq!(refused.refusal(), super::refusal(405, "invalid_request", ""), "{path}");
        let allowed: BTreeSet<_> = refused
            .header("allow")
            .split(',')
            .filter(|method| *method != "HEAD")
            .map(str::to_owned)
            .collect();
        assert_eq!(documented, allowed, "{path}");
    }
}

#[tokio::test]
async fn the_document_has_exactly_the_parameters_that_are_taken() {
    let (_, router) = front();
    for (path, method, operation) in operations(&router).await {
        let none = Vec::new();
        let documented: BTreeSet<_> = operation["parameters"]
            .as_array()
            .unwrap_or(&none)
            .iter()
            .filter(|parameter| parameter["in"] == "query")
            .map(|parameter| parameter["name"].as_str().unwrap().to_owned())
            .collect();
        let refused = call(&router, method.clone(), &format!("{path}?no_such=1"), &[], "").await;
        let detail = refused.json()["errors"][0]["detail"].as_str().unwrap().to_owned();
        let taken: BTreeSet<_> = match detail.split_once("; there are ") {
            Some((_, names)) => names.split(", ").map(str::to_owned).collect(),
            None => BTreeSet::new(),
        };
        assert_eq!(refused.refusal(), super::refusal(400, "invalid_request", "/no_such"), "{method} {path}");
        assert_eq!(documented, taken, "{method} {path}");
    }
}

#[tokio::test]
async fn every_schema_that_is_referred_to_is_there() {
    let (_, router) = front();
    let document = get(&router, "/openapi.json").await.json();
    let text = document.to_string();
    let mut referred = BTreeSet::new();
    for part in text.split("\"#/components/schemas/").skip(1) {
        referred.insert(part.split('"').next().unwrap());
    }
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for name in &referred {
        assert!(schemas.contains_key(*name), "{name}");
    }
    for name in schemas.keys() {
        assert!(referred.contains(name.as_str()), "{name} is not used");
    }
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
    assert!(document["security"][0].get("bearer").is_some());
}

#[tokio::test]
async fn every_operation_says_how_it_succeeds_and_how_it_is_refused() {
    let (_, router) = front();
    for (path, method, operation) in operations(&router).await {
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{method} {path}");
        assert!(responses.values().all(|response| response["description"] != ""), "{method} {path}");
        assert!(responses.values().all(|response| response["description"].is_string()), "{method} {path}");
        for refusal in ["4XX", "5XX"] {
            let schema = &responses[refusal]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(schema, "#/components/schemas/Problem", "{method} {path}");
        }
        assert!(operation["operationId"].is_string() && operation["summary"].is_string(), "{method} {path}");
    }
}

#[tokio::test]
async fn bodies_that_are_refused_for_unknown_fields_say_so_in_their_schema() {
    let (_, router) = front();
    let document = get(&router, "/openapi.json").await.json();
    for name in [
        "PutSecret",
        "BackendConfiguration",
        "VaultConfig",
        "NewToken",
        "PolicyRule",
        "PathRule",
        "Batch",
        "StartSync",
    ] {
        let schema = &document["components"]["schemas"][name];
        assert_eq!(schema["additionalProperties"], false, "{name}: {schema}");
    }
}
