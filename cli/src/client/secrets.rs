//! `get`, `put`, `list`, `delete`, `versions`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{ArgGroup, Args, value_parser};
use scaivault_domain::path::SecretPath;
use scaivault_domain::secret::{Kind, MAX_VALUE_BYTES, Metadata, Source as Origin, State, check_metadata};
use scaivault_domain::time::format_duration;
use scaivault_proto::secrets::v1::{
    DeleteRequest, GetRequest, ListRequest, ListVersionsRequest, PutRequest, Secret, SecretSource,
    SecretState, SecretType, SecretVersion,
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_with::{Map, Same, SerializeAs as _};

use super::wire;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::json;
use crate::output::{Format, Output, details, table};
use crate::parse::{self, Pair, Source};

/// Read a secret.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// Path of the secret, e.g. apps/db.
    #[arg(value_parser = parse::path)]
    path: SecretPath,
    /// Print one field only, e.g. password or db.user.
    #[arg(long, value_name = "FIELD")]
    field: Option<String>,
    /// Read this version instead of the current one.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    version: Option<u64>,
    /// How old a copy may be, e.g. 0s; an older one is compared with its backend first.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    max_age: Option<Duration>,
    /// Read this version or a later one, e.g. the one that was just written through another node.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    min_version: Option<u64>,
}

/// A secret as the API shows it.
#[derive(Serialize)]
struct Shown<'a> {
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    secret_type: &'static str,
    data: Box<RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    content_type: &'a str,
    metadata: BTreeMap<&'a String, &'a String>,
    state: &'static str,
    source: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    remote_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    age: Option<String>,
    /// Of copies only.
    #[serde(skip_serializing_if = "Option::is_none")]
    stale: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
}

impl Get {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let request = GetRequest {
            path: self.path.as_str().to_owned(),
            version: self.version.unwrap_or_default(),
            max_age: self.max_age.map(wire::to_duration).transpose()?,
            min_version: self.min_version.unwrap_or_default(),
        };
        let answer = to.secrets().get(request).await?.into_inner();
        let secret = answer.secret.ok_or_else(|| Failure::strange_answer("no secret"))?;
        let shown = Shown::of(&secret)?;
        if secret.stale {
            let age = shown.age.as_deref().unwrap_or("a while");
            output.note(&format!(
                "this value is stale: it was compared with its backend {age} ago; `scaivault backend status` shows why, \
                 `--max-age 0s` compares it now"
            ))?;
        }
        if let Some(field) = self.field {
            return show_field(&secret, &shown, &field, output);
        }
        if output.format == Format::Raw {
            return output.bytes(&secret.value);
        }
        output.show(&shown, || shown.to_text())
    }
}

fn show_field(
    secret: &Secret,
    shown: &Shown<'_>,
    field: &str,
    output: &mut Output<'_>,
) -> Result<(), Failure> {
    let Some(value) = json::pick(&shown.data, field) else {
        let names: Vec<_> =
            json::fields(&shown.data).unwrap_or_default().into_iter().map(|(name, _)| name).collect();
        return Err(Failure::server(
            format!("the secret has no field {field:?}"),
            format!("its fields are: {}", names.join(", ")),
        ));
    };
    match output.format {
        Format::Json | Format::Yaml => output.show(&value, String::new),
        Format::Raw if shown.encoding.is_some() => output.bytes(&secret.value),
        Format::Raw | Format::Table => {
            // Without a newline, so that what is redirected into a file is the value.
            let end = if output.terminal && output.format == Format::Table { "\n" } else { "" };
            output.bytes(format!("{}{end}", json::text(value)).as_bytes())
        }
    }
}

impl<'a> Shown<'a> {
    fn of(secret: &'a Secret) -> Result<Self, Failure> {
        let strange = |what| move |_| Failure::strange_answer(what);
        let kind = match secret.secret_type() {
            SecretType::Json => Kind::Json,
            SecretType::Text => Kind::Text,
            SecretType::Binary => Kind::Binary,
            SecretType::Unspecified => return Err(Failure::strange_answer("a secret of an unknown type")),
        };
        let text = || std::str::from_utf8(&secret.value).map_err(strange("text that is not UTF-8"));
        let wrapped =
            |value: &str| to_raw_value(&BTreeMap::from([("value", value)])).expect("a map of text is JSON");
        let data = match kind {
            Kind::Json => {
                RawValue::from_string(text()?.to_owned()).map_err(|_| Failure::strange_answer("no JSON"))?
            }
            Kind::Text => wrapped(text()?),
            Kind::Binary => wrapped(&STANDARD.encode(&secret.value)),
        };
        let source = secret.source();
        Ok(Shown {
            path: &secret.path,
            version: Some(secret.version).filter(|version| *version > 0),
            secret_type: kind.as_str(),
            data,
            encoding: (kind == Kind::Binary).then_some("base64"),
            content_type: &secret.content_type,
            metadata: secret.metadata.iter().collect(),
            state: state_name(secret.state()),
            source: match source {
                SecretSource::Proxy => Origin::Proxy.as_str(),
                SecretSource::Sync => Origin::Sync.as_str(),
                SecretSource::Local => Origin::Local.as_str(),
                SecretSource::Unspecified => "unknown",
            },
            remote_version: &secret.remote_version,
            age: wire::duration(secret.age).map(|age| format_duration(Duration::from_secs(age.as_secs()))),
            stale: (source == SecretSource::Sync).then_some(secret.stale),
            create_time: wire::time(secret.create_time),
        })
    }

