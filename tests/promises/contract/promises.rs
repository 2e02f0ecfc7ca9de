//! The promises. Each gets an empty store of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::stream::{StreamExt as _, TryStreamExt as _, iter};
use scaivault_backends::guard::BreakerState;
use scaivault_backends::{Backend, BackendError, Class, Expected, SecretBackend as _};
use scaivault_domain::Reason;
use scaivault_domain::backend::Endpoint;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State};
use scaivault_tests::http_faults::Fault;
use scaivault_tests::ports;
use tokio::time::Instant;

use super::capabilities::{
    Closes, Deleted, Empty, HistoryOfNobody, Json, NoSecrets, Pages, Surveys, Told, Unfit, Versions, Writes,
};
use super::{Connected, Store, egress, to_write};

/// An object that every store has.
const VALUE: &[u8] = br#"{"user":"app"}"#;
/// One that shows who reads JSON and writes it anew, and the same with its keys in order.
const KEYS: (&[u8], &[u8]) = (
    br#"{"user":"b\u00fccher","n":[9007199254740992,-0.5],"in":{"z":null,"a":[true]}}"#,
    br#"{"in":{"a":[true],"z":null},"n":[9007199254740992,-0.5],"user":"b\u00fccher"}"#,
);
/// Numbers that no 64-bit float is, and what such ones make of them.
const NUMBERS: (&[u8], &[u8]) = (
    br#"{"f":1.10,"n":123456789012345678901234567890,"next":9007199254740993}"#,
    br#"{"f":1.1,"n":1.2345678901234568e+29,"next":9007199254740992}"#,
);
/// The most calls that a listing without an end may take.
const BOUND: usize = 80;

