//! TLS between nodes: version 1.3, both sides with certificates of the cluster's authority, no early data, no
//! resumption.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use shared::id::NodeId;

use crate::pki::{Identity, node_name};

/// Certificates and keys that TLS cannot work with.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the node's certificates: {reason}; hint: invite the node again")]
pub struct TlsError {
    reason: String,
}

impl TlsError {
    fn new(error: impl std::fmt::Display) -> Self {
        Self { reason: error.to_string() }
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

/// For those who dial this node.
pub(crate) fn server(identity: &Identity) -> Result<QuicServerConfig, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider()).build().map_err(TlsError::new)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate.clone()], identity.private_key())
        .map_err(TlsError::new)?;
    config.alpn_protocols = vec![wire::NODE_ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    QuicServerConfig::try_from(config).map_err(TlsError::new)
}

/// For those whom this node dials.
pub(crate) fn client(identity: &Identity) -> Result<QuicClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(vec![identity.certificate.clone()], identity.private_key())
        .map_err(TlsError::new)?;
    config.alpn_protocols = vec![wire::NODE_ALPN.to_vec()];
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(TlsError::new)
}

/// Whether a certificate that TLS has accepted is the node's.
pub(crate) fn names(certificate: &CertificateDer<'_>, node: &NodeId) -> bool {
    let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(certificate), ServerName::try_from(node_name(node)))
    else {
        return false;
    };
    verify_server_name(&parsed, &name).is_ok()
}
