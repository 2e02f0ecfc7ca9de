use super::*;
use crate::mapping::{GivenRule, Overrides};

/// Every row of the three-way table, under every policy. `a / b`: `a` if writes go through to the backend, `b` if they
/// do not.
const TABLE: &str = "
ours       | theirs     | disagreement     | backend_wins          | local_wins            | manual
-----------|------------|------------------|-----------------------|-----------------------|----------------------
absent     | same       |                  | read                  | read                  | read
absent     | moved      |                  | read                  | read                  | read
absent     | agreed     |                  | create                | create                | create
absent     | ours       |                  | create                | create                | create
absent     | new        |                  | create                | create                | create
absent     | inactive   |                  | pull state            | pull state            | pull state
absent     | unlisted   |                  | nothing               | nothing               | nothing
absent     | gone       |                  | nothing               | nothing               | nothing
absent     | unreadable |                  | skip                  | skip                  | skip

unbased    | same       |                  | read                  | read                  | read
unbased    | moved      |                  | read                  | read                  | read
unbased    | agreed     | no_common_base   | pull over             | push / keep           | conflict
unbased    | ours       |                  | rebase                | rebase                | rebase
unbased    | new        | no_common_base   | pull over             | push / keep           | conflict
unbased    | inactive   |                  | pull state            | pull state            | pull state
unbased    | unlisted   |                  | nothing               | nothing               | nothing
unbased    | gone       |                  | nothing               | nothing               | nothing
unbased    | unreadable |                  | skip                  | skip                  | skip

same       | same       |                  | nothing               | nothing               | nothing
same       | moved      |                  | read                  | read                  | read
same       | agreed     |                  | rebase                | rebase                | rebase
same       | ours       |                  | rebase                | rebase                | rebase
same       | new        | remote_changed   | pull                  | push / keep           | conflict
same       | inactive   |                  | pull state            | pull state            | pull state
same       | unlisted   |                  | confirm               | confirm               | confirm
same       | gone       | remote_deleted   | tombstone             | push / keep           | conflict
same       | unreadable |                  | skip                  | skip                  | skip

changed    | same       |                  | push / ahead          | push / ahead          | push / ahead
changed    | moved      |                  | read                  | read                  | read
changed    | agreed     |                  | push / ahead          | push / ahead          | push / ahead
changed    | ours       |                  | rebase                | rebase                | rebase
changed    | new        | both_modified    | pull over             | push / keep           | conflict
changed    | inactive   |                  | pull state            | pull state            | pull state
changed    | unlisted   |                  | confirm               | confirm               | confirm
changed    | gone       | deleted_remotely | tombstone over        | push / keep           | conflict
changed    | unreadable |                  | skip                  | skip                  | skip

deleted    | same       |                  | push delete / nothing | push delete / nothing | push delete / nothing
deleted    | moved      |                  | read                  | read                  | read
deleted    | agreed     |                  | push delete / nothing | push delete / nothing | push delete / nothing
deleted    | ours       | deleted_locally  | pull over             | push delete / keep    | conflict
deleted    | new        | deleted_locally  | pull over             | push delete / keep    | conflict
deleted    | inactive   |                  | pull state            | pull state            | pull state
deleted    | unlisted   |                  | confirm               | confirm               | confirm
deleted    | gone       |                  | drop base             | drop base             | drop base
deleted    | unreadable |                  | skip                  | skip                  | skip

tombstoned | same       |                  | read                  | read                  | read
tombstoned | moved      |                  | read                  | read                  | read
tombstoned | agreed     |                  | pull                  | pull                  | pull
tombstoned | ours       |                  | pull                  | pull                  | pull
tombstoned | new        |                  | pull                  | pull                  | pull
tombstoned | inactive   |                  | pull state            | pull state            | pull state
tombstoned | unlisted   |                  | nothing               | nothing               | nothing
tombstoned | gone       |                  | nothing               | nothing               | nothing
tombstoned | unreadable |                  | skip                  | skip                  | skip

