//! What is asked: one operation of one of Google's services.

use axum::body::{self, Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use percent_encoding::percent_decode_str;
use serde_json::Value;

use super::secrets::Id;
use super::{PROJECT, PROJECT_NUMBER, Refusal};

/// What a request is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// `projects.secrets.list`
    ListSecrets,
    /// `projects.secrets.get`
    GetSecret,
    /// `projects.secrets.create`
    CreateSecret,
    /// `projects.secrets.patch`
    UpdateSecret,
    /// `projects.secrets.delete`
    DeleteSecret,
    /// `projects.secrets.addVersion`
    AddVersion,
    /// `projects.secrets.versions.list`
    ListVersions,
    /// `projects.secrets.versions.get`
    GetVersion,
    /// `projects.secrets.versions.access`
    AccessVersion,
    /// `projects.secrets.versions.disable`
    DisableVersion,
    /// `projects.secrets.versions.enable`
    EnableVersion,
    /// `projects.secrets.versions.destroy`
    DestroyVersion,
    /// `POST /token`: a service account's assertion for an access token.
    OauthToken,
    /// `POST /v1/token`: a workload's token for an access token.
    StsToken,
    /// `projects.serviceAccounts.generateAccessToken`
    GenerateAccessToken,
    /// `GET /oauth2/v3/certs`: the public keys of identity tokens.
    Certificates,
    /// The metadata server, for anything but tokens.
    Metadata,
    /// The metadata server's access tokens.
    MetadataToken,
    /// The metadata server's identity tokens.
    MetadataIdentity,
}

/// A permission of Secret Manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// `secretmanager.secrets.list`
    SecretsList,
    /// `secretmanager.secrets.get`
    SecretsGet,
    /// `secretmanager.secrets.create`
    SecretsCreate,
    /// `secretmanager.secrets.update`
    SecretsUpdate,
    /// `secretmanager.secrets.delete`
    SecretsDelete,
    /// `secretmanager.versions.add`
    VersionsAdd,
    /// `secretmanager.versions.list`
    VersionsList,
    /// `secretmanager.versions.get`
    VersionsGet,
    /// `secretmanager.versions.access`
    VersionsAccess,
    /// `secretmanager.versions.disable`
    VersionsDisable,
    /// `secretmanager.versions.enable`
    VersionsEnable,
    /// `secretmanager.versions.destroy`
    VersionsDestroy,
}

impl Permission {
    /// Every one, as `roles/secretmanager.admin` has them.
    pub const ALL: [Permission; 12] = [
        Permission::SecretsList,
        Permission::SecretsGet,
        Permission::SecretsCreate,
        Permission::SecretsUpdate,
        Permission::SecretsDelete,
        Permission::VersionsAdd,
        Permission::VersionsList,
        Permission::VersionsGet,
        Permission::VersionsAccess,
        Permission::VersionsDisable,
        Permission::VersionsEnable,
        Permission::VersionsDestroy,
    ];

    /// As Google writes it, e.g. `secretmanager.versions.access`.
    pub fn name(self) -> &'static str {
        match self {
            Permission::SecretsList => "secretmanager.secrets.list",
            Permission::SecretsGet => "secretmanager.secrets.get",
            Permission::SecretsCreate => "secretmanager.secrets.create",
            Permission::SecretsUpdate => "secretmanager.secrets.update",
            Permission::SecretsDelete => "secretmanager.secrets.delete",
            Permission::VersionsAdd => "secretmanager.versions.add",
            Permission::VersionsList => "secretmanager.versions.list",
            Permission::VersionsGet => "secretmanager.versions.get",
            Permission::VersionsAccess => "secretmanager.versions.access",
            Permission::VersionsDisable => "secretmanager.versions.disable",
            Permission::VersionsEnable => "secretmanager.versions.enable",
            Permission::VersionsDestroy => "secretmanager.versions.destroy",
        }
    }
}

impl Operation {
    /// What Secret Manager demands for it; the other services do not ask.
    pub(super) fn permission(self) -> Option<Permission> {
        Some(match self {
            Operation::ListSecrets => Permission::SecretsList,
            Operation::GetSecret => Permission::SecretsGet,
            Operation::CreateSecret => Permission::SecretsCreate,
            Operation::UpdateSecret => Permission::SecretsUpdate,
            Operation::DeleteSecret => Permission::SecretsDelete,
            Operation::AddVersion => Permission::VersionsAdd,
            Operation::ListVersions => Permission::VersionsList,
            Operation::GetVersion => Permission::VersionsGet,
            Operation::AccessVersion => Permission::VersionsAccess,
            Operation::DisableVersion => Permission::VersionsDisable,
            Operation::EnableVersion => Permission::VersionsEnable,
            Operation::DestroyVersion => Permission::VersionsDestroy,
            _ => return None,
        })
    }
}

