//! `policy put | get | list | delete`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use scaivault_domain::access::{Capability, Effect, PolicyRule};
use scaivault_domain::pattern::Pattern;
use scaivault_domain::tenant::PolicyName;
use scaivault_proto::admin::v1::{
    self as wire_v1, DeletePolicyRequest, GetPolicyRequest, ListPoliciesRequest, PutPolicyRequest,
};
use serde::{Deserialize, Serialize};

use super::wire;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, table};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a policy, or replace all of its rules.
    Put(Put),
    /// Show a policy.
    Get(Named),
    /// List the policies of the tenant.
    List,
    /// Delete a policy that no token uses.
    Delete(Named),
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the policy.
    #[arg(value_parser = parse::policy_name)]
    name: PolicyName,
}

#[derive(Debug, Args)]
pub(crate) struct Put {
    #[command(flatten)]
    named: Named,
    /// A rule, e.g. 'allow read,list apps/**'. Repeatable; a deny wins over every allow.
    #[arg(
        long = "rule",
        value_name = "RULE",
        value_parser = parse::policy_rule,
        required_unless_present = "file",
        conflicts_with = "file"
    )]
    rules: Vec<PolicyRule>,
    /// The policy as JSON, as `policy get -o json` prints it.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// What `--file` reads.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    name: Option<PolicyName>,
    rules: Vec<RuleFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    path: Pattern,
    capabilities: Vec<Capability>,
    #[serde(default = "allow")]
    effect: Effect,
}

/// As in the API: a rule that says nothing else gives.
fn allow() -> Effect {
    Effect::Allow
}

impl PolicyFile {
    fn into_rules(self, name: &PolicyName) -> Result<Vec<PolicyRule>, Failure> {
        if let Some(other) = self.name.filter(|other| other != name) {
            return Err(Failure::usage(
                format!("the file is of the policy `{other}`, not of `{name}`"),
                "name the policy of the file, or remove `name` from it",
            ));
        }
        let rule = |rule: RuleFile| PolicyRule {
            path: rule.path,
            capabilities: rule.capabilities,
            effect: rule.effect,
        };
        Ok(self.rules.into_iter().map(rule).collect())
    }
}

#[derive(Serialize)]
struct Policy {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Serialize)]
struct Rule {
    path: String,
    capabilities: Vec<String>,
    effect: &'static str,
}

#[derive(Serialize)]
struct Policies {
    policies: Vec<Policy>,
}

impl From<wire_v1::Policy> for Policy {
    fn from(policy: wire_v1::Policy) -> Self {
        let rule = |rule: wire_v1::PolicyRule| Rule {
            effect: match rule.effect() {
                wire_v1::Effect::Allow | wire_v1::Effect::Unspecified => "allow",
                wire_v1::Effect::Deny => "deny",
            },
            path: rule.path,
            capabilities: rule.capabilities,
        };
        Policy { name: policy.name, rules: policy.rules.into_iter().map(rule).collect() }
    }
}

fn to_wire(rule: PolicyRule) -> wire_v1::PolicyRule {
    wire_v1::PolicyRule {
        path: rule.path.as_str().to_owned(),
        capabilities: rule
            .capabilities
            .into_iter()
            .map(|capability| capability.as_str().to_owned())
            .collect(),
        effect: match rule.effect {
            Effect::Allow => wire_v1::Effect::Allow,
            Effect::Deny => wire_v1::Effect::Deny,
        }
        .into(),
    }
}

impl Command {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        match self {
            Command::Put(put) => put.run(to, output).await,
            Command::Get(named) => {
                let request = GetPolicyRequest { name: named.name.into() };
                show(to.admin().get_policy(request).await?.into_inner().policy, output)
            }
            Command::List => list(to, output).await,
            Command::Delete(named) => {
                to.admin()
                    .delete_policy(DeletePolicyRequest { name: named.name.as_str().to_owned() })
                    .await?;
                output.note(&format!("deleted policy {}", named.name))
            }
        }
    }
}

impl Put {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let name = self.named.name;
        let rules = match &self.file {
            None => self.rules,
            Some(file) => read(file)?.into_rules(&name)?,
        };
        let policy = wire_v1::Policy { name: name.into(), rules: rules.into_iter().map(to_wire).collect() };
        let request = PutPolicyRequest { policy: Some(policy) };
        show(to.admin().put_policy(request).await?.into_inner().policy, output)
    }
}

fn read(file: &std::path::Path) -> Result<PolicyFile, Failure> {
    let json = std::fs::read(file).map_err(|error| {
        Failure::usage(format!("{} cannot be read: {error}", file.display()), "name a file that can be read")
    })?;
    serde_json::from_slice(&json).map_err(|error| {
        Failure::usage(
            format!("{} is no policy: {error}", file.display()),
            r#"write {"rules": [{"path": "apps/**", "capabilities": ["read"], "effect": "allow"}]}"#,
        )
    })
}

fn show(policy: Option<wire_v1::Policy>, output: &mut Output<'_>) -> Result<(), Failure> {
    let policy = Policy::from(policy.ok_or_else(|| Failure::strange_answer("no policy"))?);
    output.show(&policy, || {
        let rows = policy
            .rules
            .iter()
            .map(|rule| [rule.effect.to_owned(), rule.capabilities.join(","), rule.path.clone()]);
        table(["effect", "capabilities", "path"], rows)
    })
}

async fn list(to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let policies = wire::all(async |page_token| {
        let request = ListPoliciesRequest { page_size: wire::PAGE, page_token };
        let answer = to.admin().list_policies(request).await?.into_inner();
        Ok((answer.policies, answer.next_page_token))
    })
    .await?;
    let list = Policies { policies: policies.into_iter().map(Policy::from).collect() };
    output.show(&list, || {
        let rows = list.policies.iter().map(|policy| [policy.name.clone(), policy.rules.len().to_string()]);
        table(["name", "rules"], rows)
    })
}
