//! What a store calls the rights that an operation needs, so that its owner knows what to allow.

use scaivault_domain::backend::{AwsTarget, KvVersion, ProviderKind, Target};
use scaivault_domain::mapping::RemoteName;

use crate::vault::VaultBackend;
use crate::{Backend, Lease, Operation};

/// The permission of a store that an operation needs, as its own documentation names it.
///
/// Sources: the actions of AWS Secrets Manager in the Service Authorization Reference; the data actions of Azure Key
/// Vault's RBAC guide; the permissions of GCP Secret Manager's access control; Vault's policy capabilities.
pub fn permission(kind: ProviderKind, operation: Operation) -> &'static str {
    match (kind, operation) {
        (ProviderKind::HashicorpVault, Operation::Read | Operation::ReadMany) => {
            "`read` on the secret's data path"
        }
        (ProviderKind::HashicorpVault, Operation::List) => "`list` on the metadata path of the folder",
        (ProviderKind::HashicorpVault, Operation::History) => "`read` on the secret's metadata path",
        (ProviderKind::HashicorpVault, Operation::Write) => {
            "`create` and `update` on the secret's data path, `patch` or `update` on its metadata path"
        }
        (ProviderKind::HashicorpVault, Operation::Delete) => {
            "`update` on the secret's `delete/` path, and `read` on its data path"
        }
        (ProviderKind::AwsSecretsManager, Operation::Read) => "`secretsmanager:GetSecretValue` on the secret",
        (ProviderKind::AwsSecretsManager, Operation::ReadMany) => "`secretsmanager:BatchGetSecretValue`",
        (ProviderKind::AwsSecretsManager, Operation::List) => "`secretsmanager:ListSecrets` on `*`",
        (ProviderKind::AwsSecretsManager, Operation::History) => {
            "`secretsmanager:ListSecretVersionIds` on the secret"
        }
        (ProviderKind::AwsSecretsManager, Operation::Write) => {
            "`secretsmanager:PutSecretValue` and `secretsmanager:UpdateSecretVersionStage` on the secret"
        }
        (ProviderKind::AwsSecretsManager, Operation::Delete) => "`secretsmanager:DeleteSecret` on the secret",
        (ProviderKind::AzureKeyVault, Operation::Read | Operation::ReadMany) => {
            "the role `Key Vault Secrets User` (`Microsoft.KeyVault/vaults/secrets/getSecret/action`)"
        }
        (ProviderKind::AzureKeyVault, Operation::List | Operation::History) => {
            "the role `Key Vault Secrets User` (`Microsoft.KeyVault/vaults/secrets/readMetadata/action`)"
        }
        (ProviderKind::AzureKeyVault, Operation::Write | Operation::Delete) => {
            "the role `Key Vault Secrets Officer`"
        }
        (ProviderKind::GoogleSecretManager, Operation::Read | Operation::ReadMany) => {
            "`secretmanager.versions.access` (role `roles/secretmanager.secretAccessor`) on the secret"
        }
        (ProviderKind::GoogleSecretManager, Operation::List | Operation::History) => {
            "`secretmanager.secrets.list` and `secretmanager.versions.list` (role `roles/secretmanager.viewer`) on the project"
        }
        (ProviderKind::GoogleSecretManager, Operation::Write) => {
            "`secretmanager.versions.add` and `.get` (role `roles/secretmanager.secretVersionManager`) on the secret, \
             `secretmanager.secrets.create` on the project for new ones, `secretmanager.secrets.get` and `.update` for \
             metadata"
        }
        (ProviderKind::GoogleSecretManager, Operation::Delete) => {
            "`secretmanager.versions.disable` (role `roles/secretmanager.secretVersionManager`) on the secret"
        }
    }
}

/// What the owner of a store does so that our credential may do `operation`, one sentence.
pub fn allow(kind: ProviderKind, operation: Operation) -> String {
    sentence(kind, permission(kind, operation))
}

fn sentence(kind: ProviderKind, permission: &str) -> String {
    let verb = match kind {
        ProviderKind::AzureKeyVault => "assign",
        ProviderKind::HashicorpVault
        | ProviderKind::AwsSecretsManager
        | ProviderKind::GoogleSecretManager => "allow",
    };
    format!("{verb} {permission}")
}

