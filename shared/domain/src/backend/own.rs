//! Where an identity of our own may go: what a tenant configures must not lead it to a server of the tenant's.

use std::fmt::{self, Write as _};
use std::net::Ipv6Addr;

use url::Host;

use super::{AwsRegion, AwsRole, AzureCloud, Endpoint, OwnIdentity, Provider, VaultLogin, VaultMethod};
use crate::error::{Error, Reason};

/// The hosts that the operator trusts with ScaiVault's own identities, besides the providers' own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListedHosts(Vec<ListedHost>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct ListedHost {
    /// The one that may go there; `None`: each.
    identity: Option<OwnIdentity>,
    name: ListedName,
    /// `None`: any.
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ListedName {
    Exactly(String),
    Below(String),
}

impl ListedHosts {
    /// Parses hosts: a name, an address, or `*.` and a name for everything below it. `:port` behind it narrows the entry
    /// to one port, and `kubernetes=` (or another identity's name) before it to one identity.
    ///
    /// # Errors
    /// The entry that is no host.
    pub fn parse<S: AsRef<str>>(entries: impl IntoIterator<Item = S>) -> Result<Self, NoHost> {
        let entry = |entry: S| {
            let entry = entry.as_ref().trim();
            ListedHost::parse(entry).ok_or_else(|| NoHost(entry.to_owned()))
        };
        entries.into_iter().map(entry).collect::<Result<_, _>>().map(ListedHosts)
    }

    fn has(&self, identity: OwnIdentity, endpoint: &Endpoint) -> bool {
        self.0.iter().any(|listed| {
            listed.identity.is_none_or(|only| only == identity)
                && listed.port.is_none_or(|only| endpoint.url().port_or_known_default() == Some(only))
                && listed.name.is_of(endpoint.host())
        })
    }
}

impl ListedHost {
    fn parse(entry: &str) -> Option<Self> {
        let (identity, place) = match entry.split_once('=') {
            Some((identity, place)) => (Some(OwnIdentity::parse(identity)?), place),
            None => (None, entry),
        };
        // The colons of a bare IPv6 address are its own.
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if place.parse::<Ipv6Addr>().is_err() && !place.ends_with(']') => {
                (host, Some(parse_port(port)?))
            }
            _ => (place, None),
        };
        Some(ListedHost { identity, name: ListedName::parse(host)?, port })
    }
}

impl ListedName {
    fn parse(text: &str) -> Option<Self> {
        let host = |text: &str| match text.parse::<Ipv6Addr>() {
            Ok(address) => Some(format!("[{address}]")),
            Err(_) => Host::parse(text).ok().map(|host| host.to_string()),
        };
        let Some(name) = text.strip_prefix("*.") else { return host(text).map(ListedName::Exactly) };
        let name = host(name)?;
        // What is below an address, or a top level domain, belongs to everybody.
        let is_owned = name.contains('.') && Host::parse(&name).is_ok_and(|host| is_name(&host));
        is_owned.then(|| ListedName::Below(format!(".{name}")))
    }

    fn is_of(&self, host: &str) -> bool {
        match self {
            ListedName::Exactly(name) => name == host,
            ListedName::Below(suffix) => host.strip_suffix(suffix).is_some_and(|label| !label.is_empty()),
        }
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

fn is_name(host: &Host<String>) -> bool {
    matches!(host, Host::Domain(_))
}

/// An entry of the operator's that names no host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoHost(String);

impl fmt::Display for NoHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is no host such as `vault.internal`, `*.vault.internal` or `10.0.0.7:8200`, or, for one identity alone, \
             `kubernetes=vault.internal`",
            self.0
        )
    }
}

impl std::error::Error for NoHost {}

