//! What the product does. Services take permission as a value and know neither the wire nor its status codes.

mod configuration;
pub mod federation;
pub mod nodes;
pub mod policies;
pub mod secrets;
pub mod tenants;
pub mod testing;
pub mod tokens;

use scaivault_domain::{Error, Reason};

pub use self::configuration::{Configuration, Configurations};
use crate::store::{CommitError, Revision};

/// What a change answers: the thing, and the commit after which it is visible.
#[derive(Clone, Debug)]
pub struct Committed<T> {
    /// What was stored.
    pub value: T,
    /// A node that has applied this revision knows of the change.
    pub revision: Revision,
}

/// A page of a listing.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// In order.
    pub items: Vec<T>,
    /// Where the next page begins; empty on the last.
    pub next: String,
}

/// How many items a page may have.
pub const MAX_PAGE: usize = 1000;

/// Asks for a page.
#[derive(Clone, Debug)]
pub struct PageRequest {
    /// At most this many.
    pub size: usize,
    /// The last item of the page before.
    pub after: Option<String>,
}

impl PageRequest {
    /// Parses `page_size` and `page_token` as the API has them.
    ///
    /// # Errors
    /// `invalid_request`, naming the field.
    pub fn parse(size: i32, token: &str) -> Result<Self, Error> {
        let size = match usize::try_from(size) {
            Ok(0) => 100,
            Ok(size) if size <= MAX_PAGE => size,
            _ => return Err(Error::invalid("/page_size", "is between 1 and 1000")),
        };
        if token.len() > 1024 || token.chars().any(char::is_control) {
            return Err(Error::invalid("/page_token", "is not one that a page gave"));
        }
        Ok(PageRequest { size, after: (!token.is_empty()).then(|| token.to_owned()) })
    }

    /// Cuts what was read with a limit of `size + 1` to a page.
    fn page<T>(&self, mut items: Vec<T>, name: impl Fn(&T) -> String) -> Page<T> {
        let more = items.len() > self.size;
        items.truncate(self.size);
        let next = if more { items.last().map(name).unwrap_or_default() } else { String::new() };
        Page { items, next }
    }
}

/// How often a change is tried again when another change came between reading and committing.
const ATTEMPTS: usize = 16;

/// What a lost race becomes when trying again did not help.
fn contended() -> Error {
    Error::new(Reason::Unavailable, "too many changes at once").next("try again")
}

/// An outcome of a commit: `Ok(None)` means that the race was lost and the change has to be decided again.
fn settle(outcome: Result<Revision, CommitError>) -> Result<Option<Revision>, Error> {
    match outcome {
        Ok(revision) => Ok(Some(revision)),
        Err(CommitError::Precondition(_)) => Ok(None),
        Err(CommitError::Unavailable(error)) => Err(error.into()),
    }
}
