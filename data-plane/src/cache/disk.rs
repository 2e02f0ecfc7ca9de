//! sled, at arm's length.
//!
//! sled panics on some damaged files, waits for ever when one of its own threads has died, and piles up what it has yet
//! to write. So everything that may hang runs on a thread of its own, which is left behind when it does not answer; a
//! panic is an error; and no more than [`UNWRITTEN_BYTES`] wait for the disk. Batches and transactions are not used:
//! they take a lock of the whole process, under which a flush that never ends would hold up every reader.
//!
//! sled notes which pages were used in 256 queues, and looks for pages to drop only when a queue has 64 notes. With
//! pages of 10 KiB these are 100 MiB before the first page is dropped, whatever its capacity is set to. Notes are cheap:
//! a page that was not used lately is noted a few times more ([`Recent`]).

use std::any::Any;
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use sled::IVec;

use super::dir::{lock_soon, make_private};
use super::row::{Place, Row};

/// How long opening may take. A million secrets take two seconds.
const OPEN_PATIENCE: Duration = Duration::from_secs(15);
/// How long a write may take.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
/// How long the last flush may take.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes that sled may have taken and not written.
const UNWRITTEN_BYTES: usize = 4 << 20;

/// Why the disk is of no use any more.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) reason: String,
    pub(super) reads: Reads,
}

/// Whether what is on the disk can still be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reads {
    Work,
    /// sled is in a state that nobody has thought of.
    Over,
}

/// When written rows are out of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// At the latest with a later write, or within half a second.
    Soon,
    /// When the write returns.
    Now,
}

struct Write {
    rows: Arc<[Row]>,
    flush: Flush,
    done: Sender<Result<(), Fault>>,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Disk {
    /// Always there until it is closed.
    tree: Option<sled::Db>,
    writes: Option<Sender<Write>>,
    closed: Mutex<Receiver<Result<(), Fault>>>,
    recent: Arc<Recent>,
}

impl Disk {
    /// Opens `dir`, and gives what `load` finds in it.
    pub(super) fn open<T: Send + 'static>(
        dir: &Path,
        capacity_bytes: u64,
        load: impl FnOnce(&sled::Db) -> Result<T, String> + Send + 'static,
    ) -> Result<(Self, T), String> {
        let recent = Arc::new(Recent::default());
        let (opened, wait_opened) = mpsc::channel();
        let (writes, jobs) = mpsc::channel();
        let (closing, closed) = mpsc::channel();
        let thread = thread::Builder::new().name("cache".into()).spawn({
            let (dir, recent) = (dir.to_owned(), recent.clone());
            move || {
                let tree = match guard(|| open_tree(&dir, capacity_bytes)) {
                    Ok(tree) => tree,
                    Err(fault) => return drop(opened.send(Err(fault.reason))),
                };
                let loaded = match guard(|| load(&tree)) {
                    Ok(loaded) => loaded,
                    // Said before the tree is dropped, which may never end.
                    Err(fault) => return drop(opened.send(Err(fault.reason))),
                };
                // Nobody waits any more: what is behind this directory's name may be another one by now.
                if opened.send(Ok((tree.clone(), loaded))).is_ok() {
                    write(&tree, &recent, &jobs);
                    let _ = closing.send(guard(|| close(tree, &dir)));
                }
            }
        });
        thread.map_err(|error| format!("no thread for it: {error}"))?;
        let (tree, loaded) = wait_opened
            .recv_timeout(OPEN_PATIENCE)
            .unwrap_or_else(|_| Err(format!("opening it did not end within {OPEN_PATIENCE:?}")))?;
        let closed = Mutex::new(closed);
        Ok((Disk { tree: Some(tree), writes: Some(writes), closed, recent }, loaded))
    }

    /// The row at `place`.
    pub(super) fn get(&self, place: &Place) -> Result<Option<IVec>, Fault> {
        let tree = self.tree();
        guard(|| {
            let row = tree.get(place).map_err(|error| error.to_string())?;
            self.recent.note(tree, place);
            Ok(row)
        })
    }

    /// Writes the rows in their order: after a crash those up to some row are there.
    pub(super) fn write(&self, rows: Arc<[Row]>, flush: Flush) -> Result<(), Fault> {
        let (done, written) = mpsc::channel();
        let hangs = || Fault { reason: "a write did not end".into(), reads: Reads::Over };
        let writes = self.writes.as_ref().expect("only closing takes it");
        writes.send(Write { rows, flush, done }).map_err(|_| hangs())?;
        written.recv_timeout(WRITE_PATIENCE).map_err(|_| hangs())?
    }

