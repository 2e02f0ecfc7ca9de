//! A certificate authority of a test's own.

use std::net::Ipv4Addr;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};

/// Signs certificates for servers on loopback.
#[derive(Debug)]
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, both PEM.
#[derive(Debug)]
pub struct ServerCertificate {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

impl Authority {
    /// Makes a new authority that nobody trusts yet.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Authority(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// The certificate that clients must trust, PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for `127.0.0.1` and `localhost`.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn issue(&self) -> Result<ServerCertificate> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["localhost".into()])?;
        params.subject_alt_names.push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        let certificate = params.signed_by(&key, &self.0)?.pem();
        Ok(ServerCertificate { certificate, key: key.serialize_pem() })
    }
}
