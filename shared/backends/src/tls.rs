//! TLS to a store: its own CA, the system's roots, or no check at all if its owner insists.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use rustls_platform_verifier::Verifier;

use scaivault_domain::backend::Tls;

use crate::error::BackendError;

/// Which certificates a server may show.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trust<'a> {
    /// Those that the system trusts.
    System,
    /// Those that chain to these PEM certificates, and no others.
    Only(&'a str),
    /// Any.
    Anything,
}

impl<'a> Trust<'a> {
    pub(crate) fn of(tls: &'a Tls) -> Self {
        match &tls.ca_cert {
            _ if !tls.verify => Trust::Anything,
            Some(pem) => Trust::Only(pem),
            None => Trust::System,
        }
    }
}

/// The TLS side of a client. The provider is named here, so no process-wide default is needed.
pub(crate) fn client_config(trust: Trust<'_>) -> Result<ClientConfig, BackendError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("the provider has suites for both protocol versions");
    let config = match trust {
        Trust::System => {
            let verifier = Verifier::new(provider).map_err(|_| {
                BackendError::InvalidConfig("the system has no CA certificates; give `ca_cert`")
            })?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        Trust::Only(pem) => builder.with_root_certificates(roots(pem)?),
        Trust::Anything => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        }
    };
    let mut config = config.with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn roots(pem: &str) -> Result<RootCertStore, BackendError> {
    let unusable = BackendError::InvalidConfig("`ca_cert` holds no PEM certificates that can be used");
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        store.add(certificate.map_err(|_| unusable.clone())?).map_err(|_| unusable.clone())?;
    }
    if store.is_empty() { Err(unusable) } else { Ok(store) }
}

/// `tls_verify: false`: takes any certificate, but the server must still own the one it shows.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