fn numbered(number: usize) -> Vec<u8> {
    format!(r#"{{"n":{number}}}"#).into_bytes()
}

fn metadata(pairs: &[(&str, &str)]) -> Metadata {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// The version that is there now, as a write expects it.
async fn base<S: Store>(at: &Connected<S>, leaf: &str) -> Result<String> {
    Ok(at.read(leaf).await?.remote_version)
}

/// Whether an answer says that the secret is gone, for which a sync would delete it here.
fn says_gone<T>(answer: &Result<T, BackendError>) -> bool {
    matches!(answer, Err(BackendError::NotFound | BackendError::NotActive(State::Deleted | State::Destroyed)))
}

/// The promise of a store that takes no writes: it says so, and nothing changes.
async fn refuses_to_write<S: Store>(at: &Connected<S>) -> Result<()> {
    at.store.put("kept", VALUE, Kind::Json).await?;
    for expected in [Expected::Absent, Expected::Version("1".to_owned()), Expected::Version(String::new())] {
        let refused = at.write("kept", &to_write(b"{}", Kind::Json, expected)).await;
        assert!(matches!(refused, Err(BackendError::Unsupported(_))), "{refused:?}");
    }
    let refused = at.delete("kept", "").await;
    assert!(matches!(refused, Err(BackendError::Unsupported(_))), "{refused:?}");
    assert_eq!(at.read("kept").await?.value.expose(), VALUE);
    Ok(())
}

/// What a store makes of a value.
fn kept<S: Store>(value: &'static [u8]) -> &'static [u8] {
    match S::CAN.json {
        Json::Sorted | Json::SortedAndRounded if value == KEYS.0 => KEYS.1,
        Json::SortedAndRounded if value == NUMBERS.0 => NUMBERS.1,
        _ => value,
    }
}

/// One value of every kind that the store carries.
fn values<S: Store>() -> Vec<(&'static str, &'static [u8], Kind)> {
    let mut values: Vec<(&str, &[u8], Kind)> = vec![
        ("keys", KEYS.0, Kind::Json),
        ("numbers", NUMBERS.0, Kind::Json),
        ("text", "pl\u{e4}in \"text\"\n".as_bytes(), Kind::Text),
        ("list", b"[1,2]", Kind::Text),
        ("twice", br#"{"a":1,"a":2}"#, Kind::Text),
        ("bytes", b"\xff\x00\xfe", Kind::Binary),
    ];
    if S::CAN.empty == Empty::Carried {
        values.push(("empty", b"", Kind::Text));
    }
    if S::CAN.empty_objects == Empty::Carried {
        values.push(("nothing", b"{}", Kind::Json));
    }
    values.retain(|(_, _, kind)| S::CAN.kinds.contains(kind));
    values
}

pub(super) async fn a_listing_names_every_secret_once_however_many_pages_there_are<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    let (size, is_paged) = match S::CAN.pages {
        Pages::Tokens { size, .. } | Pages::Names { size } => (size, true),
        Pages::One => (10, false),
    };
    let leaves: Vec<String> = (0..2 * size + 3).map(|number| format!("s{number:05}")).collect();
    let puts = leaves.iter().map(|leaf| at.store.put(leaf, VALUE, Kind::Json));
    iter(puts).buffer_unordered(S::AT_ONCE).try_collect::<()>().await?;
    let (entries, pages) = at.list().await?;
    ensure!(pages == if is_paged { 3 } else { 1 }, "{pages} pages");
    let found: BTreeSet<_> = entries.iter().map(|entry| entry.name.as_str().to_owned()).collect();
    let expected: BTreeSet<_> = leaves.iter().map(|leaf| at.name(leaf).as_str().to_owned()).collect();
    assert_eq!(entries.len(), expected.len());
    assert_eq!(found, expected);
    let surveyed = at.survey().await?;
    assert_eq!(surveyed.len(), expected.len());
    assert!(surveyed.iter().map(|secret| secret.name.as_str()).eq(expected.iter().map(String::as_str)));
    Ok(())
}

pub(super) async fn a_survey_finds_what_is_there_with_the_tokens_of_reads<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    assert_eq!(at.survey().await?, []);
    for leaf in ["a", "b", "c"] {
        at.store.put(leaf, VALUE, Kind::Json).await?;
    }
    at.store.put("b", &numbered(2), Kind::Json).await?;
    let described = metadata(&[("team", "core")]);
    if S::CAN.metadata != Told::Never {
        at.store.describe("c", &described).await?;
    }
    at.store.settle();
    let surveyed = at.survey().await?;
    let names: Vec<_> = surveyed.iter().map(|secret| secret.name.clone()).collect();
    assert_eq!(names, ["a", "b", "c"].map(|leaf| at.name(leaf)));
    for (secret, leaf) in surveyed.into_iter().zip(["a", "b", "c"]) {
        let mut read = at.read(leaf).await?;
        // As a sync does: what reads do not tell, the listing told.
        read.metadata = read.metadata.or(secret.metadata);
        let (seen, told) = (secret.seen.map(|seen| (seen.token, seen.state)), read.seen());
        assert_eq!(seen, told.map(|seen| (seen.token, seen.state)), "{leaf}");
        assert_eq!(seen.is_some(), S::CAN.surveys == Surveys::TellVersions, "{leaf}");
    }
    Ok(())
}

pub(super) async fn tokens_change_with_values_metadata_and_states<S: Store>(at: Connected<S>) -> Result<()> {
    let token = async || {
        at.store.settle();
        let seen = at.surveyed("a").await?.context("it is there")?.seen;
        Ok::<_, anyhow::Error>(seen.map(|seen| (seen.token, seen.state)))
    };
    at.store.put("a", VALUE, Kind::Json).await?;
    let first = token().await?;
    assert_eq!(first, token().await?, "nothing changed");
    if S::CAN.surveys == Surveys::TellNames {
        assert_eq!(first, None);
        return Ok(());
    }
    at.store.put("a", &numbered(2), Kind::Json).await?;
    let second = token().await?;
    at.store.describe("a", &metadata(&[("team", "core")])).await?;
    let described = token().await?;
    assert!(first != second && second != described, "{first:?} {second:?} {described:?}");
    for state in S::CAN.states {
        let leaf = state.as_str();
        at.store.put(leaf, VALUE, Kind::Json).await?;
        at.store.change(leaf, *state).await?;
        at.store.settle();
        // Listings may leave out what is deleted; what they name, they name with its state.
        if let Some(seen) = at.surveyed(leaf).await?.and_then(|secret| secret.seen) {
            assert_eq!(seen.state, *state);
        }
    }
    Ok(())
}

pub(super) async fn values_come_back_as_they_are<S: Store>(at: Connected<S>) -> Result<()> {
    for (leaf, value, kind) in values::<S>() {
        at.store.put(leaf, value, kind).await?;
        let read = at.read(leaf).await?;
        assert_same_text(read.value.expose(), kept::<S>(value), leaf);
        assert_eq!(read.kind, kind, "{leaf}");
    }
    Ok(())
}

/// A letter may be written as itself or by its number; nothing else may differ.
fn assert_same_text(found: &[u8], expected: &[u8], leaf: &str) {
    let plain = |bytes: &[u8]| match String::from_utf8(bytes.to_vec()) {
        Ok(text) => text.replace("\\u00fc", "\u{fc}").into_bytes(),
        Err(error) => error.into_bytes(),
    };
    let shown = String::from_utf8_lossy(found);
    assert_eq!(plain(found), plain(expected), "{leaf}: {shown}");
}

pub(super) async fn values_are_written_as_they_are<S: Store>(at: Connected<S>) -> Result<()> {
    if S::CAN.writes == Writes::Never {
        return refuses_to_write(&at).await;
    }
    for (leaf, value, kind) in values::<S>() {
        let write = to_write(value, kind, Expected::Absent);
        if value == NUMBERS.0 && S::CAN.json == Json::SortedAndRounded {
            let refused = at.write(leaf, &write).await;
            assert!(matches!(refused, Err(BackendError::Unsupported(_))), "{refused:?}");
            continue;
        }
        let written = at.write(leaf, &write).await?;
        let (read, expected) = (at.read(leaf).await?, kept::<S>(value));
        assert_same_text(read.value.expose(), expected, leaf);
        assert_eq!((read.kind, read.remote_version), (kind, written.remote_version), "{leaf}");
        assert_eq!(written.metadata, None, "{leaf}");
        let version = base(&at, leaf).await?;
        let again = to_write(value, kind, Expected::Version(version.clone()));
        let second = at.write(leaf, &again).await?;
        assert_ne!(second.remote_version, version, "{leaf}");
        assert_same_text(at.read(leaf).await?.value.expose(), expected, leaf);
    }
    Ok(())
}

pub(super) async fn what_a_store_cannot_carry_is_refused_before_it_is_sent<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    if S::CAN.writes == Writes::Never {
        return refuses_to_write(&at).await;
    }
    let examples =
        [("an object", VALUE, Kind::Json), ("text", b"text", Kind::Text), ("bytes", b"\xff", Kind::Binary)];
    let mut refused: Vec<_> =
        examples.into_iter().filter(|(_, _, kind)| !S::CAN.kinds.contains(kind)).collect();
    if S::CAN.empty == Empty::Refused {
        refused.push(("nothing", b"", Kind::Text));
    }
    for (what, value, kind) in refused {
        let outcome = at.write("a", &to_write(value, kind, Expected::Absent)).await;
        assert!(matches!(outcome, Err(BackendError::Unsupported(_))), "{what}: {outcome:?}");
    }
    assert_eq!(at.proxy.requests(), [] as [String; 0]);
    Ok(())
}

/// An object of so many bytes.
fn sized(bytes: usize) -> Vec<u8> {
    let around = br#"{"v":""}"#.len();
    format!(r#"{{"v":"{}"}}"#, "x".repeat(bytes - around)).into_bytes()
}

pub(super) async fn sizes_are_checked_before_anything_is_sent<S: Store>(at: Connected<S>) -> Result<()> {
    let most = S::CAN.most_bytes;
    let value = sized(most);
    if S::CAN.writes == Writes::Never {
        at.store.put("large", &value, Kind::Json).await?;
    } else {
        let large = to_write(&sized(most + 1), Kind::Json, Expected::Absent);
        assert_eq!(at.write("large", &large).await, Err(BackendError::ValueTooLarge { most }));
        assert_eq!(at.proxy.requests(), [] as [String; 0]);
        at.write("large", &to_write(&value, Kind::Json, Expected::Absent)).await?;
    }
    assert_eq!(at.read("large").await?.value.expose(), value);
    Ok(())
}

pub(super) async fn names_at_the_edge_work_and_beyond_it_nothing_is_sent<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    for leaf in S::CAN.good_names {
        at.store.put(leaf, VALUE, Kind::Json).await?;
        assert_eq!(at.read(leaf).await?.value.expose(), VALUE, "{leaf}");
    }
    let longest = at.store.longest();
    let leaf = longest.as_str().rsplit('/').next().context("a leaf")?;
    at.store.put(leaf, VALUE, Kind::Json).await?;
    assert_eq!(at.backend.read(&at.lease, &longest).await?.value.expose(), VALUE);
    let mut found: Vec<_> = at.survey().await?.into_iter().map(|secret| secret.name).collect();
    let mut expected: Vec<_> = S::CAN.good_names.iter().map(|leaf| at.name(leaf)).chain([longest]).collect();
    found.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    expected.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    assert_eq!(found, expected);
    let before = at.proxy.requests().len();
    for leaf in S::CAN.bad_names {
        let write = to_write(VALUE, Kind::Json, Expected::Absent);
        let outcomes = [
            at.read(leaf).await.err(),
            at.history(leaf).await.err(),
            at.may_read(leaf).await.err(),
            at.write(leaf, &write).await.err(),
            at.delete(leaf, "1").await.err(),
        ];
        for outcome in outcomes {
            let is_refused =
                matches!(outcome, Some(BackendError::Unrepresentable | BackendError::Unsupported(_)));
            assert!(is_refused, "{leaf:?}: {outcome:?}");
        }
    }
    assert_eq!(at.proxy.requests().len(), before);
    Ok(())
}

pub(super) async fn what_is_not_there_is_not_found<S: Store>(at: Connected<S>) -> Result<()> {
    assert_eq!(at.read("nobody").await.err(), Some(BackendError::NotFound));
    let history = match S::CAN.history_of_nobody {
        HistoryOfNobody::NotFound => BackendError::NotFound,
        HistoryOfNobody::Breaks => BackendError::Server { status: 500 },
    };
    assert_eq!(at.history("nobody").await.err(), Some(history));
    for version in ["1", "", "latest", "00000000000000000000000000000009", "../a"] {
        assert_eq!(
            at.read_version("nobody", version).await.err(),
            Some(BackendError::NotFound),
            "{version:?}"
        );
    }
    assert_eq!(at.list().await?.0, []);
    at.probe().await?;
    Ok(())
}

pub(super) async fn versions_are_told_oldest_first_and_read_by_name<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    for number in 1..=3 {
        at.store.put("a", &numbered(number), Kind::Json).await?;
        at.store.settle();
    }
    let history = at.history("a").await?;
    let kept = match S::CAN.versions {
        Versions::None => 1,
        Versions::Two => 2,
        Versions::All => 3,
    };
    assert_eq!(history.len(), kept);
    assert!(history.iter().all(|version| version.state == State::Active));
    let current = base(&at, "a").await?;
    assert_eq!(history.last().map(|version| &version.remote_version), Some(&current));
    assert!(history.is_sorted_by_key(|version| version.created));
    if S::CAN.versions == Versions::None {
        assert_eq!(current, "");
        assert_eq!(at.read_version("a", "1").await.err(), Some(BackendError::NotFound));
        return Ok(());
    }
    for (version, number) in history.iter().zip(4 - kept..) {
        let read = at.read_version("a", &version.remote_version).await?;
        assert_eq!(read.value.expose(), numbered(number));
        assert_eq!(read.remote_version, version.remote_version);
    }
    for version in ["0", "99", "latest", "current", "00000000000000000000000000000009", "../b"] {
        assert_eq!(at.read_version("a", version).await.err(), Some(BackendError::NotFound), "{version}");
    }
    Ok(())
}