impl Provider {
    /// Whether a tenant that was `granted` these identities of ours may have this login, and whether everything that it
    /// connects to is the provider's own or among `listed`.
    ///
    /// # Errors
    /// `permission_denied` or `invalid_config`, naming the field.
    ///
    /// A listed host may be without TLS, or with a certificate that is not checked: whether any backend may be so is the
    /// operator's to say, and asked elsewhere.
    pub fn check_own_identity(&self, granted: &[OwnIdentity], listed: &ListedHosts) -> Result<(), Error> {
        let Some(identity) = self.own_identity() else { return Ok(()) };
        if !granted.contains(&identity) {
            let detail = format!(
                "this login uses ScaiVault's own identity `{}`, which the operator has not granted to this tenant",
                identity.as_str()
            );
            let field = format!("/config/{}", self.own_identity_field());
            return Err(Error::field(Reason::PermissionDenied, field, detail).next(format!(
                "ask the operator for it: `scaivault tenant set TENANT --identity {}`; or give a credential of your own",
                identity.as_str()
            )));
        }
        self.check_shown_rights()?;
        let target = self.target();
        let tls = target.tls();
        for (field, endpoint) in self.endpoints() {
            // What lies below a path may be somebody else's: a bucket, a gateway's next server.
            if endpoint.has_path() {
                let detail = "ScaiVault's own identity goes to a host, and to nothing below a path of it";
                return Err(Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
                    .next("leave the path out, or give a credential of your own"));
            }
            if listed.has(identity, &endpoint) {
                continue;
            }
            self.check_is_of_provider(field, &endpoint)?;
            if !tls.verify || tls.ca_cert.is_some() {
                let field = if tls.verify { "ca_cert" } else { "tls_verify" };
                let detail = "with ScaiVault's own identity the provider's own address is trusted by public certificates \
                              only";
                return Err(Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
                    .next("leave it out, or ask the operator to list the host: `--own-identity-hosts`"));
            }
        }
        // Not connected to from here: it is Vault that sends our signed request there.
        if let Provider::HashicorpVault { login, .. } = self
            && let Some(sts) = login.method.sts_endpoint()
            && !listed.has(identity, sts)
        {
            self.check_is_of_provider("sts_endpoint", sts)?;
        }
        Ok(())
    }