revived    | same       |                  | read                  | read                  | read
revived    | moved      |                  | read                  | read                  | read
revived    | agreed     | both_modified    | pull over             | push / keep           | conflict
revived    | ours       |                  | rebase                | rebase                | rebase
revived    | new        | both_modified    | pull over             | push / keep           | conflict
revived    | inactive   |                  | pull state            | pull state            | pull state
revived    | unlisted   |                  | push / ahead          | push / ahead          | push / ahead
revived    | gone       |                  | push / ahead          | push / ahead          | push / ahead
revived    | unreadable |                  | skip                  | skip                  | skip

frozen     | same       |                  | skip frozen           | skip frozen           | skip frozen
frozen     | moved      |                  | skip frozen           | skip frozen           | skip frozen
frozen     | agreed     |                  | skip frozen           | skip frozen           | skip frozen
frozen     | ours       |                  | skip frozen           | skip frozen           | skip frozen
frozen     | new        |                  | skip frozen           | skip frozen           | skip frozen
frozen     | inactive   |                  | skip frozen           | skip frozen           | skip frozen
frozen     | unlisted   |                  | skip frozen           | skip frozen           | skip frozen
frozen     | gone       |                  | skip frozen           | skip frozen           | skip frozen
frozen     | unreadable |                  | skip                  | skip                  | skip
";

fn local_named(name: &str) -> Local {
    match name {
        "absent" => Local::Absent,
        "unbased" => Local::Unbased,
        "same" => Local::Same,
        "changed" => Local::Changed,
        "deleted" => Local::Deleted,
        "tombstoned" => Local::Tombstoned,
        "revived" => Local::Revived,
        "frozen" => Local::Frozen,
        other => panic!("no such side: {other}"),
    }
}

fn remote_named(name: &str) -> Remote {
    match name {
        "same" => Remote::Same,
        "moved" => Remote::Moved,
        "agreed" => Remote::Read(Value::OfBase),
        "ours" => Remote::Read(Value::OfLocal),
        "new" => Remote::Read(Value::New),
        "inactive" => Remote::Inactive(State::Disabled),
        "unlisted" => Remote::Unlisted,
        "gone" => Remote::Gone,
        "unreadable" => Remote::Unreadable(SkipReason::Forbidden),
        other => panic!("no such side: {other}"),
    }
}

fn spelled(decision: Decision) -> (&'static str, Option<Disagreement>) {
    match decision {
        Decision::Nothing => ("nothing", None),
        Decision::Read => ("read", None),
        Decision::Confirm => ("confirm", None),
        Decision::Create => ("create", None),
        Decision::Pull(Agreement::Follows) => ("pull", None),
        Decision::Pull(Agreement::Overrules(why)) => ("pull over", Some(why)),
        Decision::PullState(State::Disabled) => ("pull state", None),
        Decision::PullState(_) => ("pull another state", None),
        Decision::Rebase => ("rebase", None),
        Decision::Tombstone(Agreement::Follows) => ("tombstone", None),
        Decision::Tombstone(Agreement::Overrules(why)) => ("tombstone over", Some(why)),
        Decision::LocalAhead => ("ahead", None),
        Decision::Push => ("push", None),
        Decision::PushDelete => ("push delete", None),
        Decision::KeepLocal(why) => ("keep", Some(why)),
        Decision::Conflict(why) => ("conflict", Some(why)),
        Decision::DropBase => ("drop base", None),
        Decision::Skip(SkipReason::Forbidden) => ("skip", None),
        Decision::Skip(SkipReason::ConflictFrozen) => ("skip frozen", None),
        Decision::Skip(_) => ("skip for another reason", None),
    }
}

