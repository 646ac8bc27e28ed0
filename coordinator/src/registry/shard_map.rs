//! An ordered map that is cheap to copy and change: 256 shared shards, of which a change copies one.
//!
//! Serves the snapshot, which is published anew after every command: with 10,000 tenants a change copies
//! 256 pointers and about 40 entries. Order across shards means nothing; who lists entries sorts them.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Shards: with the 100,000 tenants allowed, a shard has about 400 entries.
const SHARDS: usize = 256;

/// A key that knows its shard.
pub(super) trait Sharded: Ord + Clone {
    /// Bytes that are spread over the shards.
    fn shard_bytes(&self) -> &[u8];
}

impl Sharded for shared::id::TenantId {
    fn shard_bytes(&self) -> &[u8] {
        self.as_str().as_bytes()
    }
}

impl Sharded for crate::auth::KeyId {
    fn shard_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct ShardMap<K, V> {
    shards: Box<[Arc<BTreeMap<K, V>>]>,
}

impl<K: Sharded, V: Clone> ShardMap<K, V> {
    /// No entries.
    pub(super) fn new() -> Self {
        Self { shards: vec![Arc::default(); SHARDS].into_boxed_slice() }
    }

    /// FNV-1a: spreads short names well, and only the operator chooses them.
    fn shard(key: &K) -> usize {
        let fnv = |hash: u32, &byte: &u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        key.shard_bytes().iter().fold(0x811c_9dc5, fnv) as usize % SHARDS
    }

    /// The value of `key`.
    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.shards[Self::shard(key)].get(key)
    }

    /// Sets the value of `key`; copies its shard if another map shares it.
    pub(super) fn insert(&mut self, key: K, value: V) {
        Arc::make_mut(&mut self.shards[Self::shard(&key)]).insert(key, value);
    }

    /// Takes `key` out.
    pub(super) fn remove(&mut self, key: &K) {
        let shard = &mut self.shards[Self::shard(key)];
        if shard.contains_key(key) {
            Arc::make_mut(shard).remove(key);
        }
    }

    /// The shards in which this map differs from `before`: as they were, and as they are.
    pub(super) fn differing<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (&'a BTreeMap<K, V>, &'a BTreeMap<K, V>)> {
        let pairs = before.shards.iter().zip(&self.shards);
        pairs.filter(|(was, is)| !Arc::ptr_eq(was, is)).map(|(was, is)| (&**was, &**is))
    }

    /// All values, in no useful order.
    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }
}
