//! What a cycle does about each path: a pure function of what the backend listed and what was agreed before.
//!
//! [`decide`] is the three-way table: our side against the base, the backend's side against the base. A listing is a
//! hint and not the truth, so where it shows a change the decision is to read, and where it misses a path the decision
//! is to make sure; both are decided again with what came of it. [`plan`] maps the names of a listing to paths and holds
//! deletions back when there are too many of them.
//!
//! A read may find a deletion that the listing did not show. So whoever carries a plan out deletes last, and only if
//! [`SyncPlan::holds_back`] does not mind as many as there are.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::report::{HeldBack, SkipReason, Skipped};
use super::{ConflictPolicy, Fingerprint, Mode, SyncSettings, WritePolicy};
use crate::backend::{BackendId, Naming};
use crate::mapping::{PathMapping, RemoteName};
use crate::path::SecretPath;
use crate::secret::{Metadata, State, Version};
use crate::time::Timestamp;

/// What both sides of a path looked like when they last agreed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The backend that the path is a copy of.
    pub backend: BackendId,
    /// The name there.
    pub remote_name: String,
    /// What the backend's listing says of the state that was read; changes with it. Empty if it says nothing, and after
    /// a deletion.
    pub token: String,
    /// The version that was read, as the backend names it.
    pub remote_version: String,
    /// Of the value that was read; `None` if the state had none.
    pub fingerprint: Option<Fingerprint>,
    /// The state there.
    pub remote_state: State,
    /// Our version then.
    pub local_version: Version,
    /// Our state then.
    pub local_state: State,
    /// When the two were last compared, one by one; what whole cycles compare is known per rule.
    pub verified: Timestamp,
    /// The deletion here followed one in the backend.
    pub tombstone: bool,
    /// The secret was ours before it was a copy: some of its versions are nowhere else.
    #[serde(default)]
    pub adopted: bool,
}

/// Our side of a path, compared with the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Local {
    /// There is no secret.
    Absent,
    /// There is one that was never a copy.
    Unbased,
    /// It is as agreed.
    Same,
    /// It was written since.
    Changed,
    /// It was deleted here since.
    Deleted,
    /// It is deleted on both sides, and a sync saw it.
    Tombstoned,
    /// A sync deleted it, and it was written since.
    Revived,
    /// It waits for somebody to resolve a conflict.
    Frozen,
}

impl Local {
    /// Compares a secret with its base, as far as it is one of `backend`. `None`: there is no secret.
    pub fn of(secret: Option<(Version, State)>, base: Option<&Base>, backend: &BackendId) -> Local {
        let base = base.filter(|base| base.backend == *backend);
        let there = secret.filter(|(_, state)| !matches!(state, State::Deleted | State::Destroyed));
        match (there, base) {
            (None, None) => Local::Absent,
            (Some(_), None) => Local::Unbased,
            (None, Some(base)) if base.tombstone => Local::Tombstoned,
            (Some(_), Some(base)) if base.tombstone => Local::Revived,
            (None, Some(_)) => Local::Deleted,
            (Some(there), Some(base)) if there == (base.local_version, base.local_state) => Local::Same,
            (Some(_), Some(_)) => Local::Changed,
        }
    }

    /// Whether a deletion in the backend would take something away here.
    fn is_live(self) -> bool {
        matches!(self, Local::Same | Local::Changed)
    }
}

/// The backend's side of a path, compared with the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Remote {
    /// It is as agreed.
    Same,
    /// It may have changed, and has not been read yet.
    Moved,
    /// It was read.
    Read(Value),
    /// It is there, and in a state without a value that is not the agreed one.
    Inactive(State),
    /// The listing does not have it.
    Unlisted,
    /// It is not there: a read said so.
    Gone,
    /// It is not known, for this reason.
    Unreadable(SkipReason),
}

/// A value that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// It is the agreed one.
    OfBase,
    /// It is not the agreed one, but the one that we have.
    OfLocal,
    /// It is another one.
    New,
}

