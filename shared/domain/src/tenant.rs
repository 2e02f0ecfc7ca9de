//! Names and ids: the tenant, and what else is known by a short name.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::Error;

fn is_slug(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

macro_rules! slug {
    ($(#[$doc:meta])* $type:ident, $pointer:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(std::sync::Arc<str>);

        impl $type {
            /// Parses 1 to 63 of `a-z 0-9 -`, beginning and ending with a letter or digit.
            ///
            /// # Errors
            /// `invalid_request`, naming the field.
            pub fn parse(text: &str) -> Result<Self, Error> {
                if is_slug(text) {
                    return Ok($type(text.into()));
                }
                Err(Error::invalid($pointer, "1 to 63 of a-z 0-9 -, beginning and ending with a letter or digit"))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(text: String) -> Result<Self, Error> {
                Self::parse(&text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0.as_ref().into()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

slug! {
    /// The unit of isolation. Everything belongs to one tenant, and a tenant is taken from the caller's token.
    TenantId, "/tenant"
}
slug! {
    /// The name of a data-plane node, unique in the installation.
    NodeName, "/name"
}
slug! {
    /// The name of a policy, unique in its tenant.
    PolicyName, "/name"
}
slug! {
    /// The name of a backend, unique in its tenant.
    BackendName, "/name"
}
