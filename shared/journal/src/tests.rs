//! The journal's promises, through its public API.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use scaivault_domain::tenant::NodeName;
use scaivault_seal::Keyring;
use tempfile::TempDir;

use super::*;
use crate::testing::{FixedClock, cipher, node, row, tenant};

fn config(dir: &Path) -> JournalConfig {
    JournalConfig { rotate_after: Duration::MAX, rotate_bytes: 1 << 16, ..JournalConfig::new(dir, node()) }
}

fn open_with(config: JournalConfig) -> Result<Journal, JournalError> {
    Journal::open(config, cipher(), Arc::new(FixedClock))
}

fn open(dir: &Path) -> Journal {
    open_with(config(dir)).unwrap()
}

/// What `kill -9` leaves at this moment: the directory as it is, without anything that closing would do.
fn killed(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.to_str().unwrap().ends_with(ending));
    files.sort();
    files
}

async fn ship_one(journal: &Journal) -> Segment {
    let segment = journal.next_segment().await;
    journal.acknowledge(&segment.id());
    segment
}

/// Closes the active file and ships all there is.
async fn ship_all(journal: &Journal) -> Vec<Segment> {
    journal.rotate_now();
    let mut segments = Vec::new();
    while journal.backlog().bytes > 0 {
        segments.push(ship_one(journal).await);
    }
    segments
}

fn paths(segments: &[Segment]) -> Vec<String> {
    segments.iter().flat_map(|segment| segment.rows(None).unwrap()).map(|(_, row)| row.path).collect()
}

/// A path that does not compress.
fn noise() -> String {
    let mut bytes = [0; 200];
    getrandom::fill(&mut bytes).unwrap();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Records until the journal refuses, and says how many rows it took.
async fn fill(journal: &Journal) -> (u64, JournalError) {
    let mut taken = 0;
    loop {
        match journal.record(row("t", &noise())).await {
            Ok(()) => taken += 1,
            Err(error) => return (taken, error),
        }
    }
}

#[tokio::test]
async fn an_acknowledged_row_is_in_a_segment_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.record(row("a", "x")).await.unwrap();
    journal.record(row("b", "y")).await.unwrap();
    drop(journal);
    let journal = open(dir.path());
    journal.record(row("a", "z")).await.unwrap();
    let segments = ship_all(&journal).await;
    assert_eq!(paths(&segments), ["x", "y", "z"]);
    assert_eq!(verify_chain(segments.iter()), Ok(()));
}

#[tokio::test]
async fn an_acknowledged_row_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for n in 0..10 {
        journal.record(row("t", &n.to_string())).await.unwrap();
        let left = killed(dir.path());
        let segments = ship_all(&open(left.path())).await;
        assert_eq!(paths(&segments), (0..=n).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_row_cut_in_half_costs_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.record(row("t", "whole")).await.unwrap();
    let [rows] = files(dir.path(), ".rows").try_into().unwrap();
    let whole = fs::metadata(&rows).unwrap().len();
    journal.record(row("t", "torn")).await.unwrap();
    let end = fs::metadata(&rows).unwrap().len();
    for cut in whole..end {
        let left = killed(dir.path());
        let rows = left.path().join(rows.file_name().unwrap());
        fs::OpenOptions::new().write(true).open(rows).unwrap().set_len(cut).unwrap();
        let journal = open(left.path());
        journal.record(row("t", "next")).await.unwrap();
        let segments = ship_all(&journal).await;
        assert_eq!(paths(&segments), ["whole", "next"]);
        assert_eq!(verify_chain(segments.iter()), Ok(()));
    }
}

#[tokio::test]
async fn a_tail_of_zeros_is_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.record(row("t", "whole")).await.unwrap();
    let left = killed(dir.path());
    let [rows] = files(left.path(), ".rows").try_into().unwrap();
    let len = fs::metadata(&rows).unwrap().len();
    fs::OpenOptions::new().write(true).open(rows).unwrap().set_len(len + 4096).unwrap();
    assert_eq!(paths(&ship_all(&open(left.path())).await), ["whole"]);
}

