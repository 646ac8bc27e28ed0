//! What the registry stores, and how a record is spelled on disk.
//!
//! A stored record is one version byte and JSON. Old versions stay readable; a version this program does
//! not know is refused, because half-understood contracts are worse than none. The state and the store call
//! this; nothing here changes a record.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use shared::hash::ContentHash;
use shared::id::{AdapterName, BaseName, TenantId};
use shared::seal::WrappedKey;
use shared::tenant::TenantContract;

use crate::auth::{KeyId, KeyRecord};

/// Version written now; raised whenever an older program would misread what this one writes.
pub const RECORD_VERSION: u8 = 2;

/// Which file format a version was uploaded in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterKind {
    /// PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.
    Peft,
    /// One GGUF LoRA file.
    Gguf,
}

/// One immutable adapter version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// Full version name; its client is the owner.
    pub name: AdapterName,
    /// Content.
    pub hash: ContentHash,
    /// Size of the content.
    pub bytes: u64,
    /// Largest rank of any of its modules.
    pub rank: u32,
    /// File format.
    pub kind: AdapterKind,
    /// Wall seconds since 1970.
    pub uploaded_at_s: u64,
    /// Base it was checked against; the same as in the name.
    pub base: BaseName,
}

/// Everything the registry knows about one tenant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// What gateway, queue, cache and billing read; never copied elsewhere.
    pub contract: Arc<TenantContract>,
    /// Name for people.
    pub display_name: String,
    /// Whom to write to.
    pub contact: Option<String>,
    /// Wall seconds since 1970.
    pub created_at_s: u64,
    /// Registry epoch of its creation: tells this tenant from an erased one of the same name.
    pub created_epoch: u64,
    /// The tenant's key under the cluster key. Erasing it erases what the tenant stored.
    pub wrapped_key: WrappedKey,
    /// API keys, revoked ones included.
    pub keys: BTreeMap<KeyId, KeyRecord>,
    /// Uploaded versions; the contract's `versions` lists the same names and hashes.
    pub adapters: BTreeMap<AdapterName, AdapterRecord>,
    /// Removed versions: the name may come back only with the same content.
    pub retired: BTreeMap<AdapterName, ContentHash>,
}

impl TenantRecord {
    /// Who.
    pub fn tenant(&self) -> &TenantId {
        &self.contract.tenant
    }
}

/// What stays of an erased tenant, so that no old copy brings it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Whose.
    pub tenant: TenantId,
    /// Wall seconds since 1970.
    pub deleted_at_s: u64,
    /// Registry epoch of the erasure; records created before it are dead.
    pub deleted_epoch: u64,
}

/// Why stored bytes are not a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Written by a newer program.
    #[error("record has version {found}, this program reads {RECORD_VERSION}; hint: upgrade this node")]
    UnknownVersion {
        /// Version byte found.
        found: u8,
    },
    /// Written before the first release.
    #[error(
        "record has version {found}, from before the first release, which is not read; hint: begin with an empty data folder"
    )]
    TooOld {
        /// Version byte found.
        found: u8,
    },
    /// Damaged.
    #[error("record of {bytes} bytes is damaged: {reason}; hint: restore the data directory from a backup")]
    Damaged {
        /// Size found.
        bytes: usize,
        /// What the parser says; never the content.
        reason: String,
    },
}

/// Spells a record for the disk.
pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    let mut bytes = vec![RECORD_VERSION];
    serde_json::to_writer(&mut bytes, record).expect("records have text keys and writing to memory succeeds");
    bytes
}

/// Reads what [`encode`] wrote.
///
/// # Errors
/// For another version and for damaged bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RecordError> {
    match bytes.split_first() {
        Some((&RECORD_VERSION, json)) => serde_json::from_slice(json).map_err(|error| RecordError::Damaged {
            bytes: bytes.len(),
            reason: format!("{:?} error in column {}", error.classify(), error.column()),
        }),
        Some((&found, _)) if found < RECORD_VERSION => Err(RecordError::TooOld { found }),
        Some((&found, _)) => Err(RecordError::UnknownVersion { found }),
        None => Err(RecordError::Damaged { bytes: 0, reason: "empty".to_owned() }),
    }
}
