//! Names of the fields of spans and log lines, so that one query finds them everywhere.
//!
//! Use them as `info!({ field::BACKEND_ID } = %id, "read from {id}")`.

/// The tenant.
pub const TENANT: &str = "tenant";
/// Who asks.
pub const PRINCIPAL: &str = "principal";
/// The accessor of the token, which is not the token.
pub const TOKEN_ACCESSOR: &str = "token.accessor";
/// The id of the request, as the caller is told it.
pub const REQUEST_ID: &str = "request.id";
/// The id of the request's trace, as its audit row has it.
pub const TRACE_ID: &str = "trace.id";
/// The backend's id.
pub const BACKEND_ID: &str = "backend.id";
/// The backend's name.
pub const BACKEND_NAME: &str = "backend.name";
/// The `type` of the backend.
pub const BACKEND_TYPE: &str = "backend.type";
/// What the backend was asked for, e.g. `read`.
pub const BACKEND_OPERATION: &str = "backend.operation";
/// ScaiVault's version of the secret.
pub const SECRET_VERSION: &str = "secret.version";
/// Where an answer came from.
pub const SECRET_SOURCE: &str = "secret.source";
/// The number of a tenant's configuration.
pub const GENERATION: &str = "generation";
/// The name of a data-plane node.
pub const NODE: &str = "node";
/// `ok`, or the code of the refusal.
pub const OUTCOME: &str = "outcome";