/// A request, taken apart.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) operation: Operation,
    /// The path's segments behind the service's prefix, decoded, without a verb.
    pub(super) segments: Vec<String>,
    pub(super) query: Vec<(String, String)>,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Call {
    /// Nothing if Google has no such page.
    pub(super) async fn read(request: Request) -> Option<Call> {
        let (parts, body) = request.into_parts();
        let mut segments: Vec<String> = parts.uri.path()[1..]
            .split('/')
            .map(|segment| percent_decode_str(segment).decode_utf8_lossy().into_owned())
            .collect();
        let last = segments.last_mut()?;
        let verb = last.rsplit_once(':').map(|(name, verb)| (name.to_owned(), verb.to_owned()));
        let verb = verb.map_or(String::new(), |(name, verb)| {
            *last = name;
            verb
        });
        let names: Vec<&str> = segments.iter().map(String::as_str).collect();
        let operation = operation(&parts.method, &names, &verb)?;
        let query = url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
        let query = query.into_owned().collect();
        // More than Google takes of any request.
        let body = body::to_bytes(body, 4 << 20).await.ok()?;
        Some(Call { operation, segments, query, headers: parts.headers, body })
    }

    pub(super) fn query(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(super) fn bearer(&self) -> Option<&str> {
        self.header(header::AUTHORIZATION.as_str())?.strip_prefix("Bearer ")
    }

    /// The body as JSON; none is an empty object.
    pub(super) fn json(&self) -> Result<Value, Refusal> {
        if self.body.is_empty() {
            return Ok(Value::Object(serde_json::Map::new()));
        }
        serde_json::from_slice(&self.body)
            .map_err(|_| Refusal::invalid("Invalid JSON payload received. Unexpected token."))
    }

    /// A field of a token request, which comes as a form or, to `sts.googleapis.com`, as JSON with `camelCase`.
    pub(super) fn form(&self, name: &str) -> Option<String> {
        let kind = self.header(header::CONTENT_TYPE.as_str()).unwrap_or_default();
        if kind.starts_with("application/json") {
            let mut words = name.split('_');
            let mut camel = words.next()?.to_owned();
            for word in words {
                camel += &word[..1].to_uppercase();
                camel += &word[1..];
            }
            return self.json().ok()?[camel].as_str().map(str::to_owned);
        }
        url::form_urlencoded::parse(&self.body)
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    }

    /// The location, if the call is about secrets of one.
    pub(super) fn location(&self) -> Option<String> {
        (self.segments.get(3)? == "locations").then(|| self.segments[4].clone())
    }

    /// The secret it is about; none for a whole project.
    pub(super) fn secret(&self) -> Option<Id> {
        let location = self.location();
        let name = self.segments.get(if location.is_some() { 6 } else { 4 })?.clone();
        Some(Id { location, name })
    }

    /// The version it is about, `latest` included.
    pub(super) fn version(&self) -> &str {
        self.segments.last().map_or("", String::as_str)
    }

    pub(super) fn knows_project(&self) -> bool {
        self.segments.get(2).is_some_and(|project| project == PROJECT || project == PROJECT_NUMBER)
    }

    /// The resource as the caller wrote it, for messages.
    pub(super) fn resource(&self) -> String {
        self.segments[1..].join("/")
    }
}

fn operation(method: &Method, path: &[&str], verb: &str) -> Option<Operation> {
    let method = method.as_str();
    if let ["v1", "projects", "-", "serviceAccounts", _] = path {
        return (method == "POST" && verb == "generateAccessToken").then_some(Operation::GenerateAccessToken);
    }
    // A location changes nothing but where the secrets are.
    let in_project = match path {
        ["v1", "projects", _, "locations", _, rest @ ..] | ["v1", "projects", _, rest @ ..] => Some(rest),
        _ => None,
    };
    if let Some(rest) = in_project {
        return Some(match (method, rest, verb) {
            ("GET", ["secrets"], "") => Operation::ListSecrets,
            ("POST", ["secrets"], "") => Operation::CreateSecret,
            ("GET", ["secrets", _], "") => Operation::GetSecret,
            ("PATCH", ["secrets", _], "") => Operation::UpdateSecret,
            ("DELETE", ["secrets", _], "") => Operation::DeleteSecret,
            ("POST", ["secrets", _], "addVersion") => Operation::AddVersion,
            ("GET", ["secrets", _, "versions"], "") => Operation::ListVersions,
            ("GET", ["secrets", _, "versions", _], "") => Operation::GetVersion,
            ("GET", ["secrets", _, "versions", _], "access") => Operation::AccessVersion,
            ("POST", ["secrets", _, "versions", _], "disable") => Operation::DisableVersion,
            ("POST", ["secrets", _, "versions", _], "enable") => Operation::EnableVersion,
            ("POST", ["secrets", _, "versions", _], "destroy") => Operation::DestroyVersion,
            _ => return None,
        });
    }
    Some(match (method, path) {
        ("POST", ["token"]) => Operation::OauthToken,
        ("POST", ["v1", "token"]) => Operation::StsToken,
        ("GET", ["oauth2", "v3", "certs"]) => Operation::Certificates,
        ("GET", ["computeMetadata", "v1", "instance", "service-accounts", _, "token"]) => {
            Operation::MetadataToken
        }
        ("GET", ["computeMetadata", "v1", "instance", "service-accounts", _, "identity"]) => {
            Operation::MetadataIdentity
        }
        ("GET", ["computeMetadata", ..] | [""]) => Operation::Metadata,
        _ => return None,
    })
}

/// An answer in JSON.
pub(super) fn answer(code: u16, body: &Value) -> Response {
    let code = StatusCode::from_u16(code).expect("every code here is one");
    json_of(code, Body::from(format!("{body:#}\n")))
}

/// An answer that says it is JSON.
pub(super) fn json_of(status: StatusCode, body: Body) -> Response {
    typed(status, "application/json; charset=UTF-8", body)
}

/// An answer of a kind.
pub(super) fn typed(status: StatusCode, kind: &'static str, body: Body) -> Response {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .body(body)
        .expect("a status and a known header")
}

/// What Google's front says to a URL that no service has.
pub(super) fn unknown_page() -> Response {
    let page = "<!DOCTYPE html>\n<html lang=en>\n<title>Error 404 (Not Found)!!1</title>\n";
    typed(StatusCode::NOT_FOUND, "text/html; charset=UTF-8", Body::from(page))
}
