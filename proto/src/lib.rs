//! The wire: generated messages, services and descriptors, and nothing else.
//!
//! Messages that carry a value or a credential have a `Debug` that shows neither.

/// Secrets: public.
pub mod secrets {
    pub mod v1 {
        tonic::include_proto!("scaivault.secrets.v1");
    }
}

/// Federated backends: public.
pub mod federation {
    pub mod v1 {
        tonic::include_proto!("scaivault.federation.v1");
    }
}

/// Tenants, policies, tokens, nodes, audit: public.
pub mod admin {
    pub mod v1 {
        tonic::include_proto!("scaivault.admin.v1");
    }
}

/// Between the planes.
pub mod discovery {
    pub mod v1 {
        tonic::include_proto!("scaivault.discovery.v1");
    }
}

/// Every file of the protocol as one encoded `FileDescriptorSet`, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

macro_rules! redacted {
    ($($type:path { $($field:ident),* }),+ $(,)?) => {
        $(impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type))$(.field(stringify!($field), &self.$field))*.finish_non_exhaustive()
            }
        })+
    };
}

redacted! {
    secrets::v1::Secret { path, version },
    secrets::v1::PutRequest { path, expected_version },
    admin::v1::CreateTokenResponse { info },
    admin::v1::CreateNodeResponse { node },
    discovery::v1::EnrolRequest { },
    discovery::v1::Lease { key, id },
    discovery::v1::AwsKeys { },
    discovery::v1::SecretCopy { name, revision, version, state },
}

impl std::fmt::Debug for discovery::v1::lease::Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_message_prints_a_value_or_a_credential() {
        const CANARY: &str = "canary-7f3a";
        let secret = secrets::v1::Secret { value: CANARY.into(), ..Default::default() };
        let put = secrets::v1::PutRequest { value: CANARY.into(), ..Default::default() };
        let token = admin::v1::CreateTokenResponse { token: CANARY.into(), info: None };
        let node = admin::v1::CreateNodeResponse { join_token: CANARY.into(), node: None };
        let enrol = discovery::v1::EnrolRequest { join_secret: CANARY.into(), csr: Vec::new() };
        let material = discovery::v1::lease::Material::VaultToken(CANARY.into());
        let lease = discovery::v1::Lease { material: Some(material), ..Default::default() };
        let keys = discovery::v1::AwsKeys {
            access_key_id: CANARY.into(),
            secret_access_key: CANARY.into(),
            session_token: CANARY.into(),
        };
        let copy = discovery::v1::SecretCopy {
            value: Some(CANARY.into()),
            metadata: [(CANARY.into(), CANARY.into())].into(),
            ..Default::default()
        };
        let upsert =
            discovery::v1::Upsert { resource: Some(discovery::v1::upsert::Resource::Secret(copy.clone())) };
        let answer = secrets::v1::GetResponse { secret: Some(secret.clone()) };
        for printed in [
            format!("{secret:?}"),
            format!("{answer:?}"),
            format!("{put:?}"),
            format!("{token:?}"),
            format!("{node:?}"),
            format!("{enrol:?}"),
            format!("{lease:?}"),
            format!("{keys:?}"),
            format!("{copy:?}"),
            format!("{upsert:?}"),
        ] {
            assert!(!printed.contains(CANARY), "{printed}");
        }
    }
}
