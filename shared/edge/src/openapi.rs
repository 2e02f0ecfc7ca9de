//! The OpenAPI document, made of the very routes that are served.

use std::collections::BTreeMap;

use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, Info, OpenApi, PathItem, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{PartialSchema as _, ToSchema};

use crate::error::problem::{self, FieldError, Problem};

const BEARER: &str = "bearer";

/// Completes what the routes say of themselves with what they have in common.
pub(crate) fn document(mut api: OpenApi) -> OpenApi {
    api.info = Info::new("ScaiVault", env!("CARGO_PKG_VERSION"));
    api.info.description =
        Some("One secrets API in front of local secrets and federated backends.".to_owned());
    api.security = Some(vec![SecurityRequirement::new(BEARER, Vec::<String>::new())]);
    let components = api.components.get_or_insert_default();
    components.add_security_scheme(BEARER, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    components.schemas.insert("Problem".to_owned(), Problem::schema());
    components.schemas.insert("FieldError".to_owned(), FieldError::schema());
    let mut referred = Vec::new();
    Problem::schemas(&mut referred);
    components.schemas.extend(referred);

    for (path, mut item) in std::mem::take(&mut api.paths.paths) {
        operations(&mut item).for_each(complete);
        // axum's name for the rest of a path is not OpenAPI's.
        api.paths.paths.insert(path.replace("{*", "{"), item);
    }
    api
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete].into_iter().flatten()
}

fn complete(operation: &mut Operation) {
    for response in operation.responses.responses.values_mut() {
        // OpenAPI demands a description where the schema says it all.
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            response.description = "Done".to_owned();
        }
    }
    let problem = |description: &str| -> RefOr<Response> {
        let content = Content::new(Some(Ref::from_schema_name("Problem")));
        ResponseBuilder::new().description(description).content(problem::CONTENT, content).build().into()
    };
    let refusals = BTreeMap::from([
        ("4XX".to_owned(), problem("The request is refused; `code` says why")),
        ("5XX".to_owned(), problem("The request failed; `code` says why")),
    ]);
    operation.responses.responses.extend(refusals);
}