#[tokio::test]
async fn numbers_never_go_back_and_a_shipped_segment_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut shipped = Vec::new();
    for n in 0..4 {
        let journal = open(dir.path());
        journal.record(row("t", &n.to_string())).await.unwrap();
        shipped.extend(ship_all(&journal).await);
    }
    assert_eq!(paths(&shipped), ["0", "1", "2", "3"]);
    assert_eq!(shipped.iter().map(|s| s.header().first_seq).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(verify_chain(shipped.iter()), Ok(()));
}

#[tokio::test]
async fn an_unacknowledged_segment_is_offered_again_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.record(row("t", "x")).await.unwrap();
    journal.rotate_now();
    let offered = journal.next_segment().await;
    assert_eq!(journal.next_segment().await.encode(), offered.encode());
    let left = killed(dir.path());
    assert_eq!(open(left.path()).next_segment().await.encode(), offered.encode());
    drop(journal);
    let journal = open(dir.path());
    assert_eq!(journal.next_segment().await.encode(), offered.encode());
    journal.acknowledge(&offered.id());
    journal.acknowledge(&offered.id());
    assert_eq!(journal.backlog(), Backlog { bytes: 0, segments: 0, oldest: None });
}

#[tokio::test]
async fn a_kill_between_the_steps_of_packing_neither_loses_nor_doubles_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let founded = fs::read(dir.path().join("head")).unwrap();
    journal.record(row("t", "x")).await.unwrap();
    let [rows] = files(dir.path(), ".rows").try_into().unwrap();
    let content = fs::read(&rows).unwrap();
    journal.rotate_now();
    let offered = journal.next_segment().await;

    // The segment and the head are written, the rows are not removed yet.
    let left = killed(dir.path());
    fs::write(left.path().join(rows.file_name().unwrap()), &content).unwrap();
    assert_eq!(ship_all(&open(left.path())).await, std::slice::from_ref(&offered));

    // The segment is written, the head is not.
    let left = killed(dir.path());
    fs::write(left.path().join(rows.file_name().unwrap()), &content).unwrap();
    fs::write(left.path().join("head"), &founded).unwrap();
    let journal = open(left.path());
    journal.record(row("t", "y")).await.unwrap();
    let segments = ship_all(&journal).await;
    assert_eq!(paths(&segments), ["x", "y"]);
    assert_eq!(verify_chain(segments.iter()), Ok(()));

    // The segment is half written.
    let left = killed(dir.path());
    let [segment] = files(left.path(), ".segment").try_into().unwrap();
    fs::rename(&segment, segment.with_extension("segment.new")).unwrap();
    fs::write(left.path().join(rows.file_name().unwrap()), &content).unwrap();
    fs::write(left.path().join("head"), &founded).unwrap();
    assert_eq!(paths(&ship_all(&open(left.path())).await), ["x"]);
    assert!(files(left.path(), ".new").is_empty());
}

#[tokio::test]
async fn rows_are_closed_by_size_and_shipped_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let mut written = Vec::new();
    for n in 0..2_000 {
        let path = format!("{n}/{}", "p".repeat(100));
        journal.record(row("t", &path)).await.unwrap();
        written.push(path);
    }
    let segments = ship_all(&journal).await;
    assert!(segments.len() > 5, "{}", segments.len());
    assert_eq!(paths(&segments), written);
    assert_eq!(verify_chain(segments.iter()), Ok(()));
}

#[tokio::test]
async fn rows_are_closed_by_age() {
    let dir = tempfile::tempdir().unwrap();
    let journal =
        open_with(JournalConfig { rotate_after: Duration::from_millis(1), ..config(dir.path()) }).unwrap();
    journal.record(row("t", "x")).await.unwrap();
    assert_eq!(paths(&[ship_one(&journal).await]), ["x"]);
}

