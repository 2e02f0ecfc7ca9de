//! Every service, in memory, with a few paths that misbehave.

use std::collections::BTreeMap;
use std::sync::Mutex;

use http::HeaderMap;
use prost_types::{Duration, Timestamp};
use scaivault_domain::{Error, Reason};
use scaivault_proto::admin::v1 as admin;
use scaivault_proto::admin::v1::admin_service_server::AdminService;
use scaivault_proto::federation::v1 as federation;
use scaivault_proto::federation::v1::federation_service_server::FederationService;
use scaivault_proto::secrets::v1 as secrets;
use scaivault_proto::secrets::v1::secrets_service_server::SecretsService;
use tonic::{Request, Response, Status, async_trait};

use crate::RequestContext;
use crate::error::grpc;

/// 2026-01-01T00:00:00.250Z.
const TIME: Timestamp = Timestamp { seconds: 1_767_225_600, nanos: 250_000_000 };

#[derive(Default)]
pub(super) struct Fake {
    pub(super) secrets: Mutex<BTreeMap<String, secrets::Secret>>,
    pub(super) backends: Mutex<Vec<federation::Backend>>,
    /// How many times somebody else changes the backend right before an update.
    pub(super) races: Mutex<u32>,
    /// The metadata of the last request, and its context.
    pub(super) metadata: Mutex<HeaderMap>,
    pub(super) context: Mutex<Option<RequestContext>>,
    /// The last request, as Rust prints it.
    pub(super) asked: Mutex<String>,
}

impl Fake {
    fn note<T>(&self, request: &Request<T>) {
        *self.metadata.lock().unwrap() = request.metadata().as_ref().clone();
        *self.context.lock().unwrap() = request.extensions().get().cloned();
    }

    fn ask<T: std::fmt::Debug>(&self, request: Request<T>) -> T {
        self.note(&request);
        *self.asked.lock().unwrap() = format!("{:?}", request.get_ref());
        request.into_inner()
    }

    /// Holds a local secret.
    pub(super) fn hold(&self, path: &str, secret_type: secrets::SecretType, value: &[u8]) {
        let secret = secrets::Secret {
            path: path.to_owned(),
            version: 3,
            secret_type: secret_type.into(),
            value: value.to_vec().into(),
            metadata: [("owner".to_owned(), "ops".to_owned()), ("app".to_owned(), "db".to_owned())].into(),
            state: secrets::SecretState::Active.into(),
            source: secrets::SecretSource::Local.into(),
            age: Some(Duration { seconds: 0, nanos: 0 }),
            create_time: Some(TIME),
            ..Default::default()
        };
        self.secrets.lock().unwrap().insert(path.to_owned(), secret);
    }

    fn secret(&self, path: &str) -> Result<secrets::Secret, Error> {
        if path == "denied" {
            return Err(Error::new(Reason::PermissionDenied, "no policy allows it").next("ask for one"));
        }
        let held = self.secrets.lock().unwrap().get(path).cloned();
        held.ok_or_else(|| Error::new(Reason::NotFound, "there is no such secret"))
    }
}

/// A backend that syncs nothing.
pub(super) const PROXIED: &str = "fed_pppppppppppppppp";
/// The run of every other one.
pub(super) const RUN: &str = "run_0000019b7709c4fa0123456789abcdef";

/// A test in which the credential may not list.
fn tested() -> federation::BackendTest {
    let check = |name: &str, outcome: &str, latency_ms| federation::BackendCheck {
        name: name.into(),
        outcome: outcome.into(),
        detail: "found".into(),
        next_step: if outcome == "failed" { "allow it".into() } else { String::new() },
        latency_ms,
    };
    let checks =
        vec![check("login", "ok", Some(7)), check("list", "failed", Some(3)), check("read", "skipped", None)];
    federation::BackendTest { passed: false, checks }
}

