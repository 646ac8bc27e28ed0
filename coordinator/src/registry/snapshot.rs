//! The registry as everyone reads it: immutable, consistent, without waiting for anybody.
//!
//! Every node publishes a new snapshot after each agreed batch of commands. A snapshot shares everything
//! that did not change with the one before it. Reading never touches the actor, its mailbox or the disk.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use shared::hash::ContentHash;
use shared::id::{AdapterName, TenantId};
use shared::seal::{SealError, TenantKey};
use shared::tenant::TenantContract;

use super::command::Event;
use super::record::TenantRecord;
use super::secrets::Secrets;
use super::shard_map::ShardMap;
use super::state::{Change, RegistryState};
use crate::auth::{self, AuthError, AuthedTenant, KeyHash, KeyId};

/// One tenant with its secrets unwrapped.
pub struct TenantView {
    record: Arc<TenantRecord>,
    key: Arc<TenantKey>,
    cache_secret: Zeroizing<[u8; 32]>,
}

impl TenantView {
    fn new(record: Arc<TenantRecord>, secrets: &Secrets, former: Option<&Arc<Self>>) -> Result<Self, SealError> {
        let unchanged = former.filter(|former| former.record.wrapped_key == record.wrapped_key);
        let key = match unchanged {
            Some(former) => former.key.clone(),
            None => Arc::new(secrets.unwrap(record.tenant(), &record.wrapped_key)?),
        };
        let cache_secret = key.derive("tenantry 2026 prefix cache secret");
        Ok(Self { record, key, cache_secret })
    }

    /// The stored record.
    pub fn record(&self) -> &Arc<TenantRecord> {
        &self.record
    }

    /// The contract.
    pub fn contract(&self) -> &Arc<TenantContract> {
        &self.record.contract
    }

    /// Seals and opens what the tenant stores.
    pub fn key(&self) -> &Arc<TenantKey> {
        &self.key
    }

    /// Keys the tenant's prefix cache.
    pub fn cache_secret(&self) -> &[u8; 32] {
        &self.cache_secret
    }
}

impl fmt::Debug for TenantView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TenantView({} at epoch {})", self.record.tenant(), self.contract().epoch)
    }
}

/// Who led when something was decided. Acts that only a leader may order carry it, and whoever has seen a higher
/// one refuses them: a term alone does not do, since two nodes can claim the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fence {
    /// Counts elections.
    pub term: u64,
    /// Raft id of the leader.
    pub leader: u64,
}

/// All tenants at one epoch.
#[derive(Clone)]
pub struct Snapshot {
    epoch: u64,
    fence: Fence,
    n_tenants: usize,
    tenants: ShardMap<TenantId, Arc<TenantView>>,
    key_owners: ShardMap<KeyId, Arc<TenantView>>,
    secrets: Arc<Secrets>,
    decoy: KeyHash,
}

impl Snapshot {
    /// A snapshot of the whole state.
    ///
    /// # Errors
    /// When a tenant's key does not open with this cluster key.
    pub fn build(state: &RegistryState, secrets: Arc<Secrets>) -> Result<Self, SealError> {
        let decoy = secrets.pepper().decoy();
        let (tenants, key_owners) = (ShardMap::new(), ShardMap::new());
        let (epoch, fence) = (state.epoch(), Fence::default());
        let mut snapshot = Self { epoch, fence, n_tenants: 0, tenants, key_owners, secrets, decoy };
        for record in state.tenants().values() {
            snapshot.put(record.clone())?;
        }
        Ok(snapshot)
    }

    /// A snapshot of another state; tenants that are in both keep their unwrapped keys.
    ///
    /// # Errors
    /// When a new tenant's key does not open with this cluster key.
    pub fn replaced_by(&self, state: &RegistryState) -> Result<Self, SealError> {
        let gone: Vec<TenantId> = self.tenants.values().map(|view| view.record.tenant().clone()).collect();
        let mut next = Self { epoch: state.epoch(), ..self.clone() };
        for tenant in gone.iter().filter(|tenant| !state.tenants().contains_key(*tenant)) {
            next.remove(tenant);
        }
        for record in state.tenants().values() {
            next.put(record.clone())?;
        }
        Ok(next)
    }

