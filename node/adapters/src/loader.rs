//! From a stored object to packed matrices: the one piece of work that is done off the hot path.
//!
//! The actor calls a [`Loader`] on blocking threads, at most `loads_at_once` at a time. [`DiskLoader`] is the
//! real one; tests bring their own. A loader decides nothing about slots, budgets or retries.

use std::fmt;
use std::sync::Arc;

use model::adapter::{AdapterError, AdapterFiles, AdapterLimits, LoraAdapter};
use model::base::BaseModel;
use shared::adapter::AdapterRef;
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::TenantId;
use shared::seal::TenantKey;
use zeroize::Zeroize;

use crate::store::{Store, StoreError};

/// Verified adapter files in host memory; wiped when the last holder drops them.
pub struct HostFiles(AdapterFiles);

impl HostFiles {
    /// Takes charge of `files`, whose content hash the caller has compared.
    pub fn new(files: AdapterFiles) -> Self {
        Self(files)
    }

    /// The files.
    pub fn files(&self) -> &AdapterFiles {
        &self.0
    }

    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl Drop for HostFiles {
    fn drop(&mut self) {
        match &mut self.0 {
            AdapterFiles::Peft { config, weights } => {
                config.zeroize();
                weights.zeroize();
            }
            AdapterFiles::Gguf(bytes) => bytes.zeroize(),
        }
    }
}

impl fmt::Debug for HostFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Why an adapter could not be brought into memory. Kept as the answer to everyone who asks for it until the
/// back-off has passed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The registry names content that this node's store does not hold: upload it again.
    #[error("the adapter's files are not in the store; hint: upload this version again")]
    NotStored,
    /// The stored bytes are not what was uploaded; they were set aside: upload it again.
    #[error("the adapter's stored files are damaged and were set aside; hint: upload this version again")]
    Damaged,
    /// The tenant's key is gone or another one: the tenant was erased, or the key file is a wrong one.
    #[error("the adapter's files cannot be opened with the tenant's key")]
    Sealed,
    /// The disk failed: see the log for the system's words.
    #[error("the adapter's files could not be read: {0}")]
    Disk(String),
    /// Reading did not end in time: the disk hangs. It is tried again after a back-off.
    #[error("the adapter's files could not be read in time; hint: retry later")]
    TimedOut,
    /// The files break a rule, by name.
    #[error(transparent)]
    Refused(AdapterError),
    /// Packed, it is larger than all memory set aside for adapters: raise `adapters.engine_mib`.
    #[error(
        "the adapter needs {needed_bytes} bytes of engine memory, the node has {budget_bytes} for adapters; hint: raise adapters.engine_mib or train with a smaller rank"
    )]
    TooLarge {
        /// Bytes when packed.
        needed_bytes: usize,
        /// Budget of the engine tier.
        budget_bytes: usize,
    },
    /// The loader panicked: our fault, logged.
    #[error("the adapter could not be loaded")]
    Panicked,
}

impl From<StoreError> for LoadError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => Self::NotStored,
            StoreError::Damaged { .. } => Self::Damaged,
            StoreError::Seal(_) => Self::Sealed,
            other => Self::Disk(other.to_string()),
        }
    }
}

impl From<LoadError> for RequestError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Refused(refused) => refused.into(),
            LoadError::Disk(_) => Self::new(
                ErrorKind::Unavailable,
                "adapter_unavailable",
                "the adapter's files could not be read; hint: retry, the failure has been logged",
            ),
            LoadError::Panicked => Self::internal(),
            other => Self::new(ErrorKind::Unavailable, "adapter_unavailable", other.to_string()),
        }
    }
}

/// Brings adapters into memory. Called on blocking threads, several at a time.
pub trait Loader: Send + Sync + 'static {
    /// Reads and verifies the files of `adapter`.
    ///
    /// # Errors
    /// [`LoadError`]; nothing is kept then.
    fn fetch(&self, adapter: &AdapterRef) -> Result<HostFiles, LoadError>;

    /// Checks and packs verified files.
    ///
    /// # Errors
    /// [`LoadError::Refused`] names the rule the files break.
    fn pack(&self, hash: &ContentHash, files: &HostFiles) -> Result<LoraAdapter, LoadError>;
}

/// Where tenants' keys come from; the registry, in a node.
pub trait KeySource: Send + Sync + 'static {
    /// The key that opens what `tenant` stored; `None` when there is none (any more).
    fn tenant_key(&self, tenant: &TenantId) -> Option<Arc<TenantKey>>;
}

/// Loads from the node's own store, for one base model.
pub struct DiskLoader {
    /// Where the files are.
    pub store: Store,
    /// What opens them.
    pub keys: Arc<dyn KeySource>,
    /// The base the adapters are checked against; DoRA factors are computed from its weights.
    pub base: Arc<BaseModel>,
    /// Ranks, sizes and base names allowed.
    pub limits: AdapterLimits,
}

impl fmt::Debug for DiskLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskLoader").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Loader for DiskLoader {
    fn fetch(&self, adapter: &AdapterRef) -> Result<HostFiles, LoadError> {
        let key = self.keys.tenant_key(&adapter.tenant).ok_or(LoadError::Sealed)?;
        Ok(self.store.read(&key, adapter)?)
    }

    fn pack(&self, hash: &ContentHash, files: &HostFiles) -> Result<LoraAdapter, LoadError> {
        let checked =
            model::adapter::check(files.files(), &self.base.info, &self.limits).map_err(LoadError::Refused)?;
        checked.pack(*hash, &self.base.weights).map_err(LoadError::Refused)
    }
}
