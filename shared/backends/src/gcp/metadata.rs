//! Labels and annotations as one map, and back.
//!
//! Source: the fields `labels` and `annotations` of Secret in the REST reference.

use std::collections::BTreeMap;

use scaivault_domain::secret::{Metadata, keep_within_limits};
use serde::{Deserialize, Serialize};

/// The bytes of all keys and values of annotations are fewer than this.
const ANNOTATIONS_BYTES: usize = 16 * 1024;

/// What a secret has of both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fields {
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) fields: Fields,
    /// Whether something was wanted that Secret Manager cannot have.
    pub(super) left_out: bool,
}

impl Fields {
    /// Both as one map. Of a key that is in both, the annotation counts: only annotations can have any value.
    pub(super) fn merged(&self) -> Metadata {
        let mut merged = self.labels.clone();
        merged.extend(self.annotations.clone());
        merged
    }

    /// The same with the metadata `wanted`.
    ///
    /// A key stays what it is, as long as it can. A new one becomes an annotation, since labels are what people filter
    /// and pay by. What [`merged`](Self::merged) shows and we could not keep is left alone.
    pub(super) fn with(&self, wanted: &Metadata) -> Changed {
        let mut fields = self.clone();
        for gone in keep_within_limits(self.merged()).keys().filter(|key| !wanted.contains_key(*key)) {
            fields.labels.remove(gone);
            fields.annotations.remove(gone);
        }
        let mut left_out = false;
        for (key, value) in wanted {
            if let Some(label) = fields.labels.get_mut(key)
                && !self.annotations.contains_key(key)
                && is_label_value(value)
            {
                label.clone_from(value);
            } else if !fields.annotate(key, value) {
                left_out = true;
            } else if !self.annotations.contains_key(key) {
                fields.labels.remove(key);
            }
        }
        Changed { fields, left_out }
    }

    /// Whether there can be such an annotation; if so, there is.
    fn annotate(&mut self, key: &str, value: &str) -> bool {
        let others = self.annotations.iter().filter(|(other, _)| *other != key);
        let bytes: usize = others.map(|(key, value)| key.len() + value.len()).sum();
        let fits = is_annotation_key(key) && bytes + key.len() + value.len() < ANNOTATIONS_BYTES;
        if fits {
            self.annotations.insert(key.to_owned(), value.to_owned());
        }
        fits
    }
}

/// "Between 1 and 63 characters, begin and end with an alphanumeric character, and may have dashes, underscores, dots,
/// and alphanumerics in between."
fn is_annotation_key(key: &str) -> bool {
    (1..=63).contains(&key.len())
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && key.starts_with(|first: char| first.is_ascii_alphanumeric())
        && key.ends_with(|last: char| last.is_ascii_alphanumeric())
}

/// `[\p{Ll}\p{Lo}\p{N}_-]{0,63}` of at most 128 bytes.
fn is_label_value(value: &str) -> bool {
    let may_stand =
        |c: char| c.is_numeric() || matches!(c, '_' | '-') || (c.is_alphabetic() && !c.is_uppercase());
    value.len() <= 128 && value.chars().count() <= 63 && value.chars().all(may_stand)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn fields(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Fields {
        Fields { labels: map(labels), annotations: map(annotations) }
    }

    #[test]
    fn an_annotation_counts_before_a_label_of_the_same_key() {
        let both = fields(&[("a", "label"), ("team", "ops")], &[("a", "Annotation")]);
        assert_eq!(both.merged(), map(&[("a", "Annotation"), ("team", "ops")]));
    }

    #[test]
    fn what_was_read_is_written_back_without_a_change() {
        let both = fields(&[("a", "label"), ("größe", "7")], &[("a", "Annotation"), ("b", "")]);
        assert_eq!(both.with(&both.merged()), Changed { fields: both.clone(), left_out: false });
    }

    #[test]
    fn a_label_stays_one_as_long_as_it_can() {
        let team = fields(&[("team", "ops")], &[]);
        assert_eq!(team.with(&map(&[("team", "dev")])).fields, fields(&[("team", "dev")], &[]));
        assert_eq!(team.with(&map(&[("team", "Dev!")])).fields, fields(&[], &[("team", "Dev!")]));
        assert_eq!(
            team.with(&map(&[("team", "ops"), ("x", "y")])).fields,
            fields(&[("team", "ops")], &[("x", "y")])
        );
        assert_eq!(team.with(&Metadata::new()).fields, Fields::default());
    }

    #[test]
    fn what_we_could_not_keep_is_left_alone() {
        let long = "x".repeat(600);
        let both = fields(&[], &[("long", &long), ("a", "b")]);
        assert_eq!(both.with(&Metadata::new()).fields, fields(&[], &[("long", &long)]));
    }

    #[test]
    fn what_secret_manager_cannot_have_is_left_out() {
        for key in ["-a", "a-", "a b", "ä", &"a".repeat(64)] {
            let changed = Fields::default().with(&map(&[(key, "v"), ("fine", "v")]));
            assert_eq!(changed, Changed { fields: fields(&[], &[("fine", "v")]), left_out: true }, "{key}");
        }
        let big = "x".repeat(500);
        let many: Metadata = (0..40).map(|index| (format!("k{index:02}"), big.clone())).collect();
        let changed = Fields::default().with(&many);
        assert!(changed.left_out);
        assert_eq!(changed.fields.annotations.len(), 32);
    }
}