    fn to_text(&self) -> String {
        let about = details([
            ("path", self.path.to_owned()),
            ("version", self.version.map(|v| v.to_string()).unwrap_or_default()),
            ("type", self.secret_type.to_owned()),
            ("encoding", self.encoding.unwrap_or_default().to_owned()),
            ("source", self.source.to_owned()),
            ("remote version", self.remote_version.to_owned()),
            ("age", self.stale.and(self.age.clone()).unwrap_or_default()),
            ("created", self.create_time.clone().unwrap_or_default()),
            (
                "metadata",
                self.metadata.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(", "),
            ),
        ]);
        let fields = json::fields(&self.data).unwrap_or_default();
        let rows = fields.into_iter().map(|(key, value)| [key, json::text(value)]);
        format!("{about}\n{}", table(["key", "value"], rows))
    }
}

/// Write a new version of a secret.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("value").required(true).args(["fields", "data", "text", "binary_file"])))]
pub(crate) struct Put {
    /// Path of the secret, e.g. apps/db.
    #[arg(value_parser = parse::path)]
    path: SecretPath,
    /// Fields of a JSON object; a value may be @FILE, or - for standard input.
    #[arg(value_name = "KEY=VALUE", value_parser = parse::pair)]
    fields: Vec<Pair>,
    /// A JSON object; or @FILE, or - for standard input.
    #[arg(long, value_name = "JSON", allow_hyphen_values = true, value_parser = parse::source)]
    data: Option<Source>,
    /// Text; or @FILE, or - for standard input.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = parse::source)]
    text: Option<Source>,
    /// A file of any bytes, or - for standard input.
    #[arg(long, value_name = "FILE", allow_hyphen_values = true, value_parser = parse::file)]
    binary_file: Option<Source>,
    /// What the value is, if it is not what its option says.
    #[arg(
        long = "type",
        value_name = "TYPE",
        value_parser = parse::one_of(&[Kind::Json, Kind::Text, Kind::Binary], Kind::as_str)
    )]
    kind: Option<Kind>,
    /// Custom metadata; all of it is replaced. Repeatable.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    metadata: Vec<Pair>,
    /// Write only if this is the current version.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    if_version: Option<u64>,
    /// Write only if there is no such secret.
    #[arg(long, conflicts_with = "if_version")]
    create_only: bool,
}

#[derive(Serialize)]
struct Written {
    path: String,
    version: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
}

impl Put {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let request = self.into_request(output)?;
        let path = request.path.clone();
        let answer = to.secrets().put(request).await?.into_inner();
        let written = Written { path, version: answer.version, create_time: wire::time(answer.create_time) };
        output.show(&written, || {
            details([("path", written.path.clone()), ("version", written.version.to_string())])
        })
    }

    fn into_request(self, output: &mut Output<'_>) -> Result<PutRequest, Failure> {
        let (value, implied) = match (&self.data, &self.text, &self.binary_file) {
            (Some(source), _, _) => (read(source, output)?, Kind::Json),
            (_, Some(source), _) => (read(source, output)?, Kind::Text),
            (_, _, Some(source)) => (read(source, output)?, Kind::Binary),
            (None, None, None) => (object(&self.fields, output)?, Kind::Json),
        };
        let kind = self.kind.unwrap_or(implied);
        kind.check(&value)?;
        let metadata: Metadata = unique(&self.metadata)?.into_iter().collect();
        check_metadata(&metadata)?;
        Ok(PutRequest {
            path: self.path.as_str().to_owned(),
            value: value.into(),
            secret_type: match kind {
                Kind::Json => SecretType::Json,
                Kind::Text => SecretType::Text,
                Kind::Binary => SecretType::Binary,
            }
            .into(),
            content_type: String::new(),
            metadata: metadata.into_iter().collect(),
            expected_version: if self.create_only { Some(0) } else { self.if_version },
        })
    }
}

fn unique(pairs: &[Pair]) -> Result<Vec<(String, String)>, Failure> {
    let mut seen = BTreeMap::new();
    for pair in pairs {
        if seen.insert(&pair.key, ()).is_some() {
            return Err(Failure::usage(format!("the key {:?} stands twice", pair.key), "give it once"));
        }
    }
    Ok(pairs.iter().map(|pair| (pair.key.clone(), pair.value.clone())).collect())
}

