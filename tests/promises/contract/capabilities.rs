//! What the stores can have, in one place: what a promise leaves out, it leaves out because it is said here.

use std::fmt::Write as _;

use scaivault_domain::secret::{Kind, State};

use super::{Store, aws, azure, gcp, vault};

/// What a store can have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    /// Its name in the table.
    pub(super) title: &'static str,
    /// How listings are paged.
    pub(super) pages: Pages,
    /// Whether a survey tells versions, so that a sync reads what has changed and nothing else.
    pub(super) surveys: Surveys,
    /// Which versions it keeps.
    pub(super) versions: Versions,
    /// The states that a current version can be in, besides the active one.
    pub(super) states: &'static [State],
    /// What a read says of a secret that was deleted through the adapter.
    pub(super) deleted: Deleted,
    /// The kinds of values that it carries.
    pub(super) kinds: &'static [Kind],
    /// Whether it has values of no bytes.
    pub(super) empty: Empty,
    /// Whether it has JSON objects without keys.
    pub(super) empty_objects: Empty,
    /// Whether an empty listing says that it is one.
    pub(super) no_secrets: NoSecrets,
    /// What becomes of the text of a JSON object.
    pub(super) json: Json,
    /// The largest value, in bytes.
    pub(super) most_bytes: usize,
    /// Leaves that it takes, at the edge of its letters.
    pub(super) good_names: &'static [&'static str],
    /// Leaves that it cannot have.
    pub(super) bad_names: &'static [&'static str],
    /// Where custom metadata is told.
    pub(super) metadata: Told,
    /// One of its metadata that it does not take, with so many keys beside it.
    pub(super) unfit: Unfit,
    /// How a write knows what it comes after.
    pub(super) writes: Writes,
    /// What a refusal closes on the server that the suite runs against.
    pub(super) closes: Closes,
    /// What that server says when the history of a secret is asked for that is not there.
    pub(super) history_of_nobody: HistoryOfNobody,
}

/// How listings are paged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Each page names the next one.
    Tokens {
        /// Secrets in one page, as the server of the suite gives them.
        size: usize,
        /// An empty page with a next one; `{n}` is a number, `{url}` the server.
        empty: &'static str,
    },
    /// The next page begins behind the last name. A page that comes again is then the end: servers that know no pages
    /// give the same names again.
    Names {
        /// Names in one page.
        size: usize,
    },
    /// Everything at once.
    One,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surveys {
    TellVersions,
    TellNames,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Versions {
    /// The current one has no name, and there is no other.
    None,
    /// The current one and the one before it.
    Two,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deleted {
    As(State),
    /// As if it had never been there.
    NotFound,
    /// Nothing can be deleted so that it could be brought back.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Empty {
    Carried,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSecrets {
    /// As an empty list.
    Said,
    /// In JSON of protocol buffers an empty list is left out, so whatever is an object is an empty listing. A sync
    /// deletes nothing for it: that is what its brake is for.
    Unsaid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Json {
    /// Kept byte for byte.
    AsWritten,
    /// Numbers and texts are kept; keys come back in the order of the alphabet.
    Sorted,
    /// The same, and numbers come back as 64-bit floats. Ones that would not be the same are not written.
    SortedAndRounded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    ByReads,
    ByListings,
    /// There is none.
    Never,
}

/// Metadata that a store cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// A key that it does not take.
    Key(&'static str),
    /// A key of so many bytes.
    LongKey(usize),
    /// So many keys.
    Keys(usize),
    /// It has no metadata at all.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writes {
    /// The store itself refuses a write that comes after something else.
    Conditional,
    /// It is found out afterwards: what came in between stays as a version.
    Checked,
    /// Neither is possible, so nothing is written.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closes {
    OneSecret,
    /// All values: the server knows no permissions for single secrets, although the real one does.
    AllSecrets,
    /// The server does not ask who calls.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HistoryOfNobody {
    NotFound,
    /// It breaks, where the real one says not found.
    Breaks,
}

/// A title, and what stands under a store.
type Row = (&'static str, fn(&Capabilities) -> String);

/// The table of the documentation. The server that has no permissions is a stand-in and not in it.
fn table() -> String {
    let stores = [vault::Kv2::CAN, vault::Kv1::CAN, aws::Secrets::CAN, azure::Vault::CAN, gcp::Project::CAN];
    let mut table = String::from("| |");
    for store in &stores {
        write!(table, " {} |", store.title).expect("a text takes everything");
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(stores.len()));
    let rows: [Row; 10] = [
        ("versions", |can| {
            match can.versions {
                Versions::None => "none",
                Versions::Two => "current and previous",
                Versions::All => "all",
            }
            .to_owned()
        }),
        ("states", |can| {
            let states: Vec<_> = can.states.iter().map(|state| state.as_str()).collect();
            if states.is_empty() { "active".to_owned() } else { states.join(", ") }
        }),
        ("values", |can| {
            let kinds: Vec<_> = can.kinds.iter().map(|kind| kind.as_str()).collect();
            kinds.join(", ")
        }),
        ("empty values", |can| if can.empty == Empty::Carried { "yes" } else { "no" }.to_owned()),
        ("text of JSON", |can| {
            match can.json {
                Json::AsWritten => "kept",
                Json::Sorted => "kept, keys sorted",
                Json::SortedAndRounded => "keys sorted, numbers are 64-bit floats",
            }
            .to_owned()
        }),
        ("largest value, bytes", |can| can.most_bytes.to_string()),
        ("custom metadata", |can| {
            match can.metadata {
                Told::ByReads => "told by reads",
                Told::ByListings => "told by listings",
                Told::Never => "none",
            }
            .to_owned()
        }),
        ("a sync reads", |can| {
            if can.surveys == Surveys::TellVersions { "what changed" } else { "everything" }.to_owned()
        }),
        ("writes", |can| {
            match can.writes {
                Writes::Conditional => "refused by the store, if something else came first",
                Writes::Checked => "checked before and after; what came in between stays as a version",
                Writes::Never => "never: the store has no condition and keeps no versions",
            }
            .to_owned()
        }),
        ("after a deletion", |can| match can.deleted {
            Deleted::As(state) => format!("`{}`, can be brought back", state.as_str()),
            Deleted::NotFound => "not found, can be brought back".to_owned(),
            Deleted::Never => "never deleted".to_owned(),
        }),
    ];
    for (title, cell) in rows {
        write!(table, "\n| {title} |").expect("a text takes everything");
        for store in &stores {
            write!(table, " {} |", cell(store)).expect("a text takes everything");
        }
    }
    table.push('\n');
    table
}

#[test]
fn the_documentation_says_what_each_store_can_have() {
    let page = include_str!("../../../docs/backends/README.md");
    let table = table();
    assert!(page.contains(&table), "docs/backends/README.md is to have this table:\n\n{table}");
}
