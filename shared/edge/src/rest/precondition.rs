//! ETags and the conditions that name them.

use http::HeaderValue;
use scaivault_domain::Error;

/// An entity tag in quotes; `None` if the text cannot stand in one.
pub(super) fn quoted(tag: &str) -> Option<HeaderValue> {
    let fits = tag.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    fits.then(|| HeaderValue::try_from(format!("\"{tag}\"")).expect("graphic ASCII fits a header"))
}

/// Whether `If-None-Match` names `etag`, so that the caller has it already.
pub(super) fn is_known(if_none_match: Option<&HeaderValue>, etag: Option<&HeaderValue>) -> bool {
    let (Some(condition), Some(etag)) = (if_none_match.and_then(text), etag.and_then(text)) else {
        return false;
    };
    let weakly = |tag: &str| tag.trim().trim_start_matches("W/") == etag;
    condition.trim() == "*" || condition.split(',').any(weakly)
}

/// The one entity tag of an `If-Match`, without quotes. `None` for `*`.
///
/// # Errors
/// `invalid_request` for weak tags, lists, and what is no tag.
pub(super) fn if_match(value: &HeaderValue) -> Result<Option<&str>, Error> {
    let condition = text(value).unwrap_or_default().trim();
    if condition == "*" {
        return Ok(None);
    }
    let tag = condition
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .filter(|tag| !tag.is_empty() && !tag.contains('"'));
    tag.map(Some).ok_or_else(|| Error::invalid("/If-Match", "is one ETag in quotes, as a GET answers it"))
}

/// The version of a secret that `If-Match` or `If-None-Match: *` expects.
///
/// # Errors
/// `invalid_request` for conditions that do not say which version.
pub(super) fn expected_version(
    if_match: Option<&HeaderValue>,
    if_none_match: Option<&HeaderValue>,
) -> Result<Option<u64>, Error> {
    match (if_match, if_none_match) {
        (None, None) => Ok(None),
        (None, Some(value)) if value.as_bytes() == b"*" => Ok(Some(0)),
        (None, Some(_)) => {
            Err(Error::invalid("/If-None-Match", "is `*` on a write: only if there is no secret"))
        }
        (Some(_), Some(_)) => Err(Error::invalid("/If-None-Match", "does not go together with If-Match")),
        (Some(value), None) => {
            let tag = self::if_match(value)?;
            let digits = tag.and_then(|tag| tag.strip_prefix('v'));
            let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
            let version = digits.and_then(|digits| digits.parse().ok()).filter(|version| *version > 0);
            version
                .map(Some)
                .ok_or_else(|| Error::invalid("/If-Match", "is the ETag of a local secret such as \"v3\""))
        }
    }
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(if_match: &'static str, if_none_match: &'static str) -> Result<Option<u64>, String> {
        let header = |text: &'static str| (!text.is_empty()).then(|| HeaderValue::from_static(text));
        expected_version(header(if_match).as_ref(), header(if_none_match).as_ref())
            .map_err(|mut error| error.violations.remove(0).pointer)
    }

    #[test]
    fn a_condition_says_which_version() {
        assert_eq!(expected("", ""), Ok(None));
        assert_eq!(expected("\"v3\"", ""), Ok(Some(3)));
        assert_eq!(expected("", "*"), Ok(Some(0)));
        for tag in ["v3", "\"v0\"", "\"v\"", "\"v+3\"", "\"3\"", "*", "W/\"v3\"", "\"v3\", \"v4\"", "\"r3\""]
        {
            assert_eq!(expected(tag, ""), Err("/If-Match".to_owned()), "{tag}");
        }
        assert_eq!(expected("", "\"v3\""), Err("/If-None-Match".to_owned()));
        assert_eq!(expected("\"v3\"", "*"), Err("/If-None-Match".to_owned()));
    }

    #[test]
    fn a_reader_is_told_nothing_new_only_if_it_names_the_tag() {
        let known = |condition| is_known(Some(&HeaderValue::from_static(condition)), quoted("v3").as_ref());
        assert!(known("\"v3\"") && known("\"v1\", W/\"v3\"") && known("*"));
        assert!(!known("\"v33\"") && !known("v3"));
        assert!(!is_known(None, quoted("v3").as_ref()));
        assert!(!is_known(Some(&HeaderValue::from_static("*")), None));
        assert!(quoted("a\"b").is_none());
    }
}
