use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use scaivault_domain::path::SecretPath;
use scaivault_domain::secret::{Kind, SecretValue, State};
use tempfile::TempDir;

use super::*;

struct Noon;

impl Clock for Noon {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_000)
    }
}

struct Node {
    data: TempDir,
    ring: Arc<Keyring>,
}

impl Node {
    fn new() -> Self {
        Node { data: tempfile::tempdir().unwrap(), ring: Arc::new(Keyring::generate()) }
    }

    fn dir(&self) -> PathBuf {
        self.data.path().join("cache")
    }

    fn open(&self) -> Opened {
        Cache::open(self.config()).expect("nobody else has the directory")
    }

    fn config(&self) -> CacheConfig {
        CacheConfig::new(self.dir(), self.ring.clone(), Arc::new(Noon))
    }

    /// Another node whose files are what this one's are now.
    fn copy(&self) -> Node {
        let node = Node { data: tempfile::tempdir().unwrap(), ring: self.ring.clone() };
        copy(self.data.path(), node.data.path());
        node
    }

    /// As if the process had died.
    fn left_open(&self) {
        Lock::take(&self.dir()).unwrap().opened();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn tenant(name: &str) -> TenantId {
    TenantId::parse(name).unwrap()
}

fn key(number: usize) -> SecretKey {
    let path = SecretPath::check(&format!("canary-path/app-{number}")).unwrap();
    SecretKey::new(&tenant("canary-tenant"), &path)
}

fn backend(number: u8) -> BackendId {
    BackendId::from_random([number; 10])
}

fn replica(value: &[u8]) -> Replica {
    Replica {
        version: 3,
        kind: Kind::Binary,
        content_type: "canary-type".into(),
        metadata: [("canary-key".into(), "canary-metadata".into())].into(),
        state: State::Active,
        value: Some(SecretValue::new(value.to_vec())),
        backend: Some(backend(1)),
        remote_version: "7".into(),
        created: Some(Timestamp::from_millis(1)),
        verified: Timestamp::from_millis(2),
    }
}

fn put(number: usize, revision: u64, value: &[u8]) -> Write {
    let tag = value.iter().fold(revision, |tag, byte| tag.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    Write::Secret(key(number), Stamp { revision, tag }, replica(value))
}

fn marks(epoch: &str) -> Marks {
    let confirmed = Timestamp::from_millis(5);
    Marks { epoch: epoch.into(), revision: 9, confirmed, prefetched: vec![backend(1)] }
}

fn value(cache: &Cache, number: usize) -> Option<Vec<u8>> {
    let (_, replica) = cache.get(&key(number))?;
    Some(replica.value.expect("active").expose().to_vec())
}

/// Of different lengths, up to some chunks, and none like another.
fn some_value(number: usize) -> Vec<u8> {
    (0..number * 137 % 20_000).map(|at| (at * 7 + number * 13) as u8).collect()
}

fn warm(found: Found) -> Warm {
    match found {
        Found::Warm(warm) => warm,
        other => panic!("{other:?}"),
    }
}

#[test]
fn everything_comes_back_after_a_restart() {
    let node = Node::new();
    let Opened { cache, found } = node.open();
    assert!(matches!(found, Found::Empty));
    let sizes = [0, 1, 1024, row::CHUNK_BYTES - 200, row::CHUNK_BYTES, 64 * 1024, 1024 * 1024];
    let values = sizes.map(|size| (0..size).map(|at| (at * 31 % 251) as u8).collect::<Vec<u8>>());
    let view = Zeroizing::new(vec![7; 300_000]);
    let freshness = Freshness {
        backend: backend(2),
        rules: vec![("e/**".into(), Timestamp::from_millis(3))],
        exceptions: [(key(1).path, Timestamp::from_millis(4))].into(),
    };
    let hash = TokenHash::from_bytes([8; 32]);
    cache.apply(values.iter().enumerate().map(|(number, value)| put(number, 1, value)).collect());
    let deleted = Replica { state: State::Deleted, value: None, ..replica(b"") };
    cache.apply(vec![
        Write::Secret(key(100), Stamp { revision: 4, tag: 5 }, deleted),
        Write::View(tenant("t"), view.clone()),
        Write::View(tenant("gone"), view.clone()),
        Write::Grant(hash, Zeroizing::new(b"grant".to_vec())),
        Write::Grant(TokenHash::from_bytes([9; 32]), Zeroizing::default()),
        Write::Freshness(tenant("t"), freshness.clone()),
        Write::Freshness(tenant("t"), Freshness { backend: backend(3), ..freshness.clone() }),
        Write::Marks(marks("e1")),
    ]);
    cache.apply(vec![
        Write::ViewGone(tenant("gone")),
        Write::GrantGone(TokenHash::from_bytes([9; 32])),
        Write::FreshnessGone(tenant("t"), backend(3)),
    ]);
    let held = cache.held();
    drop(cache);

    let Opened { cache, found } = node.open();
    let warm = warm(found);
    assert_eq!(warm.marks, marks("e1"));
    assert_eq!(warm.views, [(tenant("t"), view)]);
    assert_eq!(warm.grants, [(hash, Zeroizing::new(b"grant".to_vec()))]);
    assert_eq!(warm.freshness, [(tenant("t"), freshness)]);
    for (number, expected) in values.iter().enumerate() {
        assert_eq!(value(&cache, number).as_ref(), Some(expected), "{} bytes", expected.len());
    }
    let (stamp, read) = cache.get(&key(100)).expect("a deleted secret is held too");
    assert_eq!((stamp.tag, read.state, read.value.is_none()), (5, State::Deleted, true));
    let (_, read) = cache.get(&key(1)).unwrap();
    let Replica { version, kind, content_type, metadata, state, backend, .. } = read;
    assert_eq!(
        (version, kind, content_type.as_str(), state),
        (3, Kind::Binary, "canary-type", State::Active)
    );
    assert_eq!(
        (metadata["canary-key"].as_str(), backend),
        ("canary-metadata", Some(super::tests::backend(1)))
    );
    assert_eq!(
        (read.remote_version.as_str(), read.created, read.verified.as_millis()),
        ("7", Some(Timestamp::from_millis(1)), 2)
    );
    let sorted = |mut held: Vec<(KeyHash, Stamp)>| {
        held.sort_by_key(|(hash, _)| *hash);
        held
    };
    let same_tags = sorted(cache.held()).iter().map(|(hash, stamp)| (*hash, stamp.tag)).collect::<Vec<_>>();
    assert_eq!(same_tags, sorted(held).iter().map(|(hash, stamp)| (*hash, stamp.tag)).collect::<Vec<_>>());
    assert_eq!(cache.len(), 8);
    assert_eq!(cache.broken(), 0);
    assert!(cache.bytes_on_disk() > 0);
}

#[test]
fn an_older_state_never_replaces_a_newer_one() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 5, b"five")]);
    cache.apply(vec![put(1, 4, b"four")]);
    assert_eq!(value(&cache, 1).unwrap(), b"five");
    drop(cache);
    let cache = node.open().cache;
    cache.apply(vec![put(1, 4, b"four")]);
    assert_eq!(value(&cache, 1).unwrap(), b"five");
    cache.apply(vec![put(1, 6, b"six")]);
    assert_eq!(value(&cache, 1).unwrap(), b"six");
}

