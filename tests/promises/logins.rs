//! Every way to log in to a backend, through running planes: what is promised of one is promised of all.
//!
//! The promises are one table ([`Promise::ALL`]), and each method is a [`Method`]: its server, its configuration, and
//! what can be done to it from outside. What a method cannot have is in [`CANNOT`], with the reason.

mod aws;
mod azure;
mod gcp;
mod memory;
mod own;
mod vault;

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use scaivault_tests::planes::{self, Planes, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// How long a login lasts that is to be renewed while somebody looks on.
const SHORT: Duration = Duration::from_secs(4);
/// What is read: every server here has it.
const SECRET: &str = "db";
/// What its value has in it.
const VALUE: &str = "three";
/// How many reads are many.
const READS: usize = 10;
/// The control plane, and the nodes. For each a failed login is not tried again for a second.
const HOLDERS: usize = 2;

/// What every login keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    /// Proxied reads work through the node and through the control plane, with one login for each and not for each read.
    OneLoginForEachHolder,
    /// What was issued is refused: one new login and no failed read. If that is refused as well: a clear state, and no
    /// storm.
    RevokedIsOneNewLogin,
    /// A new credential in the place of one that stopped working heals by itself.
    RotatedHealsByItself,
    /// A stored credential that cannot work is refused with the configuration, which is not stored.
    MalformedIsRefused,
    /// A credential that the server does not take is told as that, and not tried for each read.
    WrongIsTold,
    /// What ends is renewed before it does, without a failed read.
    ExpiringIsRenewed,
}

impl Promise {
    const ALL: [Promise; 6] = [
        // Those that count logins come first, as long as there is one backend only.
        Promise::OneLoginForEachHolder,
        Promise::RevokedIsOneNewLogin,
        Promise::RotatedHealsByItself,
        Promise::MalformedIsRefused,
        Promise::WrongIsTold,
        Promise::ExpiringIsRenewed,
    ];
}

const NOTHING_STORED: &str = "nothing is stored: the identity is the control plane's own";
const ONE_IDENTITY: &str = "no configuration can name another identity than the machine's one; that it is refused is in the revoked ones";

/// What cannot be, and why.
const CANNOT: &[(&str, Promise, &str)] = &[
    ("azure managed_identity", Promise::MalformedIsRefused, NOTHING_STORED),
    ("aws own role", Promise::MalformedIsRefused, NOTHING_STORED),
    ("gcp metadata", Promise::MalformedIsRefused, NOTHING_STORED),
    ("gcp external_account", Promise::MalformedIsRefused, NOTHING_STORED),
    ("gcp impersonation", Promise::MalformedIsRefused, NOTHING_STORED),
    ("gcp metadata", Promise::WrongIsTold, ONE_IDENTITY),
    ("gcp external_account", Promise::WrongIsTold, ONE_IDENTITY),
    ("gcp impersonation", Promise::WrongIsTold, ONE_IDENTITY),
    (
        "gcp service_account",
        Promise::ExpiringIsRenewed,
        "the control plane signs tokens of an hour itself: nothing outside can make them shorter",
    ),
    ("vault own kubernetes", Promise::MalformedIsRefused, NOTHING_STORED),
    ("vault own aws", Promise::MalformedIsRefused, NOTHING_STORED),
    ("vault own gcp", Promise::MalformedIsRefused, NOTHING_STORED),
];

/// What is configured to be refused by the server.
enum Wrong {
    /// A well-formed credential that it does not take.
    Stored(Value),
    /// Settings with which it does not take ours.
    Configured(Value),
}

/// A way to log in, with a server to log in to. What was withdrawn stays so until there is another credential.
trait Method {
    /// Its name in [`CANNOT`].
    const NAME: &'static str;

    /// `type` and `config` of a backend that works, without the path of the credential.
    fn backend(&mut self) -> Value;