/// What is to be done about a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Nothing: both sides are as agreed, or there is nothing to agree on.
    Nothing,
    /// Read it, then decide again.
    Read,
    /// Make sure that it is gone, then decide again.
    Confirm,
    /// It is new: take it.
    Create,
    /// Take the backend's value, as a new version.
    Pull(Agreement),
    /// Take the backend's state, which has no value.
    PullState(State),
    /// The values agree: make a new base of them, and take the backend's state and metadata.
    Rebase,
    /// It is gone there: delete it here, softly.
    Tombstone(Agreement),
    /// We are ahead, and stay it.
    LocalAhead,
    /// We are ahead: write our value to the backend.
    Push,
    /// It was deleted here: delete it in the backend, softly.
    PushDelete,
    /// The sides disagree and ours is kept: list it.
    KeepLocal(Disagreement),
    /// The sides disagree: somebody has to say who is right.
    Conflict(Disagreement),
    /// Neither side has it any more.
    DropBase,
    /// Leave it as it is, for this reason.
    Skip(SkipReason),
}

/// Whether following the backend overrules us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Agreement {
    /// Only the backend has changed.
    Follows,
    /// We had changed too; our value stays as a version.
    Overrules(Disagreement),
}

/// How the two sides disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disagreement {
    /// The backend has another value than agreed, and we are not to follow it.
    RemoteChanged,
    /// The backend does not have it any more, and we are not to follow it.
    RemoteDeleted,
    /// Both have another value than agreed.
    BothModified,
    /// We changed it, the backend deleted it.
    DeletedRemotely,
    /// We deleted it, the backend changed it.
    DeletedLocally,
    /// Both have it, it differs, and it was never agreed.
    NoCommonBase,
}

/// The three-way table.
pub fn decide(local: Local, remote: Remote, write: WritePolicy, conflict: ConflictPolicy) -> Decision {
    use Disagreement::{
        BothModified, DeletedLocally, DeletedRemotely, NoCommonBase, RemoteChanged, RemoteDeleted,
    };
    // Following is what `backend_wins` does; the others keep ours, or ask.
    let disagree = |follow: Decision, disagreement| match (conflict, write) {
        (ConflictPolicy::BackendWins, _) => follow,
        (ConflictPolicy::LocalWins, WritePolicy::WriteThrough) => match local {
            Local::Deleted => Decision::PushDelete,
            _ => Decision::Push,
        },
        (ConflictPolicy::LocalWins, _) => Decision::KeepLocal(disagreement),
        (ConflictPolicy::Manual, _) => Decision::Conflict(disagreement),
    };
    let pull = |disagreement| disagree(Decision::Pull(Agreement::Overrules(disagreement)), disagreement);
    let ahead = match write {
        WritePolicy::WriteThrough => Decision::Push,
        WritePolicy::LocalOnly | WritePolicy::Disabled => Decision::LocalAhead,
    };
    match (local, remote) {
        (_, Remote::Unreadable(reason)) => Decision::Skip(reason),
        (Local::Frozen, _) => Decision::Skip(SkipReason::ConflictFrozen),
        (_, Remote::Inactive(state)) => Decision::PullState(state),
        (_, Remote::Moved) => Decision::Read,

        // Nothing was ever agreed, or that neither side has it: the listing has no news if it is not in there.
        (Local::Absent | Local::Unbased | Local::Tombstoned, Remote::Unlisted | Remote::Gone) => {
            Decision::Nothing
        }
        (Local::Revived, Remote::Unlisted | Remote::Gone) => ahead,
        (Local::Absent | Local::Unbased | Local::Tombstoned | Local::Revived, Remote::Same) => Decision::Read,
        (Local::Absent, Remote::Read(_)) => Decision::Create,
        (Local::Tombstoned, Remote::Read(_)) => Decision::Pull(Agreement::Follows),
        (Local::Unbased | Local::Revived, Remote::Read(Value::OfLocal)) => Decision::Rebase,
        (Local::Unbased, Remote::Read(Value::OfBase | Value::New)) => pull(NoCommonBase),
        (Local::Revived, Remote::Read(Value::OfBase | Value::New)) => pull(BothModified),

        (Local::Same | Local::Changed | Local::Deleted, Remote::Unlisted) => Decision::Confirm,

        (Local::Same, Remote::Same) => Decision::Nothing,
        (Local::Same, Remote::Read(Value::OfBase | Value::OfLocal)) => Decision::Rebase,
        (Local::Same, Remote::Read(Value::New)) => {
            disagree(Decision::Pull(Agreement::Follows), RemoteChanged)
        }
        (Local::Same, Remote::Gone) => disagree(Decision::Tombstone(Agreement::Follows), RemoteDeleted),

        (Local::Changed, Remote::Same | Remote::Read(Value::OfBase)) => ahead,
        (Local::Changed, Remote::Read(Value::OfLocal)) => Decision::Rebase,
        (Local::Changed, Remote::Read(Value::New)) => pull(BothModified),
        (Local::Changed, Remote::Gone) => {
            disagree(Decision::Tombstone(Agreement::Overrules(DeletedRemotely)), DeletedRemotely)
        }

        (Local::Deleted, Remote::Same | Remote::Read(Value::OfBase)) => match write {
            WritePolicy::WriteThrough => Decision::PushDelete,
            WritePolicy::LocalOnly | WritePolicy::Disabled => Decision::Nothing,
        },
        (Local::Deleted, Remote::Read(Value::OfLocal | Value::New)) => pull(DeletedLocally),
        (Local::Deleted, Remote::Gone) => Decision::DropBase,
    }
}