#[test]
fn in_a_new_epoch_a_tag_is_all_that_counts() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 5, b"five"), put(2, 5, b"five")]);
    let tag = cache.stamp(key(1).hash()).unwrap().tag;
    cache.apply(vec![Write::Marks(marks("e2"))]);
    assert_eq!(cache.stamp(key(1).hash()), Some(Stamp { revision: 0, tag }));
    assert_eq!(value(&cache, 1).unwrap(), b"five");
    drop(cache);
    let cache = node.open().cache;
    assert_eq!(cache.stamp(key(1).hash()), Some(Stamp { revision: 0, tag }));
    cache.apply(vec![put(1, 2, b"two")]);
    assert_eq!(value(&cache, 1).unwrap(), b"two");
    cache.apply(vec![put(1, 1, b"one")]);
    assert_eq!(value(&cache, 1).unwrap(), b"two");
}

#[test]
fn a_shorter_value_leaves_nothing_of_the_longer_one() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, &[1; 50_000])]);
    cache.apply(vec![put(1, 2, b"short")]);
    drop(cache);
    let rows = sled::open(node.dir()).unwrap();
    // Header, and index and value of the marks and of the secret.
    assert_eq!(rows.len(), 5);
}

#[test]
fn what_was_removed_stays_removed_if_the_process_dies() {
    let node = Node::new();
    let cache = node.open().cache;
    let hash = TokenHash::from_bytes([8; 32]);
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"x"), put(2, 1, b"y")]);
    cache.apply(vec![Write::Grant(hash, Zeroizing::new(b"grant".to_vec()))]);
    cache.apply(vec![Write::GrantGone(hash), Write::SecretGone(key(1).hash())]);
    let after = node.copy();
    let Opened { cache, found } = after.open();
    assert!(warm(found).grants.is_empty());
    assert_eq!(value(&cache, 1), None);
    assert_eq!(value(&cache, 2).unwrap(), b"y");
}

