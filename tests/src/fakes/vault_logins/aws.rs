//! The method `aws`, type `iam`: a signed request that Vault sends to STS itself, to hear who signed it.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{HeaderName, HeaderValue};
use serde_json::{Value, json};

use super::{Granted, Proven, Refused};

/// Tells for which Vault a request was signed, so that another one cannot log in with it.
const SERVER_ID: &str = "x-vault-aws-iam-server-id";
/// What a signature may bring along; other `X-Amz-` headers could change what is asked.
const AMZ_HEADERS: [&str; 8] = [
    "x-amz-algorithm",
    "x-amz-content-sha256",
    "x-amz-credential",
    "x-amz-date",
    "x-amz-security-token",
    "x-amz-signature",
    "x-amz-signedheaders",
    "x-amz-user-agent",
];

/// How the method is configured.
#[derive(Clone, Debug)]
pub struct AwsMount {
    /// Where STS is, e.g. a moto: the `sts_endpoint`. The host that was signed for is sent along as it is.
    pub sts: String,
    /// What the header `X-Vault-AWS-IAM-Server-ID` must say: the `iam_server_id_header_value`.
    pub server_id: String,
    /// The roles by name.
    pub roles: BTreeMap<String, AwsRole>,
}

/// Who may log in for a role.
#[derive(Clone, Debug)]
pub struct AwsRole {
    /// ARNs of users and roles, e.g. `arn:aws:iam::123456789012:role/app`; a session of a role counts as the role. `*` at
    /// the end stands for anything.
    pub bound_principals: Vec<String>,
    /// What that gives.
    pub granted: Granted,
}

/// The request of a login, decoded.
struct Signed {
    url: url::Url,
    body: String,
    headers: Vec<(String, String)>,
}

impl AwsMount {
    pub(super) async fn prove(
        &self,
        client: &reqwest::Client,
        role: &str,
        login: &Value,
    ) -> Result<Proven, Refused> {
        let bound = self.roles.get(role).ok_or_else(|| format!("entry for role {role} not found"))?;
        let signed = Signed::read(login)?;
        signed.check_server_id(&self.server_id)?;
        let identity = signed.send(client, &self.sts).await?;
        let field =
            |name: &str| element(&identity, name).ok_or_else(|| format!("STS answered without {name}"));
        let (arn, account, user_id) = (field("Arn")?, field("Account")?, field("UserId")?);
        let principal = canonical(&arn);
        let matches = |bound: &String| match bound.strip_suffix('*') {
            Some(start) => principal.starts_with(start),
            None => *bound == principal,
        };
        if !bound.bound_principals.iter().any(matches) {
            return Err(format!("IAM Principal {arn:?} does not belong to the role {role:?}"));
        }
        let metadata = json!({
            "account_id": account,
            "auth_type": "iam",
            "canonical_arn": principal,
            "client_arn": arn,
            "client_user_id": user_id.split(':').next(),
            "role_id": role,
        });
        Ok(Proven { principal, granted: bound.granted.clone(), metadata })
    }
}