#[test]
fn the_table_holds_under_every_policy() {
    let mut rows = HashSet::new();
    for row in TABLE.lines().skip(3).filter(|row| !row.trim().is_empty()) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [ours, theirs, disagreement, expected @ ..] = &cells[..] else { panic!("half a row: {row}") };
        let (local, remote) = (local_named(ours), remote_named(theirs));
        assert!(rows.insert((local, remote)), "twice: {row}");
        assert_eq!(expected.len(), ConflictPolicy::ALL.len(), "{row}");
        for (conflict, expected) in ConflictPolicy::ALL.iter().zip(expected) {
            let (through, kept) = expected.split_once(" / ").unwrap_or((expected, expected));
            for (write, expected) in [
                (WritePolicy::WriteThrough, through),
                (WritePolicy::LocalOnly, kept),
                (WritePolicy::Disabled, kept),
            ] {
                let (decided, why) = spelled(decide(local, remote, write, *conflict));
                assert_eq!(decided, expected, "{ours} | {theirs} under {write:?}, {conflict:?}");
                let why = why.map(|why| serde_json::to_value(why).unwrap());
                assert!(why.is_none_or(|why| why == *disagreement), "{ours} | {theirs} under {conflict:?}");
            }
        }
    }
    assert_eq!(rows.len(), 8 * 9, "a combination is missing");
}

/// A backend with rules, and what our store has of it.
struct Scene {
    backend: BackendId,
    mapping: PathMapping,
    settings: SyncSettings,
    naming: Naming,
    rules: Vec<usize>,
    reread: Reread,
    listing: Listing,
    held: BTreeMap<SecretPath, Held>,
    deletions: Deletions,
}

fn path(text: &str) -> SecretPath {
    SecretPath::check(text).unwrap()
}

impl Scene {
    fn new(rules: &[(&str, &str)]) -> Self {
        Self::with_overrides(
            rules.iter().map(|(pattern, template)| (*pattern, *template, Overrides::default())),
        )
    }

    fn with_overrides<'a>(rules: impl IntoIterator<Item = (&'a str, &'a str, Overrides)>) -> Self {
        let given = rules.into_iter().map(|(pattern, template, overrides)| GivenRule {
            pattern,
            template,
            overrides,
            ..GivenRule::default()
        });
        let mapping = PathMapping::parse_rules(given).unwrap();
        Scene {
            naming: Naming::Vault,
            backend: BackendId::from_random([1; 10]),
            rules: (0..mapping.rules().len()).collect(),
            mapping,
            settings: SyncSettings::default(),
            reread: Reread::Changed,
            listing: Listing::default(),
            held: BTreeMap::new(),
            deletions: Deletions::Guarded,
        }
    }

    fn base(&self, name: &str) -> Base {
        Base {
            backend: self.backend.clone(),
            remote_name: name.into(),
            token: "agreed".into(),
            remote_version: "1".into(),
            fingerprint: None,
            remote_state: State::Active,
            local_version: 1,
            local_state: State::Active,
            verified: Timestamp::from_millis(0),
            tombstone: false,
            adopted: false,
        }
    }

    /// Our store has a copy that is as it was agreed.
    fn copy(&mut self, at: &str) -> &mut Held {
        let (_, name) = self.mapping.forward(&path(at)).expect("a mapped path");
        let name = name.expect("a name that the store can have");
        let base = Some(self.base(name.as_str()));
        self.held.entry(path(at)).or_insert(Held { secret: Some((1, State::Active)), base })
    }

    fn copies(&mut self, count: usize) {
        for number in 0..count {
            self.copy(&format!("e/{number:02}"));
        }
    }

    fn list(&mut self, name: &str, token: &str) -> &mut Listed {
        let name = RemoteName::with_literal(name, 1);
        self.listing.names.push(Listed {
            name,
            token: Some(token.into()),
            state: Some(State::Active),
            metadata: None,
        });
        self.listing.names.last_mut().unwrap()
    }

    fn list_copies(&mut self, numbers: std::ops::Range<usize>) {
        for number in numbers {
            self.list(&format!("kv/{number:02}"), "agreed");
        }
    }

    fn forbid(&mut self, name: &str) {
        self.listing.forbidden.push(RemoteName::new(name));
    }

    fn plan(&self) -> SyncPlan {
        let scope = Scope {
            backend: &self.backend,
            mode: Mode::Sync,
            naming: self.naming,
            mapping: &self.mapping,
            settings: &self.settings,
            rules: &self.rules,
            reread: self.reread,
        };
        plan(&scope, &self.listing, &self.held, self.deletions)
    }
}

