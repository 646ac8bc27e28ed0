//! What can be asked of the registry, and what then happened.
//!
//! A command carries everything random or read from a clock (wrapped keys, key hashes, times), so that
//! applying it is pure and every replica gets the same state. The admin API builds commands (with the
//! help of [`super::secrets`]); the state applies them; events tell the rest of the node.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize};

use shared::hash::ContentHash;
use shared::id::{AdapterName, BaseName, TaskName, TenantId};
use shared::seal::WrappedKey;
use shared::tenant::{Fallback, Limits, Tier};

use super::record::AdapterRecord;
use crate::auth::{KeyId, KeyRecord};

/// What the operator decides about a new tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantSpec {
    /// Identifier, never changed.
    pub tenant: TenantId,
    /// Name for people, at most 200 bytes.
    pub display_name: String,
    /// Whom to write to, at most 200 bytes.
    pub contact: Option<String>,
    /// Service class.
    pub tier: Tier,
    /// Share within the tier, 1 to 1000.
    pub weight: u32,
    /// Base models it may use, 1 to 16; the first is the default.
    pub bases: Vec<BaseName>,
    /// Whether requests may name a base model.
    pub allow_base: bool,
    /// What happens without the adapter.
    pub fallback: Fallback,
    /// Numeric limits; the caller fills in the tier's defaults.
    pub limits: Limits,
    /// Region or data boundary, at most 63 bytes.
    pub region: Option<String>,
    /// Pool of nodes, at most 63 bytes; `None` is the pool `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where usage rolls up, at most 200 bytes.
    pub cost_center: Option<String>,
    /// Tasks that exist from the start, without an adapter.
    pub tasks: BTreeSet<TaskName>,
}

/// Changes to a tenant; `None` leaves a field as it is, `Some(None)` clears it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantPatch {
    /// Name for people.
    pub display_name: Option<String>,
    /// Whom to write to.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub contact: Option<Option<String>>,
    /// Service class.
    pub tier: Option<Tier>,
    /// Share within the tier.
    pub weight: Option<u32>,
    /// Base models; one that a version still uses cannot be taken away.
    pub bases: Option<Vec<BaseName>>,
    /// Whether requests may name a base model.
    pub allow_base: Option<bool>,
    /// What happens without the adapter.
    pub fallback: Option<Fallback>,
    /// Numeric limits.
    pub limits: Option<Limits>,
    /// Region or data boundary.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub region: Option<Option<String>>,
    /// Pool of nodes.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub pool: Option<Option<String>>,
    /// Where usage rolls up.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub cost_center: Option<Option<String>>,
}

/// Tells a field that is `null` from one that is absent.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// One change of the registry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Apply only if the tenant's contract has this epoch (0: only if there is no such tenant).
    pub expected_epoch: Option<u64>,
    /// What to change.
    pub action: Action,
}

impl Command {
    /// The epoch of the tenant's contract must be this one, else nothing happens.
    #[must_use]
    pub fn if_epoch(mut self, epoch: u64) -> Self {
        self.expected_epoch = Some(epoch);
        self
    }
}

/// Names one call of a command, so that trying it again applies it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CommandId([u64; 2]);

impl CommandId {
    /// A fresh one.
    pub fn random() -> Self {
        Self(random_id())
    }
}

/// 128 random bits.
///
/// # Panics
/// When the operating system has no randomness.
pub(super) fn random_id() -> [u64; 2] {
    let draw = || {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
        u64::from_le_bytes(bytes)
    };
    [draw(), draw()]
}

/// A command on its way into the replicated log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// The same for every attempt.
    pub id: CommandId,
    /// What to change.
    pub command: Command,
}

impl From<Action> for Command {
    fn from(action: Action) -> Self {
        Self { expected_epoch: None, action }
    }
}

