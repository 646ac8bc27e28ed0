//! TLS between nodes: version 1.3, both sides with certificates of the cluster's authority, no early data, no
//! resumption. Only at the node that holds the authority may somebody without a certificate come in, to join.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use shared::clock::Clock;
use shared::id::NodeId;
use wire::Version;

use crate::badge::Badge;
use crate::pki::{Identity, certificate, node_name};

/// Certificates and keys that TLS cannot work with.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the node's certificates: {reason}; hint: invite the node again")]
pub struct TlsError {
    reason: String,
}

impl TlsError {
    pub(crate) fn new(error: impl std::fmt::Display) -> Self {
        Self { reason: error.to_string() }
    }
}

/// The node's clock as TLS reads it.
struct Wall(Arc<dyn Clock>);

impl fmt::Debug for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wall(..)")
    }
}

impl TimeProvider for Wall {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(self.0.wall()))
    }
}

/// A time that stands still.
#[derive(Debug)]
struct Moment(Duration);

impl TimeProvider for Moment {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(self.0))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca.clone()).map_err(TlsError::new)?;
    Ok(Arc::new(roots))
}

/// For those who dial this node. With `may_join`, a certificate may be missing: who shows none is to be sent away
/// unless the protocol is [`wire::JOIN_ALPN`], which is spoken only then.
pub(crate) fn server(
    identity: &Identity,
    badge: Arc<Badge>,
    clock: Arc<dyn Clock>,
    may_join: bool,
) -> Result<QuicServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider());
    let verifier = if may_join { verifier.allow_unauthenticated() } else { verifier };
    let verifier = verifier.build().map_err(TlsError::new)?;
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(Wall(clock)))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(badge);
    config.alpn_protocols = Version::ALL.map(|version| version.alpn().to_vec()).into();
    if may_join {
        config.alpn_protocols.push(wire::JOIN_ALPN.to_vec());
    }
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    QuicServerConfig::try_from(config).map_err(TlsError::new)
}

/// For those whom this node dials.
pub(crate) fn client(
    identity: &Identity,
    badge: Arc<Badge>,
    clock: Arc<dyn Clock>,
) -> Result<QuicClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(Wall(clock)))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .with_root_certificates(roots(identity)?)
        .with_client_cert_resolver(badge);
    config.alpn_protocols = Version::ALL.map(|version| version.alpn().to_vec()).into();
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(TlsError::new)
}

/// For a node that has nothing but an invitation: it believes the authority that this names, and shows nothing.
/// It dials within moments of `now`, wall time since the Unix epoch.
pub(crate) fn joining(authority: [u8; 32], now: Duration) -> Result<QuicClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(Moment(now)))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Named { authority, provider: provider() }))
        .with_no_client_auth();
    config.alpn_protocols = vec![wire::JOIN_ALPN.to_vec()];
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(TlsError::new)
}

/// Believes a node whose certificate comes with that of an authority of a known fingerprint, and is signed by it.
#[derive(Debug)]
struct Named {
    authority: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = others.iter().find(|ca| certificate::fingerprint(ca) == self.authority);
        let authority = authority.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        certificate::verifier(authority)?.verify_server_cert(leaf, &[], name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a certificate that TLS has accepted is the node's.
pub(crate) fn names(certificate: &CertificateDer<'_>, node: &NodeId) -> bool {
    let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(certificate), ServerName::try_from(node_name(node)))
    else {
        return false;
    };
    verify_server_name(&parsed, &name).is_ok()
}
