//! The identity of nodes: the installation's certificate authority, invitations, and certificates.
//!
//! A node's name, its tenants and its enrolment stand in its certificate as URIs. A certificate is only as good as the
//! node's row: when the row is gone, or is another enrolment's, the certificate is refused.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::{Error, Reason};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::model::NodeRecord;
use crate::store::{Key, Records, Space, StoreError, Tx};

/// The name that nodes expect in the control plane's certificate, whatever address they reach it at.
pub const CONTROL_PLANE_NAME: &str = "control-plane.scaivault.internal";
/// How long a certificate lasts. Nodes renew at half of it.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// How far clocks may differ.
const SKEW: Duration = Duration::from_secs(300);
const JOIN_PREFIX: &str = "svj_";

const NODE: &str = "scaivault:node:";
const TENANT: &str = "scaivault:tenant:";
const ENROLMENT: &str = "scaivault:enrolment:";

/// The authority as it is stored, sealed, at `Installation / Setting / ca`.
#[derive(Serialize, Deserialize)]
struct Stored {
    certificate_pem: String,
    key_pem: String,
}

/// The certificate authority of the installation. Signs nodes and the control plane's own listener, and nothing else.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

fn authority_key() -> Key {
    Key::installation(Space::Setting, "ca")
}

/// Makes the authority and adds it to `tx`.
///
/// # Errors
/// When no key can be made.
pub fn create_authority(records: &Records, clock: &dyn Clock, tx: Tx) -> Result<Tx, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named("ScaiVault nodes");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = clock.now();
    params.not_before = date(now, -SKEW_SECONDS);
    params.not_after = date(now.after(Duration::from_secs(20 * 365 * 24 * 3600)), 0);
    let certificate = params.self_signed(&key)?;
    let stored = Stored { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() };
    let at = authority_key();
    Ok(tx.put(at.clone(), records.seal(&at, &stored)))
}

const SKEW_SECONDS: i64 = SKEW.as_secs() as i64;

impl Authority {
    /// The stored authority.
    ///
    /// # Errors
    /// When the store does not answer, or has none because it was never initialised.
    pub async fn load(records: &Records, clock: Arc<dyn Clock>) -> Result<Option<Self>, StoreError> {
        let Some((stored, _)) = records.get::<Stored>(&authority_key()).await? else { return Ok(None) };
        let corrupt = || StoreError::Corrupt("the certificate authority".into());
        let key = KeyPair::from_pem(&stored.key_pem).map_err(|_| corrupt())?;
        let issuer = Issuer::from_ca_cert_pem(&stored.certificate_pem, key).map_err(|_| corrupt())?;
        let certificate = rustls_pki_types::pem::PemObject::from_pem_slice(stored.certificate_pem.as_bytes())
            .map_err(|_| corrupt())?;
        Ok(Some(Authority { issuer, certificate, clock }))
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A key and certificate for the listener that nodes connect to.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn listener(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([CONTROL_PLANE_NAME.to_owned()])?;
        params.distinguished_name = named("ScaiVault control plane");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.limit(&mut params);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((vec![certificate.der().clone(), self.certificate.clone()], key))
    }

    /// Signs a node's request. Only its key is taken from it; who it is says the row.
    ///
    /// # Errors
    /// `invalid_request` for a request that is none.
    pub fn sign(
        &self,
        node: &NodeRecord,
        csr: &[u8],
    ) -> Result<(Vec<CertificateDer<'static>>, Timestamp), Error> {
        let invalid =
            || Error::invalid("/csr", "is no PKCS #10 certificate request in DER with a supported key");
        let request = CertificateSigningRequestDer::from(csr);
        let request = CertificateSigningRequestParams::from_der(&request).map_err(|_| invalid())?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(node.name.as_str());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let tenants = if node.tenants.is_empty() {
            vec![format!("{TENANT}*")]
        } else {
            node.tenants.iter().map(|tenant| format!("{TENANT}{tenant}")).collect()
        };
        let uris = [format!("{NODE}{}", node.name), format!("{ENROLMENT}{}", node.enrolment)];
        for uri in uris.into_iter().chain(tenants) {
            params.subject_alt_names.push(SanType::URI(uri.try_into().map_err(|_| Error::internal())?));
        }
        let ends = self.limit(&mut params);
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(|_| invalid())?;
        Ok((vec![certificate.der().clone(), self.certificate.clone()], ends))
    }

    fn limit(&self, params: &mut CertificateParams) -> Timestamp {
        let now = self.clock.now();
        let ends = now.after(CERTIFICATE_LIFE);
        params.not_before = date(now, -SKEW_SECONDS);
        params.not_after = date(ends, 0);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        ends
    }

    /// The text of a join token: the secret, and the authority that the node shall trust.
    pub fn join_token(&self, secret: &SecretString) -> SecretString {
        let invitation = Invitation {
            secret: secret.expose_secret().to_owned(),
            authority: URL_SAFE_NO_PAD.encode(&self.certificate),
        };
        let json = serde_json::to_vec(&invitation).expect("two strings are JSON");
        format!("{JOIN_PREFIX}{}", URL_SAFE_NO_PAD.encode(json)).into()
    }
}

#[derive(Serialize)]
struct Invitation {
    secret: String,
    authority: String,
}

/// The key of the invitation with this secret.
pub fn join_key(secret: &SecretString) -> Key {
    let hash: [u8; 32] = Sha256::digest(secret.expose_secret().as_bytes()).into();
    Key::installation(Space::JoinToken, URL_SAFE_NO_PAD.encode(hash))
}

/// Who a client certificate says that it is. The chain was verified by the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertifiedNode {
    /// The node's name.
    pub name: NodeName,
    /// The tenants that it serves; empty is all of them.
    pub tenants: Vec<TenantId>,
    /// Which enrolment it is.
    pub enrolment: String,
}

impl CertifiedNode {
    /// Reads a certificate that this authority made.
    ///
    /// # Errors
    /// `unauthenticated` for one that says nothing of a node.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        let refuse = || Error::new(Reason::Unauthenticated, "the certificate is not a node's");
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| refuse())?;
        let names = parsed.subject_alternative_name().map_err(|_| refuse())?.ok_or_else(refuse)?;
        let (mut name, mut enrolment, mut tenants, mut all) = (None, None, Vec::new(), false);
        for uri in &names.value.general_names {
            let GeneralName::URI(uri) = uri else { continue };
            if let Some(text) = uri.strip_prefix(NODE) {
                name = Some(NodeName::parse(text).map_err(|_| refuse())?);
            } else if let Some(text) = uri.strip_prefix(ENROLMENT) {
                enrolment = Some(text.to_owned());
            } else if let Some(text) = uri.strip_prefix(TENANT) {
                match text {
                    "*" => all = true,
                    text => tenants.push(TenantId::parse(text).map_err(|_| refuse())?),
                }
            }
        }
        if all != tenants.is_empty() {
            return Err(refuse());
        }
        Ok(CertifiedNode {
            name: name.ok_or_else(refuse)?,
            tenants,
            enrolment: enrolment.ok_or_else(refuse)?,
        })
    }

    /// Whether the node serves `tenant`.
    pub fn serves(&self, tenant: &TenantId) -> bool {
        self.tenants.is_empty() || self.tenants.contains(tenant)
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn date(time: Timestamp, offset_seconds: i64) -> time::OffsetDateTime {
    let seconds = time.as_millis() / 1000 + offset_seconds;
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}