pub(super) async fn states_are_states_and_never_values<S: Store>(at: Connected<S>) -> Result<()> {
    for state in S::CAN.states {
        let leaf = state.as_str();
        at.store.put(leaf, VALUE, Kind::Json).await?;
        let version = base(&at, leaf).await?;
        at.store.change(leaf, *state).await?;
        at.store.settle();
        // Azure shows a deleted secret nowhere but in a place of its own.
        let is_hidden = *state == State::Deleted && S::CAN.deleted == Deleted::NotFound;
        let expected = if is_hidden { BackendError::NotFound } else { BackendError::NotActive(*state) };
        assert_eq!(at.read(leaf).await.err(), Some(expected), "{leaf}");
        match at.history(leaf).await {
            Ok(history) => {
                let last = history.last().context("a version")?;
                assert_eq!((&last.remote_version, last.state), (&version, *state), "{leaf}");
            }
            Err(error) => assert!(says_gone::<()>(&Err(error.clone())), "{leaf}: {error}"),
        }
        let by_version = at.read_version(leaf, &version).await;
        assert!(
            matches!(by_version, Err(BackendError::NotActive(_) | BackendError::NotFound)),
            "{leaf}: {by_version:?}"
        );
    }
    Ok(())
}

/// The custom metadata of a secret, from wherever the store tells it.
async fn told<S: Store>(at: &Connected<S>, leaf: &str) -> Result<Option<Metadata>> {
    Ok(match S::CAN.metadata {
        Told::ByReads => at.read(leaf).await?.metadata,
        Told::ByListings => at.surveyed(leaf).await?.context("it is there")?.metadata,
        Told::Never => at.read(leaf).await?.metadata.filter(|metadata| !metadata.is_empty()),
    })
}