    /// What a local name is mapped to.
    fn template(&self) -> &'static str {
        "*"
    }

    /// The field of `config` that names the stored credential.
    fn credential_field(&self) -> &'static str {
        "credentials_path"
    }

    /// A credential that the server takes from now on; `None` if it is our own identity, which it takes then.
    fn credential(&mut self) -> impl Future<Output = Result<Option<Value>>>;

    /// Sees a backend as it was stored, before it is used.
    async fn configured(&mut self, _backend: &Value) -> Result<()> {
        Ok(())
    }

    /// How often the server was asked for a login; `None` if a login asks nobody.
    fn logins(&self) -> Result<Option<usize>>;

    /// How often it was asked for anything that prolongs one, a login included.
    fn renewals(&self) -> Result<usize> {
        self.logins()?.context("it is asked for none")
    }

    /// Has the server refuse what it issued so far. Returns for how many holders.
    fn revoke(&mut self) -> impl Future<Output = Result<usize>>;

    /// Has the server refuse the credential, and what it issued.
    fn withdraw(&mut self) -> impl Future<Output = Result<()>>;

    /// What is refused with the configuration, and the key that is named.
    fn malformed(&self) -> Vec<(Value, &'static str)> {
        Vec::new()
    }

    /// What the server refuses.
    async fn wrong(&mut self) -> Result<Wrong> {
        bail!("{}", ONE_IDENTITY)
    }

    /// For how many holders a login ends: the control plane itself may use what does not.
    fn ending(&self) -> usize {
        HOLDERS
    }

    /// Has logins from now on last [`SHORT`].
    async fn shorten(&mut self) -> Result<()> {
        bail!("its logins have one length")
    }
}

/// A method in use.
struct Bed<M> {
    planes: Planes,
    node: Rest,
    control_plane: Rest,
    method: M,
    /// The backend `main`.
    main: String,
}

fn path(backend: &str) -> String {
    format!("/v1/secrets/{backend}/{SECRET}")
}

fn status_path(id: &str) -> String {
    format!("/v1/federation/backends/{id}/status")
}

/// Whether somebody who is told this knows what to do.
fn says_what_to_do(told: &Value) -> bool {
    told["next_step"].as_str().is_some_and(|step| !step.is_empty())
}

/// Tries everything that is promised, and tells what could not be.
#[expect(clippy::print_stdout, reason = "the table, for whoever reads along")]
async fn keeps_every_promise<M: Method>(planes: Planes, method: M) -> Result<()> {
    let (node, control_plane) = (planes.rest(0)?, planes.control_plane_rest()?);
    let mut bed = Bed { planes, node, control_plane, method, main: String::new() };
    for promise in Promise::ALL {
        let cannot = CANNOT.iter().find(|(name, cannot, _)| (*name, *cannot) == (M::NAME, promise));
        if let Some((name, _, why)) = cannot {
            println!("{name}: {promise:?} cannot be tried: {why}");
            continue;
        }
        let begun = Instant::now();
        bed.keeps(promise).await.with_context(|| format!("{}: {promise:?}", M::NAME))?;
        println!("{}: {promise:?} is kept ({:?})", M::NAME, begun.elapsed());
    }
    // The planes go last: what they say when their servers are gone is of no interest.
    drop(bed.planes);
    Ok(())
}

impl<M: Method> Bed<M> {
    async fn keeps(&mut self, promise: Promise) -> Result<()> {
        match promise {
            Promise::OneLoginForEachHolder => self.one_login_for_each_holder().await,
            Promise::RevokedIsOneNewLogin => self.revoked_is_one_new_login().await,
            Promise::RotatedHealsByItself => self.rotated_heals_by_itself().await,
            Promise::MalformedIsRefused => self.malformed_is_refused().await,
            Promise::WrongIsTold => self.wrong_is_told().await,
            Promise::ExpiringIsRenewed => self.expiring_is_renewed().await,
        }
    }

    /// A configuration with this credential, if there is one, which is stored for it.
    async fn backend(&mut self, name: &str, credential: Option<Value>) -> Result<Value> {
        let mut backend = self.method.backend();
        let mapping = json!({ format!("{name}/*"): self.method.template() });
        planes::merge(&mut backend, &json!({ "name": name, "mode": "proxy", "path_mapping": mapping }));
        if let Some(credential) = credential {
            let stored = format!("infra/{name}");
            self.store(&stored, &credential).await?;
            backend["config"][self.method.credential_field()] = json!(stored);
        }
        Ok(backend)
    }

    async fn store(&self, path: &str, credential: &Value) -> Result<()> {
        let secret = match credential {
            Value::String(text) => json!({ "secret_type": "text", "data": { "value": text } }),
            _ => json!({ "data": credential }),
        };
        self.node.put(&format!("/v1/secrets/{path}"), secret).await?.ok().map(drop)
    }