/// One name that a listing showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name.
    pub name: RemoteName,
    /// Changes with the value, the state and the metadata; `None`: the listing does not tell.
    pub token: Option<String>,
    /// The state of the current version; `None`: the listing does not tell.
    pub state: Option<State>,
    /// The custom metadata, where listings tell it and reads do not.
    pub metadata: Option<Metadata>,
}

/// A whole listing. Half of one is none.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// What it showed.
    pub names: Vec<Listed>,
    /// Names that rules have for themselves, so that no listing has to show them. What one does show of them counts.
    pub named: Vec<RemoteName>,
    /// Names and folders that may not be looked at, a folder with or without the slash at its end: what lies there is
    /// unknown, not absent.
    pub forbidden: Vec<RemoteName>,
}

/// What our store has at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The newest version and its state; `None` if there is no secret.
    pub secret: Option<(Version, State)>,
    /// What was agreed.
    pub base: Option<Base>,
}

/// What a cycle is about.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// The backend.
    pub backend: &'a BackendId,
    /// Its mode.
    pub mode: Mode,
    /// How its store names secrets.
    pub naming: Naming,
    /// Its rules.
    pub mapping: &'a PathMapping,
    /// How they are synced.
    pub settings: &'a SyncSettings,
    /// Which of them this cycle is about, by index; others are left alone.
    pub rules: &'a [usize],
    /// Whether values are read although the listing shows no change, as once a day.
    pub reread: Reread,
}

/// How far a listing is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reread {
    /// What has the agreed token has not changed.
    Changed,
    /// Everything is read.
    Everything,
}

/// Whether deletions are held back when there are too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletions {
    /// They are.
    Guarded,
    /// Somebody consented to as many as this.
    Allowed(u64),
}

impl Deletions {
    fn too_many(self, deletions: u64, known: u64) -> bool {
        let consented = matches!(self, Deletions::Allowed(most) if deletions <= most);
        !consented && deletions >= 3 && deletions * 5 > known
    }

    /// Whether this many may go although nothing is left of a rule's listing.
    fn may_empty(self, deletions: u64) -> bool {
        matches!(self, Deletions::Allowed(most) if deletions <= most)
    }
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The path here.
    pub path: SecretPath,
    /// The name in the backend.
    pub name: RemoteName,
    /// The rule between them.
    pub rule: usize,
    /// What the listing said of it.
    pub token: Option<String>,
    /// The custom metadata, where the listing tells it and a read does not.
    pub metadata: Option<Metadata>,
    /// Never [`Decision::Nothing`] and never [`Decision::Skip`].
    pub decision: Decision,
}

/// What a cycle will do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncPlan {
    /// In the order of paths.
    pub steps: Vec<Step>,
    /// Names that were listed.
    pub listed: u64,
    /// Paths that they are.
    pub mapped: u64,
    /// Paths about which nothing is to be done.
    pub unchanged: u64,
    /// Paths from which a deletion in the backend would take something away here.
    pub known: u64,
    /// What is left out, and why.
    pub skipped: Vec<Skipped>,
    /// Known paths that are left out: they keep their age.
    pub unverified: Vec<SecretPath>,
    /// Deletions that were held back.
    pub held_back: Option<HeldBack>,
}