pub(super) async fn metadata_is_read<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    if S::CAN.metadata == Told::Never {
        assert_eq!(told(&at, "a").await?, None);
        return Ok(());
    }
    assert_eq!(told(&at, "a").await?, Some(Metadata::new()));
    let described = metadata(&[("team", "core"), ("cost-center", "42")]);
    at.store.describe("a", &described).await?;
    assert_eq!(told(&at, "a").await?, Some(described));
    Ok(())
}

pub(super) async fn metadata_is_written_with_the_value<S: Store>(at: Connected<S>) -> Result<()> {
    if S::CAN.writes == Writes::Never {
        return refuses_to_write(&at).await;
    }
    let mut expected = Expected::Absent;
    for wanted in [
        metadata(&[("team", "core"), ("owner", "ops")]),
        metadata(&[("team", "Core Team"), ("stage", "prod")]),
        metadata(&[]),
    ] {
        let write = to_write(VALUE, Kind::Json, expected);
        let written = at.write("a", &super::RemoteWrite { metadata: wanted.clone(), ..write }).await?;
        assert_eq!(written.metadata, None, "{wanted:?}");
        assert_eq!(told(&at, "a").await?, Some(wanted));
        expected = Expected::Version(written.remote_version);
    }
    Ok(())
}

pub(super) async fn metadata_that_does_not_fit_is_told_and_the_value_is_written<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    let mut wanted = metadata(&[("team", "core")]);
    match S::CAN.unfit {
        Unfit::Key(key) => drop(wanted.insert(key.to_owned(), "1".to_owned())),
        Unfit::LongKey(bytes) => drop(wanted.insert("k".repeat(bytes), "1".to_owned())),
        Unfit::Keys(most) => wanted.extend((0..most).map(|key| (format!("z{key:03}"), "1".to_owned()))),
        Unfit::Nothing => return refuses_to_write(&at).await,
    }
    let write = to_write(VALUE, Kind::Json, Expected::Absent);
    let written = at.write("a", &super::RemoteWrite { metadata: wanted, ..write }).await?;
    assert!(matches!(written.metadata, Some(BackendError::Unsupported(_))), "{written:?}");
    assert_eq!(at.read("a").await?.value.expose(), VALUE);
    let there = told(&at, "a").await?.context("it has some")?;
    assert_eq!(there.get("team").map(String::as_str), Some("core"), "what fits is there");
    Ok(())
}

