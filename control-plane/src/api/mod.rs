//! From the wire to the services and back. Input is parsed here, permission is asked for here, and nothing is decided.

pub mod admin;
mod discovery;
pub mod federation;
mod secrets;

use std::future::Future;
use std::sync::Arc;

use scaivault_domain::access::{Administer, Authorized, Caller, Scope, authorize_admin};
use scaivault_domain::audit::{Action, AuditRow};
use scaivault_domain::{Error, Reason};
use scaivault_edge::auth;
use scaivault_edge::error::grpc::status;
use scaivault_edge::{PeerCertificates, RequestContext};
use scaivault_telemetry::Metrics;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

pub use self::admin::AdminApi;
pub use self::discovery::{DiscoveryApi, EnrolmentApi};
pub use self::federation::FederationApi;
pub use self::secrets::SecretsApi;
use crate::audit::Audit;
use crate::nodes::CertifiedNode;
use crate::service::tenants::Tenants;
use crate::service::tokens::Tokens;
use crate::store::Revision;

/// The metadata that tells a node which revision to wait for before it answers a change.
pub const REVISION: &str = "x-scaivault-revision";

/// Most characters of a name in an audit row.
const MAX_NAME: usize = 512;

/// Who is at the door. Every call begins here.
#[derive(Clone, Debug)]
pub struct Door {
    tokens: Arc<Tokens>,
    tenants: Arc<Tenants>,
    audit: Arc<Audit>,
    metrics: Metrics,
}

impl Door {
    /// Knows tokens and tenants, and writes down whom it turns away; strangers are only counted.
    pub fn new(tokens: Arc<Tokens>, tenants: Arc<Tenants>, audit: Arc<Audit>, metrics: Metrics) -> Self {
        Door { tokens, tenants, audit, metrics }
    }

    async fn enter<T>(&self, request: &Request<T>) -> Result<(Arc<Caller>, RequestContext), Status> {
        let context = RequestContext::of(request);
        let node = certified(request).map_err(status)?;
        let caller = self.caller(request.metadata(), node.as_ref()).await.map_err(|error| {
            if error.reason == Reason::Unauthenticated {
                self.metrics.unauthenticated();
            }
            status(error)
        })?;
        Ok((caller, context))
    }

    async fn caller(
        &self,
        metadata: &MetadataMap,
        node: Option<&CertifiedNode>,
    ) -> Result<Arc<Caller>, Error> {
        let caller = auth::caller(&*self.tokens, metadata).await?;
        // An operator may name a tenant that is not its own, and so perhaps none at all.
        if metadata.contains_key(auth::TENANT) && !self.tenants.exists(&caller.tenant).await? {
            return Err(Error::new(Reason::NotFound, "no tenant has this id")
                .next("list the tenants to see their ids"));
        }
        if node.is_some_and(|node| !node.serves(&caller.tenant)) {
            return Err(Error::new(
                Reason::PermissionDenied,
                "the node does not serve the tenant of the token",
            )
            .next("use a node of your tenant"));
        }
        Ok(caller)
    }

    /// Gives an outcome of authorisation; a refusal only after its audit row.
    async fn admit<T>(
        &self,
        caller: &Caller,
        context: &RequestContext,
        action: Action,
        path: &str,
        outcome: Result<T, Error>,
    ) -> Result<T, Status> {
        // What a caller sends as a name may be of any length; a row is not.
        let path: String = path.chars().take(MAX_NAME).collect();
        let row = AuditRow::new(caller, context, action, path, self.audit.now());
        self.audit.close_refusal(row, context, outcome).await.map_err(status)
    }

    /// Authorises a call that changes something an administrator cares about.
    async fn administer<T>(
        &self,
        request: &Request<T>,
        scope: Scope,
        action: Action,
        path: &str,
    ) -> Result<(Authorized<Administer, Scope>, RequestContext), Status> {
        let (caller, context) = self.enter(request).await?;
        let allowed = self.admit(&caller, &context, action, path, authorize_admin(&caller, scope)).await?;
        Ok((allowed, context))
    }

    /// Authorises a call that only looks. What is seen has no row; what is refused has one.
    async fn look<T>(
        &self,
        request: &Request<T>,
        scope: Scope,
        action: Action,
    ) -> Result<Authorized<Administer, Scope>, Status> {
        let (allowed, _) = self.administer(request, scope, action, "").await?;
        Ok(allowed)
    }

    /// Writes down a change that was refused after it was authorised.
    async fn close<T>(
        &self,
        allowed: &Authorized<Administer, Scope>,
        context: &RequestContext,
        action: Action,
        path: &str,
        outcome: Result<T, Error>,
    ) -> Result<T, Status> {
        self.admit(allowed.caller(), context, action, path, outcome).await
    }
}

/// The node whose listener the request came through, as its client certificate says; `None` on the public listener.
fn certified<T>(request: &Request<T>) -> Result<Option<CertifiedNode>, Error> {
    let peer = request.extensions().get::<PeerCertificates>();
    peer.and_then(|chain| chain.0.first()).map(CertifiedNode::read).transpose()
}

/// Runs a change to its end, also when the caller hangs up.
async fn uninterrupted<T: Send + 'static>(
    change: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(change).await.unwrap_or_else(|failure| {
        tracing::error!(%failure, "a change was ended by a fault of ours");
        Err(status(Error::internal()))
    })
}

/// An answer to a change, with the revision that shows it.
fn changed<T>(message: T, revision: Revision) -> Response<T> {
    let mut response = Response::new(message);
    let value = revision.as_u64().to_string().parse().expect("digits are valid metadata");
    response.metadata_mut().insert(REVISION, value);
    response
}