fn running(backend: &str) -> federation::SyncRun {
    federation::SyncRun {
        run_id: RUN.into(),
        backend_id: backend.into(),
        trigger: "manual".into(),
        start_time: Some(TIME),
        counts: Some(federation::SyncCounts { listed: 20, ..Default::default() }),
        progress: Some(federation::SyncProgress { phase: "applying".into(), listed: 20, done: 5, total: 19 }),
        ..Default::default()
    }
}

fn ended(backend: &str) -> federation::SyncRun {
    federation::SyncRun {
        end_time: Some(TIME),
        outcome: "partial".into(),
        counts: Some(federation::SyncCounts {
            listed: 20,
            mapped: 19,
            unchanged: 10,
            created: 3,
            updated: 2,
            skipped: 1,
            failed: 1,
            ..Default::default()
        }),
        calls: [("read".into(), 5), ("list".into(), 1)].into(),
        held_back: Some(federation::HeldBack { deletions: 4, known: 12 }),
        class: "transient".into(),
        message: "a read failed".into(),
        progress: None,
        ..running(backend)
    }
}

fn with_revision<T>(message: T) -> Response<T> {
    let mut response = Response::new(message);
    response.metadata_mut().insert("x-scaivault-revision", "41".parse().unwrap());
    response
}

#[async_trait]
impl SecretsService for Fake {
    async fn get(
        &self,
        request: Request<secrets::GetRequest>,
    ) -> Result<Response<secrets::GetResponse>, Status> {
        let request = self.ask(request);
        match request.path.as_str() {
            "panic" => panic!("canary-in-a-panic"),
            "slow" => std::future::pending().await,
            path => {
                let secret = self.secret(path).map_err(grpc::status)?;
                if request.version > secret.version {
                    return Err(grpc::status(Error::new(Reason::NotFound, "there is no such version")));
                }
                Ok(Response::new(secrets::GetResponse { secret: Some(secret) }))
            }
        }
    }

    async fn batch_get(
        &self,
        request: Request<secrets::BatchGetRequest>,
    ) -> Result<Response<secrets::BatchGetResponse>, Status> {
        use secrets::batch_get_result::Outcome;
        let results = request.into_inner().paths.into_iter().map(|path| {
            let outcome = match self.secret(&path) {
                Ok(secret) => Outcome::Secret(secret),
                Err(error) => Outcome::Error(secrets::BatchGetError {
                    code: grpc::code(error.reason).into(),
                    reason: error.reason.code().into(),
                    message: error.message.into_owned(),
                }),
            };
            secrets::BatchGetResult { path, outcome: Some(outcome) }
        });
        Ok(Response::new(secrets::BatchGetResponse { results: results.collect() }))
    }

    async fn list(
        &self,
        request: Request<secrets::ListRequest>,
    ) -> Result<Response<secrets::ListResponse>, Status> {
        let secrets::ListRequest { folder, page_size, page_token } = request.into_inner();
        let keys =
            vec![format!("folder={folder}"), format!("size={page_size}"), format!("token={page_token}")];
        Ok(Response::new(secrets::ListResponse { keys, next_page_token: "next".into() }))
    }

    async fn put(
        &self,
        request: Request<secrets::PutRequest>,
    ) -> Result<Response<secrets::PutResponse>, Status> {
        self.note(&request);
        let put = request.into_inner();
        let mut held = self.secrets.lock().unwrap();
        let version = held.get(&put.path).map_or(0, |secret| secret.version);
        if put.expected_version.is_some_and(|expected| expected != version) {
            return Err(grpc::status(Error::new(Reason::PreconditionFailed, "another version is current")));
        }
        let secret = secrets::Secret {
            path: put.path.clone(),
            version: version + 1,
            secret_type: put.secret_type,
            value: put.value,
            content_type: put.content_type,
            metadata: put.metadata,
            state: secrets::SecretState::Active.into(),
            source: secrets::SecretSource::Local.into(),
            ..Default::default()
        };
        held.insert(put.path, secret);
        Ok(with_revision(secrets::PutResponse { version: version + 1, create_time: Some(TIME) }))
    }