#[test]
fn what_was_deleted_stays_deleted_if_the_process_dies() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"x")]);
    // Rare things are on the disk at once, and with them whatever came before.
    let grant = Zeroizing::new(b"grant".to_vec());
    cache.apply(vec![Write::Grant(TokenHash::from_bytes([8; 32]), grant)]);
    let deleted = Replica { state: State::Deleted, value: None, ..replica(b"") };
    cache.apply(vec![Write::Secret(key(1), Stamp { revision: 2, tag: 2 }, deleted)]);
    let after = node.copy();
    let (_, held) = after.open().cache.get(&key(1)).expect("what is known of it");
    assert!(held.value.is_none(), "{:?}", held.state);
}

#[test]
fn readers_never_miss_a_secret_that_is_being_replaced() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![put(1, 1, &[1; 20_000])]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let read = value(&cache, 1).expect("it is always there");
                    assert!(read.iter().all(|byte| *byte == read[0]), "torn");
                }
            });
        }
        for revision in 2..100 {
            let bytes = [revision as u8; 30_000];
            cache.apply(vec![put(1, revision, &bytes[..(revision as usize * 997) % 29_000 + 1])]);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(cache.broken(), 0);
}

#[test]
fn a_row_opens_only_where_it_belongs() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"one"), put(2, 1, b"two"), put(3, 1, b"three")]);
    drop(cache);
    node.left_open();
    let rows = sled::open(node.dir()).unwrap();
    let values: Vec<_> = rows.scan_prefix(b"v").map(Result::unwrap).collect();
    assert_eq!(values.len(), 4);
    for ((place, _), (_, other)) in values.iter().zip(values.iter().cycle().skip(1)) {
        rows.insert(place, other).unwrap();
    }
    drop(rows);
    let Opened { cache, found } = node.open();
    // Not even the marks are at their place, so nothing is trusted.
    assert!(matches!(found, Found::SetAside(_)), "{found:?}");
    assert!((1..4).all(|number| value(&cache, number).is_none()));
}

#[test]
fn a_row_that_does_not_open_is_dropped_and_can_come_again() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), put(1, 5, b"one"), put(2, 5, b"two")]);
    drop(cache);
    node.left_open();
    let rows = sled::open(node.dir()).unwrap();
    let last = rows.scan_prefix(b"v").next_back().unwrap().unwrap();
    rows.insert(&last.0, &last.1[1..]).unwrap();
    drop(rows);
    let cache = node.open().cache;
    assert_eq!(value(&cache, 1).unwrap(), b"one");
    assert_eq!(value(&cache, 2), None);
    assert_eq!((cache.broken(), cache.stamp(key(2).hash())), (1, None));
    cache.apply(vec![put(2, 5, b"two")]);
    assert_eq!(value(&cache, 2).unwrap(), b"two");
}

#[test]
fn what_another_key_sealed_is_set_aside_and_two_are_kept() {
    let mut node = Node::new();
    for _ in 0..4 {
        node.ring = Arc::new(Keyring::generate());
        let Opened { cache, found } = node.open();
        assert!(!matches!(found, Found::Warm(_)));
        cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"x")]);
    }
    assert!(matches!(node.open().found, Found::Warm(_)));
    let names = fs::read_dir(node.data.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["cache", "cache.broken-1001", "cache.broken-1002", "cache.lock"]);
}

#[test]
fn a_rotated_ring_opens_what_the_old_one_sealed() {
    let mut node = Node::new();
    node.open().cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"x")]);
    node.ring = Arc::new(node.ring.rotated());
    let Opened { cache, found } = node.open();
    assert!(matches!(found, Found::Warm(_)));
    cache.apply(vec![put(2, 1, b"y")]);
    assert_eq!((value(&cache, 1).unwrap(), value(&cache, 2).unwrap()), (b"x".to_vec(), b"y".to_vec()));
}