/// Plans a cycle: `listing` is all that the backend has below the rules of `scope`, `held` all that our store has there.
pub fn plan(
    scope: &Scope<'_>,
    listing: &Listing,
    held: &BTreeMap<SecretPath, Held>,
    deletions: Deletions,
) -> SyncPlan {
    let mut plan =
        SyncPlan { listed: (listing.names.len() + listing.named.len()) as u64, ..SyncPlan::default() };
    let mut forbidden: HashSet<&str> = HashSet::new();
    for name in &listing.forbidden {
        if forbidden.insert(name.as_str().trim_end_matches('/')) {
            let (paths, _) = scope.paths(name);
            for (path, _) in &paths {
                plan.skip(path.as_str(), name, SkipReason::Forbidden);
            }
            if paths.is_empty() {
                plan.skip("", name, SkipReason::Forbidden);
            }
        }
    }
    let (names, collisions) = scope.fold(&listing.names);
    for (name, spellings) in &collisions {
        let detail = format!("in this store these are one name: {}", spellings.join(", "));
        for (path, _) in scope.paths(name).0 {
            plan.skip(path.as_str(), name, SkipReason::Collision);
            plan.skipped.last_mut().expect("it was just added").detail.clone_from(&detail);
        }
        // What is not taken is not absent.
        forbidden.insert(name.as_str());
    }
    let mut skipped: HashSet<&str> = HashSet::new();
    let mut found: BTreeMap<SecretPath, (usize, &Listed)> = BTreeMap::new();
    let is_ambiguous = |name: &RemoteName| collisions.keys().any(|other| other.as_str() == name.as_str());
    let named = listing.named.iter().filter(|name| !is_ambiguous(name));
    let unseen = |name: &RemoteName| Listed { name: name.clone(), token: None, state: None, metadata: None };
    let named: Vec<Listed> = named.map(unseen).collect();
    for listed in named.iter().chain(names.iter()) {
        let (paths, skip) = scope.paths(&listed.name);
        if let Some(skip) = skip
            && skipped.insert(listed.name.as_str())
        {
            plan.skip("", &listed.name, skip);
        }
        // A path has one name. If that is listed twice, as by two rules with folders in each other, the later is newer.
        found.extend(paths.into_iter().map(|(path, rule)| (path, (rule, listed))));
    }
    plan.mapped = found.len() as u64;
    let listed_rules: HashSet<usize> = found.values().map(|(rule, _)| *rule).collect();

    // Deletions are decided at the end, when it is known how many there are.
    let mut missing: Vec<Step> = Vec::new();
    for (path, held) in held {
        let (rule, name, listed) = match found.remove(path) {
            Some((rule, listed)) => (rule, Cow::Borrowed(&listed.name), Some(listed)),
            None => match scope.mapping.forward(path) {
                Some((rule, Some(name))) if scope.rules.contains(&rule) && scope.naming.has(&name) => {
                    (rule, Cow::Owned(name), None)
                }
                // Another cycle's, or detached: a name that no secret there can have is not one that is gone.
                _ => continue,
            },
        };
        let base = held.base.as_ref().filter(|base| base.backend == *scope.backend);
        let local = Local::of(held.secret, base, scope.backend);
        plan.known += u64::from(local.is_live());
        let remote = match listed {
            Some(listed) => compare(listed, base, scope.reread),
            None if is_in(&forbidden, &name) => {
                plan.unverified.extend(base.map(|_| path.clone()));
                continue;
            }
            None => Remote::Unlisted,
        };
        let token = listed.and_then(|listed| listed.token.as_deref());
        let step = |decision| Step {
            path: path.clone(),
            name: name.clone().into_owned(),
            rule,
            token: token.map(str::to_owned),
            metadata: listed.and_then(|listed| listed.metadata.clone()),
            decision,
        };
        if remote == Remote::Unlisted
            && matches!(scope.decide(rule, local, Remote::Gone), Decision::Tombstone(_))
        {
            missing.push(step(Decision::Confirm));
            continue;
        }
        match scope.decide(rule, local, remote) {
            Decision::Nothing => plan.unchanged += u64::from(remote != Remote::Unlisted),
            decision => plan.steps.push(step(decision)),
        }
    }
    for (path, (rule, listed)) in found {
        match scope.decide(rule, Local::Absent, compare(listed, None, scope.reread)) {
            Decision::Nothing => {}
            decision => {
                let Listed { name, token, metadata, .. } = listed.clone();
                plan.steps.push(Step { path, name, rule, token, metadata, decision });
            }
        }
    }

    let count = missing.len() as u64;
    let too_many = deletions.too_many(count, plan.known);
    for step in missing {
        let emptied = !listed_rules.contains(&step.rule);
        if too_many || (emptied && !deletions.may_empty(count)) {
            plan.skip(step.path.as_str(), &step.name, SkipReason::MassDeleteGuard);
            plan.held_back.get_or_insert(HeldBack { deletions: 0, known: plan.known }).deletions += 1;
            plan.unverified.push(step.path);
        } else {
            plan.steps.push(step);
        }
    }
    plan.steps.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    plan
}

