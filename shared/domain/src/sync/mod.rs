//! Sync mode: what can be set, what a cycle decides, and what it reports.

/// An enum whose variants have names in the API.
macro_rules! names {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $name:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $type { $($(#[$variant_doc])* #[serde(rename = $name)] $variant),+ }

        impl $type {
            /// Every one.
            pub const ALL: &'static [$type] = &[$($type::$variant),+];

            /// The name in the API.
            pub fn as_str(self) -> &'static str {
                match self { $($type::$variant => $name),+ }
            }

            /// The one of this name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|this| this.as_str() == name)
            }
        }
    };
}

pub mod fingerprint;
pub mod plan;
pub mod report;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::fingerprint::Fingerprint;
pub use self::plan::{Base, Decision, Deletions, Local, Remote, SyncPlan, decide, plan};
pub use self::report::{Outcome, RunId, RunReport, SkipReason, Skipped, Trigger};
use crate::error::{Error, Reason};
use crate::mapping::{Overrides, Rule};

/// Shortest period of a sync unless the operator allows a shorter one.
pub const MIN_INTERVAL: Duration = Duration::from_secs(30);
/// Longest period: everything is read again at least daily.
pub const MAX_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// How many versions the first copy of a secret brings along unless configured.
pub const DEFAULT_HISTORY: u32 = 10;
/// Most versions that can be asked for.
pub const MAX_HISTORY: u32 = 100;

names! {
    /// How reads of a backend's paths are served.
    Mode {
        /// Each read is one backend read; nothing is stored.
        Proxy = "proxy",
        /// Reads are served from ScaiVault's own store, which copies the backend.
        Sync = "sync",
    }
}

names! {
    /// What becomes of writes to a synced path.
    WritePolicy {
        /// They are refused.
        Disabled = "disabled",
        /// They go to the backend first, then to our store.
        WriteThrough = "write_through",
        /// They go to our store alone; the backend goes stale.
        LocalOnly = "local_only",
    }
}

names! {
    /// Who is right when the two sides of a synced path disagree.
    ConflictPolicy {
        /// The backend. Our value stays as a version.
        BackendWins = "backend_wins",
        /// We are.
        LocalWins = "local_wins",
        /// Somebody decides; until then the path is left as it is.
        Manual = "manual",
    }
}

impl Mode {
    /// The mode of this name.
    ///
    /// # Errors
    /// `invalid_config`, naming the field.
    pub fn parse(name: &str) -> Result<Self, Error> {
        Self::from_name(name).ok_or_else(|| one_of("/mode", Self::ALL.iter().map(|this| this.as_str())))
    }
}

impl WritePolicy {
    /// The policy of this name.
    ///
    /// # Errors
    /// `invalid_config`, naming the field.
    pub fn parse(name: &str) -> Result<Self, Error> {
        Self::from_name(name)
            .ok_or_else(|| one_of("/write_policy", Self::ALL.iter().map(|this| this.as_str())))
    }
}

impl ConflictPolicy {
    /// The policy of this name.
    ///
    /// # Errors
    /// `invalid_config`, naming the field.
    pub fn parse(name: &str) -> Result<Self, Error> {
        Self::from_name(name)
            .ok_or_else(|| one_of("/conflict_policy", Self::ALL.iter().map(|this| this.as_str())))
    }
}

fn one_of(pointer: &str, names: impl Iterator<Item = &'static str>) -> Error {
    let names: Vec<_> = names.collect();
    Error::field(Reason::InvalidConfig, pointer, format!("is `{}`", names.join("` or `")))
}

/// How the synced rules of a backend are synced, unless a rule says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SyncSettings {
    /// From the start of one cycle to the start of the next. Always there if any rule is synced.
    pub interval: Option<Duration>,
    /// What becomes of writes.
    pub write_policy: WritePolicy,
    /// Who is right.
    pub conflict_policy: ConflictPolicy,
    /// Whether every node holds every copy, instead of those that were read there.
    pub prefetch: bool,
    /// How old an answer may be; an older copy is compared with the backend before it is given.
    pub max_staleness: Option<Duration>,
    /// How many versions the first copy of a secret brings along.
    pub history_depth: u32,
}

impl Default for SyncSettings {
    fn default() -> Self {
        SyncSettings {
            interval: None,
            write_policy: WritePolicy::Disabled,
            conflict_policy: ConflictPolicy::BackendWins,
            prefetch: false,
            max_staleness: None,
            history_depth: DEFAULT_HISTORY,
        }
    }
}

/// What holds for one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effective {
    /// How its reads are served.
    pub mode: Mode,
    /// The period of its sync; `None` in proxy mode.
    pub interval: Option<Duration>,
    /// What becomes of writes.
    pub write_policy: WritePolicy,
    /// Who is right.
    pub conflict_policy: ConflictPolicy,
}