#[tokio::test]
async fn concurrent_rows_are_all_there_once() {
    let dir = tempfile::tempdir().unwrap();
    let journal =
        Arc::new(open_with(JournalConfig { sync: SyncPolicy::None, ..config(dir.path()) }).unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..64 {
        let journal = journal.clone();
        tasks.spawn(async move {
            for n in 0..50 {
                journal.record(row(&format!("t{}", task % 3), &format!("{task}/{n}"))).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let segments = ship_all(&journal).await;
    assert_eq!(verify_chain(segments.iter()), Ok(()));
    let mut found = paths(&segments);
    found.sort_unstable();
    let mut expected: Vec<_> = (0..64).flat_map(|t| (0..50).map(move |n| format!("{t}/{n}"))).collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn a_full_journal_refuses_and_heals_when_segments_are_shipped() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open_with(JournalConfig { max_bytes: 200_000, ..config(dir.path()) }).unwrap();
    let mut taken = 0;
    // Packing makes room, so it takes a few rounds until there is none.
    loop {
        let (rows, error) = fill(&journal).await;
        assert!(matches!(error, JournalError::Full), "{error}");
        taken += rows;
        if journal.backlog().bytes > 190_000 && files(dir.path(), ".rows").is_empty() {
            break;
        }
    }
    assert!(journal.backlog().bytes <= 200_000);
    let segment = ship_one(&journal).await;
    journal.record(row("t", "healed")).await.unwrap();
    let mut segments = vec![segment];
    segments.extend(ship_all(&journal).await);
    assert_eq!(verify_chain(segments.iter()), Ok(()));
    let paths = paths(&segments);
    assert_eq!(paths.len() as u64, taken + 1);
    assert_eq!(paths.last().unwrap(), "healed");
}

#[tokio::test]
async fn an_unwritable_directory_refuses_and_heals() {
    let parent = tempfile::tempdir().unwrap();
    let (dir, away) = (parent.path().join("journal"), parent.path().join("away"));
    let journal = open(&dir);
    fs::rename(&dir, &away).unwrap();
    let refused = journal.record(row("t", "refused")).await;
    assert!(matches!(refused, Err(JournalError::Unavailable(_))));
    fs::rename(&away, &dir).unwrap();
    journal.record(row("t", "healed")).await.unwrap();
    assert_eq!(paths(&ship_all(&journal).await), ["healed"]);
}

#[tokio::test]
async fn a_tenant_does_not_see_the_rows_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for path in ["1", "2", "3"] {
        journal.record(row("a", &format!("a/{path}"))).await.unwrap();
        journal.record(row("b", &format!("b/{path}"))).await.unwrap();
    }
    for segment in ship_all(&journal).await {
        let rows = segment.rows(Some(&tenant("b"))).unwrap();
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|(_, row)| row.tenant == tenant("b") && row.path.starts_with("b/")));
    }
}

#[tokio::test]
async fn nothing_on_disk_tells_what_was_read_and_nobody_else_may_look() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.record(row("canary-tenant", "canary-path")).await.unwrap();
    journal.rotate_now();
    journal.next_segment().await;
    journal.record(row("canary-tenant", "canary-path")).await.unwrap();
    assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o7777, 0o700);
    let all = files(dir.path(), "");
    assert_eq!(all.len(), 5, "head, lock, reserve, rows, segment: {all:?}");
    for path in all {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600, "{path:?}");
        let content = fs::read(&path).unwrap();
        for canary in ["canary", "tenant", "ci-deployer", "SVAS", "\"n1\""] {
            assert!(!content.windows(canary.len()).any(|w| w == canary.as_bytes()), "{canary} in {path:?}");
        }
    }
}

#[tokio::test]
async fn rows_damaged_on_disk_are_no_loss_while_their_writer_lives() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.record(row("t", "1")).await.unwrap();
    damage(dir.path());
    journal.rotate_now();
    assert_eq!(paths(&[ship_one(&journal).await]), ["1"]);
}