    async fn delete(
        &self,
        request: Request<secrets::DeleteRequest>,
    ) -> Result<Response<secrets::DeleteResponse>, Status> {
        self.secrets.lock().unwrap().remove(&request.into_inner().path);
        Ok(with_revision(secrets::DeleteResponse {}))
    }

    async fn list_versions(
        &self,
        request: Request<secrets::ListVersionsRequest>,
    ) -> Result<Response<secrets::ListVersionsResponse>, Status> {
        self.secret(&request.into_inner().path).map_err(grpc::status)?;
        let version = |version, remote: &str, state: secrets::SecretState| secrets::SecretVersion {
            version,
            remote_version: remote.to_owned(),
            state: state.into(),
            create_time: Some(TIME),
        };
        let versions = vec![
            version(3, "", secrets::SecretState::Active),
            version(0, "7", secrets::SecretState::Destroyed),
        ];
        Ok(Response::new(secrets::ListVersionsResponse { versions }))
    }
}

#[async_trait]
impl FederationService for Fake {
    async fn create_backend(
        &self,
        request: Request<federation::CreateBackendRequest>,
    ) -> Result<Response<federation::CreateBackendResponse>, Status> {
        let asked = self.ask(request);
        let mut backend = asked.backend.unwrap();
        if asked.validate_only {
            let (backend, test) = (Some(backend), Some(tested()));
            return Ok(Response::new(federation::CreateBackendResponse { backend, test }));
        }
        backend.id = "fed_abcdefghijklmnop".into();
        backend.etag = "e1".into();
        backend.generation = 1;
        backend.create_time = Some(TIME);
        backend.update_time = Some(TIME);
        self.backends.lock().unwrap().push(backend.clone());
        Ok(with_revision(federation::CreateBackendResponse { backend: Some(backend), test: None }))
    }

    async fn get_backend(
        &self,
        request: Request<federation::GetBackendRequest>,
    ) -> Result<Response<federation::GetBackendResponse>, Status> {
        let id = request.into_inner().id;
        let backend = self.backends.lock().unwrap().iter().find(|backend| backend.id == id).cloned();
        let missing = || grpc::status(Error::new(Reason::NotFound, "no backend has this id"));
        Ok(Response::new(federation::GetBackendResponse { backend: Some(backend.ok_or_else(missing)?) }))
    }

    async fn list_backends(
        &self,
        request: Request<federation::ListBackendsRequest>,
    ) -> Result<Response<federation::ListBackendsResponse>, Status> {
        self.ask(request);
        let backends = self.backends.lock().unwrap().clone();
        Ok(Response::new(federation::ListBackendsResponse { backends, next_page_token: String::new() }))
    }

    async fn update_backend(
        &self,
        request: Request<federation::UpdateBackendRequest>,
    ) -> Result<Response<federation::UpdateBackendResponse>, Status> {
        let asked = self.ask(request);
        let mut backend = asked.backend.unwrap();
        let mut held = self.backends.lock().unwrap();
        let before = held.iter_mut().find(|before| before.id == backend.id).unwrap();
        let mut races = self.races.lock().unwrap();
        if *races > 0 {
            *races -= 1;
            before.etag.push('+');
        }
        if before.etag != backend.etag {
            return Err(grpc::status(Error::new(Reason::PreconditionFailed, "the etag is another one")));
        }
        if asked.validate_only {
            let (backend, test) = (Some(backend), Some(tested()));
            return Ok(Response::new(federation::UpdateBackendResponse { backend, test }));
        }
        backend.etag.push('1');
        *before = backend.clone();
        Ok(with_revision(federation::UpdateBackendResponse { backend: Some(backend), test: None }))
    }

    async fn test_backend(
        &self,
        request: Request<federation::TestBackendRequest>,
    ) -> Result<Response<federation::TestBackendResponse>, Status> {
        self.ask(request);
        Ok(Response::new(federation::TestBackendResponse { test: Some(tested()) }))
    }

    async fn delete_backend(
        &self,
        request: Request<federation::DeleteBackendRequest>,
    ) -> Result<Response<federation::DeleteBackendResponse>, Status> {
        self.ask(request);
        Ok(with_revision(federation::DeleteBackendResponse { pending_nodes: vec!["n1".into()] }))
    }