impl Signed {
    fn read(login: &Value) -> Result<Signed, Refused> {
        let given = |name: &str| match login[name].as_str() {
            None | Some("") => Err(format!("missing {name}")),
            Some(text) => Ok(text),
        };
        let decoded = |name: &str| {
            let bytes =
                STANDARD.decode(given(name)?).map_err(|_| format!("failed to base64 decode {name}"))?;
            String::from_utf8(bytes).map_err(|_| format!("{name} is no text"))
        };
        if given("iam_http_request_method")? != "POST" {
            return Err("invalid iam_http_request_method; currently only 'POST' is supported".to_owned());
        }
        let url = decoded("iam_request_url")?;
        let url = url::Url::parse(&url).map_err(|_| "error parsing iam_request_url".to_owned())?;
        if url.query().is_some() || url.path() != "/" {
            return Err("iam_request_url is not that of GetCallerIdentity".to_owned());
        }
        let body = decoded("iam_request_body")?;
        let mut fields: Vec<_> = url::form_urlencoded::parse(body.as_bytes()).into_owned().collect();
        fields.sort();
        let asked = fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        if !asked.eq([("Action", "GetCallerIdentity"), ("Version", "2011-06-15")]) {
            return Err("iam_request_body is not that of GetCallerIdentity".to_owned());
        }
        let headers: BTreeMap<String, Value> = serde_json::from_str(&decoded("iam_request_headers")?)
            .map_err(|_| "iam_request_headers is no JSON object".to_owned())?;
        let mut flat = Vec::new();
        for (name, values) in headers {
            // Go writes a list of values, everybody else one.
            let values = if let Value::Array(values) = values { values } else { vec![values] };
            for value in values {
                let text = match value {
                    Value::String(text) => text,
                    Value::Number(number) => number.to_string(),
                    _ => return Err(format!("the header {name} is no text")),
                };
                flat.push((name.to_ascii_lowercase(), text));
            }
        }
        let foreign =
            flat.iter().find(|(name, _)| name.starts_with("x-amz-") && !AMZ_HEADERS.contains(&name.as_str()));
        match foreign {
            Some((name, _)) => Err(format!("invalid request header: {name}")),
            None => Ok(Signed { url, body, headers: flat }),
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// The header must be there, say what it should, and be covered by the signature.
    fn check_server_id(&self, expected: &str) -> Result<(), Refused> {
        let failed = |why: &str| Err(format!("error validating {SERVER_ID} header: {why}"));
        match self.header(SERVER_ID) {
            None => return failed("missing header"),
            Some(given) if given != expected => return failed("it is meant for another server"),
            Some(_) => {}
        }
        let authorization = self.header("authorization").unwrap_or_default();
        let signed = authorization.split_once("SignedHeaders=").map_or("", |(_, rest)| rest);
        let signed = signed.split(',').next().unwrap_or_default().trim();
        if signed.split(';').any(|name| name == SERVER_ID) {
            Ok(())
        } else {
            failed("vault header wasn't signed")
        }
    }

    /// Has STS say who signed it.
    async fn send(&self, client: &reqwest::Client, sts: &str) -> Result<String, Refused> {
        let mut request = client.post(format!("{}/", sts.trim_end_matches('/'))).body(self.body.clone());
        for (name, value) in
            self.headers.iter().filter(|(name, _)| name != "content-length" && name != "host")
        {
            let name = HeaderName::try_from(name).map_err(|_| format!("{name} is no header"))?;
            let value = HeaderValue::try_from(value).map_err(|_| format!("{name} has no such value"))?;
            request = request.header(name, value);
        }
        // The signature covers the host that the client named.
        let port = self.url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let host = self.header("host").map(str::to_owned);
        let host = host.unwrap_or_else(|| format!("{}{port}", self.url.host_str().unwrap_or_default()));
        let answer = request.header("host", host).send().await;
        let answer = answer.map_err(|_| "error making upstream request: STS is not there".to_owned())?;
        let status = answer.status().as_u16();
        if status != 200 {
            return Err(format!("error making upstream request: received error code {status} from STS"));
        }
        answer.text().await.map_err(|_| "error making upstream request: STS broke off".to_owned())
    }
}

/// The text of the first element of this name. STS writes it without attributes and without anything to unescape.
fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
}

/// The ARN of the role for a session of it: `arn:aws:sts::1:assumed-role/app/session` is `arn:aws:iam::1:role/app`.
fn canonical(arn: &str) -> String {
    let parts: Vec<&str> = arn.splitn(6, ':').collect();
    if let ["arn", partition, "sts", _, account, resource] = parts[..]
        && let Some(role) = resource.strip_prefix("assumed-role/").and_then(|rest| rest.split('/').next())
    {
        return format!("arn:{partition}:iam::{account}:role/{role}");
    }
    arn.to_owned()
}
