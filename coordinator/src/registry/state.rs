//! The registry as a pure state: commands in, events and changed records out.
//!
//! [`RegistryState::decide`] checks a command against the state and says what would change, without changing
//! it; [`RegistryState::commit`] takes the change over. A command sent again is recognised by its id. The same
//! commands in the same order give the same state anywhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use shared::hash::ContentHash;
use shared::id::{AdapterName, TaskName, TenantId};
use shared::tenant::{TaskPointer, TenantContract, TenantState};

use super::bounds;
use super::command::{Action, Applied, Command, CommandId, Event, Proposal, TenantPatch, TenantSpec};
use super::error::RegistryError;
use super::record::{AdapterRecord, TenantRecord, Tombstone};
use crate::auth::{KeyId, KeyRecord};

/// What a command changes in the records; one tenant each.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// This record replaces the tenant's former one.
    Put(Arc<TenantRecord>),
    /// The tenant's record goes, its tombstone stays.
    Delete(Tombstone),
}

impl Change {
    /// Whose.
    pub fn tenant(&self) -> &TenantId {
        match self {
            Self::Put(record) => record.tenant(),
            Self::Delete(tombstone) => &tombstone.tenant,
        }
    }
}

/// What a command did, remembered for the case that it is sent again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Remembered {
    /// Which.
    pub id: CommandId,
    /// The answer it got; its epoch is the key under which it is kept.
    pub applied: Applied,
}

/// The whole state in one piece, for a node that has to catch up.
#[derive(Debug, Serialize, Deserialize)]
pub struct Image {
    /// Registry epoch.
    pub epoch: u64,
    /// Every tenant.
    pub tenants: Vec<Arc<TenantRecord>>,
    /// Every erased tenant.
    pub tombstones: Vec<Tombstone>,
    /// The latest commands.
    pub remembered: Vec<Remembered>,
}

/// What agreed commands changed, for the file and the readers.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Records, in order.
    pub(crate) changes: Vec<Change>,
    /// The answers to keep.
    pub(crate) remembered: Vec<Remembered>,
}

/// An accepted command: what to answer and what to keep.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The answer.
    pub applied: Applied,
    /// What to keep; `None` if everything was as asked already.
    pub change: Option<Change>,
}

/// All tenants, and the epoch that counts their changes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RegistryState {
    epoch: u64,
    tenants: BTreeMap<TenantId, Arc<TenantRecord>>,
    tombstones: BTreeMap<TenantId, Tombstone>,
    key_owners: BTreeMap<KeyId, TenantId>,
    /// By the epoch they led to.
    remembered: BTreeMap<u64, Remembered>,
    remembered_ids: BTreeMap<CommandId, u64>,
}

/// Commands remembered: far more than come in while one call may still be tried again.
pub const REMEMBERED_MAX: u64 = 8192;

type Outcome = Result<(Option<TenantRecord>, Vec<Event>), RegistryError>;

impl RegistryState {
    /// Rebuilds the state from what the store holds. A record older than its tenant's tombstone is dropped.
    pub fn restore(
        epoch: u64,
        records: impl IntoIterator<Item = impl Into<Arc<TenantRecord>>>,
        tombstones: impl IntoIterator<Item = Tombstone>,
    ) -> Self {
        let mut state = Self { epoch, ..Self::default() };
        state.tombstones.extend(tombstones.into_iter().map(|tombstone| (tombstone.tenant.clone(), tombstone)));
        for record in records {
            let record: Arc<TenantRecord> = record.into();
            let erased_in = state.tombstones.get(record.tenant()).map_or(0, |tombstone| tombstone.deleted_epoch);
            if record.created_epoch > erased_in {
                state.put(record);
            }
        }
        state
    }

    /// Commands that changed something so far.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// All tenants by id.
    pub fn tenants(&self) -> &BTreeMap<TenantId, Arc<TenantRecord>> {
        &self.tenants
    }

    /// Erased tenants by id; one that was created anew is in both maps.
    pub fn tombstones(&self) -> &BTreeMap<TenantId, Tombstone> {
        &self.tombstones
    }

    /// Decides and commits in one go.
    ///
    /// # Errors
    /// As [`Self::decide`]; then the state is unchanged.
    pub fn apply(&mut self, command: &Command) -> Result<Vec<Event>, RegistryError> {
        let decision = self.decide(command)?;
        let events = decision.applied.events.clone();
        self.commit(decision);
        Ok(events)
    }