/// Whether a value is still there, as the current version or as one before it.
async fn is_kept<S: Store>(at: &Connected<S>, leaf: &str, value: &[u8]) -> Result<bool> {
    for version in at.history(leaf).await? {
        if at.read_version(leaf, &version.remote_version).await.is_ok_and(|read| read.value.expose() == value)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) async fn a_write_is_done_only_where_nothing_else_came_first<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    if S::CAN.writes == Writes::Never {
        return refuses_to_write(&at).await;
    }
    let lost = Err(BackendError::PreconditionLost);
    at.store.put("a", &numbered(1), Kind::Json).await?;
    assert_eq!(at.write("a", &to_write(b"{}", Kind::Json, Expected::Absent)).await, lost);
    let first = base(&at, "a").await?;
    at.store.put("a", &numbered(2), Kind::Json).await?;
    let stale = to_write(b"{}", Kind::Json, Expected::Version(first.clone()));
    assert_eq!(at.write("a", &stale).await, lost);
    assert!(is_kept(&at, "a", &numbered(2)).await?);
    assert_eq!(at.write("nobody", &to_write(b"{}", Kind::Json, Expected::Version(first))).await, lost);
    assert_eq!(at.read("nobody").await.err(), Some(BackendError::NotFound));
    for nonsense in ["", "0", "-1", "latest", "../a"] {
        let write = to_write(b"{}", Kind::Json, Expected::Version(nonsense.to_owned()));
        assert_eq!(at.write("a", &write).await, lost, "{nonsense:?}");
    }
    let third = to_write(&numbered(3), Kind::Json, Expected::Version(base(&at, "a").await?));
    let written = at.write("a", &third).await?;
    let read = at.read("a").await?;
    assert_eq!((read.value.expose(), read.remote_version), (&*numbered(3), written.remote_version));
    assert!(is_kept(&at, "a", &numbered(2)).await?);
    Ok(())
}

pub(super) async fn a_write_that_is_made_again_makes_no_second_version<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    if S::CAN.writes == Writes::Never {
        return refuses_to_write(&at).await;
    }
    let mut expected = Expected::Absent;
    for number in 1..=2 {
        let write = to_write(&numbered(number), Kind::Json, expected.clone());
        let written = at.write("a", &write).await?;
        let again = at.write("a", &write).await;
        assert!(again == Ok(written.clone()) || again == Err(BackendError::PreconditionLost), "{again:?}");
        assert_eq!(at.history("a").await?.len(), number);
        assert_eq!(base(&at, "a").await?, written.remote_version);
        expected = Expected::Version(written.remote_version);
    }
    Ok(())
}

