//! What every engine promises, run over each of them.

use std::sync::Arc;

use bytes::Bytes;
use scaivault_domain::tenant::TenantId;

use super::*;

/// Makes a test of each promise, `async fn(Arc<dyn Store>)`, for each engine.
macro_rules! conformance {
    ($($promise:ident),+ $(,)?) => {
        mod over_memory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $promise() {
                super::$promise(std::sync::Arc::new(crate::store::MemoryStore::new())).await;
            })+
        }

        mod over_redb {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $promise() {
                let dir = tempfile::tempdir().unwrap();
                let store = crate::store::RedbStore::open(&dir.path().join("store")).unwrap();
                super::$promise(std::sync::Arc::new(store)).await;
            })+
        }
    };
}

pub(super) use conformance;

conformance! {
    a_commit_is_read_as_it_was_written,
    a_version_that_moved_on_is_named,
    a_row_that_exists_is_not_absent,
    one_unmet_precondition_undoes_the_whole_transaction,
    a_row_written_again_is_not_the_row_it_was,
    names_come_in_the_order_of_their_bytes,
    a_scan_stays_in_its_tenant_and_space,
    children_are_rows_and_folders,
    a_row_and_a_folder_may_share_a_name,
    pages_of_any_size_join_to_the_whole,
    a_page_continues_behind_a_row_that_is_gone,
    the_feed_tells_what_was_put_and_deleted,
    the_feed_has_one_line_for_a_row_in_a_commit,
    the_feed_leaves_out_what_nobody_follows,
    the_feed_pages_by_whole_commits,
    the_feed_misses_nothing_under_24_writers,
    a_counter_loses_no_increment,
    a_trimmed_feed_says_so,
    a_cursor_from_another_store_has_expired,
    a_commit_wakes_followers,
}

type Engine = Arc<dyn Store>;

fn tenant(name: &str) -> Owner {
    Owner::Tenant(TenantId::parse(name).unwrap())
}

