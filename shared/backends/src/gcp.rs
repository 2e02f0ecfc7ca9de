//! Skeleton.
use scaivault_domain::backend::GcpTarget;
use scaivault_domain::mapping::RemoteName;

use crate::error::BackendError;
use crate::survey::{Calls, Found, Step};
use crate::{Lease, Page, PageToken, RemoteSecret, RemoteVersion, RemoteWrite, SecretBackend, Written};

/// Skeleton.
#[derive(Debug)]
pub struct GcpBackend {}

impl GcpBackend {
    /// Skeleton.
    ///
    /// # Errors
    /// None.
    pub fn connect(_target: &GcpTarget, _egress: &crate::Egress) -> Result<Self, BackendError> {
        Ok(GcpBackend {})
    }
}

impl SecretBackend for GcpBackend {
    async fn read(&self, _lease: &Lease, _name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        Err(BackendError::NotFound)
    }

    async fn history(&self, _lease: &Lease, _name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        Err(BackendError::NotFound)
    }

    async fn read_version(
        &self,
        _lease: &Lease,
        _name: &RemoteName,
        _remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        Err(BackendError::NotFound)
    }

    async fn list(
        &self,
        _lease: &Lease,
        _folder: Option<&RemoteName>,
        _after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        Err(BackendError::NotFound)
    }

    async fn survey(&self, _lease: &Lease, _step: &Step, _calls: &Calls) -> Result<Found, BackendError> {
        Err(BackendError::NotFound)
    }

    async fn write(
        &self,
        _lease: &Lease,
        _name: &RemoteName,
        _write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        Err(BackendError::NotFound)
    }

    async fn delete(&self, _lease: &Lease, _name: &RemoteName, _expected: &str) -> Result<(), BackendError> {
        Err(BackendError::NotFound)
    }

    async fn may_read(&self, _lease: &Lease, _name: &RemoteName) -> Result<(), BackendError> {
        Err(BackendError::NotFound)
    }

    async fn probe(&self, _lease: &Lease) -> Result<(), BackendError> {
        Err(BackendError::NotFound)
    }
}
