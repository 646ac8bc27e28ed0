//! What the registry derives from the cluster key, and the random parts of commands.
//!
//! The state stays pure because everything random is made here, before a command is sent.

use std::collections::BTreeSet;
use std::fmt;

use shared::hash::ContentHash;
use shared::id::TenantId;
use shared::seal::{ClusterKey, SealError, TenantKey, WrappedKey};

use super::command::{Action, TenantSpec};
use crate::auth::{ApiKey, KeyRecord, Pepper, Scope};

/// Cluster key and pepper of a node.
pub struct Secrets {
    cluster: ClusterKey,
    pepper: Pepper,
}

impl Secrets {
    /// Derives everything from the cluster key.
    pub fn new(cluster: ClusterKey) -> Self {
        Self { pepper: Pepper::of(&cluster), cluster }
    }

    /// The cluster's root secret.
    pub fn cluster(&self) -> &ClusterKey {
        &self.cluster
    }

    /// The key of the API-key hashes.
    pub fn pepper(&self) -> &Pepper {
        &self.pepper
    }

    /// Tells cluster keys apart; stored in the registry.
    pub fn fingerprint(&self) -> ContentHash {
        self.cluster.fingerprint()
    }

    /// A fresh API key and its record.
    pub fn api_key(&self, scopes: BTreeSet<Scope>, at_s: u64, expires_at_s: Option<u64>) -> (ApiKey, KeyRecord) {
        ApiKey::generate(&self.pepper, scopes, at_s, expires_at_s)
    }

    /// A command that creates `spec` with a fresh tenant key and the given API keys.
    pub fn create_tenant(&self, spec: TenantSpec, keys: Vec<KeyRecord>, at_s: u64) -> Action {
        let wrapped_key = self.cluster.wrap(&spec.tenant, &TenantKey::random());
        Action::CreateTenant { spec: Box::new(spec), wrapped_key, keys, at_s }
    }

    /// The tenant's key.
    ///
    /// # Errors
    /// When the wrapped key was made by another cluster or for another tenant.
    pub fn unwrap(&self, tenant: &TenantId, wrapped: &WrappedKey) -> Result<TenantKey, SealError> {
        self.cluster.unwrap(tenant, wrapped)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(..)")
    }
}