/// What will be done, in short.
fn steps(plan: &SyncPlan) -> Vec<(&str, Decision)> {
    plan.steps.iter().map(|step| (step.path.as_str(), step.decision)).collect()
}

fn skips(plan: &SyncPlan) -> Vec<(&str, &str, SkipReason)> {
    plan.skipped.iter().map(|skip| (&*skip.path, &*skip.remote_name, skip.reason)).collect()
}

#[test]
fn our_side_is_seen_against_the_base_of_this_backend_only() {
    let scene = Scene::new(&[("e/**", "kv/**")]);
    let agreed = scene.base("kv/a");
    let tombstone =
        Base { local_state: State::Deleted, tombstone: true, token: String::new(), ..agreed.clone() };
    let foreign = Base { backend: BackendId::from_random([2; 10]), ..agreed.clone() };
    let side = |secret, base| Local::of(secret, base, &scene.backend);
    let (active, deleted, destroyed) = (State::Active, State::Deleted, State::Destroyed);
    for (secret, base, expected) in [
        (None, None, Local::Absent),
        (Some((1, deleted)), None, Local::Absent),
        (Some((1, active)), None, Local::Unbased),
        (Some((1, State::Disabled)), None, Local::Unbased),
        (Some((1, active)), Some(&foreign), Local::Unbased),
        (Some((1, deleted)), Some(&foreign), Local::Absent),
        (Some((1, active)), Some(&agreed), Local::Same),
        (Some((2, active)), Some(&agreed), Local::Changed),
        (Some((1, State::Disabled)), Some(&agreed), Local::Changed),
        (Some((1, deleted)), Some(&agreed), Local::Deleted),
        (Some((2, destroyed)), Some(&agreed), Local::Deleted),
        (None, Some(&agreed), Local::Deleted),
        (Some((1, deleted)), Some(&tombstone), Local::Tombstoned),
        (Some((2, deleted)), Some(&tombstone), Local::Tombstoned),
        (None, Some(&tombstone), Local::Tombstoned),
        (Some((2, active)), Some(&tombstone), Local::Revived),
        (Some((1, active)), Some(&tombstone), Local::Revived),
    ] {
        assert_eq!(side(secret, base), expected, "{secret:?} {base:?}");
    }
}

#[test]
fn only_what_changed_is_read() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copy("e/a");
    scene.copy("e/b");
    scene.list("kv/a", "agreed");
    scene.list("kv/b", "another");
    scene.list("kv/c", "new");
    let plan = scene.plan();
    assert_eq!(steps(&plan), [("e/b", Decision::Read), ("e/c", Decision::Read)]);
    assert_eq!((plan.listed, plan.mapped, plan.unchanged, plan.known), (3, 3, 1, 2));
    let tokens: Vec<_> = plan.steps.iter().map(|step| step.token.as_deref()).collect();
    assert_eq!(tokens, [Some("another"), Some("new")]);
    scene.reread = Reread::Everything;
    assert_eq!(scene.plan().steps.len(), 3);
}

#[test]
fn a_listing_without_tokens_has_everything_read() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copy("e/a").base.as_mut().unwrap().token = String::new();
    *scene.list("kv/a", "") =
        Listed { name: RemoteName::new("kv/a"), token: None, state: None, metadata: None };
    assert_eq!(steps(&scene.plan()), [("e/a", Decision::Read)]);
    scene.listing.names[0].token = Some(String::new());
    assert_eq!(steps(&scene.plan()), [("e/a", Decision::Read)]);
}