    /// The state an image shows.
    pub fn from_image(image: Image) -> Self {
        let mut state = Self::restore(image.epoch, image.tenants, image.tombstones);
        image.remembered.into_iter().for_each(|remembered| state.remember(remembered));
        state
    }

    /// All of it in one piece.
    pub fn image(&self) -> Image {
        Image {
            epoch: self.epoch,
            tenants: self.tenants.values().cloned().collect(),
            tombstones: self.tombstones.values().cloned().collect(),
            remembered: self.remembered.values().cloned().collect(),
        }
    }

    /// Applies a proposal, once: sent again, it gets its first answer and changes nothing. What changes is added
    /// to `changes`.
    ///
    /// # Errors
    /// As [`Self::decide`].
    pub(super) fn apply_once(&mut self, proposal: &Proposal, changes: &mut Changes) -> Result<Applied, RegistryError> {
        if let Some(before) = self.remembered_ids.get(&proposal.id).and_then(|epoch| self.remembered.get(epoch)) {
            return Ok(before.applied.clone());
        }
        let decision = self.decide(&proposal.command)?;
        let applied = decision.applied.clone();
        if let Some(change) = &decision.change {
            changes.changes.push(change.clone());
            let remembered = Remembered { id: proposal.id, applied: applied.clone() };
            changes.remembered.push(remembered.clone());
            self.remember(remembered);
        }
        self.commit(decision);
        Ok(applied)
    }

    /// Keeps an answer, and forgets the one that falls out of the window.
    pub fn remember(&mut self, remembered: Remembered) {
        let epoch = remembered.applied.epoch;
        self.remembered_ids.insert(remembered.id, epoch);
        self.remembered.insert(epoch, remembered);
        if let Some(old) = epoch.checked_sub(REMEMBERED_MAX).and_then(|epoch| self.remembered.remove(&epoch)) {
            self.remembered_ids.remove(&old.id);
        }
    }

    /// What `command` would change.
    ///
    /// # Errors
    /// When a bound, an invariant or the expected epoch is not met.
    pub fn decide(&self, command: &Command) -> Result<Decision, RegistryError> {
        let tenant = command.action.tenant();
        let found = self.tenants.get(tenant).map_or(0, |record| record.contract.epoch);
        if let Some(expected) = command.expected_epoch.filter(|&expected| expected != found) {
            return Err(RegistryError::EpochMismatch { expected, found });
        }
        let epoch = self.epoch + 1;
        if let Action::DeleteTenant { tenant, at_s } = &command.action {
            return self.decide_delete(tenant, *at_s, epoch);
        }
        let (record, events) = self.decide_record(&command.action, epoch)?;
        let Some(mut record) = record else {
            return Ok(Decision { applied: Applied { epoch: self.epoch, events: Vec::new() }, change: None });
        };
        Arc::make_mut(&mut record.contract).epoch = epoch;
        Ok(Decision { applied: Applied { epoch, events }, change: Some(Change::Put(Arc::new(record))) })
    }

    /// Takes over what [`Self::decide`] said. Decisions must be committed in order and at most once.
    pub fn commit(&mut self, decision: Decision) {
        match decision.change {
            None => return,
            Some(Change::Put(record)) => self.put(record),
            Some(Change::Delete(tombstone)) => {
                if let Some(record) = self.tenants.remove(&tombstone.tenant) {
                    record.keys.keys().for_each(|id| drop(self.key_owners.remove(id)));
                }
                self.tombstones.insert(tombstone.tenant.clone(), tombstone);
            }
        }
        self.epoch = decision.applied.epoch;
    }

    fn put(&mut self, record: Arc<TenantRecord>) {
        if let Some(former) = self.tenants.get(record.tenant()) {
            former
                .keys
                .keys()
                .filter(|id| !record.keys.contains_key(id))
                .for_each(|id| drop(self.key_owners.remove(id)));
        }
        for id in record.keys.keys() {
            self.key_owners.insert(*id, record.tenant().clone());
        }
        self.tenants.insert(record.tenant().clone(), record);
    }

    fn record(&self, tenant: &TenantId) -> Result<&Arc<TenantRecord>, RegistryError> {
        self.tenants
            .get(tenant)
            .ok_or_else(|| RegistryError::NotFound { what: "tenant".into(), name: tenant.to_string() })
    }