    /// Refuses a login that shows more of our identity than it needs to.
    fn check_shown_rights(&self) -> Result<(), Error> {
        match self {
            // Nodes hold the session. Without a role it would be that of our own identity, with all that this may do.
            Provider::AwsSecretsManager { login, .. } if login.role.is_none() => {
                let detail = "is required where ScaiVault's own identity is used: what nodes hold are the role's rights, \
                              not ScaiVault's";
                Err(Error::field(Reason::InvalidConfig, "/config/role_arn", detail).next(
                    "name a role that may read these secrets and trusts ScaiVault's identity; or give keys of your own \
                     as `credentials_path`",
                ))
            }
            // A request that is signed for another Vault could be shown to that one by whoever runs this one.
            Provider::HashicorpVault { target, login: VaultLogin { method, .. } } => match method {
                VaultMethod::Aws { server_id, .. } if server_id != target.endpoint.host() => {
                    let detail = "is the endpoint's host where ScaiVault's own identity is used";
                    Err(Error::field(Reason::InvalidConfig, "/config/aws_server_id", detail).next(
                        "leave it out, and configure Vault's `iam_server_id_header_value` to be that host; or give keys \
                         of your own as `auth_config_path`",
                    ))
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn check_is_of_provider(&self, field: &str, endpoint: &Endpoint) -> Result<(), Error> {
        if endpoint.is_https() && self.is_of_provider(field, endpoint) {
            return Ok(());
        }
        let detail = "ScaiVault's own identity goes to the provider's own address only, or where the operator allows it";
        Err(Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail).next(
            "leave the field out, give a credential of your own, or ask the operator to list the host: \
             `--own-identity-hosts`",
        ))
    }

    /// This login, with an external id of ours where an identity of ours assumes a role: what the configuration had
    /// `before` for the same role, else one made of `random`.
    ///
    /// An external id keeps a tenant from having us assume a role that trusts us for the sake of another tenant. So it is
    /// never the caller's choice, except that what was shown may be sent back.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.external_id`.
    ///
    /// Source: "The confused deputy problem" in the AWS IAM User Guide.
    pub fn with_external_id(mut self, before: Option<&Provider>, random: [u8; 16]) -> Result<Self, Error> {
        let Some(role) = self.own_role_mut() else { return Ok(self) };
        let known = before.and_then(Provider::own_role);
        let shown = known.and_then(|known| known.external_id.as_ref());
        if role.external_id.is_some() && role.external_id.as_ref() != shown {
            let detail = "is made by ScaiVault where its own identity assumes the role";
            return Err(Error::field(Reason::InvalidConfig, "/config/external_id", detail).next(
                "leave it out, and let the role's trust policy ask for the one that the configuration shows",
            ));
        }
        role.external_id = match (known, shown) {
            (Some(known), Some(shown)) if known.arn == role.arn => Some(shown.clone()),
            _ => {
                let mut id = String::from("scaivault-");
                for byte in random {
                    write!(id, "{byte:02x}").expect("a string takes all text");
                }
                Some(id)
            }
        };
        Ok(self)
    }

    /// The role that an identity of ours assumes.
    fn own_role(&self) -> Option<&AwsRole> {
        match self {
            Provider::AwsSecretsManager { login, .. } if login.credentials.is_none() => login.role.as_ref(),
            _ => None,
        }
    }

    fn own_role_mut(&mut self) -> Option<&mut AwsRole> {
        match self {
            Provider::AwsSecretsManager { login, .. } if login.credentials.is_none() => login.role.as_mut(),
            _ => None,
        }
    }

    /// The field that decides for an identity of ours.
    fn own_identity_field(&self) -> &'static str {
        match self {
            Provider::HashicorpVault { .. } | Provider::AwsSecretsManager { .. } => self.credentials_field(),
            Provider::AzureKeyVault { .. } | Provider::GoogleSecretManager { .. } => "auth_method",
        }
    }

    /// Whether a host belongs to the provider whose identity is shown there, and not to a customer of it. Vault belongs
    /// to whoever runs it.
    fn is_of_provider(&self, field: &str, endpoint: &Endpoint) -> bool {
        let host = endpoint.host();
        match self {
            // A login at Vault carries a signed request for STS, which only AWS can make use of.
            Provider::HashicorpVault { login, .. } => match &login.method {
                VaultMethod::Aws { region, .. } => {
                    field == "sts_endpoint" && is_aws_service(host, "sts", region)
                }
                _ => false,
            },
            Provider::AwsSecretsManager { target, .. } => {
                let service = if field == "sts_endpoint" { "sts" } else { "secretsmanager" };
                is_aws_service(host, service, &target.region)
            }
            Provider::AzureKeyVault { .. } => AzureCloud::has_vault(host),
            Provider::GoogleSecretManager { .. } => is_secret_manager(host),
        }
    }
}

/// Whether `host` is Secret Manager itself: other services of Google, such as Cloud Storage and those behind API
/// gateways, give out what customers put there.
///
/// Source: "Service endpoints" and "Regional service endpoints" in the reference of Secret Manager, and "Use a Private
/// Service Connect endpoint" in Google's documentation of VPC: `SERVICE-ENDPOINT.p.googleapis.com`.
fn is_secret_manager(host: &str) -> bool {
    const SERVICE: &str = "secretmanager";
    let Some(name) = host.strip_suffix(".googleapis.com") else { return false };
    let is_label = |label: &str| !label.is_empty() && !label.contains('.');
    let regional = || name.strip_prefix(SERVICE)?.strip_prefix('.')?.strip_suffix(".rep");
    let private = || name.strip_suffix(".p")?.strip_prefix(SERVICE)?.strip_prefix('-');
    name == SERVICE || regional().is_some_and(is_label) || private().is_some_and(is_label)
}

/// Whether `host` is a service of AWS itself. Below `amazonaws.com` there are also machines and gateways of customers.
///
/// Source: the endpoints of AWS Secrets Manager and AWS STS in the AWS General Reference (FIPS and dual stack included),
/// and "Interface VPC endpoints" in the AWS PrivateLink Guide: those of AWS's services have the service's name in them,
/// those of customers' `vpce-svc-…`.
fn is_aws_service(host: &str, service: &str, region: &AwsRegion) -> bool {
    let domain = region.domain();
    if service == "sts" && host == "sts.amazonaws.com" && domain == "amazonaws.com" {
        return true;
    }
    [service.to_owned(), format!("{service}-fips")].iter().any(|service| {
        let regional = host == format!("{service}.{region}.{domain}");
        let dual_stack = domain == "amazonaws.com" && host == format!("{service}.{region}.api.aws");
        let private = host
            .strip_suffix(&format!(".{service}.{region}.vpce.{domain}"))
            .is_some_and(|name| name.starts_with("vpce-") && !name.contains('.'));
        regional || dual_stack || private
    })
}

#[cfg(test)]
mod tests {
    use super::super::{
        AwsLogin, AwsTarget, AzureLogin, AzureMethod, AzureTarget, GcpLogin, GcpTarget, ProjectId, RoleArn,
        Tls, VaultTarget,
    };
    use super::*;
    use crate::path::SecretPath;

    fn at(url: &str) -> Endpoint {
        Endpoint::parse("endpoint", url).unwrap()
    }

    fn role(name: &str, external_id: Option<&str>) -> AwsRole {
        let arn = RoleArn::parse(&format!("arn:aws:iam::123456789012:role/{name}")).unwrap();
        AwsRole::new(arn, external_id.map(str::to_owned), AwsRole::SESSION).unwrap()
    }

    fn aws(endpoint: Option<&str>, sts: Option<&str>) -> Provider {
        let region = AwsRegion::parse("region", "eu-central-1").unwrap();
        Provider::AwsSecretsManager {
            target: AwsTarget { region, endpoint: endpoint.map(at), tls: Tls::default() },
            login: AwsLogin {
                credentials: None,
                role: Some(role("reader", None)),
                sts_endpoint: sts.map(at),
                allow_static_on_nodes: false,
            },
        }
    }

    fn azure(vault: &str) -> Provider {
        let vault = at(vault);
        Provider::AzureKeyVault {
            login: AzureLogin {
                method: AzureMethod::ManagedIdentity { client_id: None },
                authority: None,
                resource: None,
                cloud: AzureCloud::of(&vault),
            },
            target: AzureTarget { vault, tls: Tls::default() },
        }
    }

    fn gcp(endpoint: Option<&str>) -> Provider {
        let project = ProjectId::parse("acme").unwrap();
        let target = GcpTarget { project, location: None, endpoint: endpoint.map(at), tls: Tls::default() };
        Provider::GoogleSecretManager { target, login: GcpLogin::WorkloadIdentity }
    }

    fn vault(endpoint: &str) -> Provider {
        let method = VaultMethod::Kubernetes { role: "r".into(), credentials: None };
        let login = VaultLogin { mount: "kubernetes".into(), method };
        Provider::HashicorpVault { target: VaultTarget::at(at(endpoint)), login }
    }

    fn vault_by_aws(server_id: &str, sts: Option<&str>) -> Provider {
        let mut provider = vault("https://vault.internal:8200");
        if let Provider::HashicorpVault { login, .. } = &mut provider {
            login.method = VaultMethod::Aws {
                role: "r".into(),
                credentials: None,
                server_id: server_id.into(),
                region: AwsRegion::parse("aws_region", "eu-central-1").unwrap(),
                sts_endpoint: sts.map(at),
            };
        }
        provider
    }

    fn refused(provider: &Provider, listed: &[&str]) -> Option<String> {
        let listed = ListedHosts::parse(listed).unwrap();
        let outcome = provider.check_own_identity(OwnIdentity::ALL, &listed);
        outcome.err().map(|error| error.violations[0].pointer.clone())
    }

    #[test]
    fn an_identity_of_ours_is_for_tenants_that_it_was_granted_to() {
        for (provider, field) in [
            (aws(None, None), "/config/credentials_path"),
            (vault("https://vault.internal"), "/config/auth_config_path"),
            (azure("https://acme.vault.azure.net"), "/config/auth_method"),
            (gcp(None), "/config/auth_method"),
        ] {
            let identity = provider.own_identity().unwrap();
            let others: Vec<_> =
                OwnIdentity::ALL.iter().copied().filter(|other| *other != identity).collect();
            let error = provider.check_own_identity(&others, &ListedHosts::default()).unwrap_err();
            assert_eq!((error.reason, &*error.violations[0].pointer), (Reason::PermissionDenied, field));
            assert!(error.what_next().contains(&format!("--identity {}", identity.as_str())));
        }
    }

    #[test]
    fn the_external_id_of_our_identity_is_ours_and_stays_with_the_role() {
        let with = |name: &str, id: Option<&str>, credentials: Option<&str>| {
            let mut provider = aws(None, None);
            if let Provider::AwsSecretsManager { login, .. } = &mut provider {
                login.role = Some(role(name, id));
                login.credentials = credentials.map(|path| SecretPath::parse(path).unwrap());
            }
            provider
        };
        let id = |provider: &Provider| provider.own_role().unwrap().external_id.clone().unwrap();
        let first = with("a", None, None).with_external_id(None, [1; 16]).unwrap();
        assert_eq!(id(&first), format!("scaivault-{}", "01".repeat(16)));
        let kept = |next: Provider| id(&next.with_external_id(Some(&first), [2; 16]).unwrap()) == id(&first);
        assert!(kept(with("a", None, None)), "it is left out");
        assert!(kept(with("a", Some(&id(&first)), None)), "it is sent back");
        assert!(!kept(with("b", None, None)), "another role");
        assert!(!kept(with("b", Some(&id(&first)), None)), "another role in a patch of what was shown");
        for before in [None, Some(&first), Some(&with("a", Some("theirs"), Some("aws")))] {
            let error = with("a", Some("theirs"), None).with_external_id(before, [2; 16]).unwrap_err();
            assert_eq!(error.violations[0].pointer, "/config/external_id");
        }
        let theirs = with("a", Some("theirs"), Some("aws"));
        assert_eq!(theirs.clone().with_external_id(Some(&first), [2; 16]).unwrap(), theirs, "their own keys");
    }

    #[test]
    fn it_goes_to_the_providers_own_addresses() {
        for provider in [
            aws(None, None),
            aws(Some("https://secretsmanager-fips.eu-central-1.amazonaws.com"), None),
            aws(Some("https://vpce-0a-1b.secretsmanager.eu-central-1.vpce.amazonaws.com"), None),
            aws(None, Some("https://sts.amazonaws.com")),
            azure("https://acme.vault.azure.net"),
            azure("https://acme.vault.azure.cn"),
            gcp(None),
            gcp(Some("https://secretmanager.europe-west3.rep.googleapis.com")),
            gcp(Some("https://secretmanager-acme.p.googleapis.com/")),
        ] {
            assert_eq!(refused(&provider, &[]), None, "{provider:?}");
        }
    }

    #[test]
    fn it_goes_to_no_customer_of_the_provider_and_to_nobody_else() {
        for (provider, field) in [
            (aws(Some("https://evil.example"), None), "endpoint"),
            (aws(Some("https://secretsmanager.eu-central-1.amazonaws.com.evil.example"), None), "endpoint"),
            (aws(Some("https://secretsmanager.us-east-1.amazonaws.com"), None), "endpoint"),
            (aws(Some("http://secretsmanager.eu-central-1.amazonaws.com"), None), "endpoint"),
            (aws(Some("https://ec2-1-2-3-4.eu-central-1.compute.amazonaws.com"), None), "endpoint"),
            (aws(Some("https://abc.execute-api.eu-central-1.amazonaws.com"), None), "endpoint"),
            (aws(Some("https://vpce-0a.vpce-svc-1.eu-central-1.vpce.amazonaws.com"), None), "endpoint"),
            (aws(Some("https://a.vpce-0a.secretsmanager.eu-central-1.vpce.amazonaws.com"), None), "endpoint"),
            (aws(None, Some("https://secretsmanager.eu-central-1.amazonaws.com")), "sts_endpoint"),
            (aws(None, Some("https://127.0.0.1")), "sts_endpoint"),
            (azure("https://acme.vault.azure.net.evil.example"), "vault_url"),
            (gcp(Some("https://googleapis.com")), "endpoint"),
            (gcp(Some("https://evilgoogleapis.com")), "endpoint"),
            (gcp(Some("https://storage.googleapis.com")), "endpoint"),
            (gcp(Some("https://evil.secretmanager.googleapis.com")), "endpoint"),
            (gcp(Some("https://secretmanager.evil.googleapis.com")), "endpoint"),
            (gcp(Some("https://secretmanager.a.b.rep.googleapis.com")), "endpoint"),
            (gcp(Some("https://secretmanager.storage.p.googleapis.com")), "endpoint"),
            (gcp(Some("https://secretmanagers.p.googleapis.com")), "endpoint"),
            (gcp(Some("https://secretmanager.googleapis.com/a")), "endpoint"),
            (aws(Some("https://secretsmanager.eu-central-1.amazonaws.com/a"), None), "endpoint"),
            (azure("https://acme.vault.azure.net/a"), "vault_url"),
            (vault("https://vault.internal"), "endpoint"),
        ] {
            assert_eq!(refused(&provider, &[]), Some(format!("/config/{field}")), "{provider:?}");
        }
    }

    #[test]
    fn it_goes_where_the_operator_lets_it() {
        let listed = ["vault.internal", "*.trusted.example", "10.0.0.7", "::1"];
        for endpoint in [
            "https://VAULT.internal:8200",
            "https://a.b.trusted.example",
            "http://10.0.0.7",
            "https://[::1]:8200",
        ] {
            assert_eq!(refused(&vault(endpoint), &listed), None, "{endpoint}");
        }
        for endpoint in [
            "https://vault.internal/a",
            "https://a.vault.internal",
            "https://trusted.example",
            "https://nottrusted.example",
            "https://10.0.0.70",
        ] {
            assert_eq!(refused(&vault(endpoint), &listed).as_deref(), Some("/config/endpoint"), "{endpoint}");
        }
        for entry in [
            "",
            "a b",
            "https://a",
            "*.",
            "*.com",
            "*.10.0.0.1",
            "a/b",
            "a:",
            "a:0",
            "a:+1",
            "a:65536",
            "me=a",
            "aws=",
        ] {
            assert!(ListedHosts::parse([entry]).is_err(), "{entry}");
        }
    }

    #[test]
    fn a_listed_host_may_be_narrowed_to_a_port_and_an_identity() {
        for (entry, endpoint, allowed) in [
            ("vault.internal:8200", "https://vault.internal:8200", true),
            ("vault.internal:8200", "https://vault.internal", false),
            ("vault.internal:443", "https://vault.internal", true),
            ("vault.internal:80", "http://vault.internal", true),
            ("*.internal.example:8200", "https://a.internal.example:8200", true),
            ("*.internal.example:8200", "https://a.internal.example:8201", false),
            ("[::1]:8200", "https://[::1]:8200", true),
            ("[::1]:8200", "https://[::1]:8201", false),
            ("[::1]", "https://[::1]:8201", true),
            ("kubernetes=vault.internal", "https://vault.internal:8200", true),
            ("kubernetes=vault.internal:8200", "https://vault.internal:8200", true),
            ("kubernetes=::1", "https://[::1]:8200", true),
            ("aws=vault.internal", "https://vault.internal:8200", false),
        ] {
            let refused = refused(&vault(endpoint), &[entry]);
            assert_eq!(refused.is_none(), allowed, "{entry} {endpoint}");
        }
    }

    #[test]
    fn what_nodes_hold_are_the_rights_of_a_role_and_not_ours() {
        let mut provider = aws(None, None);
        if let Provider::AwsSecretsManager { login, .. } = &mut provider {
            login.role = None;
        }
        assert_eq!(refused(&provider, &[]).as_deref(), Some("/config/role_arn"));
    }

    #[test]
    fn our_signed_request_is_good_for_the_vault_that_it_is_shown_to() {
        let listed = ["vault.internal"];
        assert_eq!(refused(&vault_by_aws("vault.internal", None), &listed), None);
        let elsewhere = refused(&vault_by_aws("other.internal", None), &listed);
        assert_eq!(elsewhere.as_deref(), Some("/config/aws_server_id"));
    }

    #[test]
    fn an_sts_that_vault_calls_is_judged_by_its_name() {
        let sts = "https://sts.eu-central-1.amazonaws.com";
        let mut provider = vault_by_aws("vault.internal", Some(sts));
        if let Provider::HashicorpVault { target, .. } = &mut provider {
            target.tls.ca_cert = Some("pem".into());
        }
        assert_eq!(refused(&provider, &["vault.internal"]), None, "the certificates are Vault's own");
        for sts in ["https://sts.evil.example", "http://sts.eu-central-1.amazonaws.com"] {
            let refused = refused(&vault_by_aws("vault.internal", Some(sts)), &["vault.internal"]);
            assert_eq!(refused.as_deref(), Some("/config/sts_endpoint"), "{sts}");
        }
        for (provider, fields) in [
            (vault_by_aws("vault.internal", Some(sts)), vec!["endpoint"]),
            (azure("https://acme.vault.azure.net"), vec!["vault_url"]),
        ] {
            let connected: Vec<_> = provider.endpoints().into_iter().map(|(field, _)| field).collect();
            assert_eq!(connected, fields, "nothing else is connected to");
        }
    }

    #[test]
    fn the_providers_own_addresses_are_believed_by_public_certificates_only() {
        let with = |tls: Tls| {
            let mut provider = aws(None, None);
            if let Provider::AwsSecretsManager { target, .. } = &mut provider {
                target.tls = tls;
            }
            refused(&provider, &[])
        };
        assert_eq!(with(Tls { verify: false, ..Tls::default() }).as_deref(), Some("/config/tls_verify"));
        assert_eq!(
            with(Tls { ca_cert: Some("pem".into()), verify: true }).as_deref(),
            Some("/config/ca_cert")
        );
    }
}
