//! JSON bodies: parsed once, and refused with a pointer to what is wrong, never with a value.

use std::fmt;
use std::marker::PhantomData;

use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::LengthLimitError;
use scaivault_domain::{Error, Reason};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::error::Category;
use serde_path_to_error::Segment;

use crate::error::Refusal;

/// The most bytes of a request's body.
pub(crate) const MAX_BODY: usize = 2 * 1024 * 1024;

/// A whole body whose content type says JSON.
pub(super) struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        if let Some(content_type) = request.headers().get(CONTENT_TYPE)
            && !is_json(content_type.to_str().unwrap_or_default())
        {
            return Err(Error::invalid("/Content-Type", "is not application/json")
                .next("send the header `Content-Type: application/json`")
                .into());
        }
        let too_large = || Error::new(Reason::TooLarge, "a body has at most 2 MiB");
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if announced.and_then(|length| length.parse().ok()).is_some_and(|length: usize| length > MAX_BODY) {
            return Err(too_large().into());
        }
        let bytes = axum::body::to_bytes(request.into_body(), MAX_BODY).await.map_err(|error| {
            let cause = std::error::Error::source(&error);
            if cause.is_some_and(|cause| cause.is::<LengthLimitError>()) {
                too_large()
            } else {
                Error::new(Reason::InvalidRequest, "the body ended too early")
            }
        })?;
        Ok(Body(bytes))
    }
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

impl Body {
    /// The body as `T`.
    ///
    /// # Errors
    /// `invalid_request`, naming the field.
    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Error> {
        parse(&self.0).map_err(|fault| fault.under("", Reason::InvalidRequest))
    }

    /// The body as `T`, or an empty body as if it were `{}`.
    ///
    /// # Errors
    /// `invalid_request`, naming the field.
    pub(super) fn parse_or_empty<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Error> {
        let text: &[u8] = if self.0.is_empty() { b"{}" } else { &self.0 };
        parse(text).map_err(|fault| fault.under("", Reason::InvalidRequest))
    }

    /// The bytes as they were sent.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The part of the body that `text`, which was parsed from it, points to; not copied.
    pub(super) fn slice(&self, text: &str) -> Bytes {
        self.0.slice_ref(text.as_bytes())
    }
}

/// What is wrong with a JSON object.
#[derive(Debug)]
pub(super) struct Fault {
    pointer: String,
    detail: String,
}

impl Fault {
    /// The fault as an error about what lies at `prefix` of the request.
    pub(super) fn under(self, prefix: &str, reason: Reason) -> Error {
        Error::field(reason, format!("{prefix}{}", self.pointer), self.detail)
    }
}

/// Parses a JSON object.
pub(super) fn parse<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, Fault> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let Object(parsed) = serde_path_to_error::deserialize(&mut deserializer).map_err(fault)?;
    deserializer.end().map_err(|error| syntax(&error))?;
    Ok(parsed)
}

/// A struct that is written as an object: what serde derives would take an array of the fields too.
#[derive(serde::Serialize)]
#[serde(transparent)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyMap<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OnlyMap<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(OnlyMap(PhantomData)).map(Object)
    }
}

/// What serde says, without what it quotes of the request: only names of fields are repeated.
fn fault(error: serde_path_to_error::Error<serde_json::Error>) -> Fault {
    let (mut path, error) = (pointer(error.path()), error.into_inner());
    if error.classify() != Category::Data {
        return syntax(&error);
    }
    let message = error.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    let quoted = |prefix: &str| {
        let rest = message.strip_prefix(prefix)?.strip_prefix(" `")?;
        // The name is the caller's and may hold anything, a backtick too; what follows it is ours.
        let end = rest.rfind("`, expected ").or_else(|| rest.rfind("`, there are no fields"));
        let name = &rest[..end.unwrap_or(rest.len().saturating_sub(1))];
        Some(name.chars().take(60).collect::<String>())
    };
    let mut at = |name: &str| {
        let last = format!("/{}", escape(name));
        if !path.ends_with(&last) {
            path.push_str(&last);
        }
    };
    let detail = if let Some(name) = quoted("missing field") {
        at(&name);
        "is required".to_owned()
    } else if let Some(name) = quoted("duplicate field") {
        at(&name);
        "stands twice".to_owned()
    } else if let Some(name) = quoted("unknown field") {
        at(&name);
        match message.rsplit_once("`, expected ") {
            Some((_, known)) => format!("is no field here; there is {}", known.trim_start_matches("one of ")),
            None => "is no field here".to_owned(),
        }
    } else if let Some((_, expected)) = message.rsplit_once(", expected ") {
        format!("is not {}", in_json(expected))
    } else {
        message.to_owned()
    };
    Fault { pointer: path, detail }
}