    async fn configure(&mut self, backend: Value) -> Result<String> {
        let stored = self.node.post("/v1/federation/backends", backend).await?.ok()?;
        self.method.configured(&stored).await?;
        Ok(stored["id"].as_str().context("no id")?.to_owned())
    }

    async fn delete(&self, id: &str) -> Result<()> {
        let path = format!("/v1/federation/backends/{id}");
        self.node.delete(&path).await?.ok()?;
        let gone = async || Ok((self.node.get(&path).await?.status == 404).then_some(()));
        wait::until("the backend is gone", gone).await
    }

    async fn works(&self, backend: &str) -> Result<()> {
        for plane in [&self.node, &self.control_plane] {
            let mut told = String::new();
            wait::until("the backend is read", async || {
                let answer = plane.get(&path(backend)).await?;
                ensure!(answer.status != 200 || answer.text.contains(VALUE), "{}", answer.text);
                told = answer.text;
                Ok((answer.status == 200).then_some(()))
            })
            .await
            .with_context(|| told)?;
        }
        Ok(())
    }

    async fn read(plane: &Rest, backend: &str) -> Result<()> {
        let answer = plane.get(&path(backend)).await?;
        ensure!(answer.status == 200 && answer.text.contains(VALUE), "{} {}", answer.status, answer.text);
        Ok(())
    }

    async fn refused(plane: &Rest, backend: &str) -> Result<()> {
        let answer = plane.get(&path(backend)).await?;
        ensure!(answer.refusal() == (502, "backend_login_failed"), "{} {}", answer.status, answer.text);
        ensure!(says_what_to_do(&answer.json), "{}", answer.text);
        Ok(())
    }

    async fn is(&self, id: &str, status: &str) -> Result<Value> {
        wait::until(&format!("the backend is {status}"), async || {
            let found = self.node.get(&status_path(id)).await?.ok()?;
            Ok((found["status"] == status).then_some(found))
        })
        .await
    }

    /// How many logins there were, by the server's account or, if it is not asked, by the audit trail's of a
    /// backend.
    async fn logins(&self, id: &str) -> Result<usize> {
        if let Some(asked) = self.method.logins()? {
            return Ok(asked);
        }
        let rows = self.control_plane.audit().await?;
        Ok(rows.iter().filter(|row| row["action"] == "backend.login" && row["backend"] == id).count())
    }

    /// When the control plane last looked at the backend by itself.
    async fn probed(&self, id: &str) -> Result<Value> {
        Ok(self.node.get(&status_path(id)).await?.ok()?["connection"]["probed_at"].take())
    }

    /// Waits until there were so many logins; where they are counted by the audit trail, that is a little later.
    async fn main_logins_are(&self, expected: usize) -> Result<()> {
        if self.method.logins()?.is_none() {
            let arrived = async || Ok((self.logins(&self.main).await? >= expected).then_some(()));
            wait::until("the logins are in the audit trail", arrived).await?;
        }
        let found = self.logins(&self.main).await?;
        ensure!(found == expected, "{found} logins, not {expected}");
        Ok(())
    }

    async fn one_login_for_each_holder(&mut self) -> Result<()> {
        let credential = self.method.credential().await?;
        let before = self.logins("none yet").await?;
        let backend = self.backend("main", credential).await?;
        self.main = self.configure(backend).await?;
        self.works("main").await?;
        for _ in 0..READS {
            Self::read(&self.node, "main").await?;
            Self::read(&self.control_plane, "main").await?;
        }
        let healthy = self.is(&self.main, "healthy").await?;
        ensure!(healthy["nodes"][0]["has_lease"] == true, "{healthy}");
        self.main_logins_are(before + HOLDERS).await
    }

    async fn revoked_is_one_new_login(&mut self) -> Result<()> {
        let before = self.logins(&self.main).await?;
        let holders = self.method.revoke().await?;
        Self::read(&self.node, "main").await?;
        Self::read(&self.control_plane, "main").await?;
        self.main_logins_are(before + holders).await?;

        self.method.withdraw().await?;
        let (before, probed) = (self.logins(&self.main).await?, self.probed(&self.main).await?);
        Self::refused(&self.node, "main").await?;
        // A probe of the control plane, every half a minute, may have come between.
        if self.probed(&self.main).await? == probed {
            self.main_logins_are(before + 1).await?;
        }
        self.is_told_without_a_storm("main", &self.main).await
    }