    fn decide_delete(&self, tenant: &TenantId, at_s: u64, epoch: u64) -> Result<Decision, RegistryError> {
        let record = self.record(tenant)?;
        let mut adapters: Vec<ContentHash> = record.adapters.values().map(|adapter| adapter.hash).collect();
        adapters.sort_unstable();
        adapters.dedup();
        let events = vec![Event::TenantDeleted { tenant: tenant.clone(), adapters }];
        let tombstone = Tombstone { tenant: tenant.clone(), deleted_at_s: at_s, deleted_epoch: epoch };
        Ok(Decision { applied: Applied { epoch, events }, change: Some(Change::Delete(tombstone)) })
    }

    /// The tenant's next record, or `None` if it stays as it is.
    fn decide_record(&self, action: &Action, epoch: u64) -> Outcome {
        if let Action::CreateTenant { spec, wrapped_key, keys, at_s } = action {
            let record = self.create(spec, wrapped_key.clone(), keys, *at_s, epoch)?;
            return Ok((Some(record), vec![Event::TenantCreated { tenant: spec.tenant.clone() }]));
        }
        let mut record = TenantRecord::clone(self.record(action.tenant())?);
        let events = match action {
            Action::CreateTenant { .. } | Action::DeleteTenant { .. } => unreachable!("handled by the callers"),
            Action::UpdateTenant { patch, .. } => update(&mut record, patch)?,
            Action::SuspendTenant { .. } => set_state(&mut record, TenantState::Suspended),
            Action::ResumeTenant { .. } => set_state(&mut record, TenantState::Active),
            Action::AddKey { key, .. } => self.add_key(&mut record, key)?,
            Action::RevokeKey { key_id, at_s, .. } => revoke_key(&mut record, *key_id, *at_s)?,
            Action::AddAdapterVersion { adapter, .. } => add_version(&mut record, adapter)?,
            Action::RemoveAdapterVersion { name, .. } => remove_version(&mut record, name)?,
            Action::PointTask { task, version, .. } => point_task(&mut record, task, version.as_ref())?,
            Action::RemoveTask { task, .. } => remove_task(&mut record, task)?,
        };
        Ok(if events.is_empty() { (None, events) } else { (Some(record), events) })
    }

    fn create(
        &self,
        spec: &TenantSpec,
        wrapped_key: shared::seal::WrappedKey,
        keys: &[KeyRecord],
        at_s: u64,
        epoch: u64,
    ) -> Result<TenantRecord, RegistryError> {
        if self.tenants.contains_key(&spec.tenant) {
            return Err(RegistryError::Exists { what: "tenant".into(), name: spec.tenant.to_string() });
        }
        if self.tenants.len() >= bounds::TENANTS_MAX {
            let hint = "delete tenants that are gone, or start another cell";
            return Err(RegistryError::LimitReached {
                what: "tenants".into(),
                max: bounds::TENANTS_MAX,
                hint: hint.into(),
            });
        }
        if self.tenants.len() + self.tombstones.len() >= bounds::NAMES_EVER_MAX {
            let hint = "start another cell";
            return Err(RegistryError::LimitReached {
                what: "tenants and tombstones".into(),
                max: bounds::NAMES_EVER_MAX,
                hint: hint.into(),
            });
        }
        bounds::check_spec(spec)?;
        spec.tasks.iter().try_for_each(|task| check_task_name(task, &spec.bases))?;
        let contract = TenantContract {
            tenant: spec.tenant.clone(),
            state: TenantState::Active,
            tier: spec.tier,
            weight: spec.weight,
            bases: spec.bases.clone(),
            allow_base: spec.allow_base,
            tasks: spec.tasks.iter().map(|task| (task.clone(), None)).collect(),
            versions: BTreeMap::new(),
            fallback: spec.fallback,
            limits: spec.limits,
            region: spec.region.clone(),
            pool: spec.pool.clone(),
            cost_center: spec.cost_center.clone(),
            epoch,
        };
        let mut record = TenantRecord {
            contract: Arc::new(contract),
            display_name: spec.display_name.clone(),
            contact: spec.contact.clone(),
            created_at_s: at_s,
            created_epoch: epoch,
            wrapped_key,
            keys: BTreeMap::new(),
            adapters: BTreeMap::new(),
            retired: BTreeMap::new(),
        };
        for key in keys {
            self.add_key(&mut record, key)?;
        }
        Ok(record)
    }

