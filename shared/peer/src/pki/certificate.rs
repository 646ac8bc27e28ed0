//! What a certificate says, and whether it is what a node should show.

use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use shared::id::NodeId;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{PUBLIC_KEY_BYTES, node_name};

/// What matters of a certificate; times since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) from: Duration,
    pub(crate) until: Duration,
    /// The Ed25519 key it is for.
    pub(crate) key: [u8; PUBLIC_KEY_BYTES],
}

// === impl Facts ===

impl Facts {
    /// Less than a third of its time is left: time for a new one.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        self.until.saturating_sub(now) < self.until.saturating_sub(self.from) / 3
    }
}

/// Names an authority: whoever joins knows by it whom to believe.
pub(crate) fn fingerprint(ca: &CertificateDer<'_>) -> [u8; 32] {
    *blake3::hash(ca).as_bytes()
}

/// Reads a certificate without believing it; `None` when it is none of ours.
pub(crate) fn read(certificate: &CertificateDer<'_>) -> Option<Facts> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let time = |seconds: i64| u64::try_from(seconds).ok().map(Duration::from_secs);
    Some(Facts {
        from: time(parsed.validity().not_before.timestamp())?,
        until: time(parsed.validity().not_after.timestamp())?,
        key: parsed.public_key().subject_public_key.data.as_ref().try_into().ok()?,
    })
}

/// Whether `ca` certified `node`, for a time that includes `now` (wall time since the Unix epoch).
///
/// # Errors
/// With what is wrong.
pub(crate) fn check(
    certificate: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
    node: &NodeId,
    now: Duration,
) -> Result<(), rustls::Error> {
    let name = ServerName::try_from(node_name(node)).map_err(|error| rustls::Error::General(error.to_string()))?;
    let now = UnixTime::since_unix_epoch(now);
    verifier(ca)?.verify_server_cert(certificate, &[], &name, &[], now).map(|_| ())
}

/// Believes exactly one authority.
pub(crate) fn verifier(ca: &CertificateDer<'_>) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let built = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
    built.map_err(|error| rustls::Error::General(error.to_string()))
}
