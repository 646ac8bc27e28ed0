//! What changes of the registry take away here: caches forget, files go.
//!
//! A change that this node was asked for is followed by [`super::change`], before it is answered. Whatever arrives
//! through the registry's log, or at once in a snapshot of it, is noticed here by comparing what was known before.
//! So an erased tenant leaves every node's memory and disk, also that of a node that was away while it happened.
//! Files in the object store are left to the node that was asked.

use std::sync::Arc;

use coordinator::registry::command::Event;
use shared::adapter::AdapterRef;
use shared::hash::ContentHash;
use shared::id::TenantId;

use super::App;

/// Whose files go with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// This node was asked: the object store's, too.
    Everywhere,
    /// Another node was asked: only this disk's.
    ThisNode,
}

impl App {
    /// Follows the registry until the node ends.
    pub fn follow_registry(self: &Arc<Self>) {
        let app = Arc::downgrade(self);
        let mut snapshots = self.registry.subscribe();
        let mut before = snapshots.borrow_and_update().clone();
        tokio::spawn(async move {
            while snapshots.changed().await.is_ok() {
                let after = snapshots.borrow_and_update().clone();
                let Some(app) = app.upgrade() else { return };
                for event in after.gone_since(&before) {
                    let _changing = app.changing.lock().await;
                    app.follow(&event, Reach::ThisNode).await;
                }
                before = after;
            }
        });
    }

    /// What an event takes away leaves this node's memory and the files that `reach` says. The caller holds
    /// `changing`, so that no name is given to a file meanwhile.
    pub(super) async fn follow(&self, event: &Event, reach: Reach) {
        match event {
            Event::TenantDeleted { tenant, adapters } => {
                self.admission.lock().forget(tenant);
                self.rooms.values().for_each(|room| room.erase(tenant));
                self.texts.forget(tenant);
                self.forget(tenant, adapters, reach).await;
            }
            Event::AdapterVersionRemoved { name, hash, still_used: false } => {
                self.forget(&name.client, &[*hash], reach).await;
            }
            _ => {}
        }
    }

    async fn forget(&self, tenant: &TenantId, hashes: &[ContentHash], reach: Reach) {
        // Uploaded again meanwhile, perhaps under a new tenant of the same name: it is wanted, and may be on its way
        // into memory.
        let snapshot = self.registry.snapshot();
        let record = snapshot.tenant(tenant).map(|view| Arc::clone(view.record()));
        let is_named = |hash: &ContentHash| {
            record.as_ref().is_some_and(|record| record.adapters.values().any(|adapter| adapter.hash == *hash))
        };
        let copy = |hash: &ContentHash| AdapterRef { tenant: tenant.clone(), hash: *hash };
        let gone: Vec<AdapterRef> = hashes.iter().filter(|hash| !is_named(hash)).map(copy).collect();
        // Memory first, files off the async threads.
        for adapter in &gone {
            self.rooms.values().for_each(|room| room.cache.forget(&adapter.id()));
        }
        self.delete_files(gone, reach).await;
    }
}