impl Backend {
    /// As [`allow`], with the resource in `target` as far as it is known: that of `name`, or of what its template says
    /// about all such names. `None` as `name` is everything.
    pub async fn allow(
        &self,
        lease: &Lease,
        target: &Target,
        operation: Operation,
        name: Option<&RemoteName>,
    ) -> String {
        let (kind, plain) = (target.kind(), permission(target.kind(), operation));
        let exact = match (self, target) {
            (Backend::Vault(vault), _) => match name {
                Some(name) => on_path(vault, lease, operation, name).await,
                None => None,
            },
            (_, Target::AwsSecretsManager(target)) => {
                plain.strip_suffix("the secret").map(|action| format!("{action}`{}`", arn(target, name)))
            }
            (_, Target::AzureKeyVault(target)) => {
                Some(format!("{plain} for the vault `{}`", target.vault.host()))
            }
            (_, Target::GoogleSecretManager(target)) => Some(match plain.strip_suffix("the project") {
                Some(permission) => format!("{permission}the project `{}`", target.project),
                None => format!("{plain}, or on the project `{}`", target.project),
            }),
            _ => None,
        };
        sentence(kind, exact.as_deref().unwrap_or(plain))
    }
}

/// The capability and the path of a policy; `None` if it is not known where the mount is.
///
/// Source: "ACL rules" of the KV secrets engine in Vault's documentation.
async fn on_path(
    vault: &VaultBackend,
    lease: &Lease,
    operation: Operation,
    name: &RemoteName,
) -> Option<String> {
    let (mount, version, below) = vault.place(lease, name).await?;
    let (capability, infix, end) = match operation {
        Operation::Read | Operation::ReadMany => ("`read`", "data", ""),
        Operation::List => ("`list`", "metadata", "/*"),
        Operation::History => ("`read`", "metadata", ""),
        // These need more than one path.
        Operation::Write | Operation::Delete => return None,
    };
    let infix = (version == KvVersion::V2).then(|| infix.to_owned());
    let path: Vec<String> = mount.into_iter().chain(infix).chain(below).collect();
    Some(format!("{capability} on `{}{end}`", path.join("/")))
}

/// The resource of a policy that covers `name` and its like: AWS puts six characters of its own behind each name.
///
/// Source: "IAM policy examples" in the AWS Secrets Manager User Guide.
fn arn(target: &AwsTarget, name: Option<&RemoteName>) -> String {
    let Some(name) = name else { return "*".to_owned() };
    if name.as_str().starts_with("arn:") {
        return name.as_str().to_owned();
    }
    let count = name.segments().count();
    let resource = match name.literal() {
        0 => "*".to_owned(),
        all if all >= count => format!("{}-??????", name.as_str()),
        some => format!("{}/*", name.segments().take(some).collect::<Vec<_>>().join("/")),
    };
    let region = &target.region;
    format!("arn:{}:secretsmanager:{region}:*:secret:{resource}", region.partition())
}

#[cfg(test)]
mod tests {
    use scaivault_domain::backend::{AwsRegion, Tls};

    use super::*;

    #[test]
    fn the_resource_of_a_policy_is_as_wide_as_the_rule() {
        let at = |region: &str| AwsTarget {
            region: AwsRegion::parse("region", region).unwrap(),
            endpoint: None,
            tls: Tls::default(),
        };
        for (region, name, literal, expected) in [
            ("eu-central-1", "prod/app/db", 1, "arn:aws:secretsmanager:eu-central-1:*:secret:prod/*"),
            ("cn-north-1", "db", 1, "arn:aws-cn:secretsmanager:cn-north-1:*:secret:db-??????"),
            ("us-gov-west-1", "db", 0, "arn:aws-us-gov:secretsmanager:us-gov-west-1:*:secret:*"),
        ] {
            assert_eq!(arn(&at(region), Some(&RemoteName::with_literal(name, literal))), expected);
        }
    }

    #[test]
    fn what_is_to_be_done_begins_with_a_verb_that_fits() {
        let aws = allow(ProviderKind::AwsSecretsManager, Operation::Read);
        assert_eq!(aws, "allow `secretsmanager:GetSecretValue` on the secret");
        assert!(
            allow(ProviderKind::AzureKeyVault, Operation::List).starts_with("assign the role `Key Vault")
        );
    }
}
