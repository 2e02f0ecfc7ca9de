use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::StreamExt as _;
use scaivault_domain::Reason;
use scaivault_domain::backend::{
    AwsRegion, AwsTarget, BackendId, KvMount, KvVersion, Target, Tls, VaultTarget,
};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::secret::State;
use scaivault_domain::sync::{Mode, SyncSettings};
use scaivault_domain::tenant::{BackendName, TenantId};
use scaivault_domain::view::{BackendView, Generation};
use tokio::sync::Barrier;

use super::*;
use crate::Material;
use crate::budget::{Budget, Limit, Quotas, Rate};
use crate::connection::Connections;
use crate::testing::{Reply, Server, egress, json, lease, with_header};

const TIMEOUT: Duration = Duration::from_secs(5);
const LOOKUP: &str = "/v1/auth/token/lookup-self";
const DENIED: &str = r#"{"errors":["permission denied"]}"#;
const VALUE: &str = r#"{"data":{"data":{"a":1},"metadata":{"created_time":"2026-01-01T00:00:00Z","deletion_time":"",
    "destroyed":false,"version":1}}}"#;
const DELETED: &str = r#"{"data":{"data":null,"metadata":{"created_time":"2026-01-01T00:00:00Z",
    "deletion_time":"2026-01-02T00:00:00Z","destroyed":false,"version":1}}}"#;

/// Leases on `token 1`, `token 2` and so on, another one for every refusal.
#[derive(Default)]
struct Logins(Mutex<usize>);

impl Leases for Logins {
    async fn lease(&self, _: &LeaseKey, _: Generation, refused: Option<&str>) -> Result<Arc<Lease>, Error> {
        let mut current = self.0.lock().expect("no test panicked with it");
        let held = lease(&format!("token {current}"));
        if refused.is_some_and(|refused| held.id == refused) {
            *current += 1;
        }
        Ok(Arc::new(lease(&format!("token {current}"))))
    }

    fn budget(&self, _: &LeaseKey, target: &Target) -> Arc<Budget> {
        Arc::new(Budget::new(Quotas::of(target)))
    }
}

/// One lease, and so many calls of each quota a day, a tenth of them at once.
struct Rationed(Arc<Budget>);

impl Rationed {
    fn to(calls: u32) -> Self {
        let rate = Limit::Rate(Rate::per(calls, Duration::from_secs(24 * 3600)));
        Rationed(Arc::new(Budget::new(Quotas { values: rate, metadata: rate, lists: rate, batches: rate })))
    }

    fn left(&self) -> Vec<f64> {
        self.0.remaining().iter().map(|remaining| remaining.now.floor()).collect()
    }
}

impl Leases for Arc<Rationed> {
    async fn lease(&self, _: &LeaseKey, _: Generation, _: Option<&str>) -> Result<Arc<Lease>, Error> {
        Ok(Arc::new(lease("token")))
    }

    fn budget(&self, _: &LeaseKey, _: &Target) -> Arc<Budget> {
        self.0.clone()
    }
}

/// No login can be made.
struct NoLogin(Reason);

impl Leases for NoLogin {
    async fn lease(&self, _: &LeaseKey, _: Generation, _: Option<&str>) -> Result<Arc<Lease>, Error> {
        Err(Error::new(self.0, "no login"))
    }

    fn budget(&self, _: &LeaseKey, target: &Target) -> Arc<Budget> {
        Arc::new(Budget::new(Quotas::of(target)))
    }
}

fn run<L: Leases>(server: &Server, leases: L) -> Background<L> {
    connect(server, leases).background(TIMEOUT)
}

fn connect<L: Leases>(server: &Server, leases: L) -> Arc<Connection<L>> {
    let tenant = TenantId::parse("acme").expect("a tenant");
    Connections::new(Arc::new(leases), egress()).of(&tenant, &view(server)).expect("a connection")
}

