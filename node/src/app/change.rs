//! Changes of the registry and what the rest of the node does about them: caches forget, files go.
//!
//! The admin API calls it for everything that takes something away, the upload path for what it adds. A change runs
//! to its end on a task of its own, whether or not the caller is still there; changes that touch adapter files run
//! one after another, so that no file goes that a name was just given to.

use std::sync::Arc;

use coordinator::registry::command::{Applied, Command};
use shared::adapter::AdapterRef;
use shared::error::RequestError;

use super::App;
use super::follow::Reach;

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
                app.follow(event, Reach::Everywhere).await;
            }
            Ok(applied)
        };
        tokio::spawn(change).await.map_err(|_| RequestError::internal())?
    }

    /// Deletes files that no name points at any more. What fails here is gone at the next start.
    pub(super) async fn delete_files(&self, adapters: Vec<AdapterRef>, reach: Reach) {
        let store = self.store.clone();
        let deleted = tokio::task::spawn_blocking(move || {
            for adapter in adapters {
                let deleted = match reach {
                    Reach::Everywhere => store.delete(&adapter),
                    Reach::ThisNode => store.forget_copy(&adapter),
                };
                if let Err(error) = deleted {
                    tracing::warn!(tenant_id = %adapter.tenant, hash = %adapter.hash.short(), %error, "adapter file could not be deleted; its key is what matters");
                }
            }
        });
        if deleted.await.is_err() {
            tracing::error!("deleting adapter files panicked");
        }
    }
}
