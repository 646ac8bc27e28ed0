//! Who is who: the cluster's own certificate authority, and what a node shows to the others.
//!
//! A node's certificate names it as `NODE.node.tenantry`, so TLS itself checks that the one dialled is the one
//! meant, and the name is the role: a certificate for `NAME.client.tenantry` opens no node's door. All keys are
//! Ed25519. [`authority`] lets nodes in, on its own machine or by [`invite`]; its key never leaves its folder, and a
//! node's key never leaves the node.

pub mod authority;
pub mod invite;
pub(crate) mod certificate;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ED25519, PublicKeyData, SignatureAlgorithm, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use shared::id::NodeId;
use shared::seal::SealError;
use shared::seal::key_file::{self, KeyFileError};
use zeroize::Zeroizing;

pub use authority::{Admission, Authority};
pub use invite::Token;

/// How long a node's certificate is good for. It is renewed when a third is left, so the machine with the authority may
/// be away for a month.
pub const NODE_VALIDITY: Duration = Duration::from_secs(90 * 24 * 3600);
/// How long the authority itself is good for.
const CA_VALIDITY: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
/// Clocks of nodes may differ by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// Bytes of an Ed25519 public key.
pub const PUBLIC_KEY_BYTES: usize = 32;

/// Why a certificate or key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A key file is missing, unreadable, too open or malformed.
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    /// The cluster key cannot be had, or is another one than the node's.
    #[error(transparent)]
    ClusterKey(#[from] SealError),
    /// Nodes of this machine have served as clusters of their own.
    #[error(
        "{} and {} hold different cluster keys, so they have served as clusters of their own; hint: found the cluster \
         with one of them and give the others empty data folders",
        first.display(),
        second.display()
    )]
    TwoClusters {
        /// One of the key files.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file does not hold what belongs there.
    #[error("{} holds no {expected}; hint: invite the node again", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
    },
    /// A certificate could not be made.
    #[error("cannot make the certificate of {name}: {reason}")]
    Certificate {
        /// For whom.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The invitation does not let anyone in.
    #[error("the invitation is not accepted ({0}); hint: ask for a new one with `tenantry ctl ca invite`")]
    Refused(crate::refusal::Refusal),
}

/// The name in a node's certificate.
pub fn node_name(node: &NodeId) -> String {
    format!("{node}.node.tenantry")
}

/// The name of the cluster key in a node's data folder and in the authority's.
pub const CLUSTER_KEY: &str = "cluster.key";

/// What signs the certificates of the nodes of one cluster; lives in a folder.
pub struct Ca {
    key: KeyPair,
    pem: String,
}

// === impl Ca ===

impl Ca {
    /// Opens the authority in `folder`, or founds it there. `now` is wall time since the Unix epoch.
    ///
    /// # Errors
    /// When its files cannot be read or created, or others may read its key.
    pub fn load_or_create(folder: &Path, now: Duration) -> Result<Self, PkiError> {
        let key_path = folder.join("ca.key");
        let key = key_file::load_or_create(&key_path, || Zeroizing::new(new_key().serialize_pem()))?;
        let malformed = |path, expected| PkiError::Malformed { path, expected };
        let key = KeyPair::from_pem(&key).map_err(|_| malformed(key_path, "private key"))?;
        let made = ca_params(now).self_signed(&key).map_err(|error| certificate_error("the authority", error))?;
        let pem_path = folder.join("ca.pem");
        let pem = key_file::load_or_create(&pem_path, || Zeroizing::new(made.pem()))?.to_string();
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| malformed(pem_path, "certificate"))?;
        Ok(Self { key, pem })
    }

    /// Its certificate, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its certificate.
    pub(crate) fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("it was parsed when it was loaded")
    }

    /// A certificate (PEM) for any name, and the key that only its bearer has; roles other than `node` open no door
    /// yet.
    ///
    /// # Errors
    /// When the name cannot stand in a certificate.
    pub fn certify(
        &self,
        name: &str,
        key: &[u8; PUBLIC_KEY_BYTES],
        now: Duration,
        validity: Duration,
    ) -> Result<String, PkiError> {
        let mut params =
            CertificateParams::new(vec![name.to_owned()]).map_err(|error| certificate_error(name, error))?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
        params.not_after = epoch + now + validity;
        // An issuer is its name and key; validity does not enter.
        let issuer = Issuer::new(ca_params(now), &self.key);
        let made = params.signed_by(&PublicKey(key), &issuer).map_err(|error| certificate_error(name, error))?;
        Ok(made.pem())
    }
}