fn view(server: &Server) -> BackendView {
    let kv = Some(KvMount { path: "kv".into(), version: KvVersion::V2 });
    BackendView {
        id: BackendId::from_random([1; 10]),
        name: BackendName::parse("prod").expect("a name"),
        target: Target::HashicorpVault(VaultTarget { kv, ..server.target() }),
        mapping: PathMapping::parse([("a/**", "kv/data/**")]).expect("a mapping"),
        mode: Mode::Sync,
        sync: SyncSettings::default(),
        enabled: true,
        timeout: TIMEOUT,
        login_generation: 0,
    }
}

fn name(text: &str) -> RemoteName {
    RemoteName::with_literal(text, 2)
}

async fn surveyed<L: Leases>(run: &Background<L>) -> Result<BTreeSet<String>, Failed> {
    let (mut survey, mut names) = (run.survey(Some(&name("kv/data"))), BTreeSet::new());
    while let Some(page) = survey.next().await? {
        names.extend(page.secrets.into_iter().map(|secret| secret.name.as_str().to_owned()));
    }
    Ok(names)
}

/// HashiCorp Vault with a hundred secrets in ten folders.
fn hundred(path: &str) -> Reply {
    let keys = |text: &str, end: &str| {
        let keys: Vec<_> = (0..10).map(|n| format!("\"{text}{n}{end}\"")).collect();
        json(200, &format!(r#"{{"data":{{"keys":[{}]}}}}"#, keys.join(",")))
    };
    match path.strip_prefix("/v1/kv/metadata") {
        None => json(404, r#"{"warnings":["Invalid path for a versioned K/V secrets engine."]}"#),
        Some(path) if path.starts_with('?') => keys("f", "/"),
        Some(path) if path.contains('?') => keys("s", ""),
        Some(_) => json(
            200,
            r#"{"data":{"current_version":1,"versions":{"1":{"created_time":"2026-01-01T00:00:00Z",
                "deletion_time":"","destroyed":false}}}}"#,
        ),
    }
}

#[tokio::test]
async fn a_survey_finds_everything_and_counts_its_calls() {
    let server = Server::start(hundred).await;
    let run = run(&server, Logins::default());
    assert_eq!(surveyed(&run).await.expect("a survey").len(), 100);
    assert_eq!(run.calls(), BTreeMap::from([("scan", 1), ("list", 1 + 1 + 10), ("metadata", 100)]));
    assert_eq!(server.paths().len(), 113);
}

/// AWS, where every secret has its own name as its value.
fn aws(server: &Server) -> Background<Keys> {
    let region = AwsRegion::parse("region", "eu-central-1").expect("a region");
    let endpoint = server.target().endpoint;
    let target = AwsTarget { region, endpoint: Some(endpoint), tls: Tls::default() };
    let backend = BackendView { target: Target::AwsSecretsManager(target), ..view(server) };
    let tenant = TenantId::parse("acme").expect("a tenant");
    let connections = Connections::new(Arc::new(Keys), egress());
    connections.of(&tenant, &backend).expect("a connection").background(TIMEOUT)
}

struct Keys;

impl Leases for Keys {
    async fn lease(&self, _: &LeaseKey, _: Generation, _: Option<&str>) -> Result<Arc<Lease>, Error> {
        let material = Material::AwsKeys {
            access_key_id: "AKIA".into(),
            secret_access_key: "secret".into(),
            session_token: None,
        };
        Ok(Arc::new(Lease { material, ..lease("keys") }))
    }

    fn budget(&self, _: &LeaseKey, target: &Target) -> Arc<Budget> {
        Arc::new(Budget::new(Quotas::of(target)))
    }
}

/// The names in the body of a request.
fn asked(head: &str) -> Vec<String> {
    let body: serde_json::Value =
        head.find("\r\n\r\n").and_then(|end| serde_json::from_str(&head[end..]).ok()).unwrap_or_default();
    match (&body["SecretIdList"], &body["SecretId"]) {
        (serde_json::Value::Array(names), _) => {
            names.iter().map(|name| name.as_str().unwrap_or("").into()).collect()
        }
        (_, name) => vec![name.as_str().unwrap_or("").into()],
    }
}

