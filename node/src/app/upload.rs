//! A new adapter version's way into the store: checked against its base, sealed with its tenant's key.

use std::sync::Arc;

use coordinator::registry::snapshot::TenantView;
use model::adapter::{AdapterFiles, AdapterLimits};
use shared::config::ClusterConfig;
use shared::error::RequestError;
use shared::hash::ContentHash;
use shared::id::{AdapterName, BaseName};

use super::App;

/// What was stored.
pub struct StoredAdapter {
    /// Content.
    pub hash: ContentHash,
    /// Bytes of the uploaded files.
    pub bytes: u64,
    /// Largest rank.
    pub rank: u32,
    /// GGUF file or PEFT folder.
    pub is_gguf: bool,
}

/// What adapters for `base` may be, by the configuration.
pub fn adapter_limits(config: &ClusterConfig, base: &BaseName) -> AdapterLimits {
    let found = config.bases.iter().find(|found| found.name == *base);
    let mut names: Vec<String> = vec![base.to_string()];
    names.extend(found.iter().flat_map(|found| found.aliases.iter().cloned()));
    // A base without declared aliases goes by shapes alone: its own short name is rarely what trainers write.
    let accepted_base_names = if names.len() > 1 { names } else { Vec::new() };
    AdapterLimits { rank_max: config.adapters.rank_max, bytes_max: config.adapters.file_bytes_max, accepted_base_names }
}

impl App {
    /// Checks the files and stores them; the registry does not know of them yet.
    ///
    /// # Errors
    /// The rule that the files break, by name, or what is wrong with the disk.
    pub async fn store_adapter(
        &self,
        owner: Arc<TenantView>,
        name: &AdapterName,
        files: AdapterFiles,
    ) -> Result<StoredAdapter, RequestError> {
        let room = Arc::clone(self.room(&name.base)?);
        let limits = adapter_limits(self.config(), &name.base);
        let store = self.store.clone();
        let stored = tokio::task::spawn_blocking(move || -> Result<StoredAdapter, RequestError> {
            let checked = model::adapter::check(&files, &room.model.info, &limits)?;
            let summary = checked.summary();
            let hash = files.content_hash();
            store.put(owner.key(), &owner.contract().tenant, &files)?;
            room.cache.stored(&hash, &owner.contract().tenant);
            Ok(StoredAdapter {
                hash,
                bytes: files.bytes() as u64,
                rank: u32::try_from(summary.rank_max).unwrap_or(u32::MAX),
                is_gguf: matches!(files, AdapterFiles::Gguf(_)),
            })
        });
        stored.await.map_err(|_| RequestError::internal())?
    }
}
