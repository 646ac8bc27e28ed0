//! Changes of the registry and what the rest of the node does about them: caches forget, files go.
//!
//! The admin API calls it for everything that takes something away, the upload path for what it adds. A change runs
//! to its end on a task of its own, whether or not the caller is still there; changes that touch adapter files run
//! one after another, so that no file goes that a name was just given to.

use std::sync::Arc;

use coordinator::registry::command::{Applied, Command, Event};
use shared::adapter::AdapterRef;
use shared::error::RequestError;
use shared::hash::ContentHash;
use shared::id::TenantId;

use super::App;

impl App {
    /// Applies a command to the registry and makes the rest of the node follow.
    ///
    /// # Errors
    /// The registry's refusal; nothing has changed then.
    pub async fn change(self: &Arc<Self>, command: impl Into<Command>) -> Result<Applied, RequestError> {
        let (app, command) = (Arc::clone(self), command.into());
        let change = async move {
            let _changing = app.changing.lock().await;
            let applied = app.registry.apply(command).await?;
            for event in &applied.events {
                tracing::info!(?event, epoch = applied.epoch, "registry changed");
                app.follow(event).await;
            }
            Ok(applied)
        };
        tokio::spawn(change).await.map_err(|_| RequestError::internal())?
    }

    async fn follow(&self, event: &Event) {
        match event {
            Event::TenantDeleted { tenant, adapters } => {
                self.admission.lock().forget(tenant);
                self.rooms.values().for_each(|room| room.erase(tenant));
                self.delete_adapters(tenant, adapters).await;
            }
            Event::AdapterVersionRemoved { name, hash, still_used: false } => {
                self.delete_adapters(&name.client, &[*hash]).await;
            }
            _ => {}
        }
    }

    /// Memory first, files off the async threads.
    async fn delete_adapters(&self, tenant: &TenantId, hashes: &[ContentHash]) {
        let adapters: Vec<AdapterRef> =
            hashes.iter().map(|hash| AdapterRef { tenant: tenant.clone(), hash: *hash }).collect();
        for adapter in &adapters {
            self.rooms.values().for_each(|room| room.cache.forget(&adapter.id()));
        }
        self.delete_files(adapters).await;
    }

    /// Deletes files that no name points at any more. What fails here is gone at the next start.
    pub(super) async fn delete_files(&self, adapters: Vec<AdapterRef>) {
        let store = self.store.clone();
        let deleted = tokio::task::spawn_blocking(move || {
            for adapter in adapters {
                if let Err(error) = store.delete(&adapter) {
                    tracing::warn!(tenant_id = %adapter.tenant, hash = %adapter.hash.short(), %error, "adapter file could not be deleted; its key is what matters");
                }
            }
        });
        if deleted.await.is_err() {
            tracing::error!("deleting adapter files panicked");
        }
    }
}
