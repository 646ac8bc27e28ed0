//! The authority of a cluster: certifies nodes, and hands them the key that all of them share.
//!
//! It is a folder on one machine, used by `tenantry ctl ca` and by the node that serves there; files appear whole or
//! not at all, so both may use it at once.
//!
//! ```text
//! ca.key, ca.pem          what certificates are signed with
//! cluster.key             the secret of the cluster
//! invitations/HASH        "NODE UNTIL": invitations that were not used yet
//! nodes/NODE.pem          the last certificate of every node that was let in
//! ```
//!
//! A node is let in once, here ([`Authority::admit_here`]) or over the network ([`Authority::redeem`], which
//! [`mod@crate::join`] calls). Whom the others let in is decided by their cluster's file, too: who is taken out of it is
//! out, whatever the certificate says.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use shared::hash::ContentHash;
use shared::id::NodeId;
use shared::seal::ClusterKey;
use zeroize::Zeroizing;

use super::{
    CLUSTER_KEY, Ca, Identity, NODE_VALIDITY, NodeKey, PUBLIC_KEY_BYTES, PkiError, certificate, write_private,
};
use crate::refusal::Refusal;

/// What a node gets that is let in.
#[derive(Debug)]
pub struct Admission {
    /// Who is in.
    pub node: NodeId,
    /// Its certificate, PEM.
    pub certificate: String,
    /// The authority's certificate, PEM.
    pub ca: String,
    /// The secret of the cluster.
    pub cluster_key: ClusterKey,
}

impl Admission {
    /// Puts all of it into the node's data folder, beside the key that was certified.
    ///
    /// # Errors
    /// When the folder holds another cluster key, which stays, or the operating system refuses.
    pub fn store(&self, data: &Path) -> Result<(), PkiError> {
        self.cluster_key.store(&data.join(CLUSTER_KEY))?;
        Identity::store(data, &self.certificate, &self.ca)
    }
}

/// Who asks to be let in.
#[derive(Debug, Clone, Copy)]
pub struct Applicant<'a> {
    /// Its name.
    pub node: &'a NodeId,
    /// The key to be certified.
    pub key: &'a [u8; PUBLIC_KEY_BYTES],
    /// Fingerprint of the cluster key it holds already.
    pub holds: Option<ContentHash>,
}

/// One line of [`Authority::roll`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Which node.
    pub node: NodeId,
    /// Until when its certificate or its invitation is good; wall time since the Unix epoch.
    pub until: Duration,
}

/// Who is in and who is invited, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roll {
    /// Nodes with a certificate, be it expired.
    pub nodes: Vec<Entry>,
    /// Invitations that were not used, be they too old.
    pub invitations: Vec<Entry>,
}

/// The authority of one cluster. See the module.
pub struct Authority {
    pub(super) folder: PathBuf,
    ca: Ca,
    cluster_key: ClusterKey,
}

// === impl Authority ===

impl Authority {
    /// Opens the authority in `folder`, or founds it there. A node that has served alone gives the cluster its key:
    /// `data_folders` are those of the nodes on this machine, whether they exist or not. `now` is wall time since the
    /// Unix epoch.
    ///
    /// # Errors
    /// When nodes hold different cluster keys, or files cannot be read or created.
    pub fn found(folder: &Path, data_folders: &[&Path], now: Duration) -> Result<Self, PkiError> {
        let path = folder.join(CLUSTER_KEY);
        let places = std::iter::once(folder).chain(data_folders.iter().copied()).map(|folder| folder.join(CLUSTER_KEY));
        let mut first: Option<(PathBuf, ClusterKey)> = None;
        for second in places.filter(|path| path.exists()) {
            let key = ClusterKey::load(&second)?;
            match &first {
                Some((first, held)) if held.fingerprint() != key.fingerprint() => {
                    return Err(PkiError::TwoClusters { first: first.clone(), second });
                }
                Some(_) => {}
                None => first = Some((second, key)),
            }
        }
        let cluster_key = first.map_or_else(ClusterKey::random, |(_, key)| key);
        cluster_key.store(&path)?;
        Ok(Self { folder: folder.to_owned(), ca: Ca::load_or_create(folder, now)?, cluster_key })
    }