    /// Reads fail, and say why; so does the status; and the server is left alone.
    async fn is_told_without_a_storm(&self, backend: &str, id: &str) -> Result<()> {
        let (before, begun) = (self.logins(id).await?, Instant::now());
        for _ in 0..READS {
            Self::refused(&self.node, backend).await?;
            Self::refused(&self.control_plane, backend).await?;
        }
        let degraded = self.is(id, "degraded").await?;
        ensure!(says_what_to_do(&degraded), "{degraded}");
        ensure!(degraded["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{degraded}");
        let (logins, seconds) = (self.logins(id).await? - before, begun.elapsed().as_secs() + 1);
        // One a second; where logins succeed in vain, three before that.
        let most = HOLDERS * (usize::try_from(seconds)? + 3);
        ensure!(logins <= most, "{logins} logins for {} reads in {seconds} s", 2 * READS);
        Ok(())
    }

    async fn rotated_heals_by_itself(&mut self) -> Result<()> {
        self.method.withdraw().await?;
        self.is(&self.main, "degraded").await?;
        if let Some(credential) = self.method.credential().await? {
            self.store("infra/main", &credential).await?;
        }
        self.works("main").await?;
        let healthy = self.is(&self.main, "healthy").await?;
        ensure!(healthy["reason"] == "", "{healthy}");
        Ok(())
    }

    async fn malformed_is_refused(&mut self) -> Result<()> {
        let mut malformed = self.method.malformed();
        ensure!(!malformed.is_empty(), "nothing is tried");
        malformed.push((json!("hunter2"), "no JSON object"));
        let listed = self.node.get("/v1/federation/backends").await?.ok()?;
        for (credential, named) in malformed {
            let backend = self.backend("malformed", Some(credential)).await?;
            let answer = self.node.post("/v1/federation/backends", backend).await?;
            ensure!(answer.refusal() == (400, "credential_unusable"), "{named}: {}", answer.text);
            let pointer = format!("/config/{}", self.method.credential_field());
            ensure!(answer.pointers() == [pointer], "{named}: {}", answer.text);
            ensure!(answer.text.contains(named), "{named}: {}", answer.text);
        }
        let now = self.node.get("/v1/federation/backends").await?.ok()?;
        ensure!(now == listed, "{now} was {listed}");
        Ok(())
    }

    async fn wrong_is_told(&mut self) -> Result<()> {
        let backend = match self.method.wrong().await? {
            Wrong::Stored(credential) => self.backend("wrong", Some(credential)).await?,
            Wrong::Configured(settings) => {
                let credential = self.method.credential().await?;
                let mut backend = self.backend("wrong", credential).await?;
                planes::merge(&mut backend["config"], &settings);
                backend
            }
        };
        let id = self.configure(backend).await?;
        wait::until("the node knows the backend", async || {
            Ok((self.node.get(&path("wrong")).await?.refusal() != (404, "not_found")).then_some(()))
        })
        .await?;
        self.is_told_without_a_storm("wrong", &id).await?;
        self.works("main").await?;
        self.delete(&id).await
    }

    async fn expiring_is_renewed(&mut self) -> Result<()> {
        self.method.shorten().await?;
        let credential = self.method.credential().await?;
        let backend = self.backend("short", credential).await?;
        let id = self.configure(backend).await?;
        self.works("short").await?;
        let before = self.method.renewals()?;
        let (mut ends, end) = (BTreeSet::new(), Instant::now() + 2 * SHORT);
        while Instant::now() < end {
            Self::read(&self.node, "short").await?;
            Self::read(&self.control_plane, "short").await?;
            let status = self.node.get(&status_path(&id)).await?.ok()?;
            ends.extend(
                status["login_expires_at"].as_str().map(|end| end[.."2026-11-22T13:46:18".len()].to_owned()),
            );
            sleep(Duration::from_millis(50)).await;
        }
        let renewals = self.method.renewals()? - before;
        // Four half lives, of which the first had begun before.
        let ending = self.method.ending();
        ensure!(renewals >= 3 * ending, "{renewals} renewals");
        ensure!(ends.len() >= 3 || ending < HOLDERS, "the login was to end at {ends:?}");
        self.delete(&id).await
    }
}

/// Grants identities of ours to the tenant that everything here is in.
async fn grant(operator: &Rest, identities: &[&str]) -> Result<()> {
    let granted = json!({ "identities": identities });
    operator.patch("/v1/tenants/default", granted).await?.ok().map(drop)
}