    /// Bytes of the files.
    pub(super) fn bytes(&self) -> u64 {
        guard(|| self.tree().size_on_disk().map_err(|error| error.to_string())).unwrap_or_default()
    }

    /// Writes the rest. Afterwards nothing is written any more, unless this is an error.
    pub(super) fn close(&mut self) -> Result<(), Fault> {
        // The thread drops its own after this one, so that it is the thread that may hang.
        self.tree = None;
        self.writes = None;
        let closed = self.closed.get_mut().unwrap_or_else(PoisonError::into_inner);
        let hangs = || Fault { reason: "closing it did not end".into(), reads: Reads::Over };
        closed.recv_timeout(CLOSE_PATIENCE).map_err(|_| hangs())?
    }

    fn tree(&self) -> &sled::Db {
        self.tree.as_ref().expect("only closing takes it")
    }
}

fn open_tree(dir: &Path, capacity_bytes: u64) -> Result<sled::Db, String> {
    make_private(dir).map_err(|error| error.to_string())?;
    // sled does not wait for its lock. The directory is ours, so whoever has it gives it back soon.
    wait_for_files(dir)?;
    let tree = sled::Config::new()
        .path(dir)
        .cache_capacity(capacity_bytes)
        .mode(sled::Mode::LowSpace)
        .open()
        .map_err(|error| error.to_string())?;
    make_private(dir).map_err(|error| error.to_string())?;
    Ok(tree)
}

/// Writes the rest, and waits until sled has let the files go: some of its threads cannot be joined.
fn close(tree: sled::Db, dir: &Path) -> Result<(), String> {
    tree.flush().map_err(|error| error.to_string())?;
    drop(tree);
    wait_for_files(dir)
}

fn wait_for_files(dir: &Path) -> Result<(), String> {
    match File::open(dir.join("db")).map(|file| lock_soon(&file)) {
        // Nobody has it, or it is not there yet.
        Ok(Ok(())) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // What has it still is memory that nobody came by to free.
        Ok(Err(TryLockError::WouldBlock)) => Ok(()),
        Ok(Err(TryLockError::Error(error))) | Err(error) => Err(error.to_string()),
    }
}

/// Does what it is asked until nobody asks any more.
fn write(tree: &sled::Db, recent: &Recent, jobs: &Receiver<Write>) {
    let mut unwritten = 0;
    for Write { rows, flush, done } in jobs {
        let written = guard(|| {
            for (place, record) in rows.iter() {
                match record {
                    Some(record) => {
                        unwritten += place.len() + record.len();
                        tree.insert(place, record.as_slice())
                    }
                    None => tree.remove(place),
                }
                .map_err(|error| error.to_string())?;
                recent.note(tree, place);
            }
            if flush == Flush::Now || unwritten > UNWRITTEN_BYTES {
                unwritten = 0;
                tree.flush().map_err(|error| error.to_string())?;
            }
            Ok(())
        });
        // Whoever asked may have lost patience.
        let _ = done.send(written);
    }
}

/// Runs a piece of sled. An error is one of input or output, after which reads work; a panic may be anything.
fn guard<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, Fault> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(reason)) => Err(Fault { reason, reads: Reads::Work }),
        Err(panic) => Err(Fault { reason: format!("sled: {}", message(&*panic)), reads: Reads::Over }),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

/// Which leaves were used lately, roughly.
#[derive(Debug)]
struct Recent {
    leaves: [AtomicU64; 1024],
    hasher: RandomState,
}

impl Default for Recent {
    fn default() -> Self {
        Recent { leaves: std::array::from_fn(|_| AtomicU64::default()), hasher: RandomState::new() }
    }
}

impl Recent {
    /// Notes the use of a leaf a few times more if it was not used lately.
    fn note(&self, tree: &sled::Db, place: &Place) {
        // Rows are numbered as they come, and a leaf that is split keeps half of its rows: eight.
        let mut leaf = *place;
        leaf[8] &= !7;
        leaf[10] &= !7;
        let leaf = self.hasher.hash_one(leaf);
        let slot = &self.leaves[(leaf % 1024) as usize];
        if slot.swap(leaf, Ordering::Relaxed) != leaf {
            for _ in 0..7 {
                let _ = tree.get(place);
            }
        }
    }
}