    /// The next snapshot: this one with some changes, at another epoch.
    ///
    /// # Errors
    /// When a new tenant's key does not open with this cluster key.
    pub fn with<'a>(&self, changes: impl IntoIterator<Item = &'a Change>, epoch: u64) -> Result<Self, SealError> {
        let mut next = Self { epoch, ..self.clone() };
        for change in changes {
            match change {
                Change::Put(record) => next.put(record.clone())?,
                Change::Delete(tombstone) => next.remove(&tombstone.tenant),
            }
        }
        Ok(next)
    }

    /// The same, decided under this leader.
    #[must_use]
    pub fn under(mut self, fence: Fence) -> Self {
        self.fence = fence;
        self
    }

    fn put(&mut self, record: Arc<TenantRecord>) -> Result<(), SealError> {
        let tenant = record.tenant().clone();
        let former = self.tenants.get(&tenant).cloned();
        let view = Arc::new(TenantView::new(record, &self.secrets, former.as_ref())?);
        for id in former.iter().flat_map(|former| former.record.keys.keys()) {
            self.key_owners.remove(id);
        }
        for id in view.record.keys.keys() {
            self.key_owners.insert(*id, view.clone());
        }
        self.n_tenants += usize::from(former.is_none());
        self.tenants.insert(tenant, view);
        Ok(())
    }

    fn remove(&mut self, tenant: &TenantId) {
        let Some(former) = self.tenants.get(tenant).cloned() else { return };
        for id in former.record.keys.keys() {
            self.key_owners.remove(id);
        }
        self.n_tenants -= 1;
        self.tenants.remove(tenant);
    }

    /// Registry epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The leader of the latest command this copy knows.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// How many tenants there are.
    pub fn n_tenants(&self) -> usize {
        self.n_tenants
    }

    /// Who presents this key. Suspended tenants authenticate; admission refuses them.
    ///
    /// # Errors
    /// [`AuthError::Invalid`] for unknown, malformed and wrong keys alike, at the same cost for the last two of
    /// unknown id and wrong secret; the others only for the right secret.
    pub fn authenticate(&self, presented: &str, now_wall_s: u64) -> Result<AuthedTenant, AuthError> {
        let find = |id| {
            let view: &Arc<TenantView> = self.key_owners.get(&id)?;
            view.record.keys.get(&id).map(|key| (key, view.clone()))
        };
        let (key, view) = auth::verify(self.secrets.pepper(), &self.decoy, presented, now_wall_s, find)?;
        Ok(AuthedTenant::new(view, key))
    }

    /// The tenant's contract in this snapshot; `None` once it is deleted. For connections that outlive a change.
    pub fn contract(&self, authed: &AuthedTenant) -> Option<Arc<TenantContract>> {
        self.tenants.get(authed.tenant()).map(|view| view.contract().clone())
    }

    /// What was there in an earlier snapshot and is gone, told as the events that took it away. However it went:
    /// command by command, or at once in a copy from another node.
    pub fn gone_since(&self, before: &Self) -> Vec<Event> {
        let mut gone = Vec::new();
        for (was, is) in self.tenants.differing(&before.tenants) {
            for (tenant, old) in was {
                let same = is.get(tenant).filter(|new| new.record.created_epoch == old.record.created_epoch);
                match same {
                    Some(new) => gone.extend(versions_gone(&old.record, &new.record)),
                    None => {
                        let mut adapters: Vec<_> = old.record.adapters.values().map(|adapter| adapter.hash).collect();
                        adapters.sort_unstable();
                        adapters.dedup();
                        gone.push(Event::TenantDeleted { tenant: tenant.clone(), adapters });
                    }
                }
            }
        }
        gone
    }

    /// One tenant. For the operator and the node's own work only: a request names no tenant, its key does.
    pub fn tenant(&self, tenant: &TenantId) -> Option<&Arc<TenantView>> {
        self.tenants.get(tenant)
    }

    /// All tenants by id, for the operator.
    pub fn tenants(&self) -> Vec<Arc<TenantView>> {
        let mut all: Vec<_> = self.tenants.values().cloned().collect();
        all.sort_unstable_by(|a, b| a.record.tenant().cmp(b.record.tenant()));
        all
    }
}

fn versions_gone(old: &TenantRecord, new: &TenantRecord) -> Vec<Event> {
    let gone = old.adapters.iter().filter(|(name, _)| !new.adapters.contains_key(*name));
    let event = |name: &AdapterName, hash: ContentHash| {
        let still_used = new.adapters.values().any(|adapter| adapter.hash == hash);
        Event::AdapterVersionRemoved { name: name.clone(), hash, still_used }
    };
    gone.map(|(name, adapter)| event(name, adapter.hash)).collect()
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot(epoch {}, {} tenants)", self.epoch, self.n_tenants)
    }
}

#[cfg(test)]
mod tests;