    /// The authority in `folder`; `None` if there is none, as on all machines of a cluster but one.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn open(folder: &Path, now: Duration) -> Result<Option<Self>, PkiError> {
        if !folder.join("ca.key").exists() {
            return Ok(None);
        }
        let cluster_key = ClusterKey::load(&folder.join(CLUSTER_KEY))?;
        Ok(Some(Self { folder: folder.to_owned(), ca: Ca::load_or_create(folder, now)?, cluster_key }))
    }

    /// Lets in a node whose data folder is on this machine; false if it is in already, with more than a third of its
    /// certificate's time left, and nothing was to be done.
    ///
    /// # Errors
    /// When the node holds another cluster key, or files cannot be read or written.
    pub fn admit_here(&self, node: &NodeId, data: &Path, now: Duration) -> Result<bool, PkiError> {
        self.cluster_key.store(&data.join(CLUSTER_KEY))?;
        let key = NodeKey::load_or_create(data)?;
        if Identity::is_stored(data) {
            let identity = Identity::load(node.clone(), data)?;
            let is_ours = certificate::check(&identity.certificate, &self.ca.der(), node, now).is_ok();
            let facts = certificate::read(&identity.certificate).filter(|facts| is_ours && facts.key == key.public());
            if facts.is_some_and(|facts| !facts.is_due(now)) && identity.ca == self.ca.der() {
                return Ok(false);
            }
        }
        self.certify(node, &key.public(), now)?.store(data)?;
        Ok(true)
    }

    /// A new certificate (PEM) for the name and the key of the one that a node shows, which others have checked. Asked
    /// again, it gives the same one until that is due.
    ///
    /// # Errors
    /// When the certificate shown has ended, or files cannot be read or written.
    pub(crate) fn renew(&self, node: &NodeId, shown: &CertificateDer<'_>, now: Duration) -> Result<String, PkiError> {
        let facts = certificate::read(shown).filter(|facts| now < facts.until);
        let facts = facts.ok_or(PkiError::Refused(Refusal::Expired))?;
        let last = fs::read_to_string(self.folder.join("nodes").join(format!("{node}.pem"))).unwrap_or_default();
        let certificate = CertificateDer::from_pem_slice(last.as_bytes()).ok();
        let certificate = certificate.filter(|last| certificate::check(last, &self.ca.der(), node, now).is_ok());
        let last_facts = certificate.and_then(|last| certificate::read(&last));
        if last_facts.is_some_and(|last| last.key == facts.key && !last.is_due(now)) {
            return Ok(last);
        }
        Ok(self.certify(node, &facts.key, now)?.certificate)
    }

    /// Certifies a node's key and remembers it.
    pub(super) fn certify(
        &self,
        node: &NodeId,
        key: &[u8; PUBLIC_KEY_BYTES],
        now: Duration,
    ) -> Result<Admission, PkiError> {
        let certificate = self.ca.certify(&super::node_name(node), key, now, NODE_VALIDITY)?;
        write_private(&self.folder.join("nodes").join(format!("{node}.pem")), &certificate)?;
        let cluster_key = ClusterKey::from_bytes(Zeroizing::new(*self.cluster_key.reveal()));
        Ok(Admission { node: node.clone(), certificate, ca: self.ca.pem().to_owned(), cluster_key })
    }

    /// The fingerprint by which those who join know it.
    pub fn fingerprint(&self) -> [u8; 32] {
        certificate::fingerprint(&self.ca.der())
    }

    /// Whether a node that holds a cluster key holds this one's.
    pub(super) fn is_key(&self, held: &ContentHash) -> bool {
        *held == self.cluster_key.fingerprint()
    }

    /// Who is in and who is invited.
    ///
    /// # Errors
    /// When the folder cannot be read. Files that are not ours are passed over.
    pub fn roll(&self) -> Result<Roll, PkiError> {
        let node = |(name, text): (String, String)| {
            let certificate = CertificateDer::from_pem_slice(text.as_bytes()).ok()?;
            let until = certificate::read(&certificate)?.until;
            Some(Entry { node: name.strip_suffix(".pem")?.parse().ok()?, until })
        };
        let mut roll = Roll {
            nodes: files(&self.folder.join("nodes"))?.filter_map(node).collect(),
            invitations: files(&self.folder.join("invitations"))?
                .filter_map(|(_, text)| super::invite::parse(&text))
                .collect(),
        };
        for list in [&mut roll.nodes, &mut roll.invitations] {
            list.sort_by(|a, b| (&a.node, a.until).cmp(&(&b.node, b.until)));
        }
        Ok(roll)
    }
}

/// Names and texts of the small files in a folder, which need not exist.
pub(super) fn files(folder: &Path) -> Result<impl Iterator<Item = (String, String)>, PkiError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(PkiError::Io { action: "read", path: folder.to_owned(), source }),
    };
    // A file that goes away meanwhile was used meanwhile.
    Ok(entries.into_iter().flatten().filter_map(|entry| {
        let path = entry.ok()?.path();
        Some((path.file_name()?.to_str()?.to_owned(), fs::read_to_string(&path).ok()?))
    }))
}
