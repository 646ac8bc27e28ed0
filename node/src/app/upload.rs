//! A new adapter version's way in: sealed while it arrives, checked against its base, named, registered.
//!
//! [`App::begin_upload`] opens the way, the admin API writes into the [`Upload`], [`App::finish_upload`] ends it. A
//! file is in memory once, while it is checked, one upload at a time. Order matters: the bytes are durable before the
//! registry names them, so a crash in between leaves a file that nobody names, which goes at the next start, and never
//! a name without content.

use std::sync::Arc;

use adapters::{Incoming, Received};
use bytes::Bytes;
use coordinator::registry::command::Action;
use coordinator::registry::record::{AdapterKind, AdapterRecord};
use coordinator::registry::snapshot::TenantView;
use model::adapter::{AdapterError, AdapterFiles, AdapterLimits, AdapterSummary, CONFIG_BYTES_MAX};
use shared::config::ClusterConfig;
use shared::error::{ErrorKind, RequestError};
use shared::id::{AdapterName, BaseName, TenantId};

use super::App;
use crate::base_text::BaseText;

/// Uploads checked at once: each holds a whole file in memory.
pub const CHECKED_AT_ONCE: usize = 1;

/// What adapters for `base` may be, by the configuration.
pub fn adapter_limits(config: &ClusterConfig, base: &BaseName) -> AdapterLimits {
    let found = config.bases.iter().find(|found| found.name == *base);
    let mut names: Vec<String> = vec![base.to_string()];
    names.extend(found.iter().flat_map(|found| found.aliases.iter().cloned()));
    // A base without declared aliases goes by shapes alone: its own short name is rarely what trainers write.
    let accepted_base_names = if names.len() > 1 { names } else { Vec::new() };
    AdapterLimits { rank_max: config.adapters.rank_max, bytes_max: config.adapters.file_bytes_max, accepted_base_names }
}

/// The parts of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `adapter_config.json`.
    Config,
    /// `adapter_model.safetensors`.
    Weights,
    /// A GGUF file.
    Gguf,
}

/// An upload under way. Dropped, it leaves nothing.
pub struct Upload {
    name: AdapterName,
    owner: Arc<TenantView>,
    text: Arc<BaseText>,
    limits: AdapterLimits,
    /// Always there, but for the time of a write.
    incoming: Option<Incoming>,
    begun: Vec<Part>,
    config: Vec<u8>,
    large_bytes: usize,
}

// === impl Upload ===

impl Upload {
    /// The next part begins.
    ///
    /// # Errors
    /// When it came before, or does not go with what came before.
    pub fn begin(&mut self, part: Part) -> Result<(), RequestError> {
        let message = match (part, self.begun.as_slice()) {
            (_, []) | (Part::Config, [Part::Weights]) | (Part::Weights, [Part::Config]) => {
                self.begun.push(part);
                return Ok(());
            }
            (_, begun) if begun.contains(&part) => "a part of the form comes twice",
            _ => "send the parts config and weights (PEFT), or the part gguf",
        };
        Err(RequestError::new(ErrorKind::Invalid, "invalid_body", message))
    }

    /// More bytes of the part that was begun last.
    ///
    /// # Errors
    /// When the part is larger than allowed, or the store cannot take it.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), RequestError> {
        let (what, so_far, max) = match self.begun.last() {
            Some(Part::Config) => ("adapter_config.json", &mut self.config.len(), CONFIG_BYTES_MAX),
            _ => ("the adapter", &mut self.large_bytes, self.limits.bytes_max),
        };
        *so_far += bytes.len();
        if *so_far > max {
            return Err(AdapterError::Bytes { what, found: *so_far, max }.into());
        }
        if self.begun.last() == Some(&Part::Config) {
            self.config.extend_from_slice(&bytes);
            return Ok(());
        }
        let mut incoming = self.incoming.take().ok_or_else(RequestError::internal)?;
        let written = tokio::task::spawn_blocking(move || incoming.write(&bytes).map(|()| incoming));
        self.incoming = Some(written.await.map_err(|_| RequestError::internal())??);
        Ok(())
    }
}

impl App {
    /// Opens the way for a new version of `tenant`.
    ///
    /// # Errors
    /// When there is no such tenant or base, or the disk refuses.
    pub async fn begin_upload(&self, tenant: &TenantId, name: AdapterName) -> Result<Upload, RequestError> {
        let owner = self.registry.snapshot().tenant(tenant).cloned().ok_or_else(|| no_tenant(tenant))?;
        let text = self.text(&name.base)?;
        let limits = adapter_limits(self.config(), &name.base);
        let (store, view) = (self.store.clone(), Arc::clone(&owner));
        let incoming = tokio::task::spawn_blocking(move || store.receive(view.key(), view.record().tenant()));
        let incoming = Some(incoming.await.map_err(|_| RequestError::internal())??);
        Ok(Upload { name, owner, text, limits, incoming, begun: Vec::new(), config: Vec::new(), large_bytes: 0 })
    }

