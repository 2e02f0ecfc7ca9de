//! How old an answer may be, as the caller's `Cache-Control` says (RFC 9111).

use std::time::Duration;

use http::HeaderMap;
use http::header::CACHE_CONTROL;

/// The largest age that can be meant: a larger number counts as this one.
const LONGEST: u64 = 1 << 31;

/// The greatest age that the headers accept. `None` if they do not say; what is malformed says nothing.
pub(super) fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let lines = headers.get_all(CACHE_CONTROL).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(directives).filter_map(age).min().map(Duration::from_secs)
}

/// The parts between commas; a comma in quotes is none.
fn directives(line: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    line.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
}

fn age(directive: &str) -> Option<u64> {
    let (name, value) = match directive.split_once('=') {
        None => (directive.trim(), None),
        Some((name, value)) => (name.trim(), Some(value.trim())),
    };
    match value {
        None if name.eq_ignore_ascii_case("no-cache") => Some(0),
        Some(value) if name.eq_ignore_ascii_case("max-age") => {
            let bare = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value);
            let digits = !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| bare.parse().unwrap_or(LONGEST).min(LONGEST))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn asked(lines: &[&'static str]) -> Option<u64> {
        let headers = lines.iter().map(|line| (CACHE_CONTROL, HeaderValue::from_static(line)));
        max_age(&headers.collect()).map(|age| age.as_secs())
    }

    #[test]
    fn the_strictest_directive_counts() {
        for (lines, age) in [
            (&["max-age=30"][..], 30),
            (&["Max-Age=\"30\""], 30),
            (&["no-cache"], 0),
            (&["NO-CACHE, max-age=30"], 0),
            (&["max-age=60", "no-transform , max-age=30"], 30),
            (&["max-age=0"], 0),
            (&["max-age=99999999999999999999"], LONGEST),
        ] {
            assert_eq!(asked(lines), Some(age), "{lines:?}");
        }
    }

    #[test]
    fn what_is_malformed_or_says_something_else_says_nothing() {
        for line in [
            "",
            "no-store",
            "max-age",
            "max-age=",
            "max-age=-1",
            "max-age=+1",
            "max-age=1.5",
            "max-age=\"1",
            "max-age=soon",
            "max-stale=5",
            "no-cache=\"x\"",
            "ext=\"a, max-age=1\"",
        ] {
            assert_eq!(asked(&[line]), None, "{line}");
        }
        assert_eq!(asked(&[]), None);
    }
}