pub(super) async fn a_deletion_is_soft_and_of_the_expected_version_only<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    let gone = match S::CAN.deleted {
        Deleted::Never => return refuses_to_write(&at).await,
        Deleted::NotFound => BackendError::NotFound,
        Deleted::As(state) => BackendError::NotActive(state),
    };
    at.store.put("a", &numbered(1), Kind::Json).await?;
    let first = base(&at, "a").await?;
    at.store.put("a", &numbered(2), Kind::Json).await?;
    for stale in [&*first, "", "99"] {
        assert_eq!(at.delete("a", stale).await, Err(BackendError::PreconditionLost), "{stale:?}");
    }
    assert_eq!(at.read("a").await?.value.expose(), numbered(2));
    let second = base(&at, "a").await?;
    at.delete("a", &second).await?;
    assert_eq!(at.read("a").await.err(), Some(gone));
    let again = at.delete("a", &second).await;
    assert!(again.is_ok() || says_gone(&again), "{again:?}");
    at.store.restore("a").await?;
    assert_eq!(at.read("a").await?.value.expose(), numbered(2));
    assert_eq!(at.delete("nobody", "1").await, Err(BackendError::NotFound));
    Ok(())
}

pub(super) async fn one_closed_secret_does_not_close_the_others<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("open", VALUE, Kind::Json).await?;
    at.store.put("closed", VALUE, Kind::Json).await?;
    at.store.forbid("closed").await?;
    if S::CAN.closes == Closes::Nothing {
        return Ok(at.read("closed").await.map(drop)?);
    }
    assert_eq!(at.read("closed").await.err(), Some(BackendError::Forbidden));
    assert_eq!(at.may_read("closed").await, Err(BackendError::Forbidden));
    let open = at.read("open").await.err();
    assert_eq!(open, (S::CAN.closes == Closes::AllSecrets).then_some(BackendError::Forbidden));
    at.probe().await?;
    let names: Vec<_> = at.survey().await?.into_iter().map(|secret| secret.name).collect();
    assert_eq!(names, ["closed", "open"].map(|leaf| at.name(leaf)), "it is still named");
    Ok(())
}

pub(super) async fn a_closed_listing_is_no_empty_one<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    at.store.forbid_listing().await?;
    if S::CAN.closes == Closes::Nothing {
        return Ok(());
    }
    assert_eq!(at.list().await.err(), Some(BackendError::Forbidden));
    assert_eq!(at.survey().await.err(), Some(BackendError::Forbidden));
    assert_eq!(at.read("a").await?.value.expose(), VALUE, "reading by name needs no listing");
    at.probe().await?;
    Ok(())
}

pub(super) async fn whether_a_value_may_be_read_is_found_out_without_reading_it<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    at.may_read("a").await?;
    // Permission is asked about, not existence.
    at.may_read("nobody").await?;
    let read = at.read("a").await?;
    let requests = at.proxy.requests();
    let last = requests.last().context("a read")?;
    let same = requests.iter().filter(|request| *request == last).count();
    // All calls of AWS have one path.
    assert!(same == 1 || last == "POST /", "{requests:?} {read:?}");
    Ok(())
}

pub(super) async fn a_probe_is_one_call<S: Store>(at: Connected<S>) -> Result<()> {
    at.probe().await?;
    assert_eq!(at.proxy.requests().len(), 1, "{:?}", at.proxy.requests());
    Ok(())
}

pub(super) async fn a_lease_that_ended_says_so<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    let version = base(&at, "a").await?;
    at.probe().await?;
    at.store.revoke().await?;
    if S::CAN.closes == Closes::Nothing {
        return Ok(());
    }
    // For a moment, what is known of a token is believed.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let ended = Some(BackendError::LoginExpired);
    assert_eq!(at.read("a").await.err(), ended);
    assert_eq!(at.list().await.err(), ended);
    assert_eq!(at.survey().await.err(), ended);
    assert_eq!(at.history("a").await.err(), ended);
    assert_eq!(at.may_read("a").await.err(), ended);
    assert_eq!(at.probe().await.err(), ended);
    if S::CAN.writes != Writes::Never {
        let write = to_write(b"{}", Kind::Json, Expected::Version(version.clone()));
        assert_eq!(at.write("a", &write).await.err(), ended);
        assert_eq!(at.delete("a", &version).await.err(), ended);
    }
    Ok(())
}

/// Every call, and what came of it.
async fn calls<S: Store>(
    at: &Connected<S>,
    version: &str,
) -> BTreeMap<&'static str, Result<(), BackendError>> {
    let new = to_write(b"{}", Kind::Json, Expected::Absent);
    let next = to_write(b"{}", Kind::Json, Expected::Version(version.to_owned()));
    let mut calls = BTreeMap::from([
        ("read", at.read("a").await.map(drop)),
        ("history", at.history("a").await.map(drop)),
        ("list", at.list().await.map(drop)),
        ("survey", at.survey().await.map(drop)),
        ("may_read", at.may_read("a").await),
        ("probe", at.probe().await),
    ]);
    if S::CAN.versions != Versions::None {
        calls.insert("read_version", at.read_version("a", version).await.map(drop));
    }
    if S::CAN.writes != Writes::Never {
        calls.insert("create", at.write("new", &new).await.map(drop));
        calls.insert("update", at.write("a", &next).await.map(drop));
        calls.insert("delete", at.delete("a", version).await);
    }
    calls
}