    /// Checks what arrived, gives it its name and registers the version.
    ///
    /// # Errors
    /// The rule that the files break, by name, the registry's refusal, or what is wrong with the disk; nothing stays.
    pub async fn finish_upload(self: &Arc<Self>, upload: Upload) -> Result<AdapterRecord, RequestError> {
        let app = Arc::clone(self);
        // To its end even if the client leaves.
        let finish = async move {
            let Upload { name, owner, text, limits, incoming, begun, config, .. } = upload;
            let incoming = incoming.ok_or_else(RequestError::internal)?;
            let config = match begun.as_slice() {
                [Part::Gguf] => None,
                [_, _] => Some(config),
                _ => {
                    let message = "send the parts config and weights (PEFT), or the part gguf";
                    return Err(RequestError::new(ErrorKind::Invalid, "invalid_body", message));
                }
            };
            let _checking = app.checking.acquire().await.map_err(|_| RequestError::internal())?;
            let (view, checks) = (Arc::clone(&owner), Arc::clone(&text));
            let received = tokio::task::spawn_blocking(move || receive(incoming, config, &view, &checks, &limits));
            let (received, summary) = received.await.map_err(|_| RequestError::internal())??;
            let record = AdapterRecord {
                name: name.clone(),
                hash: received.adapter().hash,
                bytes: summary.bytes as u64,
                rank: u32::try_from(summary.rank_max).unwrap_or(u32::MAX),
                kind: match summary.kind {
                    model::adapter::AdapterKind::Peft => AdapterKind::Peft,
                    model::adapter::AdapterKind::Gguf => AdapterKind::Gguf,
                },
                uploaded_at_s: app.wall_s(),
                base: name.base,
            };
            app.publish(&owner, received, record.clone()).await?;
            Ok(record)
        };
        tokio::spawn(finish).await.map_err(|_| RequestError::internal())?
    }

    /// File first, then name; nobody removes either in between.
    async fn publish(&self, owner: &TenantView, received: Received, record: AdapterRecord) -> Result<(), RequestError> {
        let adapter = received.adapter().clone();
        let _changing = self.changing.lock().await;
        // A tenant that was deleted meanwhile is not the one that was created anew under its name.
        let present = self.registry.snapshot().tenant(&adapter.tenant).cloned();
        if !present.is_some_and(|present| Arc::ptr_eq(present.key(), owner.key())) {
            return Err(no_tenant(&adapter.tenant));
        }
        let published = tokio::task::spawn_blocking(move || received.publish());
        let published = published.await.map_err(|_| RequestError::internal())?.map_err(RequestError::from);
        let action = Action::AddAdapterVersion { tenant: adapter.tenant.clone(), adapter: record };
        let added = match published {
            Ok(()) => self.registry.apply(action).await.map_err(RequestError::from),
            Err(error) => Err(error),
        };
        match added {
            Ok(_) => {
                self.rooms.values().for_each(|room| room.cache.stored(&adapter.id()));
                Ok(())
            }
            Err(error) => {
                let snapshot = self.registry.snapshot();
                let record = snapshot.tenant(&adapter.tenant).map(|view| Arc::clone(view.record()));
                // The tenant may have the same bytes under another name.
                if !record.is_some_and(|record| record.adapters.values().any(|stored| stored.hash == adapter.hash)) {
                    self.delete_files(vec![adapter], super::follow::Reach::Everywhere).await;
                }
                Err(error)
            }
        }
    }
}

fn no_tenant(tenant: &TenantId) -> RequestError {
    RequestError::new(ErrorKind::NotFound, "not_found", format!("there is no tenant {tenant}"))
}

/// Makes the bytes durable, reads them back as a load will, and checks them.
fn receive(
    incoming: Incoming,
    config: Option<Vec<u8>>,
    owner: &TenantView,
    text: &BaseText,
    limits: &AdapterLimits,
) -> Result<(Received, AdapterSummary), RequestError> {
    let mut received = incoming.finish(owner.key(), config.as_deref())?;
    let files = received.read(owner.key())?;
    let files: &AdapterFiles = files.files();
    let summary = model::adapter::check(files, &text.info, limits)?.summary();
    Ok((received, summary))
}