/// What a command changes. Each touches exactly one tenant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Adds a tenant.
    CreateTenant {
        /// Its contract.
        spec: Box<TenantSpec>,
        /// Fresh key of the tenant, under the cluster key.
        wrapped_key: WrappedKey,
        /// First API keys.
        keys: Vec<KeyRecord>,
        /// Wall seconds since 1970.
        at_s: u64,
    },
    /// Changes contract fields.
    UpdateTenant {
        /// Whose.
        tenant: TenantId,
        /// What.
        patch: Box<TenantPatch>,
    },
    /// Stops serving; keeps everything.
    SuspendTenant {
        /// Whom.
        tenant: TenantId,
    },
    /// Serves again.
    ResumeTenant {
        /// Whom.
        tenant: TenantId,
    },
    /// Erases the tenant: its wrapped key is destroyed, a tombstone stays.
    DeleteTenant {
        /// Whom.
        tenant: TenantId,
        /// Wall seconds since 1970.
        at_s: u64,
    },
    /// Adds an API key.
    AddKey {
        /// Whose.
        tenant: TenantId,
        /// Its record.
        key: KeyRecord,
    },
    /// Ends an API key at once.
    RevokeKey {
        /// Whose.
        tenant: TenantId,
        /// Which.
        key_id: KeyId,
        /// Wall seconds since 1970.
        at_s: u64,
    },
    /// Registers an uploaded version. A name never changes its content, not even after removal.
    AddAdapterVersion {
        /// Whose.
        tenant: TenantId,
        /// What was checked and stored.
        adapter: AdapterRecord,
    },
    /// Takes a version away; refused while a task points at it.
    RemoveAdapterVersion {
        /// Whose.
        tenant: TenantId,
        /// Which.
        name: AdapterName,
    },
    /// Creates a task or points it elsewhere.
    PointTask {
        /// Whose.
        tenant: TenantId,
        /// Which.
        task: TaskName,
        /// Where to; `None` is a task whose adapter is not there yet.
        version: Option<AdapterName>,
    },
    /// Takes a task away; its versions stay.
    RemoveTask {
        /// Whose.
        tenant: TenantId,
        /// Which.
        task: TaskName,
    },
}

impl Action {
    /// The one tenant this touches.
    pub fn tenant(&self) -> &TenantId {
        match self {
            Self::CreateTenant { spec, .. } => &spec.tenant,
            Self::UpdateTenant { tenant, .. }
            | Self::SuspendTenant { tenant }
            | Self::ResumeTenant { tenant }
            | Self::DeleteTenant { tenant, .. }
            | Self::AddKey { tenant, .. }
            | Self::RevokeKey { tenant, .. }
            | Self::AddAdapterVersion { tenant, .. }
            | Self::RemoveAdapterVersion { tenant, .. }
            | Self::PointTask { tenant, .. }
            | Self::RemoveTask { tenant, .. } => tenant,
        }
    }
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A tenant exists.
    TenantCreated {
        /// Whom.
        tenant: TenantId,
    },
    /// Contract fields changed.
    TenantUpdated {
        /// Whose.
        tenant: TenantId,
    },
    /// Requests are refused from now on.
    TenantSuspended {
        /// Whose.
        tenant: TenantId,
    },
    /// Requests are served again.
    TenantResumed {
        /// Whose.
        tenant: TenantId,
    },
    /// The tenant and its key are gone; caches must drop what they hold of it.
    TenantDeleted {
        /// Whom.
        tenant: TenantId,
        /// Content it had stored.
        adapters: Vec<ContentHash>,
    },
    /// A key works.
    KeyAdded {
        /// Whose.
        tenant: TenantId,
        /// Which.
        key_id: KeyId,
    },
    /// A key no longer works.
    KeyRevoked {
        /// Whose.
        tenant: TenantId,
        /// Which.
        key_id: KeyId,
    },
    /// A version can be used.
    AdapterVersionAdded {
        /// Which; its client is the owner.
        name: AdapterName,
        /// Content.
        hash: ContentHash,
    },
    /// A version is gone.
    AdapterVersionRemoved {
        /// Which; its client is the owner.
        name: AdapterName,
        /// Content.
        hash: ContentHash,
        /// Whether another version of this tenant still holds the same content.
        still_used: bool,
    },
    /// A task points elsewhere.
    TaskPointed {
        /// Whose.
        tenant: TenantId,
        /// Which.
        task: TaskName,
        /// Where to.
        version: Option<AdapterName>,
    },
    /// A task is gone.
    TaskRemoved {
        /// Whose.
        tenant: TenantId,
        /// Which.
        task: TaskName,
    },
}

/// Answer to an accepted command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Registry epoch after it; when something changed, also the epoch of the tenant's contract.
    pub epoch: u64,
    /// What happened; empty if everything already was as asked, and then the epoch did not move.
    pub events: Vec<Event>,
}