    fn add_key(&self, record: &mut TenantRecord, key: &KeyRecord) -> Result<Vec<Event>, RegistryError> {
        bounds::check_key(key)?;
        if self.key_owners.contains_key(&key.id) || record.keys.contains_key(&key.id) {
            // Names no owner: it may be another tenant's key.
            return Err(RegistryError::Exists { what: "API key".into(), name: key.id.to_string() });
        }
        if record.keys.len() >= bounds::KEYS_MAX {
            let dead = record.keys.values().filter(|old| !old.is_live(key.created_at_s));
            let oldest = dead.min_by_key(|old| (old.created_at_s, old.id)).map(|old| old.id);
            let oldest = oldest.ok_or(RegistryError::LimitReached {
                what: "live API keys of one tenant".into(),
                max: bounds::KEYS_MAX,
                hint: "revoke one that is no longer used".into(),
            })?;
            record.keys.remove(&oldest);
        }
        record.keys.insert(key.id, key.clone());
        Ok(vec![Event::KeyAdded { tenant: record.tenant().clone(), key_id: key.id }])
    }
}

/// A task must not be spelled like a base of the tenant: a request could mean either.
fn check_task_name(task: &TaskName, bases: &[shared::id::BaseName]) -> Result<(), RegistryError> {
    if bases.iter().any(|base| base.as_str() == task.as_str()) {
        return Err(RegistryError::Conflict(format!(
            "{task} is the name of a base model; hint: name the task differently"
        )));
    }
    Ok(())
}

fn update(record: &mut TenantRecord, patch: &TenantPatch) -> Result<Vec<Event>, RegistryError> {
    bounds::check_patch(patch)?;
    let former = record.clone();
    let TenantPatch { display_name, contact, tier, weight, bases, allow_base, fallback, limits, .. } = patch.clone();
    let contract = Arc::make_mut(&mut record.contract);
    if let Some(bases) = bases {
        let orphan = record.adapters.keys().find(|name| !bases.contains(&name.base));
        if let Some(name) = orphan {
            let base = &name.base;
            return Err(RegistryError::Conflict(format!("base {base} cannot go while version {name} is built on it")));
        }
        contract.tasks.keys().try_for_each(|task| check_task_name(task, &bases))?;
        contract.bases = bases;
    }
    contract.tier = tier.unwrap_or(contract.tier);
    contract.weight = weight.unwrap_or(contract.weight);
    contract.allow_base = allow_base.unwrap_or(contract.allow_base);
    contract.fallback = fallback.unwrap_or(contract.fallback);
    contract.limits = limits.unwrap_or(contract.limits);
    contract.region = patch.region.clone().unwrap_or_else(|| contract.region.take());
    contract.pool = patch.pool.clone().unwrap_or_else(|| contract.pool.take());
    contract.cost_center = patch.cost_center.clone().unwrap_or_else(|| contract.cost_center.take());
    record.display_name = display_name.unwrap_or_else(|| std::mem::take(&mut record.display_name));
    record.contact = contact.unwrap_or_else(|| record.contact.take());
    let events = vec![Event::TenantUpdated { tenant: record.tenant().clone() }];
    Ok(if *record == former { Vec::new() } else { events })
}

fn set_state(record: &mut TenantRecord, state: TenantState) -> Vec<Event> {
    if record.contract.state == state {
        return Vec::new();
    }
    Arc::make_mut(&mut record.contract).state = state;
    let tenant = record.tenant().clone();
    vec![match state {
        TenantState::Active => Event::TenantResumed { tenant },
        TenantState::Suspended => Event::TenantSuspended { tenant },
    }]
}

fn revoke_key(record: &mut TenantRecord, key_id: KeyId, at_s: u64) -> Result<Vec<Event>, RegistryError> {
    let tenant = record.tenant().clone();
    let missing = || RegistryError::NotFound { what: "API key".into(), name: key_id.to_string() };
    let key = record.keys.get_mut(&key_id).ok_or_else(missing)?;
    if key.revoked_at_s.is_some() {
        return Ok(Vec::new());
    }
    key.revoked_at_s = Some(at_s);
    Ok(vec![Event::KeyRevoked { tenant, key_id }])
}