#[test]
fn rows_without_marks_are_set_aside() {
    let node = Node::new();
    node.open().cache.apply(vec![put(1, 1, b"x")]);
    assert!(matches!(node.open().found, Found::SetAside(_)));
    assert!(matches!(node.open().found, Found::Empty));
}

#[test]
fn one_directory_is_for_one_process() {
    let node = Node::new();
    let first = node.open();
    assert!(matches!(Cache::open(node.config()), Err(CacheError::InUse(_))));
    drop(first);
    assert!(matches!(node.open().found, Found::Empty));
}

#[test]
fn what_killed_the_process_twice_is_not_opened_again() {
    let node = Node::new();
    node.open().cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"x")]);
    for _ in 0..2 {
        Lock::take(&node.dir()).unwrap().begin().unwrap();
    }
    let Found::SetAside(reason) = node.open().found else { panic!("a third attempt") };
    assert!(reason.contains("died"), "{reason}");
    assert!(matches!(node.open().found, Found::Empty));
}

#[test]
fn after_a_crash_of_the_process_everything_is_there_and_of_the_machine_nothing() {
    let node = Node::new();
    node.open().cache.apply(vec![Write::Marks(marks("e1")), put(1, 1, b"x")]);
    node.left_open();
    let Opened { cache, found } = node.open();
    assert!(matches!(found, Found::Warm(_)));
    assert_eq!(value(&cache, 1).unwrap(), b"x");
    drop(cache);
    let before = format!("{:<64}", "open 123 0");
    fs::write(node.data.path().join("cache.lock"), before).unwrap();
    assert!(matches!(node.open().found, Found::SetAside(_)));
}

#[test]
fn without_a_directory_values_are_kept_in_bounded_memory() {
    let node = Node::new();
    let config =
        CacheConfig { dir: node.data.path().join("none/cache"), memory_bytes: 100_000, ..node.config() };
    let Opened { cache, found } = Cache::open(config).unwrap();
    assert!(matches!(found, Found::NoDisk(_)));
    assert!(matches!(cache.storage(), Storage::Memory(_)));
    for number in 0..100 {
        cache.apply(vec![put(number, 1, &[number as u8; 10_000])]);
        assert_eq!(value(&cache, number).unwrap(), [number as u8; 10_000], "what came last is there");
    }
    cache.memory.run_pending_tasks();
    let there = (0..100).filter(|number| value(&cache, *number).is_some()).count();
    assert!((1..=10).contains(&there), "{there}");
    assert_eq!((cache.broken(), cache.len()), (0, there));
    cache.apply(vec![Write::SecretGone(key(99).hash())]);
    assert_eq!(value(&cache, 99), None);
}