fn key(name: &str) -> Key {
    Key::new(tenant("acme"), Space::Secret, name)
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put(name: &str) -> Tx {
    Tx::new().put(key(name), bytes(name))
}

async fn fill(store: &Engine, names: &[&str]) {
    store.commit(names.iter().fold(Tx::new(), |tx, name| tx.put(key(name), bytes(name)))).await.unwrap();
}

/// Names of one page in `acme`'s secrets.
async fn page(store: &Engine, prefix: &str, depth: Depth, after: Option<&str>, limit: usize) -> Vec<String> {
    let entries = store.scan(&tenant("acme"), Space::Secret, prefix, depth, after, limit).await.unwrap();
    entries
        .iter()
        .map(|entry| {
            match entry {
                Entry::Row { name, row } => assert_eq!(row.value, bytes(name), "a row has its own value"),
                Entry::Folder { name } => assert!(name.ends_with('/')),
            }
            entry.name().to_owned()
        })
        .collect()
}

fn unmet(outcome: Result<Revision, CommitError>) -> Key {
    match outcome {
        Err(CommitError::Precondition(key)) => key,
        other => panic!("a precondition should have failed: {other:?}"),
    }
}

async fn a_commit_is_read_as_it_was_written(store: Engine) {
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    assert_eq!(store.head().await, Revision::START);
    let first = store.commit(put("a")).await.unwrap();
    assert_eq!(first, Revision::from_u64(1));
    assert_eq!(store.get(&key("a")).await.unwrap(), Some(Row { version: first, value: bytes("a") }));

    let second = store.commit(Tx::new().put(key("a"), Bytes::new())).await.unwrap();
    assert_eq!(store.get(&key("a")).await.unwrap(), Some(Row { version: second, value: Bytes::new() }));

    store.commit(Tx::new().delete(key("a")).delete(key("never was"))).await.unwrap();
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    assert_eq!(store.head().await, Revision::from_u64(3));
    store.health().await.unwrap();
}

async fn a_version_that_moved_on_is_named(store: Engine) {
    let read = store.commit(put("a")).await.unwrap();
    store.commit(put("a").expect(key("a"), read)).await.unwrap();
    assert_eq!(unmet(store.commit(put("a").expect(key("a"), read)).await), key("a"));
    assert_eq!(unmet(store.commit(put("b").expect(key("b"), read)).await), key("b"));
}

async fn a_row_that_exists_is_not_absent(store: Engine) {
    let found = store.commit(put("a").expect_as_found(key("a"), None)).await.unwrap();
    assert_eq!(unmet(store.commit(put("a").expect_absent(key("a"))).await), key("a"));
    store.commit(put("a").expect_as_found(key("a"), Some(found))).await.unwrap();
}

async fn one_unmet_precondition_undoes_the_whole_transaction(store: Engine) {
    let first = store.commit(put("a").put(key("b"), bytes("b"))).await.unwrap();
    let tx = put("c").delete(key("a")).expect(key("a"), first).expect_absent(key("b"));
    assert_eq!(unmet(store.commit(tx).await), key("b"));
    assert_eq!(page(&store, "", Depth::All, None, 10).await, ["a", "b"]);
    assert_eq!(store.head().await, first);
    assert_eq!(store.changes(first, 10).await.unwrap(), Changes { changes: Vec::new(), next: first });
}

async fn a_row_written_again_is_not_the_row_it_was(store: Engine) {
    let read = store.commit(put("a")).await.unwrap();
    store.commit(Tx::new().delete(key("a"))).await.unwrap();
    store.commit(put("a")).await.unwrap();
    assert_eq!(unmet(store.commit(put("a").expect(key("a"), read)).await), key("a"));
}

async fn names_come_in_the_order_of_their_bytes(store: Engine) {
    fill(&store, &["b", "a/b", "a-b", "B", "a", "a0", "", "ä"]).await;
    assert_eq!(page(&store, "", Depth::All, None, 10).await, ["", "B", "a", "a-b", "a/b", "a0", "b", "ä"]);
    assert_eq!(page(&store, "a", Depth::All, None, 10).await, ["a", "a-b", "a/b", "a0"]);
    assert_eq!(page(&store, "", Depth::All, None, 0).await, [""; 0]);
}

async fn a_scan_stays_in_its_tenant_and_space(store: Engine) {
    let owners =
        [Owner::Installation, tenant("a"), tenant("acm"), tenant("acme"), tenant("acme-2"), tenant("b")];
    let mut tx = Tx::new();
    for owner in &owners {
        for space in Space::ALL {
            tx = tx.put(Key::new(owner.clone(), *space, "x"), bytes("x"));
        }
    }
    store.commit(tx).await.unwrap();
    for owner in &owners {
        for space in Space::ALL {
            for after in [None, Some("w")] {
                let found = store.scan(owner, *space, "", Depth::All, after, 10).await.unwrap();
                assert_eq!(found.len(), 1, "{owner:?} {space:?}");
            }
            assert_eq!(store.scan(owner, *space, "", Depth::All, Some("x"), 10).await.unwrap(), []);
        }
    }
}

async fn children_are_rows_and_folders(store: Engine) {
    fill(&store, &["top", "a/1", "a/2/x", "a/2/y", "a/3", "b/c/d"]).await;
    assert_eq!(page(&store, "", Depth::Children, None, 10).await, ["a/", "b/", "top"]);
    assert_eq!(page(&store, "a/", Depth::Children, None, 10).await, ["a/1", "a/2/", "a/3"]);
    assert_eq!(page(&store, "a/2/", Depth::Children, None, 10).await, ["a/2/x", "a/2/y"]);
    assert_eq!(page(&store, "c/", Depth::Children, None, 10).await, [""; 0]);
}

async fn a_row_and_a_folder_may_share_a_name(store: Engine) {
    fill(&store, &["a", "a/x", "a/y", "a-", "a0"]).await;
    assert_eq!(page(&store, "", Depth::Children, None, 10).await, ["a", "a-", "a/", "a0"]);
    assert_eq!(page(&store, "", Depth::Children, Some("a"), 10).await, ["a-", "a/", "a0"]);
    assert_eq!(page(&store, "", Depth::Children, Some("a/"), 10).await, ["a0"]);
    assert_eq!(page(&store, "", Depth::Children, Some("a/x"), 10).await, ["a0"]);
}

async fn pages_of_any_size_join_to_the_whole(store: Engine) {
    fill(&store, &["a", "a/1", "a/2", "a/2/3", "a-b", "b/1", "b/2", "c", "d/e/f", "z"]).await;
    for depth in [Depth::All, Depth::Children] {
        for prefix in ["", "a", "a/", "b/", "q"] {
            let whole = page(&store, prefix, depth, None, 100).await;
            for size in 1..=whole.len() + 1 {
                let mut joined: Vec<String> = Vec::new();
                loop {
                    let next = page(&store, prefix, depth, joined.last().map(String::as_str), size).await;
                    let full = next.len() == size;
                    joined.extend(next);
                    if !full {
                        break;
                    }
                }
                assert_eq!(joined, whole, "{depth:?} below {prefix:?} by {size}");
            }
        }
    }
}

async fn a_page_continues_behind_a_row_that_is_gone(store: Engine) {
    fill(&store, &["a-before", "b/a", "b/c"]).await;
    assert_eq!(page(&store, "b/", Depth::All, Some("b/b"), 10).await, ["b/c"]);
    assert_eq!(page(&store, "b/", Depth::All, Some("a"), 10).await, ["b/a", "b/c"]);
    assert_eq!(page(&store, "b/", Depth::All, Some("c"), 10).await, [""; 0]);
}

async fn the_feed_tells_what_was_put_and_deleted(store: Engine) {
    let first = store.commit(put("a")).await.unwrap();
    let second = store.commit(put("b").delete(key("a")).delete(key("never was"))).await.unwrap();
    let change = |revision, name, kind| Change { revision, key: key(name), kind };
    let changes = vec![
        change(first, "a", ChangeKind::Put),
        change(second, "a", ChangeKind::Deleted),
        change(second, "b", ChangeKind::Put),
    ];
    assert_eq!(store.changes(Revision::START, 10).await.unwrap(), Changes { changes, next: second });
    assert_eq!(store.changes(second, 10).await.unwrap(), Changes { changes: Vec::new(), next: second });
}

async fn the_feed_has_one_line_for_a_row_in_a_commit(store: Engine) {
    let tx = put("a").put(key("a"), bytes("again")).put(key("b"), bytes("b")).delete(key("b"));
    let revision = store.commit(tx).await.unwrap();
    let changes = store.changes(Revision::START, 10).await.unwrap().changes;
    let kinds: Vec<_> = changes.iter().map(|change| (change.key.name.as_str(), change.kind)).collect();
    assert_eq!(kinds, [("a", ChangeKind::Put), ("b", ChangeKind::Deleted)]);
    assert_eq!(
        store.get(&key("a")).await.unwrap(),
        Some(Row { version: revision, value: bytes("again") }),
        "the last operation counts"
    );
}

async fn the_feed_leaves_out_what_nobody_follows(store: Engine) {
    let tx = Space::ALL
        .iter()
        .fold(Tx::new(), |tx, space| tx.put(Key::new(tenant("acme"), *space, "x"), Bytes::new()));
    let revision = store.commit(tx).await.unwrap();
    let feed = store.changes(Revision::START, 100).await.unwrap();
    assert_eq!(feed.next, revision);
    let fed: Vec<Space> = feed.changes.iter().map(|change| change.key.space).collect();
    let followed: Vec<Space> = Space::ALL.iter().copied().filter(|space| space.is_fed()).collect();
    assert_eq!(fed, followed);
    assert!(!fed.contains(&Space::AuditRow) && !fed.contains(&Space::SecretVersion));
}

async fn the_feed_pages_by_whole_commits(store: Engine) {
    let first = store.commit(put("a").put(key("b"), bytes("b")).put(key("c"), bytes("c"))).await.unwrap();
    let second = store.commit(put("d").put(key("e"), bytes("e"))).await.unwrap();
    for (max, expected, next) in [(1, 3, first), (3, 3, first), (4, 5, second), (5, 5, second), (0, 3, first)]
    {
        let feed = store.changes(Revision::START, max).await.unwrap();
        assert_eq!((feed.changes.len(), feed.next), (expected, next), "at most about {max}");
    }
    assert_eq!(store.changes(first, 1).await.unwrap().next, second);
}

async fn the_feed_misses_nothing_under_24_writers(store: Engine) {
    const WRITERS: usize = 24;
    const COMMITS: usize = 40;

    let follower = tokio::spawn({
        let store = store.clone();
        async move {
            let (mut cursor, mut wake, mut seen) = (Revision::START, store.wake(), Vec::new());
            while seen.len() < WRITERS * COMMITS * 2 {
                let page = store.changes(cursor, 7).await.unwrap();
                seen.extend(page.changes.into_iter().map(|change| (change.revision, change.key)));
                if page.next == cursor {
                    wake.changed().await.unwrap();
                }
                cursor = page.next;
            }
            seen
        }
    });
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut written = Vec::new();
                for n in 0..COMMITS {
                    let keys = [key("shared"), key(&format!("{writer}/{n}"))];
                    let tx = keys.iter().fold(Tx::new(), |tx, key| tx.put(key.clone(), Bytes::new()));
                    let refused = tx.clone().expect(key("never was"), Revision::from_u64(1));
                    unmet(store.commit(refused).await);
                    let revision = store.commit(tx).await.unwrap();
                    written.extend(keys.map(|key| (revision, key)));
                }
                written
            })
        })
        .collect();
    let mut written = Vec::new();
    for writer in writers {
        written.extend(writer.await.unwrap());
    }
    written.sort();
    let mut seen = follower.await.unwrap();
    assert!(seen.is_sorted_by_key(|(revision, _)| *revision), "in the order of revisions");
    seen.sort();
    assert_eq!(seen, written);
}