fn syntax(error: &serde_json::Error) -> Fault {
    let detail = format!("the body is no JSON from line {} column {} on", error.line(), error.column());
    Fault { pointer: String::new(), detail }
}

/// What serde calls a type, in the words of JSON.
fn in_json(expected: &str) -> String {
    match expected {
        "a map" | "struct" => "an object".to_owned(),
        "a sequence" => "an array".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "i32" | "i64" => "a whole number".to_owned(),
        "a nonzero u32" => "a whole number from 1 on".to_owned(),
        "a borrowed string" => "a string".to_owned(),
        other => other.to_owned(),
    }
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => {
                pointer.push('/');
                pointer.push_str(&escape(key));
            }
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    pointer
}

/// A key in a JSON pointer (RFC 6901), cut to a sensible length.
fn escape(key: &str) -> String {
    key.chars().take(60).collect::<String>().replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[expect(dead_code, reason = "only parsed")]
        name: String,
        #[serde(default)]
        #[expect(dead_code, reason = "only parsed")]
        inner: Vec<Inner>,
        #[serde(default)]
        #[expect(dead_code, reason = "only parsed")]
        labels: BTreeMap<String, String>,
    }

    type Inner = Checked;

    #[derive(Debug)]
    struct Checked;

    impl<'de> Deserialize<'de> for Checked {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            #[derive(serde::Deserialize)]
            #[serde(deny_unknown_fields)]
            struct Fields {
                #[serde(rename = "size")]
                _size: u32,
            }
            Object::<Fields>::deserialize(deserializer).map(|_| Checked)
        }
    }

    #[test]
    fn what_is_wrong_is_pointed_at_and_never_quoted() {
        for (text, pointer, detail) in [
            ("", "", "the body is no JSON from line 1 column 0 on"),
            ("{", "", "the body is no JSON from line 1 column 1 on"),
            (r#"{"name":"a"} canary"#, "", "the body is no JSON from line 1 column 14 on"),
            (r#"["canary"]"#, "", "is not an object"),
            (r#""canary""#, "", "is not an object"),
            ("{}", "/name", "is required"),
            (r#"{"name":7}"#, "/name", "is not a string"),
            (r#"{"name":"canary","name":"b"}"#, "/name", "stands twice"),
            (
                r#"{"name":"a","x/y":"canary"}"#,
                "/x~1y",
                "is no field here; there is `name`, `inner`, `labels`",
            ),
            (r#"{"name":"a","inner":{}}"#, "/inner", "is not an array"),
            (r#"{"name":"a","inner":[{"size":1},[1]]}"#, "/inner/1", "is not an object"),
            (
                r#"{"name":"a","inner":[{"size":"canary, expected a"}]}"#,
                "/inner/0/size",
                "is not a whole number",
            ),
            (r#"{"name":"a","inner":[{"size":-1}]}"#, "/inner/0/size", "is not a whole number"),
            (r#"{"name":"a","inner":[{}]}"#, "/inner/0/size", "is required"),
            (
                r#"{"name":"a","inner":[{"size":1,"more":1}]}"#,
                "/inner/0/more",
                "is no field here; there is `size`",
            ),
            (r#"{"name":"a","labels":{"k":{"canary":1}}}"#, "/labels/k", "is not a string"),
        ] {
            let fault = parse::<Outer>(text.as_bytes()).expect_err(text);
            assert_eq!((fault.pointer.as_str(), fault.detail.as_str()), (pointer, detail), "{text}");
        }
    }

    #[test]
    fn json_has_many_content_types() {
        for text in ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"] {
            assert!(is_json(text), "{text}");
        }
        for text in
            ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "text/x+json"]
        {
            assert!(!is_json(text), "{text}");
        }
    }
}
