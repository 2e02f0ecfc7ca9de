//! `token create | lookup | list | renew | revoke`.

use std::time::Duration;

use clap::{Args, Subcommand};
use scaivault_domain::access::Scope;
use scaivault_domain::tenant::PolicyName;
use scaivault_proto::admin::v1::{
    CreateTokenRequest, ListTokensRequest, LookupTokenRequest, RenewTokenRequest, RevokeTokenRequest, Token,
};
use serde::Serialize;

use super::wire;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, details, table};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a token and print it: it is shown once.
    Create(Create),
    /// Show what a token may do.
    Lookup {
        /// Accessor of the token; your own if there is none.
        accessor: Option<String>,
    },
    /// List the tokens of the tenant.
    List,
    /// Let a token live longer.
    Renew {
        /// Accessor of the token; your own if there is none.
        accessor: Option<String>,
        /// How long it lives from now, e.g. 24h.
        #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
        ttl: Duration,
    },
    /// Revoke a token and the tokens that were created with it.
    Revoke {
        /// Accessor of the token.
        #[arg(required_unless_present = "own")]
        accessor: Option<String>,
        /// Revoke your own token.
        #[arg(long = "self", conflicts_with = "accessor")]
        own: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Who it is for, e.g. ci-deployer.
    #[arg(long)]
    subject: String,
    /// Which API it may use. Repeatable, or separated by commas.
    #[arg(
        long = "scope",
        value_name = "SCOPE",
        required = true,
        value_delimiter = ',',
        value_parser = parse::one_of(Scope::ALL, Scope::as_str)
    )]
    scopes: Vec<Scope>,
    /// A policy that says which paths. Repeatable, or separated by commas.
    #[arg(long = "policy", value_name = "POLICY", value_delimiter = ',', value_parser = parse::policy_name)]
    policies: Vec<PolicyName>,
    /// How long it lives; 24h if nothing is said.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    ttl: Option<Duration>,
    /// It never ends (operators only).
    #[arg(long, conflicts_with = "ttl")]
    no_expiry: bool,
}

#[derive(Serialize)]
struct Shown {
    accessor: String,
    subject: String,
    scopes: Vec<String>,
    policies: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expire_time: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    parent: String,
    tenant: String,
}

impl Shown {
    fn of(token: Option<Token>) -> Result<Self, Failure> {
        token.map(Shown::from).ok_or_else(|| Failure::strange_answer("no token"))
    }

    fn expiry(&self) -> String {
        self.expire_time.clone().unwrap_or_else(|| "never".to_owned())
    }

    fn to_text(&self) -> String {
        details([
            ("accessor", self.accessor.clone()),
            ("subject", self.subject.clone()),
            ("tenant", self.tenant.clone()),
            ("scopes", self.scopes.join(", ")),
            ("policies", self.policies.join(", ")),
            ("created", self.create_time.clone().unwrap_or_default()),
            ("expires", self.expiry()),
            ("parent", self.parent.clone()),
        ])
    }
}

impl From<Token> for Shown {
    fn from(token: Token) -> Self {
        Shown {
            accessor: token.accessor,
            subject: token.subject,
            scopes: token.scopes,
            policies: token.policies,
            create_time: wire::time(token.create_time),
            expire_time: wire::time(token.expire_time),
            parent: token.parent,
            tenant: token.tenant,
        }
    }
}

#[derive(Serialize)]
struct Created {
    token: String,
    #[serde(flatten)]
    about: Shown,
}

#[derive(Serialize)]
struct Tokens {
    tokens: Vec<Shown>,
}

#[derive(Serialize)]
struct Revoked {
    revoked: u32,
}

impl Command {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        match self {
            Command::Create(create) => create.run(to, output).await,
            Command::Lookup { accessor } => {
                let request = LookupTokenRequest { accessor: accessor.unwrap_or_default() };
                show(to.admin().lookup_token(request).await?.into_inner().token, output)
            }
            Command::List => list(to, output).await,
            Command::Renew { accessor, ttl } => {
                let accessor = accessor.unwrap_or_default();
                let request = RenewTokenRequest { accessor, ttl: Some(wire::to_duration(ttl)?) };
                show(to.admin().renew_token(request).await?.into_inner().token, output)
            }
            Command::Revoke { accessor, .. } => {
                let request = RevokeTokenRequest { accessor: accessor.unwrap_or_default() };
                let revoked =
                    Revoked { revoked: to.admin().revoke_token(request).await?.into_inner().revoked };
                output.show(&revoked, || details([("revoked", revoked.revoked.to_string())]))
            }
        }
    }
}

impl Create {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let ttl = if self.no_expiry { Some(Duration::ZERO) } else { self.ttl };
        let request = CreateTokenRequest {
            subject: self.subject,
            scopes: self.scopes.into_iter().map(|scope| scope.as_str().to_owned()).collect(),
            policies: self.policies.into_iter().map(String::from).collect(),
            ttl: ttl.map(wire::to_duration).transpose()?,
        };
        let answer = to.admin().create_token(request).await?.into_inner();
        let created = Created { token: answer.token, about: Shown::of(answer.info)? };
        let about = format!("accessor {}, expires {}", created.about.accessor, created.about.expiry());
        // The token alone on standard output, so that it can be piped.
        output.show(&created, || format!("{}\n", created.token))?;
        output.note(&about)
    }
}

fn show(token: Option<Token>, output: &mut Output<'_>) -> Result<(), Failure> {
    let shown = Shown::of(token)?;
    output.show(&shown, || shown.to_text())
}

async fn list(to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let tokens = wire::all(async |page_token| {
        let request = ListTokensRequest { page_size: wire::PAGE, page_token };
        let answer = to.admin().list_tokens(request).await?.into_inner();
        Ok((answer.tokens, answer.next_page_token))
    })
    .await?;
    let list = Tokens { tokens: tokens.into_iter().map(Shown::from).collect() };
    output.show(&list, || {
        let rows = list.tokens.iter().map(|token| {
            [
                token.accessor.clone(),
                token.subject.clone(),
                token.scopes.join(","),
                token.policies.join(","),
                token.expiry(),
            ]
        });
        table(["accessor", "subject", "scopes", "policies", "expires"], rows)
    })
}
