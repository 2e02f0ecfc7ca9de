//! What the API says of itself is true.

use anyhow::{Context as _, Result};
use scaivault_tests::planes::{Options, Planes};

/// Every route of this version.
const SERVED: &str = "
    GET /v1/secrets/{path}
    PUT /v1/secrets/{path}
    DELETE /v1/secrets/{path}
    POST /v1/secrets
    GET /v1/federation/backends
    POST /v1/federation/backends
    GET /v1/federation/backends/{id}
    PATCH /v1/federation/backends/{id}
    DELETE /v1/federation/backends/{id}
    GET /v1/federation/backends/{id}/status
    POST /v1/federation/backends/{id}/test
    POST /v1/federation/backends/{id}/sync
    GET /v1/federation/backends/{id}/syncs
    GET /v1/federation/backends/{id}/syncs/{run}
    POST /v1/federation/backends/{id}/syncs/{run}/cancel
    GET /v1/federation/events
    GET /v1/tenants
    POST /v1/tenants
    DELETE /v1/tenants/{id}
    GET /v1/policies
    POST /v1/policies
    GET /v1/policies/{name}
    PUT /v1/policies/{name}
    DELETE /v1/policies/{name}
    GET /v1/tokens
    POST /v1/tokens
    GET /v1/tokens/self
    DELETE /v1/tokens/self
    POST /v1/tokens/self/renew
    GET /v1/tokens/{accessor}
    DELETE /v1/tokens/{accessor}
    POST /v1/tokens/{accessor}/renew
    GET /v1/nodes
    POST /v1/nodes
    DELETE /v1/nodes/{name}
    GET /v1/audit
";

#[tokio::test]
async fn the_served_openapi_lists_every_route() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    let document = rest.without_token().get("/openapi.json").await?.ok()?;
    let mut routes: Vec<String> = Vec::new();
    for (path, item) in document["paths"].as_object().context("paths")? {
        let methods = item.as_object().context("methods")?.keys().map(|method| method.to_uppercase());
        routes.extend(methods.map(|method| format!("{method} {path}")));
    }
    let served = SERVED.lines().map(str::trim);
    for route in served.filter(|route| !route.is_empty()) {
        assert!(routes.iter().any(|listed| listed == route), "{route} is not among {routes:#?}");
    }
    assert_eq!(planes.control_plane_rest()?.get("/openapi.json").await?.ok()?["paths"], document["paths"]);
    // And what is listed is served: whatever it answers, it is not "no such route".
    for route in routes {
        let (method, path) = route.split_once(' ').context("a method")?;
        let path = ["{path}", "{id}", "{run}", "{name}", "{accessor}"]
            .iter()
            .fold(path.to_owned(), |path, name| path.replace(name, "x"));
        let answer = rest.without_token().send(method.parse()?, &path, None).await?;
        assert!([400, 401].contains(&answer.status), "{route}: {}", answer.text);
    }
    Ok(())
}