fn new_key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ED25519).expect("the operating system provides randomness")
}

fn ca_params(now: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "tenantry cluster authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + now + CA_VALIDITY;
    params
}

fn certificate_error(name: &str, error: rcgen::Error) -> PkiError {
    PkiError::Certificate { name: name.to_owned(), reason: error.to_string() }
}

/// Somebody else's public key, to be certified.
struct PublicKey<'a>(&'a [u8; PUBLIC_KEY_BYTES]);

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

/// A node's own key, before anyone has certified it.
pub struct NodeKey(KeyPair);

// === impl NodeKey ===

impl NodeKey {
    /// The key in the node's data folder; a new one if there is none.
    ///
    /// # Errors
    /// When the file cannot be read or created, or others may read it.
    pub fn load_or_create(data: &Path) -> Result<Self, PkiError> {
        let path = data.join("peer.key");
        let pem = key_file::load_or_create(&path, || Zeroizing::new(new_key().serialize_pem()))?;
        let key = KeyPair::from_pem(&pem).map_err(|_| PkiError::Malformed { path, expected: "private key" })?;
        Ok(Self(key))
    }

    /// What an authority certifies.
    pub fn public(&self) -> [u8; PUBLIC_KEY_BYTES] {
        self.0.public_key_raw().try_into().expect("an Ed25519 public key has 32 bytes")
    }
}

/// What a node shows to the others, and by what it knows them.
pub struct Identity {
    /// Who this is.
    pub node: NodeId,
    /// Where it lies.
    pub(crate) data: PathBuf,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivatePkcs8KeyDer<'static>,
    pub(crate) ca: CertificateDer<'static>,
}

// === impl Identity ===

impl Identity {
    /// Puts certificate and authority (PEM) into the node's data folder, beside its key. Each file appears complete
    /// or not at all.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn store(data: &Path, certificate_pem: &str, ca_pem: &str) -> Result<(), PkiError> {
        write_private(&data.join("ca.pem"), ca_pem)?;
        Self::store_certificate(data, certificate_pem)
    }

    /// Puts another certificate of the same authority in its place.
    pub(crate) fn store_certificate(data: &Path, certificate_pem: &str) -> Result<(), PkiError> {
        write_private(&data.join("peer.pem"), certificate_pem)
    }

    /// Whether the data folder holds an identity.
    pub fn is_stored(data: &Path) -> bool {
        data.join("peer.pem").exists()
    }

    /// The identity in the node's data folder.
    ///
    /// # Errors
    /// When a file is missing, unreadable, malformed or (the key) readable by others.
    pub fn load(node: NodeId, data: &Path) -> Result<Self, PkiError> {
        let key = NodeKey::load_or_create(data)?;
        let certificate = |name: &str| -> Result<CertificateDer<'static>, PkiError> {
            let path = data.join(name);
            let pem = key_file::load(&path)?;
            CertificateDer::from_pem_slice(pem.as_bytes())
                .map_err(|_| PkiError::Malformed { path, expected: "certificate" })
        };
        Ok(Self {
            node,
            data: data.to_owned(),
            certificate: certificate("peer.pem")?,
            key: PrivatePkcs8KeyDer::from(key.0.serialize_der()),
            ca: certificate("ca.pem")?,
        })
    }

    /// A secret that survives restarts and that only this node has, for one purpose.
    pub(crate) fn secret(&self, purpose: &str) -> [u8; 32] {
        blake3::derive_key(purpose, self.key.secret_pkcs8_der())
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key().into()
    }
}

/// Writes a file of mode 0600 that appears complete, or not at all, and outlives a crash of the machine.
fn write_private(path: &Path, text: &str) -> Result<(), PkiError> {
    let io_error = |source| PkiError::Io { action: "write", path: path.to_owned(), source };
    let folder = path.parent().expect("the path was joined to a folder");
    let mut unique = [0_u8; 8];
    getrandom::fill(&mut unique).expect("the operating system provides randomness");
    let temporary = path.with_extension(format!("{:016x}.new", u64::from_le_bytes(unique)));
    let written = || -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(folder)?.sync_all()
    };
    written().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        io_error(source)
    })
}
