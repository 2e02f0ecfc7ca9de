//! Query parameters: known ones, once each.

use std::borrow::Cow;
use std::time::Duration;

use scaivault_domain::Error;
use scaivault_domain::time::{Timestamp, format_duration, parse_duration};
use url::form_urlencoded;

/// The parameters of a request that were not taken yet.
pub(super) struct Query<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Query<'a> {
    /// Parses a query string.
    ///
    /// # Errors
    /// `invalid_request` for a parameter that is not among `known` or stands twice, naming it.
    pub(super) fn parse(text: &'a str, known: &[&'static str]) -> Result<Self, Error> {
        let mut pairs = Vec::new();
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            if !known.contains(&&*name) {
                return Err(unknown(&name, known));
            }
            if pairs.iter().any(|(earlier, _)| *earlier == name) {
                return Err(Error::invalid(format!("/{name}"), "stands twice in the query"));
            }
            pairs.push((name, value));
        }
        Ok(Query(pairs))
    }

    /// Takes a parameter.
    pub(super) fn text(&mut self, name: &str) -> Option<Cow<'a, str>> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.swap_remove(at).1)
    }

    /// Takes a parameter that is a number of at least 1.
    pub(super) fn number<T: TryFrom<u64>>(&mut self, name: &str) -> Result<Option<T>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let number = Some(&text).filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
        let number = number.and_then(|text| text.parse().ok()).filter(|n: &u64| *n > 0);
        let number = number.and_then(|n| T::try_from(n).ok());
        number.map(Some).ok_or_else(|| Error::invalid(format!("/{name}"), "is a whole number from 1 on"))
    }

    /// Takes a parameter that is `true`, `false`, or left out.
    pub(super) fn flag(&mut self, name: &str) -> Result<Flag, Error> {
        match self.text(name).as_deref() {
            None | Some("false") => Ok(Flag::Off),
            Some("true") => Ok(Flag::On),
            Some(_) => Err(Error::invalid(format!("/{name}"), "is `true` or `false`")),
        }
    }

    /// Takes a parameter that is a time.
    pub(super) fn time(&mut self, name: &str) -> Result<Option<prost_types::Timestamp>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let time = Timestamp::parse(&text).ok_or_else(|| {
            Error::invalid(format!("/{name}"), "is no RFC 3339 time such as 2026-01-01T00:00:00Z")
        })?;
        Ok(Some(prost_types::Timestamp {
            seconds: time.as_millis().div_euclid(1000),
            nanos: i32::try_from(time.as_millis().rem_euclid(1000)).expect("below 1000") * 1_000_000,
        }))
    }

    /// Takes a parameter that is a duration of at most `most`.
    pub(super) fn duration(&mut self, name: &str, most: Duration) -> Result<Option<Duration>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let duration = parse_duration(&text).map_err(str::to_owned);
        let fits = |duration: &Duration| *duration <= most;
        let too_long = || format!("is at most {}", format_duration(most));
        let duration = duration.and_then(|duration| Some(duration).filter(fits).ok_or_else(too_long));
        duration.map(Some).map_err(|detail| Error::invalid(format!("/{name}"), detail))
    }

    /// Takes `page_size` and `page_token`.
    pub(super) fn page(&mut self) -> Result<Page, Error> {
        let size = self.number::<i32>("page_size")?.unwrap_or_default();
        Ok(Page { size, token: self.text("page_token").unwrap_or_default().into_owned() })
    }

    /// Checks that every parameter was taken.
    ///
    /// # Errors
    /// `invalid_request` for one that does not go together with those that were taken.
    pub(super) fn end(self) -> Result<(), Error> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => {
                Err(Error::invalid(format!("/{name}"), "does not go together with the other parameters"))
            }
        }
    }
}

/// A parameter that is there or not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flag {
    On,
    Off,
}

/// Which part of a list.
pub(super) struct Page {
    /// 0 is the service's default.
    pub(super) size: i32,
    /// Empty is the beginning.
    pub(super) token: String,
}

/// The parameters of every list.
pub(super) const PAGE: &[&str] = &["page_size", "page_token"];

fn unknown(name: &str, known: &[&'static str]) -> Error {
    let shown: String = name.chars().take(40).collect();
    let detail = if known.is_empty() {
        "this request takes no query parameters".to_owned()
    } else {
        format!("is no parameter of this request; there are {}", known.join(", "))
    };
    Error::invalid(format!("/{shown}"), detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["version", "list", "page_size", "page_token", "start"];

    fn refused(text: &str) -> String {
        let taken = Query::parse(text, KNOWN).and_then(|mut query| {
            query.number::<u64>("version")?;
            query.flag("list")?;
            query.time("start")?;
            query.page()?;
            query.end()
        });
        taken.expect_err(text).violations.remove(0).pointer
    }

    #[test]
    fn a_wrong_parameter_is_named() {
        for (text, pointer) in [
            ("verzion=1", "/verzion"),
            ("=1", "/"),
            ("version=1&version=2", "/version"),
            ("version=0", "/version"),
            ("version=-1", "/version"),
            ("version=+1", "/version"),
            ("version=99999999999999999999", "/version"),
            ("page_size=4294967296", "/page_size"),
            ("list=yes", "/list"),
            ("list", "/list"),
            ("start=yesterday", "/start"),
        ] {
            assert_eq!(refused(text), pointer, "{text}");
        }
    }

    #[test]
    fn values_are_decoded() {
        let mut query = Query::parse("page_token=a%2Fb%3D&page_size=7&list=true", KNOWN).unwrap();
        let page = query.page().unwrap();
        assert_eq!((page.size, page.token.as_str()), (7, "a/b="));
        assert!(query.flag("list").unwrap() == Flag::On);
        assert!(query.end().is_ok());
    }

    #[test]
    fn times_before_the_epoch_are_times_too() {
        let mut query = Query::parse("start=1969-12-31T23:59:59.5Z", KNOWN).unwrap();
        let time = query.time("start").unwrap().unwrap();
        assert_eq!((time.seconds, time.nanos), (-1, 500_000_000));
    }
}