#[tokio::test]
async fn rows_damaged_on_disk_are_a_break_of_the_chain_and_do_not_stop_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for path in ["1", "2", "3"] {
        journal.record(row("t", path)).await.unwrap();
    }
    drop(journal);
    // As a packer finds them that was not there when they were written.
    let (disk, found) = Disk::open(dir.path(), &node(), cipher()).unwrap();
    damage(dir.path());
    let disk = Arc::new(disk);
    let reserve = Arc::new(Mutex::new(disk.reserve(1)));
    let file = found.rows[0].clone();
    let waiting = Arc::new(Waiting::new(found.rows, found.segments));
    let clock = Arc::new(FixedClock);
    let mut packer =
        Packer { disk: disk.clone(), waiting: waiting.clone(), reserve, clock, head: found.head };
    packer.pack(&file).unwrap();
    let file = waiting.oldest_segment().await;
    let damaged = disk.read_segment(&node(), &file).unwrap().unwrap();
    assert_eq!(paths(std::slice::from_ref(&damaged)), ["1", "2"]);
    assert_eq!(files(dir.path(), ".damaged").len(), 1);
    assert_eq!(
        (file.first_seq, file.last_seq),
        (1, 2),
        "the next file begins with 4: the gap shows in the chain"
    );
}

/// Flips a bit at the end of the one file of rows.
fn damage(dir: &Path) {
    let [rows] = files(dir, ".rows").try_into().unwrap();
    let mut content = fs::read(&rows).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&rows, content).unwrap();
}

#[tokio::test]
async fn a_segment_damaged_on_disk_is_set_aside_and_the_next_is_shipped() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for path in ["1", "2"] {
        journal.record(row("t", path)).await.unwrap();
        journal.rotate_now();
        while files(dir.path(), ".segment").len() < path.parse().unwrap() {
            tokio::task::yield_now().await;
        }
    }
    let segment = &files(dir.path(), ".segment")[0];
    let mut content = fs::read(segment).unwrap();
    content[100] ^= 1;
    fs::write(segment, content).unwrap();
    assert_eq!(paths(&[ship_one(&journal).await]), ["2"]);
    assert_eq!(files(dir.path(), ".damaged").len(), 1);
}

#[test]
fn a_directory_is_used_by_one_journal_under_one_name_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    assert!(matches!(open_with(config(dir.path())), Err(JournalError::InUse(_))));
    drop(journal);
    let other = JournalConfig { node: NodeName::parse("n2").unwrap(), ..config(dir.path()) };
    assert!(matches!(open_with(other), Err(JournalError::OtherNode { .. })));
    let key = Keyring::generate().cipher("node", "journal");
    let opened = Journal::open(config(dir.path()), key, Arc::new(FixedClock));
    assert!(matches!(opened, Err(JournalError::Damaged(_))));
    assert!(open_with(config(dir.path())).is_ok());
}

#[test]
fn a_lost_head_is_not_taken_for_a_new_journal() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    fs::write(dir.path().join("00000000000000000001.rows"), "x").unwrap();
    fs::remove_file(dir.path().join("head")).unwrap();
    assert!(matches!(open_with(config(dir.path())), Err(JournalError::Damaged(_))));
}

#[tokio::test]
async fn a_row_that_is_too_large_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let refused = journal.record(row("t", &"p".repeat(MAX_ROW_BYTES))).await;
    assert!(matches!(refused, Err(JournalError::RowTooLarge)));
}

#[tokio::test]
async fn the_backlog_tells_the_oldest_row_and_what_waits() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    assert_eq!(journal.backlog().oldest, None);
    journal.record(row("t", "x")).await.unwrap();
    let oldest = Some(row("t", "x").time);
    let active = journal.backlog();
    assert_eq!((active.segments, active.oldest), (0, oldest));
    journal.rotate_now();
    journal.next_segment().await;
    let closed = journal.backlog();
    assert_eq!((closed.segments, closed.oldest), (1, oldest));
    let bytes: u64 = files(dir.path(), ".segment").iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert_eq!(closed.bytes, bytes);
}