/// A JSON object of text fields, in the order of the command line.
fn object(fields: &[Pair], output: &mut Output<'_>) -> Result<Vec<u8>, Failure> {
    let mut object = unique(fields)?;
    if object.iter().filter(|(_, value)| value == "-").count() > 1 {
        return Err(Failure::usage(
            "standard input can be the value of one field only",
            "use @FILE for the others",
        ));
    }
    for (key, value) in &mut object {
        let source = Source::of(value);
        *value = String::from_utf8(read(&source, output)?).map_err(|_| {
            Failure::usage(
                format!("the value of {key:?} is not UTF-8"),
                "write it with --binary-file to a path of its own",
            )
        })?;
    }
    let mut json = Vec::new();
    Map::<Same, Same>::serialize_as(&object, &mut serde_json::Serializer::new(&mut json))
        .expect("pairs of text are a JSON object");
    Ok(json)
}

fn read(source: &Source, output: &mut Output<'_>) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    // One byte more than is allowed, so that what is too large is refused and not cut.
    let limit = MAX_VALUE_BYTES as u64 + 1;
    let (result, name) = match source {
        Source::Literal(text) => return Ok(text.clone().into_bytes()),
        Source::Stdin => (output.input.take(limit).read_to_end(&mut bytes), "standard input".to_owned()),
        Source::File(file) => (
            std::fs::File::open(file).and_then(|file| file.take(limit).read_to_end(&mut bytes)),
            file.display().to_string(),
        ),
    };
    result.map_err(|error| {
        Failure::usage(format!("{name} cannot be read: {error}"), "name a file that can be read, or `-`")
    })?;
    Ok(bytes)
}

/// List what lies in a folder.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// The folder; everything if there is none.
    #[arg(default_value = "", hide_default_value = true, value_parser = parse::folder)]
    folder: String,
}

#[derive(Serialize)]
struct Keys {
    keys: Vec<String>,
}

impl List {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let keys = wire::all(async |page_token| {
            let request = ListRequest { folder: self.folder.clone(), page_size: wire::PAGE, page_token };
            let answer = to.secrets().list(request).await?.into_inner();
            Ok((answer.keys, answer.next_page_token))
        })
        .await?;
        let keys = Keys { keys };
        output.show(&keys, || {
            keys.keys.iter().map(|key| format!("{}\n", crate::output::printable(key))).collect()
        })
    }
}

/// Delete a secret; its versions are kept.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Path of the secret.
    #[arg(value_parser = parse::path)]
    path: SecretPath,
    /// Delete only if this is the current version.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    if_version: Option<u64>,
}

impl Delete {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let request =
            DeleteRequest { path: self.path.as_str().to_owned(), expected_version: self.if_version };
        to.secrets().delete(request).await?;
        output.note(&format!("deleted {}", self.path))
    }
}

/// List the versions of a secret, without values.
#[derive(Debug, Args)]
pub(crate) struct Versions {
    /// Path of the secret.
    #[arg(value_parser = parse::path)]
    path: SecretPath,
}

#[derive(Serialize)]
struct VersionList {
    versions: Vec<ShownVersion>,
}

#[derive(Serialize)]
struct ShownVersion {
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    #[serde(skip_serializing_if = "String::is_empty")]
    remote_version: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
}

impl From<SecretVersion> for ShownVersion {
    fn from(version: SecretVersion) -> Self {
        ShownVersion {
            state: state_name(version.state()),
            version: Some(version.version).filter(|version| *version > 0),
            remote_version: version.remote_version,
            create_time: wire::time(version.create_time),
        }
    }
}

impl Versions {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let request = ListVersionsRequest { path: self.path.as_str().to_owned() };
        let answer = to.secrets().list_versions(request).await?.into_inner();
        let list = VersionList { versions: answer.versions.into_iter().map(ShownVersion::from).collect() };
        output.show(&list, || {
            let rows = list.versions.iter().map(|version| {
                [
                    version.version.map_or_else(|| "-".to_owned(), |number| number.to_string()),
                    version.remote_version.clone(),
                    version.state.to_owned(),
                    version.create_time.clone().unwrap_or_default(),
                ]
            });
            table(["version", "remote version", "state", "created"], rows)
        })
    }
}

fn state_name(state: SecretState) -> &'static str {
    match state {
        SecretState::Active => State::Active.as_str(),
        SecretState::Disabled => State::Disabled.as_str(),
        SecretState::Deleted => State::Deleted.as_str(),
        SecretState::Destroyed => State::Destroyed.as_str(),
        SecretState::Expired => State::Expired.as_str(),
        SecretState::Unspecified => "unknown",
    }
}