    async fn get_backend_status(
        &self,
        request: Request<federation::GetBackendStatusRequest>,
    ) -> Result<Response<federation::GetBackendStatusResponse>, Status> {
        let id = request.into_inner().id;
        let sync = federation::SyncStatus {
            last_sync: Some(TIME),
            last_sync_duration_ms: 3421,
            secrets_synced: 127,
            last_attempt: Some(TIME),
            last_outcome: "failed".into(),
            consecutive_failures: 2,
            oldest_value_age: Some(Duration { seconds: 90, nanos: 1 }),
            next_sync: None,
            running: Some(running(&id)),
            skipped: 1,
            held_back_run: RUN.into(),
        };
        Ok(Response::new(federation::GetBackendStatusResponse {
            sync: (id != PROXIED).then_some(sync),
            id,
            name: "hashicorp-production".into(),
            status: federation::BackendHealth::Healthy.into(),
            connection: Some(federation::Connection {
                status: "connected".into(),
                latency_ms: Some(15),
                probe_time: Some(TIME),
                breaker: "closed".into(),
            }),
            generation: 4,
            nodes: vec![federation::NodeState { name: "n1".into(), generation: 3, ..Default::default() }],
            call_budget: Some(federation::CallBudget {
                quotas: vec![federation::QuotaBudget {
                    quota: "lists".into(),
                    per_second: 90.0,
                    burst: 10.0,
                    remaining: 2.5,
                }],
                concurrency: 8,
                max_concurrency: 64,
                throttled_until: Some(TIME),
                reason: "slowed down by the backend until then".into(),
            }),
            ..Default::default()
        }))
    }

    async fn sync_backend(
        &self,
        request: Request<federation::SyncBackendRequest>,
    ) -> Result<Response<federation::SyncBackendResponse>, Status> {
        let asked = self.ask(request);
        if asked.id == PROXIED {
            return Err(grpc::status(Error::new(Reason::WrongMode, "the backend is in mode `proxy`")));
        }
        let wait = asked.wait.unwrap_or_default();
        if wait.seconds == 60 {
            std::future::pending::<()>().await;
        }
        // It takes ten seconds.
        let run = if wait.seconds >= 10 { ended(&asked.id) } else { running(&asked.id) };
        Ok(Response::new(federation::SyncBackendResponse { run_id: run.run_id.clone(), run: Some(run) }))
    }

    async fn get_sync(
        &self,
        request: Request<federation::GetSyncRequest>,
    ) -> Result<Response<federation::GetSyncResponse>, Status> {
        let asked = self.ask(request);
        let left_out = |path: &str, reason: &str| federation::SkippedPath {
            path: path.into(),
            remote_name: "kv/a b".into(),
            reason: reason.into(),
            detail: String::new(),
        };
        Ok(Response::new(federation::GetSyncResponse {
            run: Some(ended(&asked.id)),
            skipped: vec![left_out("", "charset")],
            failed: vec![left_out("external/a", "transient")],
            next_page_token: "2".into(),
        }))
    }

    async fn list_syncs(
        &self,
        request: Request<federation::ListSyncsRequest>,
    ) -> Result<Response<federation::ListSyncsResponse>, Status> {
        let id = self.ask(request).id;
        let syncs = vec![running(&id), ended(&id)];
        Ok(Response::new(federation::ListSyncsResponse { syncs, next_page_token: String::new() }))
    }

    async fn cancel_sync(
        &self,
        request: Request<federation::CancelSyncRequest>,
    ) -> Result<Response<federation::CancelSyncResponse>, Status> {
        let asked = self.ask(request);
        let run = federation::SyncRun { outcome: "cancelled".into(), ..ended(&asked.id) };
        Ok(Response::new(federation::CancelSyncResponse { run: Some(run) }))
    }