#[test]
fn a_token_is_only_good_for_the_name_and_the_state_it_was_agreed_of() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copy("e/a").base.as_mut().unwrap().remote_name = "old/a".into();
    scene.copy("e/b").base.as_mut().unwrap().remote_state = State::Disabled;
    scene.list("kv/a", "agreed");
    scene.list("kv/b", "agreed");
    assert_eq!(steps(&scene.plan()), [("e/a", Decision::Read), ("e/b", Decision::Read)]);
}

#[test]
fn a_state_is_pulled_once() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copy("e/a");
    scene.list("kv/a", "disabled").state = Some(State::Disabled);
    scene.list("kv/new", "expired").state = Some(State::Expired);
    let pulls =
        [("e/a", Decision::PullState(State::Disabled)), ("e/new", Decision::PullState(State::Expired))];
    assert_eq!(steps(&scene.plan()), pulls);
    scene.copy("e/a").base.as_mut().unwrap().remote_state = State::Disabled;
    scene.listing.names.pop();
    let plan = scene.plan();
    assert_eq!((steps(&plan), plan.unchanged), (vec![], 1));
}

#[test]
fn a_deleted_version_is_as_good_as_a_missing_name_but_its_listing_is_not_empty() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copies(1);
    for state in [State::Deleted, State::Destroyed] {
        scene.listing.names.clear();
        scene.list("kv/00", "gone").state = Some(state);
        scene.list("kv/new", "gone").state = Some(state);
        let plan = scene.plan();
        assert_eq!((steps(&plan), plan.held_back), (vec![("e/00", Decision::Confirm)], None), "{state:?}");
    }
}

#[test]
fn a_fifth_may_be_deleted_and_not_one_more() {
    for (known, missing, held_back) in
        [(15, 3, false), (14, 3, true), (2, 1, false), (3, 2, false), (20, 4, false), (20, 5, true)]
    {
        let mut scene = Scene::new(&[("e/**", "kv/**")]);
        scene.copies(known);
        scene.list_copies(missing..known);
        let plan = scene.plan();
        let expected = held_back.then_some(HeldBack { deletions: missing as u64, known: known as u64 });
        assert_eq!(plan.held_back, expected, "{missing} of {known}");
        assert_eq!(plan.known, known as u64);
        let (confirmed, left_out) = if held_back { (0, missing) } else { (missing, 0) };
        assert_eq!((plan.steps.len(), plan.unverified.len()), (confirmed, left_out));
        assert!(plan.skipped.iter().all(|skip| skip.reason == SkipReason::MassDeleteGuard));
        assert_eq!(plan.skipped.len(), left_out);
        scene.deletions = Deletions::Allowed(u64::MAX);
        let plan = scene.plan();
        assert_eq!((plan.steps.len(), plan.held_back), (missing, None), "with consent");
    }
}

#[test]
fn what_a_rule_lost_altogether_is_kept() {
    let mut scene = Scene::new(&[("e/t/**", "kv/t/**"), ("e/**", "kv/**")]);
    scene.copies(10);
    scene.copy("e/t/x");
    scene.list_copies(1..10);
    let plan = scene.plan();
    assert_eq!(steps(&plan), [("e/00", Decision::Confirm)]);
    assert_eq!(skips(&plan), [("e/t/x", "kv/t/x", SkipReason::MassDeleteGuard)]);
    assert_eq!(plan.held_back, Some(HeldBack { deletions: 1, known: 11 }));
    scene.deletions = Deletions::Allowed(u64::MAX);
    assert_eq!(scene.plan().steps.len(), 2);
}