/// Runs itself again in a process that may not write files of more than 4 MiB.
#[test]
fn a_disk_that_fails_costs_the_directory_and_no_value() {
    const LIMITED: &str = "SCAIVAULT_TEST_LIMITED";
    if std::env::var_os(LIMITED).is_none() {
        let again = std::process::Command::new("sh")
            .args(["-c", r#"trap "" XFSZ; ulimit -f 8192; exec "$0" "$@""#])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "cache::tests::a_disk_that_fails_costs_the_directory_and_no_value"])
            .env(LIMITED, "1")
            .output()
            .unwrap();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
        return;
    }
    let node = Node::new();
    let cache = node.open().cache;
    let mut last = 0;
    while cache.storage() == Storage::Disk {
        last += 1;
        assert!(last < 2_000, "the limit does not hold");
        cache.apply(vec![Write::Marks(marks("e1")), put(last, 1, &[last as u8; 20_000])]);
    }
    let Storage::Memory(reason) = cache.storage() else { panic!("the disk is full") };
    assert!(reason.contains("File too large"), "{reason}");
    assert_eq!(value(&cache, last).unwrap(), [last as u8; 20_000], "what could not be written is in memory");
    assert_eq!(value(&cache, 1).unwrap(), [1; 20_000], "what was written is still read");
    cache.apply(vec![put(1, 2, b"later"), Write::SecretGone(key(2).hash())]);
    assert_eq!((value(&cache, 1).unwrap(), value(&cache, 2)), (b"later".to_vec(), None));
    assert_eq!((cache.broken(), cache.bytes_on_disk()), (0, 0));
    drop(cache);
    assert!(!node.dir().exists(), "a restart must not find what was true before");
    assert!(matches!(node.open().found, Found::Empty));
}

#[test]
fn a_directory_that_cannot_be_written_is_set_aside() {
    let node = Node::new();
    fs::create_dir(node.dir()).unwrap();
    symlink("/dev/full", node.dir().join("db")).unwrap();
    node.left_open();
    let Opened { cache, found } = node.open();
    let Found::SetAside(reason) = found else { panic!("{found:?}") };
    assert!(reason.contains("No space left"), "{reason}");
    cache.apply(vec![put(1, 1, b"x")]);
    assert_eq!((value(&cache, 1).unwrap(), cache.storage()), (b"x".to_vec(), Storage::Disk));
}

#[test]
fn nothing_on_disk_tells_anything() {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![
        Write::Marks(marks("canary-epoch")),
        put(1, 1, b"canary-value"),
        Write::View(tenant("canary-view"), Zeroizing::new(b"canary-view".to_vec())),
        Write::Grant(TokenHash::from_bytes(*b"canary-grant-canary-grant-canary"), Zeroizing::default()),
    ]);
    drop(cache);
    for file in files(node.data.path()) {
        let bytes = fs::read(&file).unwrap();
        for canary in [&b"canary"[..], &key(1).hash().0, b"fed_"] {
            assert!(!bytes.windows(canary.len()).any(|window| window == canary), "{}", file.display());
        }
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
    }
    assert_eq!(fs::metadata(node.dir()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn no_value_becomes_a_file_of_its_own() {
    let node = Node::new();
    let cache = node.open().cache;
    for revision in 1..4 {
        cache.apply(
            (0..40).map(|number| put(number, revision, &vec![number as u8; number * 6_000])).collect(),
        );
    }
    drop(cache);
    assert_eq!(fs::read_dir(node.dir().join("blobs")).unwrap().count(), 0);
}

const SECRETS: usize = 150;

fn filled() -> Node {
    let node = Node::new();
    let cache = node.open().cache;
    cache.apply(vec![Write::Marks(marks("e1")), Write::View(tenant("t"), Zeroizing::new(vec![1; 20_000]))]);
    for number in 0..SECRETS {
        // An older state of each is in the files as well.
        cache.apply(vec![put(number, 1, b"old"), put(number, 2, &some_value(number))]);
    }
    node
}

#[test]
fn files_that_were_changed_are_not_opened() {
    let node = filled();
    let mut random = 1_u64;
    let mut next = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for turn in 0..60 {
        let copy = node.copy();
        let files = files(&copy.dir());
        let name = &files[turn % files.len()];
        let file = fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        let length = file.metadata().unwrap().len();
        match turn / files.len() % 4 {
            0 => file.set_len(next(length)).unwrap(),
            1 => fs::remove_file(name).unwrap(),
            2 => fs::rename(name, name.with_extension("other")).unwrap(),
            _ => {
                let (mut byte, at) = ([0], next(length));
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << (turn % 8)], at).unwrap();
            }
        }
        let Opened { cache, found } = copy.open();
        let Found::SetAside(reason) = found else { panic!("{} turn {turn}: {found:?}", name.display()) };
        assert!(reason.contains("changed"), "{reason}");
        assert!(cache.is_empty());
    }
    assert!(matches!(node.open().found, Found::Warm(_)));
}

#[test]
fn damage_that_nobody_notices_never_makes_another_value() {
    let node = filled();
    node.left_open();
    for name in files(&node.dir()) {
        let length = fs::metadata(&name).unwrap().len();
        for harm in 0..4 {
            let copy = node.copy();
            let name = copy.dir().join(name.strip_prefix(node.dir()).unwrap());
            let file = fs::OpenOptions::new().write(true).open(&name).unwrap();
            match harm {
                0 => fs::remove_file(&name).unwrap(),
                1 => file.set_len(length / 2).unwrap(),
                2 => fs::write(&name, (0..5_000).map(|at| (at * 7919 % 251) as u8).collect::<Vec<_>>())
                    .unwrap(),
                _ => file.write_all_at(&[0xa5], length / 3).unwrap(),
            }
            let cache = copy.open().cache;
            for number in 0..SECRETS {
                if let Some((stamp, replica)) = cache.get(&key(number)) {
                    let written = if stamp.revision == 1 { b"old".to_vec() } else { some_value(number) };
                    assert!(
                        replica.value.unwrap().expose() == written,
                        "{} {harm}: {number}",
                        name.display()
                    );
                }
            }
            cache.apply(vec![put(1, 9, b"new")]);
            assert_eq!(value(&cache, 1).unwrap(), b"new", "{} {harm}", name.display());
        }
    }
}