    async fn list_events(
        &self,
        request: Request<federation::ListEventsRequest>,
    ) -> Result<Response<federation::ListEventsResponse>, Status> {
        self.ask(request);
        let event = federation::Event {
            id: "1".into(),
            r#type: "federation.backend.unreachable".into(),
            source: "/v1/federation/backends/fed_a".into(),
            subject: "hashicorp-production".into(),
            time: Some(TIME),
            data: r#"{"class":"timeout"}"#.into(),
        };
        Ok(Response::new(federation::ListEventsResponse { events: vec![event], next_page_token: "2".into() }))
    }
}

fn token(accessor: &str) -> admin::Token {
    admin::Token {
        accessor: accessor.into(),
        subject: "ci-deployer".into(),
        scopes: vec!["secrets:read".into()],
        tenant: "acme".into(),
        create_time: Some(TIME),
        ..Default::default()
    }
}

macro_rules! answers {
    ($($method:ident($request:ident) -> $response:ident |$asked:pat_param| $answer:expr;)*) => {
        #[async_trait]
        impl AdminService for Fake {
            $(async fn $method(
                &self,
                request: Request<admin::$request>,
            ) -> Result<Response<admin::$response>, Status> {
                let $asked = self.ask(request);
                Ok(with_revision($answer))
            })*
        }
    };
}

answers! {
    create_tenant(CreateTenantRequest) -> CreateTenantResponse |asked|
        admin::CreateTenantResponse { tenant: asked.tenant };
    list_tenants(ListTenantsRequest) -> ListTenantsResponse |_|
        admin::ListTenantsResponse { tenants: vec![admin::Tenant::default()], next_page_token: "n".into() };
    update_tenant(UpdateTenantRequest) -> UpdateTenantResponse |asked|
        admin::UpdateTenantResponse { tenant: asked.tenant };
    delete_tenant(DeleteTenantRequest) -> DeleteTenantResponse |_| admin::DeleteTenantResponse {};
    put_policy(PutPolicyRequest) -> PutPolicyResponse |asked| admin::PutPolicyResponse { policy: asked.policy };
    get_policy(GetPolicyRequest) -> GetPolicyResponse |asked|
        admin::GetPolicyResponse { policy: Some(admin::Policy { name: asked.name, rules: Vec::new() }) };
    list_policies(ListPoliciesRequest) -> ListPoliciesResponse |_| admin::ListPoliciesResponse::default();
    delete_policy(DeletePolicyRequest) -> DeletePolicyResponse |_| admin::DeletePolicyResponse {};
    create_token(CreateTokenRequest) -> CreateTokenResponse |_|
        admin::CreateTokenResponse { token: "svt_new".into(), info: Some(token("acc")) };
    lookup_token(LookupTokenRequest) -> LookupTokenResponse |asked|
        admin::LookupTokenResponse { token: Some(token(&asked.accessor)) };
    list_tokens(ListTokensRequest) -> ListTokensResponse |_| admin::ListTokensResponse::default();
    renew_token(RenewTokenRequest) -> RenewTokenResponse |asked|
        admin::RenewTokenResponse { token: Some(token(&asked.accessor)) };
    revoke_token(RevokeTokenRequest) -> RevokeTokenResponse |_| admin::RevokeTokenResponse { revoked: 2 };
    create_node(CreateNodeRequest) -> CreateNodeResponse |asked| admin::CreateNodeResponse {
        join_token: "svj_new".into(),
        node: Some(admin::Node { name: asked.name, tenants: asked.tenants, ..Default::default() }),
    };
    list_nodes(ListNodesRequest) -> ListNodesResponse |_| admin::ListNodesResponse::default();
    delete_node(DeleteNodeRequest) -> DeleteNodeResponse |_| admin::DeleteNodeResponse {};
    query_audit(QueryAuditRequest) -> QueryAuditResponse |_| admin::QueryAuditResponse {
        rows: vec![admin::AuditRow {
            time: Some(TIME),
            action: "secret.read".into(),
            latency: Some(Duration { seconds: 0, nanos: 1_500_000 }),
            ..Default::default()
        }],
        next_page_token: "n".into(),
    };
}