#[test]
fn the_brake_counts_only_what_would_be_deleted() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copies(4);
    scene.list("kv/other", "new");
    let confirmed =
        |scene: &Scene| scene.plan().steps.iter().filter(|step| step.decision == Decision::Confirm).count();
    assert_eq!(confirmed(&scene), 0, "they would be deleted");
    for policy in [ConflictPolicy::LocalWins, ConflictPolicy::Manual] {
        scene.settings.conflict_policy = policy;
        assert_eq!((confirmed(&scene), scene.plan().held_back), (4, None), "{policy:?} deletes nothing");
    }
    scene.settings.conflict_policy = ConflictPolicy::BackendWins;
    for held in scene.held.values_mut() {
        held.secret = Some((1, State::Deleted));
    }
    assert_eq!((confirmed(&scene), scene.plan().known), (4, 0), "they are deleted here already");
}

#[test]
fn deletions_that_only_reads_find_are_held_back_by_the_same_measure() {
    let mut scene = Scene::new(&[("e/t/**", "kv/t/**"), ("e/**", "kv/**")]);
    scene.copies(15);
    scene.list_copies(0..15);
    let held_back = |scene: &Scene, found| scene.plan().holds_back(found, scene.deletions);
    assert_eq!((held_back(&scene, 3), held_back(&scene, 4)), (false, true));
    scene.copy("e/t/x");
    assert_eq!(scene.plan().held_back, Some(HeldBack { deletions: 1, known: 16 }));
    assert_eq!((held_back(&scene, 2), held_back(&scene, 3)), (false, true), "one was held back already");
    scene.deletions = Deletions::Allowed(u64::MAX);
    assert!(!held_back(&scene, 15));
}

#[test]
fn what_may_not_be_seen_is_not_absent() {
    for forbidden in ["kv/t/x", "kv/t", "kv/t/", "kv", "", "/"] {
        let mut scene = Scene::new(&[("e/**", "kv/**")]);
        scene.copy("e/t/x");
        scene.copy("e/tx");
        scene.copies(1);
        scene.list_copies(0..1);
        scene.forbid(forbidden);
        let plan = scene.plan();
        assert!(plan.unverified.contains(&path("e/t/x")), "{forbidden:?}");
        assert!(!plan.steps.iter().any(|step| step.path == path("e/t/x")), "{forbidden:?}");
        assert_eq!(plan.held_back, None, "{forbidden:?}");
        assert_eq!(plan.skipped.len(), 1, "{forbidden:?}");
        // Only a whole segment is a folder.
        let sibling = plan.unverified.contains(&path("e/tx"));
        assert_eq!(sibling, matches!(forbidden, "kv" | "" | "/"), "{forbidden:?}");
    }
}

#[test]
fn what_is_forbidden_is_told_with_its_path() {
    let mut scene = Scene::new(&[("e/**", "kv/**"), ("m/**", "kv/**"), ("l/**", "kv/**")]);
    scene.rules = vec![0, 1];
    for name in ["kv/x", "kv/sp ace", "kv/x"] {
        scene.forbid(name);
    }
    let forbidden = SkipReason::Forbidden;
    assert_eq!(
        skips(&scene.plan()),
        [("e/x", "kv/x", forbidden), ("m/x", "kv/x", forbidden), ("", "kv/sp ace", forbidden)]
    );
}

#[test]
fn a_name_is_skipped_once_and_only_if_no_rule_has_a_path_for_it() {
    let mut scene =
        Scene::new(&[("e/t/**", "kv/t/**"), ("e/old/*", "kv/o/*"), ("e/**", "kv/**"), ("m/**", "kv/**")]);
    scene.rules = vec![0, 1, 2];
    for name in ["kv/t/x", "kv/sp ace", "kv/sp ace", "other/x"] {
        scene.list(name, "1");
    }
    let plan = scene.plan();
    assert_eq!(
        steps(&plan),
        [("e/t/x", Decision::Read)],
        "its own rule has a path for it, the others do not matter"
    );
    let (charset, no_rule) = (SkipReason::Charset, SkipReason::NoRule);
    assert_eq!(skips(&plan), [("", "kv/sp ace", charset), ("", "other/x", no_rule)]);

    let mut scene = Scene::new(&[("e/old/*", "kv/o/*"), ("e/**", "kv/**")]);
    scene.list("kv/old/x", "1");
    assert_eq!(skips(&scene.plan()), [("", "kv/old/x", SkipReason::ShadowedByRule)]);
    assert_eq!((steps(&scene.plan()), scene.plan().mapped), (vec![], 0));
}