/// Asserts of every call that it failed like this, and that afterwards everything is as it was.
async fn all_fail<S: Store>(
    at: &Connected<S>,
    fault: Fault,
    fails: impl Fn(&BackendError) -> bool,
) -> Result<()> {
    at.proxy.set(Fault::Pass);
    if at.read("a").await.is_err() {
        at.store.put("a", VALUE, Kind::Json).await?;
    }
    let version = base(at, "a").await?;
    at.proxy.set(fault.clone());
    for (call, outcome) in calls(at, &version).await {
        ensure!(outcome.as_ref().is_err_and(&fails), "{fault:?}: {call}: {outcome:?}");
    }
    at.proxy.set(Fault::Pass);
    assert_eq!(base(at, "a").await?, version);
    assert_eq!(at.read("new").await.err(), Some(BackendError::NotFound));
    Ok(())
}

pub(super) async fn faults_of_the_server_are_told_apart<S: Store>(at: Connected<S>) -> Result<()> {
    for status in [500, 502, 503] {
        all_fail(&at, Fault::Status(status), |error| *error == BackendError::Server { status }).await?;
    }
    for retry_after in [None, Some(7)] {
        let expected = retry_after.map(|seconds| Duration::from_secs(seconds.into()));
        let is_told = |error: &BackendError| *error == BackendError::Throttled { retry_after: expected };
        all_fail(&at, Fault::Throttled { retry_after }, is_told).await?;
    }
    Ok(())
}

pub(super) async fn what_is_not_the_protocol_is_no_answer<S: Store>(at: Connected<S>) -> Result<()> {
    let nonsense = |error: &BackendError| matches!(error, BackendError::InvalidAnswer(_));
    for fault in [Fault::Garbage, Fault::Page(200), Fault::Redirect("http://127.0.0.1:1/".to_owned())] {
        all_fail(&at, fault, nonsense).await?;
    }
    // An answer that breaks off may not be told from a connection that does. What was asked may have been done.
    at.store.put("b", VALUE, Kind::Json).await?;
    at.proxy.set(Fault::Truncated);
    let broken = [at.read("b").await.map(drop), at.list().await.map(drop), at.survey().await.map(drop)];
    for outcome in broken {
        let is_told = matches!(&outcome, Err(BackendError::InvalidAnswer(_) | BackendError::Unreachable(_)));
        assert!(is_told, "{outcome:?}");
    }
    Ok(())
}

pub(super) async fn a_page_in_front_of_the_store_never_says_that_something_is_gone<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    let version = base(&at, "a").await?;
    for fault in
        [Fault::Page(404), Fault::Status(404), Fault::Page(400), Fault::Page(403), Fault::Json("{}".into())]
    {
        at.proxy.set(fault.clone());
        for (call, outcome) in calls(&at, &version).await {
            assert!(!says_gone(&outcome), "{fault:?}: {call}: {outcome:?}");
            assert_ne!(outcome.err(), Some(BackendError::PreconditionLost), "{fault:?}: {call}");
        }
        let (listed, surveyed) = (at.list().await, at.survey().await);
        if S::CAN.no_secrets == NoSecrets::Unsaid && matches!(fault, Fault::Json(_)) {
            continue;
        }
        ensure!(!listed.as_ref().is_ok_and(|(entries, _)| entries.is_empty()), "{fault:?}: an empty listing");
        ensure!(!surveyed.as_ref().is_ok_and(Vec::is_empty), "{fault:?}: an empty survey");
    }
    Ok(())
}

pub(super) async fn listings_that_go_in_circles_end_with_an_error<S: Store>(at: Connected<S>) -> Result<()> {
    let (size, is_told) = match S::CAN.pages {
        Pages::Tokens { size, .. } => (size, true),
        Pages::Names { size } => (size, false),
        Pages::One => (10, false),
    };
    let puts = (0..size + 1).map(async |number| at.store.put(&format!("s{number}"), VALUE, Kind::Json).await);
    iter(puts).buffer_unordered(S::AT_ONCE).try_collect::<()>().await?;
    at.proxy.set(Fault::Replay);
    let before = at.proxy.requests().len();
    for entries in
        [at.list().await.map(|(entries, _)| entries.len()), at.survey().await.map(|found| found.len())]
    {
        match entries {
            Ok(entries) => assert!(!is_told && entries >= size, "{entries}"),
            Err(error) => assert!(is_told && error.class() == Class::Invalid, "{error}"),
        }
    }
    assert!(at.proxy.requests().len() - before < BOUND);
    Ok(())
}