async fn a_counter_loses_no_increment(store: Engine) {
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut done = 0;
                while done < 20 {
                    let found = store.get(&key("counter")).await.unwrap();
                    let count = found.as_ref().map_or(0, |row| row.value.len());
                    let tx = Tx::new()
                        .expect_as_found(key("counter"), found.map(|row| row.version))
                        .put(key("counter"), Bytes::from(vec![1; count + 1]));
                    match store.commit(tx).await {
                        Ok(_) => done += 1,
                        Err(CommitError::Precondition(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(store.get(&key("counter")).await.unwrap().unwrap().value.len(), 8 * 20);
}

async fn a_trimmed_feed_says_so(store: Engine) {
    let big = |from: usize| {
        (from..from + 60_000).fold(Tx::new(), |tx, n| tx.put(key(&n.to_string()), Bytes::new()))
    };
    let first = store.commit(big(0)).await.unwrap();
    assert!(store.changes(Revision::START, 1).await.is_ok());
    let second = store.commit(big(60_000)).await.unwrap();
    assert!(matches!(store.changes(Revision::START, 1).await, Err(FeedError::Expired)));
    let feed = store.changes(first, 1).await.unwrap();
    assert_eq!((feed.changes.len(), feed.next), (60_000, second));
}

async fn a_cursor_from_another_store_has_expired(store: Engine) {
    store.commit(put("a")).await.unwrap();
    assert!(matches!(store.changes(Revision::from_u64(2), 1).await, Err(FeedError::Expired)));
}

async fn a_commit_wakes_followers(store: Engine) {
    store.commit(put("a")).await.unwrap();
    let mut wake = store.wake();
    assert!(!wake.has_changed().unwrap());
    let revision = store.commit(put("b")).await.unwrap();
    wake.changed().await.unwrap();
    assert_eq!(*wake.borrow(), revision);
}