#[test]
fn what_is_listed_twice_is_one_secret_and_the_later_is_newer() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copy("e/a");
    scene.list("kv/a", "older");
    scene.list("kv/a", "agreed");
    let plan = scene.plan();
    assert_eq!((steps(&plan), skips(&plan), plan.mapped, plan.unchanged), (vec![], vec![], 1, 1));
}

#[test]
fn one_name_can_have_two_paths() {
    let mut scene = Scene::new(&[("e/**", "kv/**"), ("m/**", "kv/**")]);
    scene.list("kv/a", "1");
    assert_eq!(steps(&scene.plan()), [("e/a", Decision::Read), ("m/a", Decision::Read)]);
}

#[test]
fn rules_that_are_not_due_are_left_alone() {
    let mut scene = Scene::new(&[("e/t/**", "kv/t/**"), ("e/**", "kv/**")]);
    scene.copy("e/t/x");
    scene.copy("e/t/y");
    scene.copy("e/z");
    scene.rules = vec![0];
    scene.list("kv/t/x", "another");
    scene.list("kv/new", "1");
    let plan = scene.plan();
    assert_eq!(steps(&plan), [("e/t/x", Decision::Read), ("e/t/y", Decision::Confirm)]);
    assert_eq!((plan.mapped, plan.known, skips(&plan)), (1, 2, vec![]));
}

#[test]
fn a_rule_has_its_own_policies() {
    let own = Overrides { write_policy: Some(WritePolicy::WriteThrough), ..Overrides::default() };
    let mut scene =
        Scene::with_overrides([("e/t/**", "kv/t/**", own), ("e/**", "kv/**", Overrides::default())]);
    scene.copy("e/t/x").secret = Some((2, State::Active));
    scene.copy("e/x").secret = Some((2, State::Active));
    scene.list("kv/t/x", "agreed");
    scene.list("kv/x", "agreed");
    assert_eq!(steps(&scene.plan()), [("e/t/x", Decision::Push), ("e/x", Decision::LocalAhead)]);
}

#[test]
fn what_is_no_copy_of_this_backend_is_never_missed() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copies(1);
    scene.list_copies(0..1);
    scene.copy("e/local").base = None;
    scene.copy("e/foreign").base.as_mut().unwrap().backend = BackendId::from_random([2; 10]);
    scene.held.insert(
        path("unmapped/x"),
        Held { secret: Some((1, State::Active)), base: Some(scene.base("kv/x")) },
    );
    let plan = scene.plan();
    assert_eq!((steps(&plan), skips(&plan), plan.known, plan.unchanged), (vec![], vec![], 1, 1));
    // Nor can they be unverified.
    scene.forbid("kv");
    assert_eq!(scene.plan().unverified, [] as [SecretPath; 0]);
    // Once the backend has something there, it is looked at, whatever was agreed with another one.
    scene.list("kv/foreign", "agreed");
    assert_eq!(steps(&scene.plan()), [("e/foreign", Decision::Read)]);
    scene.listing.names.last_mut().unwrap().state = Some(State::Disabled);
    scene.copy("e/foreign").base.as_mut().unwrap().remote_state = State::Disabled;
    assert_eq!(steps(&scene.plan()), [("e/foreign", Decision::PullState(State::Disabled))]);
}