fn add_version(record: &mut TenantRecord, adapter: &AdapterRecord) -> Result<Vec<Event>, RegistryError> {
    let AdapterRecord { name, hash, .. } = adapter;
    bounds::check_adapter(adapter)?;
    if name.client != *record.tenant() {
        let rule = format!("start it with {}-", record.tenant());
        return Err(RegistryError::Invalid { field: "version name".into(), found: name.to_string(), rule });
    }
    if !record.contract.bases.contains(&name.base) {
        let rule = "use a base that the contract allows".to_owned();
        return Err(RegistryError::Invalid { field: "version base".into(), found: name.base.to_string(), rule });
    }
    let bound_to = record.contract.versions.get(name).or_else(|| record.retired.get(name));
    if bound_to.is_some_and(|bound| bound != hash) {
        return Err(RegistryError::Conflict(format!(
            "{name} holds other content, and a version never changes; hint: upload it under the next version number"
        )));
    }
    if record.adapters.contains_key(name) {
        return Ok(Vec::new());
    }
    if record.adapters.len() >= bounds::VERSIONS_MAX {
        let hint = "remove versions that no task points at";
        return Err(RegistryError::LimitReached {
            what: "versions of one tenant".into(),
            max: bounds::VERSIONS_MAX,
            hint: hint.into(),
        });
    }
    if bound_to.is_none() && record.adapters.len() + record.retired.len() >= bounds::VERSIONS_EVER_MAX {
        let hint = "continue under another tenant";
        return Err(RegistryError::LimitReached {
            what: "versions ever".into(),
            max: bounds::VERSIONS_EVER_MAX,
            hint: hint.into(),
        });
    }
    record.retired.remove(name);
    Arc::make_mut(&mut record.contract).versions.insert(name.clone(), *hash);
    record.adapters.insert(name.clone(), adapter.clone());
    Ok(vec![Event::AdapterVersionAdded { name: name.clone(), hash: *hash }])
}

fn remove_version(record: &mut TenantRecord, name: &AdapterName) -> Result<Vec<Event>, RegistryError> {
    let in_use = record.contract.tasks.iter().find(|(_, to)| to.as_ref().is_some_and(|to| to.adapter == *name));
    if let Some((task, _)) = in_use {
        return Err(RegistryError::Conflict(format!("task {task} points at {name}; hint: point it elsewhere first")));
    }
    let missing = || RegistryError::NotFound { what: "adapter version".into(), name: name.to_string() };
    let adapter = record.adapters.remove(name).ok_or_else(missing)?;
    Arc::make_mut(&mut record.contract).versions.remove(name);
    record.retired.insert(name.clone(), adapter.hash);
    let still_used = record.adapters.values().any(|other| other.hash == adapter.hash);
    Ok(vec![Event::AdapterVersionRemoved { name: name.clone(), hash: adapter.hash, still_used }])
}

fn point_task(
    record: &mut TenantRecord,
    task: &TaskName,
    version: Option<&AdapterName>,
) -> Result<Vec<Event>, RegistryError> {
    check_task_name(task, &record.contract.bases)?;
    let missing =
        |name: &AdapterName| RegistryError::NotFound { what: "adapter version".into(), name: name.to_string() };
    let to = match version {
        None => None,
        Some(name) => {
            let hash = *record.contract.versions.get(name).ok_or_else(|| missing(name))?;
            Some(TaskPointer { adapter: name.clone(), hash })
        }
    };
    let tasks = &record.contract.tasks;
    if tasks.get(task) == Some(&to) {
        return Ok(Vec::new());
    }
    if !tasks.contains_key(task) && tasks.len() >= bounds::TASKS_MAX {
        let hint = "remove tasks that are no longer asked for";
        return Err(RegistryError::LimitReached {
            what: "tasks of one tenant".into(),
            max: bounds::TASKS_MAX,
            hint: hint.into(),
        });
    }
    Arc::make_mut(&mut record.contract).tasks.insert(task.clone(), to);
    Ok(vec![Event::TaskPointed { tenant: record.tenant().clone(), task: task.clone(), version: version.cloned() }])
}

fn remove_task(record: &mut TenantRecord, task: &TaskName) -> Result<Vec<Event>, RegistryError> {
    if Arc::make_mut(&mut record.contract).tasks.remove(task).is_none() {
        return Err(RegistryError::NotFound { what: "task".into(), name: task.to_string() });
    }
    Ok(vec![Event::TaskRemoved { tenant: record.tenant().clone(), task: task.clone() }])
}

#[cfg(test)]
mod tests;