fn stored(name: &str) -> String {
    format!(
        r#"{{"ARN":"arn:aws:secretsmanager:eu-central-1:123456789012:secret:{name}-AbCdEf","Name":"{name}","VersionId":"v-{name}",
            "SecretString":"{name}","VersionStages":["AWSCURRENT"],"CreatedDate":1.7e9}}"#
    )
}

fn batch(head: &str) -> Reply {
    let values: Vec<_> = asked(head).iter().filter(|name| *name != "gone").map(|name| stored(name)).collect();
    let error = r#"{"SecretId":"gone","ErrorCode":"ResourceNotFoundException","Message":"x"}"#;
    let errors = if asked(head).iter().any(|name| name == "gone") { error } else { "" };
    json(200, &format!(r#"{{"SecretValues":[{}],"Errors":[{errors}]}}"#, values.join(",")))
}

#[tokio::test]
async fn reads_at_the_same_time_are_one_call_and_each_gets_its_own_answer() {
    let server = Server::start_with_heads(|_, head| batch(head)).await;
    let run = aws(&server);
    let mut names: Vec<String> = (0..44).map(|number| format!("s{number}")).collect();
    names.push("gone".into());
    let reads = names.iter().map(|name| {
        let run = run.clone();
        async move { (name, run.read(&RemoteName::new(name.as_str())).await) }
    });
    for (name, read) in futures::future::join_all(reads).await {
        match read {
            Ok(secret) => assert_eq!(secret.value.expose(), name.as_bytes()),
            Err(failed) => assert_eq!((name.as_str(), failed.cause), ("gone", BackendError::NotFound)),
        }
    }
    assert_eq!(run.calls(), BTreeMap::from([("batch", 3)]));
}

#[tokio::test]
async fn as_many_calls_are_under_way_as_the_store_gets_and_all_of_them_are_full() {
    let at_once = Limits::default().background;
    let together = Arc::new(Barrier::new(at_once));
    // Answers come only to so many calls at the same time.
    let server = Server::start_with_heads(move |_, head| match batch(head) {
        Reply::Bytes(answer) => Reply::Together(together.clone(), answer),
        other => other,
    })
    .await;
    let run = aws(&server);
    let names: Vec<_> = (0..40 * at_once).map(|number| RemoteName::new(format!("s{number}"))).collect();
    let reads = futures::stream::iter(names.iter().map(|name| run.read(name)));
    let reads = reads.buffer_unordered(run.most_reads_at_once()).collect::<Vec<_>>();
    let reads = tokio::time::timeout(TIMEOUT, reads).await.expect("nobody waits for a call too few");
    assert!(reads.iter().all(Result::is_ok), "{reads:?}");
    assert_eq!(run.calls(), BTreeMap::from([("batch", 2 * at_once as u64)]));
}

#[test]
fn a_few_reads_wait_for_the_call_that_is_under_way() {
    let mut gathering = Gathering::default();
    let ask = |gathering: &mut Gathering| {
        let answer = oneshot::channel().0;
        gathering.waiting.push(Gathered { name: RemoteName::new("s"), answer });
    };
    ask(&mut gathering);
    assert!(gathering.needs_a_look() && !gathering.needs_a_look(), "one look is enough");
    assert_eq!(gathering.rest().map(|rest| rest.len()), Some(1));
    ask(&mut gathering);
    assert!(!gathering.needs_a_look() && gathering.rest().is_none());
    gathering.under_way -= 1;
    assert!(gathering.needs_a_look());
    ask(&mut gathering);
    assert_eq!(gathering.full(2).map(|full| full.len()), Some(2));
    assert!(gathering.rest().is_none(), "nothing is left to be looked after");
}

#[tokio::test]
async fn what_is_refused_as_one_of_many_is_read_alone() {
    let server = Server::start_with_heads(|_, head| {
        if !head.to_ascii_lowercase().contains("batchgetsecretvalue") {
            return json(200, &stored(&asked(head)[0]));
        }
        let error = r#"{"SecretId":"shy","ErrorCode":"AccessDeniedException","Message":"x"}"#;
        json(200, &format!(r#"{{"SecretValues":[{}],"Errors":[{error}]}}"#, stored("open")))
    })
    .await;
    let run = aws(&server);
    let names = ["open", "shy"].map(RemoteName::new);
    let reads = futures::future::join_all(names.iter().map(|name| run.read(name))).await;
    assert!(reads.iter().all(Result::is_ok), "{reads:?}");
    assert_eq!(run.calls(), BTreeMap::from([("batch", 1), ("read", 1)]));
}

#[tokio::test]
async fn where_reading_together_is_forbidden_each_is_read_alone() {
    let server = Server::start_with_heads(|_, head| {
        if head.to_ascii_lowercase().contains("batchgetsecretvalue") {
            return json(400, r#"{"__type":"AccessDeniedException","Message":"no"}"#);
        }
        json(200, &stored(&asked(head)[0]))
    })
    .await;
    let run = aws(&server);
    let names: Vec<_> = (0..5).map(|number| RemoteName::new(format!("s{number}"))).collect();
    for _ in 0..2 {
        let reads = futures::future::join_all(names.iter().map(|name| run.read(name))).await;
        assert!(reads.iter().all(Result::is_ok), "{reads:?}");
    }
    assert_eq!(run.calls(), BTreeMap::from([("batch", 1), ("read", 10)]));
}

#[tokio::test]
async fn a_listing_without_an_end_is_given_up() {
    for next in [|_: usize| "same".to_owned(), |page: usize| format!("page-{page}")] {
        let pages = AtomicUsize::new(0);
        let server = Server::start(move |_| {
            let next = next(pages.fetch_add(1, Ordering::Relaxed));
            json(200, &format!(r#"{{"SecretList":[],"NextToken":"{next}"}}"#))
        })
        .await;
        let mut survey = aws(&server).survey(None);
        let failed = survey.next().await.expect_err("no end, no listing");
        assert!(matches!(failed.cause, BackendError::InvalidAnswer(_)), "{failed}");
    }
}

#[tokio::test]
async fn a_herd_on_one_name_costs_one_call() {
    let server = Server::start(|_| json(200, VALUE)).await;
    let budget = Arc::new(Rationed::to(100));
    let connection = connect(&server, budget.clone());
    let mut herd = JoinSet::new();
    for _ in 0..1000 {
        let connection = connection.clone();
        herd.spawn(async move { connection.read(&name("kv/data/x"), TIMEOUT).await });
    }
    assert!(herd.join_all().await.into_iter().all(|read| read.is_ok()));
    assert_eq!(server.paths().len(), 1);
    assert_eq!(budget.0.remaining()[0].now.floor(), 9.0);
}

#[tokio::test]
async fn a_read_beyond_the_budget_is_refused_at_once_and_not_made() {
    let server = Server::start(|_| json(200, VALUE)).await;
    let budget = Arc::new(Rationed::to(100));
    budget.0.debit(Quota::Values, 10);
    let refused = connect(&server, budget).read(&name("kv/data/x"), TIMEOUT).await.expect_err("it is spent");
    assert_eq!(refused.reason, Reason::BackendThrottled);
    assert!(refused.retry_after.is_some_and(|after| after > TIMEOUT));
    assert_eq!(server.paths(), Vec::<String>::new());
}

#[tokio::test]
async fn each_operation_uses_up_its_own_quota() {
    let server = Server::start(hundred).await;
    let budget = Arc::new(Rationed::to(10_000));
    let run = run(&server, budget.clone());
    assert_eq!(surveyed(&run).await.expect("a survey").len(), 100);
    assert_eq!(budget.left(), [1000.0, 900.0, 1000.0 - 11.0, 1000.0]);
    run.calls.beyond(Quota::Values);
    run.calls.debit(&budget.0);
    assert_eq!(budget.left()[0], 999.0);
}

#[tokio::test]
async fn a_failure_in_the_middle_fails_the_survey_for_good() {
    let server = Server::start(|path| match path {
        "/v1/kv/metadata/f7/s7" => json(200, "no JSON"),
        _ => hundred(path),
    })
    .await;
    let mut survey = run(&server, Logins::default()).survey(Some(&name("kv/data")));
    let failed = loop {
        match survey.next().await {
            Ok(page) => assert!(page.is_some(), "half a survey looks like a whole one"),
            Err(failed) => break failed,
        }
    };
    assert!(matches!(failed.cause, BackendError::InvalidAnswer(_)));
    assert!(failed.shown.message.contains("prod"));
    assert!(survey.next().await.is_err());
}

#[tokio::test]
async fn a_lease_that_ends_in_the_middle_is_replaced() {
    let asked = AtomicUsize::new(0);
    let server = Server::start_with_heads(move |path, head| {
        let is_first = head.contains("token 0");
        match path {
            LOOKUP => json(403, DENIED),
            _ if is_first && asked.fetch_add(1, Ordering::SeqCst) > 40 => json(403, DENIED),
            _ => hundred(path),
        }
    })
    .await;
    let run = run(&server, Logins::default());
    assert_eq!(surveyed(&run).await.expect("a survey").len(), 100);
}

#[tokio::test]
async fn a_store_that_slows_us_down_is_waited_for() {
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |path| match asked.fetch_add(1, Ordering::SeqCst) {
        20 => with_header(429, "retry-after: 0", "{}"),
        21..24 => json(503, "{}"),
        _ => hundred(path),
    })
    .await;
    assert_eq!(surveyed(&run(&server, Logins::default())).await.expect("a survey").len(), 100);
}

#[tokio::test]
async fn reads_say_what_happened_so_that_it_can_be_decided_by() {
    let server = Server::start(|path| match path {
        LOOKUP => json(200, r#"{"data":{}}"#),
        "/v1/kv/data/x" | "/v1/kv/data/x?version=1" => json(200, VALUE),
        "/v1/kv/data/deleted" => json(404, DELETED),
        "/v1/kv/data/mine" => json(403, DENIED),
        _ => json(404, r#"{"errors":[]}"#),
    })
    .await;
    let run = run(&server, Logins::default());
    let cause = async |path| run.read(&name(path)).await.map(drop).map_err(|failed| failed.cause);
    assert_eq!(cause("kv/data/x").await, Ok(()));
    assert_eq!(cause("kv/data/none").await, Err(BackendError::NotFound));
    assert_eq!(cause("kv/data/deleted").await, Err(BackendError::NotActive(State::Deleted)));
    assert_eq!(cause("kv/data/mine").await, Err(BackendError::Forbidden));
    assert!(run.read_version(&name("kv/data/x"), "1").await.is_ok());
    assert_eq!(run.calls(), BTreeMap::from([("read", 5)]));
}

#[tokio::test]
async fn reads_of_the_background_share_no_call() {
    let server = Server::start(|_| json(200, VALUE)).await;
    let (run, name) = (run(&server, Logins::default()), name("kv/data/x"));
    let (one, other) = tokio::join!(run.read(&name), run.read(&name));
    assert!(one.is_ok() && other.is_ok());
    assert_eq!(server.paths().len(), 2);
}

#[tokio::test]
async fn why_there_is_no_login_is_a_class_too() {
    let server = Server::start(|_| json(200, VALUE)).await;
    for (reason, class) in [
        (Reason::BackendUnreachable, crate::Class::Transient),
        (Reason::BackendTimeout, crate::Class::Transient),
        (Reason::NoLease, crate::Class::Transient),
        (Reason::BackendThrottled, crate::Class::Throttled),
        (Reason::BackendLoginFailed, crate::Class::Auth),
    ] {
        let failed = run(&server, NoLogin(reason)).read(&name("kv/data/x")).await.expect_err("no login");
        assert_eq!(failed.cause.class(), class, "{reason:?}");
    }
}