impl SyncPlan {
    /// Whether this many deletions that were found while the plan was carried out, besides those that it held back
    /// itself, are too many.
    pub fn holds_back(&self, found: u64, deletions: Deletions) -> bool {
        let before = self.held_back.map_or(0, |held_back| held_back.deletions);
        deletions.too_many(before + found, self.known)
    }

    fn skip(&mut self, path: &str, name: &RemoteName, reason: SkipReason) {
        self.skipped.push(Skipped {
            path: path.into(),
            remote_name: name.as_str().into(),
            reason,
            detail: String::new(),
        });
    }
}

impl Scope<'_> {
    /// The paths of a name that the cycle is about, each with its rule; or why the name has no path at all.
    fn paths(&self, name: &RemoteName) -> (Vec<(SecretPath, usize)>, Option<SkipReason>) {
        let mut paths = Vec::new();
        let mut skip = None;
        let mut is_mapped = false;
        for outcome in self.mapping.reverse(name) {
            match outcome {
                Ok(path) => {
                    is_mapped = true;
                    if let Some(rule) = self.mapping.owner(&path)
                        && self.rules.contains(&rule)
                    {
                        paths.push((path, rule));
                    }
                }
                Err(fault) => skip = skip.or(Some(fault.into())),
            }
        }
        (paths, skip.filter(|_| !is_mapped))
    }

    /// The names in the one spelling that has a path, and those of which the listing has more than one spelling, with
    /// these: which of them a read would give, nobody can say.
    fn fold<'l>(&self, names: &'l [Listed]) -> (Cow<'l, [Listed]>, BTreeMap<RemoteName, Vec<String>>) {
        let is_folded = |listed: &Listed| *self.naming.fold(&listed.name) == listed.name;
        if names.iter().all(is_folded) {
            return (Cow::Borrowed(names), BTreeMap::new());
        }
        let mut spellings: BTreeMap<RemoteName, BTreeSet<&str>> = BTreeMap::new();
        for listed in names {
            let folded = self.naming.fold(&listed.name).into_owned();
            spellings.entry(folded).or_default().insert(listed.name.as_str());
        }
        spellings.retain(|_, spellings| spellings.len() > 1);
        let fold =
            |listed: &Listed| Listed { name: self.naming.fold(&listed.name).into_owned(), ..listed.clone() };
        let folded = names.iter().map(fold).filter(|listed| !spellings.contains_key(&listed.name)).collect();
        let collisions = spellings
            .into_iter()
            .map(|(name, spellings)| (name, spellings.into_iter().map(str::to_owned).collect()))
            .collect();
        (Cow::Owned(folded), collisions)
    }

    fn decide(&self, rule: usize, local: Local, remote: Remote) -> Decision {
        let effective = self.settings.of(self.mode, &self.mapping.rules()[rule]);
        decide(local, remote, effective.write_policy, effective.conflict_policy)
    }
}

/// What a listing says of a path, compared with what was agreed.
fn compare(listed: &Listed, base: Option<&Base>, reread: Reread) -> Remote {
    match listed.state {
        Some(State::Deleted | State::Destroyed) => Remote::Unlisted,
        Some(state @ (State::Disabled | State::Expired)) => match base {
            Some(base) if base.remote_state == state => Remote::Same,
            _ => Remote::Inactive(state),
        },
        Some(State::Active) | None => match base {
            Some(base) if reread == Reread::Changed && is_agreed(listed, base) => Remote::Same,
            _ => Remote::Moved,
        },
    }
}

/// A token says nothing of another name, as after a change of the mapping, and the empty one says nothing at all.
fn is_agreed(listed: &Listed, base: &Base) -> bool {
    listed.token.as_ref().is_some_and(|token| !token.is_empty() && *token == base.token)
        && listed.name.as_str() == base.remote_name
        && listed.state.is_none_or(|state| state == base.remote_state)
}

/// Whether `name` is one of `folders` or lies in one; the empty one is the folder of everything.
fn is_in(folders: &HashSet<&str>, name: &RemoteName) -> bool {
    let name = name.as_str();
    let mut above = name.match_indices('/').map(|(end, _)| &name[..end]);
    !folders.is_empty()
        && (folders.contains(name) || folders.contains("") || above.any(|folder| folders.contains(folder)))
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
