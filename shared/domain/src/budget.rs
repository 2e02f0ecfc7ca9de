//! Parts of a call budget: what a store's quotas leave one credential is shared by everybody who uses it.

use std::sync::Arc;

/// A part of a budget: above 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Share(f64);

impl Share {
    /// All of it.
    pub const WHOLE: Share = Share(1.0);

    /// `part`, if it is one.
    pub fn new(part: f64) -> Option<Share> {
        (part > 0.0 && part <= 1.0).then_some(Share(part))
    }

    /// What each of `parties` has; none have as much as one.
    pub fn among(parties: usize) -> Share {
        Share(1.0 / parties.max(1) as f64)
    }

    /// The part as a number.
    pub fn get(self) -> f64 {
        self.0
    }
}

/// What a node may use of the budget of a credential.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// Leases with the same name of a tenant use the same budget. It says nothing of the credential.
    pub budget: Arc<str>,
    /// How much of it.
    pub share: Share,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_part_of_something() {
        assert!([0.0, -1.0, 1.1, f64::NAN, f64::INFINITY].iter().all(|part| Share::new(*part).is_none()));
        assert_eq!(Share::new(1.0), Some(Share::WHOLE));
        assert_eq!((Share::among(0), Share::among(4).get()), (Share::WHOLE, 0.25));
    }
}