#[test]
fn what_was_written_over_a_tombstone_stays_until_the_backend_has_it_again() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    scene.copies(1);
    scene.list_copies(0..1);
    let tombstone =
        Base { tombstone: true, local_state: State::Deleted, token: String::new(), ..scene.base("kv/a") };
    scene.held.insert(path("e/a"), Held { secret: Some((1, State::Deleted)), base: Some(tombstone.clone()) });
    assert_eq!(steps(&scene.plan()), []);
    scene.held.insert(path("e/a"), Held { secret: Some((2, State::Active)), base: Some(tombstone) });
    let plan = scene.plan();
    assert_eq!((steps(&plan), plan.known), (vec![("e/a", Decision::LocalAhead)], 1));
    scene.list("kv/a", "");
    assert_eq!(steps(&scene.plan()), [("e/a", Decision::Read)]);
}

#[test]
fn steps_are_in_the_order_of_their_paths() {
    let mut scene = Scene::new(&[("e/**", "kv/**")]);
    for at in ["e/m", "e/b", "e/y", "e/0", "e/1", "e/2", "e/3", "e/4", "e/5", "e/6"] {
        scene.copy(at);
    }
    for name in ["kv/z", "kv/a", "kv/m", "kv/y", "kv/c", "kv/0", "kv/1", "kv/2", "kv/3", "kv/4", "kv/5"] {
        scene.list(name, "another");
    }
    let plan = scene.plan();
    assert_eq!(plan.steps.len(), 13);
    assert!(plan.steps.is_sorted_by(|a, b| a.path < b.path));
}

#[test]
fn two_spellings_of_one_name_are_a_collision_and_not_absent() {
    let mut scene = Scene::new(&[("e/**", "**")]);
    scene.naming = Naming::Azure;
    scene.copy("e/db");
    for name in ["DB", "Db", "Other"] {
        scene.list(name, "agreed");
    }
    let plan = scene.plan();
    let skipped: Vec<_> = plan.skipped.iter().map(|line| (&*line.path, line.reason, &*line.detail)).collect();
    assert_eq!(skipped, [("e/db", SkipReason::Collision, "in this store these are one name: DB, Db")]);
    assert_eq!(plan.unverified, [path("e/db")]);
    let steps: Vec<_> = plan.steps.iter().map(|step| (step.path.as_str(), step.name.as_str())).collect();
    assert_eq!(steps, [("e/other", "other")]);
    assert_eq!(plan.steps[0].decision, Decision::Read);
}

#[test]
fn what_a_listing_shows_of_a_rules_own_name_counts() {
    let mut scene = Scene::new(&[("own", "db"), ("e/**", "**")]);
    scene.naming = Naming::Azure;
    scene.listing.named = vec![RemoteName::new("db")];
    // No listing shows it: it may still be there, at each of its paths.
    assert_eq!(steps(&scene.plan()), [("e/db", Decision::Read), ("own", Decision::Read)]);
    for at in ["own", "e/db"] {
        scene.copy(at).base.as_mut().unwrap().remote_name = "db".into();
    }
    // It is spelled in one way there, and in ours here.
    scene.list("DB", "agreed");
    let plan = scene.plan();
    assert_eq!((steps(&plan), skips(&plan), plan.unchanged), (vec![], vec![], 2));
    // In two ways it is nobody's.
    scene.list("Db", "agreed");
    let plan = scene.plan();
    assert_eq!((steps(&plan), plan.unchanged, plan.unverified.len()), (vec![], 0, 2));
}

#[test]
fn a_copy_whose_name_the_store_cannot_have_is_detached_and_not_gone() {
    let mut scene = Scene::new(&[("e/*", "*")]);
    scene.naming = Naming::Azure;
    for at in ["e/DB", "e/db"] {
        scene.copy(at);
    }
    scene.list("db", "agreed");
    let plan = scene.plan();
    assert_eq!((steps(&plan), plan.known, plan.unverified.len()), (vec![], 1, 0));
}