impl SyncSettings {
    /// What holds for `rule` of a backend in `mode`.
    pub fn of(&self, mode: Mode, rule: &Rule) -> Effective {
        let Overrides { mode: own_mode, sync_interval, write_policy, conflict_policy } = rule.overrides;
        let mode = own_mode.unwrap_or(mode);
        let interval = match mode {
            Mode::Proxy => None,
            Mode::Sync => sync_interval.or(self.interval),
        };
        Effective {
            mode,
            interval,
            write_policy: write_policy.unwrap_or(self.write_policy),
            conflict_policy: conflict_policy.unwrap_or(self.conflict_policy),
        }
    }

    /// Checks the settings of a backend in `mode` with `rules`. No period may be shorter than `shortest`.
    ///
    /// # Errors
    /// `invalid_config`, naming the field.
    pub fn check(&self, mode: Mode, rules: &[Rule], shortest: Duration) -> Result<(), Error> {
        let invalid =
            |pointer: String, detail: String| Err(Error::field(Reason::InvalidConfig, pointer, detail));
        let check_interval = |pointer: String, interval: Duration| {
            if (shortest..=MAX_INTERVAL).contains(&interval) {
                return Ok(());
            }
            let least = crate::time::format_duration(shortest);
            invalid(pointer, format!("is between {least} and 24h"))
        };
        if let Some(interval) = self.interval {
            check_interval("/sync_interval".into(), interval)?;
        }
        check_policies("", self.write_policy, self.conflict_policy)?;
        for (index, rule) in rules.iter().enumerate() {
            let at = format!("/path_mapping/{index}");
            if let Some(interval) = rule.overrides.sync_interval {
                check_interval(format!("{at}/sync_interval"), interval)?;
            }
            let effective = self.of(mode, rule);
            check_policies(&at, effective.write_policy, effective.conflict_policy)?;
            if effective.mode == Mode::Sync && effective.interval.is_none() {
                return invalid("/sync_interval".into(), "is needed in mode `sync`, e.g. `15m`".into());
            }
        }
        if self.max_staleness.is_some_and(|limit| limit < Duration::from_secs(1)) {
            return invalid("/max_staleness".into(), "is at least 1s".into());
        }
        if !(1..=MAX_HISTORY).contains(&self.history_depth) {
            return invalid("/history_depth".into(), format!("is between 1 and {MAX_HISTORY}"));
        }
        Ok(())
    }
}

/// What a cycle can plan is more than what this version can carry out: it never writes to a backend.
fn check_policies(at: &str, write: WritePolicy, conflict: ConflictPolicy) -> Result<(), Error> {
    let refuse = |field: &str, only: &str| {
        let detail = format!("this version serves `{only}` only");
        Err(Error::field(Reason::InvalidConfig, format!("{at}/{field}"), detail))
    };
    match (write, conflict) {
        (WritePolicy::WriteThrough | WritePolicy::LocalOnly, _) => {
            refuse("write_policy", WritePolicy::Disabled.as_str())
        }
        (_, ConflictPolicy::LocalWins | ConflictPolicy::Manual) => {
            refuse("conflict_policy", ConflictPolicy::BackendWins.as_str())
        }
        (WritePolicy::Disabled, ConflictPolicy::BackendWins) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::PathMapping;

    fn rules() -> Vec<Rule> {
        PathMapping::parse([("e/x/**", "kv/x/**"), ("e/**", "kv/**")]).unwrap().rules().to_vec()
    }

    #[test]
    fn a_rule_overrides_its_backend() {
        let mut rules = rules();
        rules[0].overrides = Overrides {
            mode: Some(Mode::Sync),
            sync_interval: Some(Duration::from_secs(60)),
            ..Default::default()
        };
        let settings = SyncSettings::default();
        assert_eq!(settings.of(Mode::Proxy, &rules[0]).mode, Mode::Sync);
        assert_eq!(settings.of(Mode::Proxy, &rules[0]).interval, Some(Duration::from_secs(60)));
        assert_eq!(settings.of(Mode::Proxy, &rules[1]).mode, Mode::Proxy);
        settings.check(Mode::Proxy, &rules, MIN_INTERVAL).expect("good settings");
    }

    #[test]
    fn what_cannot_be_is_named() {
        let refused = |settings: SyncSettings, mode| {
            settings.check(mode, &rules(), MIN_INTERVAL).expect_err("refused").violations[0].pointer.clone()
        };
        let settings = SyncSettings::default();
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(refused(settings.clone(), Mode::Sync), "/sync_interval");
        assert_eq!(
            refused(SyncSettings { interval: seconds(1), ..settings.clone() }, Mode::Proxy),
            "/sync_interval"
        );
        let manual = SyncSettings { conflict_policy: ConflictPolicy::Manual, ..settings.clone() };
        assert_eq!(refused(manual, Mode::Proxy), "/conflict_policy");
        let through = SyncSettings { write_policy: WritePolicy::WriteThrough, ..settings.clone() };
        assert_eq!(refused(through, Mode::Proxy), "/write_policy");
        assert_eq!(refused(SyncSettings { history_depth: 0, ..settings }, Mode::Proxy), "/history_depth");
    }
}
