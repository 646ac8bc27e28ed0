//! What this node shows to the others: its key, and the certificate that can be renewed while it runs.
//!
//! TLS asks for it at every handshake, so connections that open after a renewal show the new one; those that are open
//! stay as they are.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::pki::Identity;
use crate::tls::TlsError;

/// Key and present certificate.
pub(crate) struct Badge(RwLock<Arc<CertifiedKey>>);

// === impl Badge ===

impl Badge {
    pub(crate) fn new(identity: &Identity) -> Result<Self, TlsError> {
        let provider = rustls::crypto::ring::default_provider();
        // The authority's certificate goes along for those who know it by its fingerprint only.
        let chain = vec![identity.certificate.clone(), identity.ca.clone()];
        let certified = CertifiedKey::from_der(chain, identity.private_key(), &provider).map_err(TlsError::new)?;
        Ok(Self(RwLock::new(Arc::new(certified))))
    }

    /// The present certificate.
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.shown().cert[0].clone()
    }

    /// Shows another certificate of the same key from now on.
    pub(crate) fn replace(&self, certificate: CertificateDer<'static>) {
        let shown = self.shown();
        let chain = std::iter::once(certificate).chain(shown.cert[1..].iter().cloned()).collect();
        let renewed = Arc::new(CertifiedKey::new(chain, shown.key.clone()));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = renewed;
    }

    fn shown(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Badge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Badge(..)")
    }
}

impl ResolvesServerCert for Badge {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.shown())
    }
}

impl ResolvesClientCert for Badge {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.shown())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
