//! How stores name their secrets: which names they can have, and which of them are one.

use std::borrow::Cow;

use crate::error::{Error, Reason};
use crate::mapping::{PathMapping, RemoteName, Rule};

/// The naming of a kind of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Naming {
    /// Folders, each of whose names may be nearly anything. What a mount can have, its adapter tells.
    Vault,
    /// `A-Z a-z 0-9 / _ + = . @ -`, up to 512 bytes; a literal name may also be a whole ARN.
    ///
    /// Source: CreateSecret in the AWS Secrets Manager API Reference.
    Aws,
    /// `A-Z a-z 0-9 -`, up to 127 bytes, whatever the case: a path stands for the lower-case form alone.
    ///
    /// Source: "Vault-name and Object-name" in the documentation of Azure Key Vault.
    Azure,
    /// `A-Z a-z 0-9 _ -`, up to 255 bytes.
    ///
    /// Source: projects.secrets.create in the reference of GCP Secret Manager.
    Gcp,
}

impl Naming {
    /// Whether `/` can stand in a name, so that names are like paths.
    pub fn has_slashes(self) -> bool {
        match self {
            Naming::Vault | Naming::Aws => true,
            Naming::Azure | Naming::Gcp => false,
        }
    }

    /// Whether a store can have a secret of this name that a path may stand for.
    pub fn has(self, name: &RemoteName) -> bool {
        let name = name.as_str();
        let fits = |most: usize, others: &[u8]| {
            (1..=most).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
        };
        match self {
            Naming::Vault => true,
            Naming::Aws if is_secret_arn(name) => true,
            Naming::Aws => fits(512, b"/_+=.@-"),
            Naming::Azure => fits(127, b"-") && !name.bytes().any(|b| b.is_ascii_uppercase()),
            Naming::Gcp => fits(255, b"_-"),
        }
    }

    /// Whether listings never show a secret by this name, which the store describes to whoever asks for it.
    pub fn is_told_alone(self, name: &RemoteName) -> bool {
        self == Naming::Aws && is_secret_arn(name.as_str())
    }

    /// The form of `name` that stands for every spelling of it.
    pub fn fold(self, name: &RemoteName) -> Cow<'_, RemoteName> {
        match self {
            Naming::Azure if name.as_str().bytes().any(|b| b.is_ascii_uppercase()) => {
                Cow::Owned(RemoteName::with_literal(name.as_str().to_ascii_lowercase(), name.literal()))
            }
            _ => Cow::Borrowed(name),
        }
    }

    /// Checks that the rules of a mapping can name something in such a store.
    ///
    /// # Errors
    /// `invalid_mapping`, naming the rule.
    pub fn check(self, mapping: &PathMapping) -> Result<(), Error> {
        for (index, rule) in mapping.rules().iter().enumerate() {
            self.check_rule(rule).map_err(|detail| {
                Error::field(Reason::InvalidMapping, format!("/path_mapping/{index}"), detail)
            })?;
        }
        Ok(())
    }

    fn check_rule(self, rule: &Rule) -> Result<(), String> {
        let literals = || rule.template.literals();
        match &rule.separator {
            Some(separator) if self.has_slashes() => {
                return Err(format!(
                    "has the separator `{separator}`, which is for stores without slashes in their names"
                ));
            }
            Some(separator) if !self.has(&RemoteName::new(separator.as_str())) => {
                return Err(format!("has the separator `{separator}`, which no name in this store can have"));
            }
            None if !self.has_slashes() && rule.template.segment_count() > 1 => {
                return Err(format!(
                    "the template `{}` has more than one segment; names in this store have no slashes, so give \
                     the rule a `separator` such as `--`",
                    rule.template
                ));
            }
            _ => {}
        }
        let is_arn = self == Naming::Aws && is_secret_arn(rule.template.as_str());
        if let Some(literal) = literals().find(|literal| !is_arn && !self.has(&RemoteName::new(*literal))) {
            let why = match self {
                Naming::Azure => "; names are letters, digits and `-`, and stand in lower case here",
                _ => "",
            };
            return Err(format!("the template's `{literal}` cannot stand in a name of this store{why}"));
        }
        Ok(())
    }
}

/// Whether a name is the whole ARN of a secret, as one of another account must be named.
fn is_secret_arn(name: &str) -> bool {
    match name.split(':').collect::<Vec<_>>()[..] {
        ["arn", partition, "secretsmanager", region, account, "secret", secret] => {
            partition.starts_with("aws")
                && !region.is_empty()
                && account.len() == 12
                && account.bytes().all(|b| b.is_ascii_digit())
                && !secret.is_empty()
                && name.len() <= 2048
                && secret.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_+=.@-".contains(&b))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_store_has_names_of_its_own() {
        for (naming, good, bad) in [
            (
                Naming::Aws,
                &[
                    "prod/db",
                    "a+b=c.d@e",
                    "x-AbCdEf",
                    "arn:aws:secretsmanager:eu-central-1:123456789012:secret:a/b-AbCdEf",
                ][..],
                &["", "a:b", "a b", "arn:aws:s3:::bucket"][..],
            ),
            (Naming::Azure, &["db-password", "0"][..], &["", "DB", "a_b", "a/b", "a.b"][..]),
            (Naming::Gcp, &["db_Password-1"][..], &["", "a.b", "a/b"][..]),
        ] {
            for name in good {
                assert!(naming.has(&RemoteName::new(*name)), "{naming:?} {name}");
            }
            for name in bad {
                assert!(!naming.has(&RemoteName::new(*name)), "{naming:?} {name}");
            }
        }
        let edge = |naming: Naming, most: usize| {
            assert!(naming.has(&RemoteName::new("a".repeat(most))));
            assert!(!naming.has(&RemoteName::new("a".repeat(most + 1))));
        };
        edge(Naming::Aws, 512);
        edge(Naming::Azure, 127);
        edge(Naming::Gcp, 255);
    }

    #[test]
    fn a_secret_that_is_named_by_its_arn_is_in_no_listing() {
        let arn = RemoteName::new("arn:aws:secretsmanager:eu-central-1:123456789012:secret:a/b-AbCdEf");
        assert!(Naming::Aws.is_told_alone(&arn));
        assert!(!Naming::Aws.is_told_alone(&RemoteName::new("a/b-AbCdEf")));
        assert!(!Naming::Vault.is_told_alone(&arn));
    }

    #[test]
    fn azure_has_one_name_in_every_case() {
        let name = RemoteName::new("DB-Password");
        assert_eq!(Naming::Azure.fold(&name).as_str(), "db-password");
        let listed = RemoteName::with_literal("DB-Password", 0);
        assert_eq!(*Naming::Azure.fold(&listed), RemoteName::with_literal("db-password", 0));
        assert_eq!(Naming::Gcp.fold(&name).as_str(), "DB-Password");
    }
}