pub(super) async fn empty_pages_without_end_end_with_an_error<S: Store>(at: Connected<S>) -> Result<()> {
    let Pages::Tokens { empty, .. } = S::CAN.pages else {
        // Without a token an empty page is the last one.
        assert_eq!(at.list().await?.0, []);
        return Ok(());
    };
    at.proxy.set(Fault::Json(empty.replace("{url}", &at.proxy.url())));
    for entries in
        [at.list().await.map(|(entries, _)| entries.len()), at.survey().await.map(|found| found.len())]
    {
        let error = entries.err().context("it has no end")?;
        assert_eq!(error.class(), Class::Invalid, "{error}");
    }
    assert!(at.proxy.requests().len() < 2 * BOUND);
    Ok(())
}

pub(super) async fn a_throttled_store_is_asked_later_and_not_given_up<S: Store>(
    at: Connected<S>,
) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    at.read("a").await?;
    let (guarded, name) = (at.guarded()?, at.name("a"));
    at.proxy.set(Fault::Throttled { retry_after: None });
    let most = guarded.guard().flowing().concurrency;
    for _ in 0..4 {
        let refused = guarded.read(&name, Duration::from_secs(1)).await.err().context("throttled")?;
        let is_told = matches!(refused.reason, Reason::BackendThrottled | Reason::BackendTimeout);
        assert!(is_told, "{refused}");
    }
    assert_eq!(guarded.guard().state(), BreakerState::Closed);
    assert!(guarded.guard().flowing().concurrency < most, "it slows");
    at.proxy.set(Fault::Pass);
    let read = guarded.background(Duration::from_secs(5)).read(&name).await?;
    assert_eq!(read.value.expose(), VALUE);
    assert_eq!(guarded.guard().state(), BreakerState::Closed);
    Ok(())
}

pub(super) async fn a_pause_that_is_asked_for_is_made<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    at.read("a").await?;
    let (guarded, name) = (at.guarded()?, at.name("a"));
    at.proxy.set_times(Fault::Throttled { retry_after: Some(1) }, 1);
    let (before, begin) = (at.proxy.requests().len(), Instant::now());
    guarded.background(Duration::from_secs(5)).read(&name).await?;
    assert!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
    // The mount of a Vault is asked for by the new connection, too.
    assert!(at.proxy.requests().len() - before <= 4, "{:?}", at.proxy.requests());
    Ok(())
}

pub(super) async fn a_fault_that_passes_is_survived<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    let (guarded, name) = (at.guarded()?, at.name("a"));
    at.proxy.set_times(Fault::Status(503), 1);
    let read = guarded.read(&name, Duration::from_secs(5)).await?;
    assert_eq!(read.value.expose(), VALUE, "a read that somebody waits for is tried once more");
    at.proxy.set_times(Fault::Status(503), 3);
    let (mut survey, mut found) =
        (guarded.background(Duration::from_secs(5)).survey(at.store.root().as_ref()), 0);
    while let Some(page) = survey.next().await? {
        found += page.secrets.len();
    }
    assert_eq!(found, 1);
    assert_eq!(guarded.guard().state(), BreakerState::Closed);
    Ok(())
}

pub(super) async fn a_store_that_hangs_does_not_hang_its_readers<S: Store>(at: Connected<S>) -> Result<()> {
    at.store.put("a", VALUE, Kind::Json).await?;
    let (guarded, name) = (at.guarded()?, at.name("a"));
    at.proxy.set(Fault::Hang);
    let begin = Instant::now();
    let error = guarded.read(&name, Duration::from_millis(300)).await.err().context("it hangs")?;
    assert_eq!(error.reason, Reason::BackendTimeout);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    at.proxy.set(Fault::Pass);
    assert_eq!(guarded.read(&name, Duration::from_secs(5)).await?.value.expose(), VALUE);
    Ok(())
}

pub(super) async fn nobody_at_the_address_is_unreachable<S: Store>(at: Connected<S>) -> Result<()> {
    let nowhere = Endpoint::parse("endpoint", &format!("http://127.0.0.1:{}", ports::free()))?;
    let backend = Backend::connect(&at.store.target(nowhere), &egress())?;
    let name: RemoteName = at.name("a");
    let read = backend.read(&at.lease, &name).await.err().context("nobody is there")?;
    assert_eq!(read, BackendError::Unreachable("the connection was refused"));
    assert!(matches!(backend.probe(&at.lease).await, Err(BackendError::Unreachable(_))));
    Ok(())
}
