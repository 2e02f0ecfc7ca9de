//! Where a listing goes on. Pure.
//!
//! Key Vault gives an absolute link. Of that the query alone is used, and only if it leads to the vault that was asked:
//! the token goes nowhere else.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use reqwest::Url;

use crate::PageToken;
use crate::error::BackendError;

/// The links of Key Vault have some 400 bytes.
const LONGEST_QUERY: usize = 8 * 1024;
/// A last page is often empty, one in between seldom; so many in a row are a fault.
const MOST_EMPTY_PAGES: u32 = 10;

const FOREIGN_TOKEN: BackendError = BackendError::InvalidConfig("a listing of another kind of store");

/// The next part of a listing, with what tells that it goes in circles.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    /// How many parts were before it.
    page: u32,
    /// How many of the last ones were empty.
    empty: u32,
    /// Of a query that was seen before; another one after twice as many pages, so that no circle is too long for it.
    mark: u64,
    query: String,
}

impl Cursor {
    pub(super) fn parse(PageToken(token): &PageToken) -> Result<Self, BackendError> {
        let mut parts = token.splitn(4, '.');
        let mut part = || parts.next().ok_or(FOREIGN_TOKEN);
        Ok(Cursor {
            page: part()?.parse().map_err(|_| FOREIGN_TOKEN)?,
            empty: part()?.parse().map_err(|_| FOREIGN_TOKEN)?,
            mark: part()?.parse().map_err(|_| FOREIGN_TOKEN)?,
            query: part()?.to_owned(),
        })
    }

    pub(super) fn token(&self) -> PageToken {
        let Cursor { page, empty, mark, query } = self;
        PageToken(format!("{page}.{empty}.{mark}.{query}"))
    }

    /// The query, without the question mark.
    pub(super) fn query(&self) -> &str {
        &self.query
    }

    /// What `link` leads to, which was given with a part of `items` items; that was `asked` for, or was the first one.
    pub(super) fn after(
        asked: Option<&Cursor>,
        items: usize,
        link: &str,
        vault: &Url,
    ) -> Result<Self, BackendError> {
        let link = Url::parse(link).map_err(|_| BackendError::InvalidAnswer("a next page that is no URL"))?;
        // With the port left out or spelled out, as Key Vault does.
        if link.origin() != vault.origin() {
            return Err(BackendError::InvalidAnswer("a next page of another server"));
        }
        let query = link.query().filter(|query| (1..=LONGEST_QUERY).contains(&query.len()));
        let query = query.ok_or(BackendError::InvalidAnswer("a next page that is none"))?.to_owned();
        let (page, empty, mark) = asked.map_or((0, 0, 0), |asked| (asked.page, asked.empty, asked.mark));
        let hash = hash(&query);
        if asked.is_some_and(|asked| asked.query == query || asked.mark == hash) {
            return Err(BackendError::InvalidAnswer("a listing that goes in circles"));
        }
        let empty = if items == 0 { empty + 1 } else { 0 };
        if empty > MOST_EMPTY_PAGES {
            return Err(BackendError::InvalidAnswer("empty pages without end"));
        }
        let page = page.saturating_add(1);
        Ok(Cursor { page, empty, mark: if page.is_power_of_two() { hash } else { mark }, query })
    }
}

fn hash(query: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    query.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vault() -> Url {
        Url::parse("https://acme.vault.azure.net").expect("a URL")
    }

    fn after(asked: Option<&Cursor>, items: usize, link: &str) -> Result<Cursor, BackendError> {
        Cursor::after(asked, items, link, &vault())
    }

    #[test]
    fn a_token_keeps_everything() {
        let first =
            after(None, 25, "https://acme.vault.azure.net:443/secrets?api-version=7.4&$skiptoken=a.b");
        let first = first.expect("the port is the scheme's own");
        assert_eq!(first.query(), "api-version=7.4&$skiptoken=a.b");
        assert_eq!(Cursor::parse(&first.token()), Ok(first));
        for token in ["", "1.2", "a.0.0.q", "-1.0.0.q"] {
            assert_eq!(Cursor::parse(&PageToken(token.to_owned())), Err(FOREIGN_TOKEN), "{token}");
        }
    }

    #[test]
    fn a_link_to_another_server_is_not_followed() {
        for link in [
            "https://acme.vault.azure.net.evil.example/secrets?q",
            "https://acme.vault.azure.net@evil.example/secrets?q",
            "http://acme.vault.azure.net/secrets?q",
            "https://acme.vault.azure.net:8443/secrets?q",
            "https://acme.vault.azure.net/secrets",
            "https://acme.vault.azure.net/secrets?",
            "/secrets?q",
            "",
        ] {
            assert!(matches!(after(None, 25, link), Err(BackendError::InvalidAnswer(_))), "{link}");
        }
        let long = format!("https://acme.vault.azure.net/secrets?{}", "q".repeat(LONGEST_QUERY + 1));
        assert!(after(None, 25, &long).is_err());
    }

    #[test]
    fn circles_are_noticed_whatever_their_length() {
        for (lead, circle) in [(0, 1), (0, 2), (3, 1), (5, 7), (0, 100), (100, 3)] {
            let mut cursor = None;
            let mut pages = 0;
            let error = loop {
                let step = if pages < lead { pages } else { lead + (pages - lead) % circle };
                let link = format!("https://acme.vault.azure.net/secrets?q={step}");
                match after(cursor.as_ref(), 25, &link) {
                    Ok(next) => cursor = Some(next),
                    Err(error) => break error,
                }
                pages += 1;
                assert!(pages < 1000, "a circle of {circle} after {lead}");
            };
            assert_eq!(error, BackendError::InvalidAnswer("a listing that goes in circles"));
        }
    }

    #[test]
    fn empty_pages_end_somewhere() {
        let mut cursor = None;
        for page in 0..MOST_EMPTY_PAGES {
            let link = format!("https://acme.vault.azure.net/secrets?q={page}");
            cursor = Some(after(cursor.as_ref(), 0, &link).expect("a few are borne"));
        }
        let link = "https://acme.vault.azure.net/secrets?q=last";
        assert!(after(cursor.as_ref(), 0, link).is_err());
        assert_eq!(after(cursor.as_ref(), 1, link).map(|next| next.empty), Ok(0));
    }
}
