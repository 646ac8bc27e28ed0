//! KV pages: who holds which, which are free, and what each tenant's prefix cache keeps.
//!
//! The engine allocates, shares, publishes and releases pages here; it runs no step while pages change hands.
//! A full page may be *published* under a key once the step that wrote it has finished; a later sequence of the
//! same tenant with the same key shares it read-only. Keys are a keyed BLAKE3 chain over (base, adapter content,
//! all tokens so far), and every tenant has an index of its own, so that no page is ever shared between tenants,
//! adapters or versions (RELIABILITY T2, T3).
//!
//! **Invariant**: every page is used, cached or free: `used + cached + free = n_pages`.

use std::collections::{BTreeMap, HashMap};

use shared::hash::ContentHash;
use shared::id::TenantId;

/// A tenant's floor lapses once this many times the pool's pages were allocated since its cache was last used: whoever
/// went away does not keep pages from those who stayed. Allocations are the pool's only clock.
const FLOOR_LAPSE_ROUNDS: u64 = 4;

/// Names the contents of a full page: everything that decides its keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageKey([u8; 32]);

impl PageKey {
    /// The parent of a sequence's first page. `secret` is the tenant's cache secret.
    pub fn root(secret: &[u8; 32], base: ContentHash, adapter: Option<ContentHash>) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(b"kv page root 1");
        hasher.update(&base.0);
        match adapter {
            None => hasher.update(b"base"),
            Some(hash) => hasher.update(b"adapter").update(&hash.0),
        };
        Self(*hasher.finalize().as_bytes())
    }

    /// The page after this one, holding `tokens`.
    pub fn next(self, secret: &[u8; 32], tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Sizes of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Pages in all.
    pub n_pages: u32,
    /// Most unreferenced pages that one tenant's cache keeps; 0 turns the prefix cache off.
    pub tenant_quota_pages: u32,
    /// Unreferenced pages of a tenant that other tenants' needs never evict, as long as its cache is in use (four
    /// times `n_pages` allocations without a hit or a page added end that). Lowered when the floors of all tenants
    /// together would leave less than `sequence_pages_max`.
    pub tenant_floor_pages: u32,
    /// Pages of the longest sequence: always obtainable when nothing else runs.
    pub sequence_pages_max: u32,
}

/// How the pages are spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Held by sequences.
    pub used: u32,
    /// Held by nobody but findable in a tenant's cache.
    pub cached: u32,
    /// Empty.
    pub free: u32,
}

#[derive(Debug, Clone, Default)]
struct Page {
    refs: u32,
    /// Set while the page is used or cached.
    tenant: Option<TenantId>,
    /// Set while the page can be found in its tenant's index.
    key: Option<PageKey>,
    /// Place in the tenant's `idle` list while cached.
    stamp: u64,
}

#[derive(Debug, Default)]
struct TenantPages {
    index: HashMap<PageKey, u32>,
    /// Cached pages, least recently released first.
    idle: BTreeMap<u64, u32>,
    /// The pool's allocations when a page was last found here or came to be cached.
    used_at: u64,
}

/// The pages of one engine.
#[derive(Debug)]
pub struct BlockPool {
    config: PoolConfig,
    pages: Vec<Page>,
    free: Vec<u32>,
    tenants: BTreeMap<TenantId, TenantPages>,
    n_used: u32,
    n_cached: u32,
    stamps: u64,
    n_allocated: u64,
    freed: Vec<u32>,
}

impl BlockPool {
    /// A pool with all pages free.
    pub fn new(config: PoolConfig) -> Self {
        Self {
            config,
            pages: vec![Page::default(); config.n_pages as usize],
            // Popped from the end: low ids first, so that a lightly used pool touches little memory.
            free: (0..config.n_pages).rev().collect(),
            tenants: BTreeMap::new(),
            n_used: 0,
            n_cached: 0,
            stamps: 0,
            n_allocated: 0,
            freed: Vec::new(),
        }
    }

    /// The longest run of `keys` that the tenant has pages for, in order. The caller holds each of them.
    pub fn lookup(&mut self, tenant: &TenantId, keys: &[PageKey]) -> Vec<u32> {
        let Some(owned) = self.tenants.get_mut(tenant) else {
            return Vec::new();
        };
        let found: Vec<u32> = keys.iter().map_while(|key| owned.index.get(key).copied()).collect();
        if !found.is_empty() {
            owned.used_at = self.n_allocated;
        }
        for &page in &found {
            assert_eq!(self.pages[page as usize].tenant.as_ref(), Some(tenant), "a page is indexed by its tenant only");
            self.share(page);
        }
        found
    }

    /// An empty page for the tenant, evicting from caches if need be; `None` when only preemption could free one.
    pub fn allocate(&mut self, tenant: &TenantId) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let victim = self.victim(tenant)?;
                self.evict(victim);
                self.free.pop().expect("the evicted page is free")
            }
        };
        let slot = &mut self.pages[page as usize];
        assert!(slot.refs == 0 && slot.key.is_none() && slot.tenant.is_none(), "a free page belongs to nobody");
        slot.refs = 1;
        slot.tenant = Some(tenant.clone());
        self.n_used += 1;
        self.n_allocated += 1;
        Some(page)
    }

    /// One more holder of a page that is used or cached.
    pub fn share(&mut self, page: u32) {
        let slot = &mut self.pages[page as usize];
        let tenant = slot.tenant.as_ref().expect("only pages with an owner are shared");
        if slot.refs == 0 {
            self.tenants.get_mut(tenant).expect("a cached page's tenant has a cache").idle.remove(&slot.stamp);
            self.n_cached -= 1;
            self.n_used += 1;
        }
        slot.refs += 1;
    }

    /// Makes a held, full page findable. Its step must have finished. A key that another page already has is left there.
    pub fn publish(&mut self, page: u32, key: PageKey) {
        if self.config.tenant_quota_pages == 0 {
            return;
        }
        let slot = &mut self.pages[page as usize];
        assert!(slot.refs > 0, "only held pages are published");
        let tenant = slot.tenant.clone().expect("a held page has an owner");
        if slot.key.is_none() {
            let index = &mut self.tenants.entry(tenant).or_default().index;
            if let std::collections::hash_map::Entry::Vacant(entry) = index.entry(key) {
                entry.insert(page);
                slot.key = Some(key);
            }
        }
    }

    /// One holder less. The last one's page stays in the tenant's cache if it was published, else it is freed.
    pub fn release(&mut self, page: u32) {
        let slot = &mut self.pages[page as usize];
        assert!(slot.refs > 0, "only held pages are released");
        slot.refs -= 1;
        if slot.refs > 0 {
            return;
        }
        self.n_used -= 1;
        if slot.key.is_none() {
            self.free_page(page);
            return;
        }
        self.stamps += 1;
        slot.stamp = self.stamps;
        let tenant = slot.tenant.clone().expect("a held page has an owner");
        let owned = self.tenants.get_mut(&tenant).expect("a published page's tenant has a cache");
        owned.idle.insert(self.stamps, page);
        owned.used_at = self.n_allocated;
        self.n_cached += 1;
        if owned.idle.len() > self.config.tenant_quota_pages as usize {
            let (_, &oldest) = owned.idle.first_key_value().expect("just inserted");
            self.evict(oldest);
        }
    }

    /// Releases a sequence's pages, the last first, so that its beginning stays cached longest.
    pub fn release_all(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            self.release(page);
        }
    }

    /// Forgets a tenant's cache (erasure, a new cache secret). Pages still held become private to their holders.
    pub fn forget(&mut self, tenant: &TenantId) {
        let idle: Vec<u32> =
            self.tenants.get(tenant).map(|owned| owned.idle.values().copied().collect()).unwrap_or_default();
        idle.into_iter().for_each(|page| self.evict(page));
        if let Some(owned) = self.tenants.remove(tenant) {
            owned.index.into_values().for_each(|page| self.pages[page as usize].key = None);
        }
    }

    /// Pages the tenant could allocate now without preempting anyone.
    pub fn available(&self, tenant: &TenantId) -> u32 {
        let own = self.tenants.get(tenant);
        self.available_to_any()
            + own.map_or(0, |owned| (owned.idle.len() as u32).min(self.floor_of(owned, self.floor())))
    }

    /// Pages that any tenant could allocate now without preempting anyone.
    pub fn available_to_any(&self) -> u32 {
        let floor = self.floor();
        let spare = |owned: &TenantPages| (owned.idle.len() as u32).saturating_sub(self.floor_of(owned, floor));
        self.free.len() as u32 + self.tenants.values().map(spare).sum::<u32>()
    }

    /// Takes the ids of pages freed since the last call.
    pub fn take_freed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.freed)
    }

    /// How the pages are spread.
    pub fn usage(&self) -> PoolUse {
        PoolUse { used: self.n_used, cached: self.n_cached, free: self.free.len() as u32 }
    }

    /// Checks the counts; cheap enough for every step.
    ///
    /// # Panics
    /// When a page is lost or counted twice.
    pub fn assert_counts(&self) {
        let PoolUse { used, cached, free } = self.usage();
        assert_eq!(used + cached + free, self.config.n_pages, "every page is used, cached or free");
    }

    /// Checks every page against every index; for tests.
    ///
    /// # Panics
    /// When they disagree.
    pub fn assert_consistent(&self) {
        self.assert_counts();
        assert_eq!(self.pages.iter().filter(|page| page.refs > 0).count() as u32, self.n_used);
        for (tenant, owned) in &self.tenants {
            for (key, &page) in &owned.index {
                let slot = &self.pages[page as usize];
                assert_eq!((slot.tenant.as_ref(), slot.key.as_ref()), (Some(tenant), Some(key)));
                assert!(slot.refs > 0 || owned.idle.get(&slot.stamp) == Some(&page));
            }
            assert!(owned.idle.values().all(|&page| self.pages[page as usize].refs == 0));
            assert!(owned.idle.len() <= self.config.tenant_quota_pages as usize);
        }
        for &page in &self.free {
            let slot = &self.pages[page as usize];
            assert!(slot.refs == 0 && slot.tenant.is_none() && slot.key.is_none());
        }
    }

    /// A tenant's protected pages: `floor`, or none once it has lapsed.
    fn floor_of(&self, owned: &TenantPages, floor: u32) -> u32 {
        let lapse = FLOOR_LAPSE_ROUNDS * u64::from(self.config.n_pages);
        if self.n_allocated - owned.used_at > lapse { 0 } else { floor }
    }

    /// The configured floor, or less so that the longest sequence still fits. Tenants whose floors have lapsed count
    /// while they have pages: no floor rises because another one lapsed.
    fn floor(&self) -> u32 {
        let caching = self.tenants.values().filter(|owned| !owned.idle.is_empty()).count() as u32;
        let protectable = self.config.n_pages.saturating_sub(self.config.sequence_pages_max);
        self.config.tenant_floor_pages.min(protectable / caching.max(1))
    }

    /// The least recently released cached page that `tenant` may take: its own, or one above its owner's floor.
    fn victim(&self, tenant: &TenantId) -> Option<u32> {
        let floor = self.floor();
        let above_floor = |owned: &TenantPages| owned.idle.len() > self.floor_of(owned, floor) as usize;
        let allowed = self.tenants.iter().filter(|&(owner, owned)| owner == tenant || above_floor(owned));
        allowed.filter_map(|(_, owned)| owned.idle.first_key_value()).min().map(|(_, &page)| page)
    }

    fn evict(&mut self, page: u32) {
        let slot = &mut self.pages[page as usize];
        let tenant = slot.tenant.clone().expect("a cached page has an owner");
        let owned = self.tenants.get_mut(&tenant).expect("a cached page's tenant has a cache");
        owned.idle.remove(&slot.stamp).expect("an evicted page is idle");
        let key = slot.key.take().expect("a cached page has a key");
        owned.index.remove(&key);
        if owned.index.is_empty() {
            self.tenants.remove(&tenant);
        }
        self.n_cached -= 1;
        self.free_page(page);
    }

    fn free_page(&mut self, page: u32) {
        let slot = &mut self.pages[page as usize];
        slot.tenant = None;
        slot.key = None;
        self.free.push(page);
        self.freed.push(page);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        name.parse().expect("valid")
    }

    fn pool(n_pages: u32, quota: u32, floor: u32) -> BlockPool {
        let config =
            PoolConfig { n_pages, tenant_quota_pages: quota, tenant_floor_pages: floor, sequence_pages_max: 2 };
        BlockPool::new(config)
    }

    fn key(secret: u8, tokens: &[u32]) -> PageKey {
        let secret = [secret; 32];
        PageKey::root(&secret, ContentHash([0; 32]), None).next(&secret, tokens)
    }

    /// Allocates, publishes and releases one page.
    fn cache(pool: &mut BlockPool, owner: &TenantId, key: PageKey) -> u32 {
        let page = pool.allocate(owner).expect("a page");
        pool.publish(page, key);
        pool.release(page);
        page
    }

    #[test]
    fn keys_differ_by_secret_base_adapter_parent_and_tokens() {
        let (base, other) = (ContentHash([1; 32]), ContentHash([2; 32]));
        let roots = [
            PageKey::root(&[0; 32], base, None),
            PageKey::root(&[1; 32], base, None),
            PageKey::root(&[0; 32], other, None),
            PageKey::root(&[0; 32], base, Some(other)),
            PageKey::root(&[0; 32], base, Some(base)),
            PageKey::root(&[0; 32], base, None).next(&[0; 32], &[1, 2]),
            PageKey::root(&[0; 32], base, None).next(&[0; 32], &[2, 1]),
            PageKey::root(&[0; 32], base, None).next(&[0; 32], &[1]).next(&[0; 32], &[2]),
        ];
        for (at, root) in roots.iter().enumerate() {
            assert!(!roots[..at].contains(root), "key {at} repeats");
        }
    }

    #[test]
    fn a_published_page_is_found_by_its_tenant_only() {
        let mut pool = pool(4, 4, 0);
        let page = cache(&mut pool, &tenant("a"), key(1, &[1]));
        assert!(pool.lookup(&tenant("b"), &[key(1, &[1])]).is_empty(), "not even with the same key");
        assert_eq!(pool.lookup(&tenant("a"), &[key(1, &[1]), key(1, &[2])]), [page]);
        assert_eq!(pool.usage(), PoolUse { used: 1, cached: 0, free: 3 });
    }

    #[test]
    fn an_unpublished_page_is_freed_and_reported() {
        let mut pool = pool(2, 2, 0);
        let page = pool.allocate(&tenant("a")).expect("a page");
        pool.release(page);
        assert_eq!(pool.take_freed(), [page]);
        assert!(pool.take_freed().is_empty());
        assert_eq!(pool.usage().free, 2);
    }

    #[test]
    fn a_tenant_over_its_quota_loses_its_own_oldest_page() {
        let mut pool = pool(8, 2, 0);
        let oldest = cache(&mut pool, &tenant("a"), key(1, &[1]));
        cache(&mut pool, &tenant("b"), key(2, &[1]));
        cache(&mut pool, &tenant("a"), key(1, &[2]));
        cache(&mut pool, &tenant("a"), key(1, &[3]));
        assert_eq!(pool.take_freed(), [oldest]);
        assert_eq!(pool.lookup(&tenant("b"), &[key(2, &[1])]).len(), 1);
        pool.assert_consistent();
    }

    #[test]
    fn others_needs_never_evict_below_the_floor() {
        let mut pool = pool(6, 6, 2);
        for token in 0..3 {
            cache(&mut pool, &tenant("a"), key(1, &[token]));
        }
        let needy = tenant("b");
        assert_eq!(pool.available(&needy), 4);
        let held: Vec<u32> = std::iter::from_fn(|| pool.allocate(&needy)).collect();
        assert_eq!(held.len(), 4, "three were free, one was above the floor");
        assert!(pool.lookup(&tenant("a"), &[key(1, &[0])]).is_empty(), "the oldest went");
        assert_eq!(pool.lookup(&tenant("a"), &[key(1, &[1])]).len(), 1);
        assert_eq!(pool.lookup(&tenant("a"), &[key(1, &[2])]).len(), 1);
    }

    #[test]
    fn the_floor_of_an_unused_cache_lapses_and_use_renews_it() {
        let mut pool = pool(6, 6, 2);
        let (idle, busy, needy) = (tenant("a"), tenant("b"), tenant("c"));
        for token in 0..2 {
            cache(&mut pool, &idle, key(1, &[token]));
            cache(&mut pool, &busy, key(2, &[token]));
        }
        for _ in 0..30 {
            let page = pool.allocate(&needy).expect("two are free");
            pool.release(page);
            pool.lookup(&busy, &[key(2, &[0])]).into_iter().for_each(|page| pool.release(page));
        }
        assert_eq!(pool.available(&needy), 4, "two free, two of the unused cache");
        let held: Vec<u32> = std::iter::from_fn(|| pool.allocate(&needy)).collect();
        assert_eq!(held.len(), 4);
        assert!(pool.lookup(&idle, &[key(1, &[0])]).is_empty() && pool.lookup(&idle, &[key(1, &[1])]).is_empty());
        assert_eq!(pool.lookup(&busy, &[key(2, &[0]), key(2, &[1])]).len(), 2, "in use, so protected");
        pool.assert_consistent();
    }

    #[test]
    fn floors_shrink_so_that_the_longest_sequence_fits() {
        let mut pool = pool(4, 4, 4);
        for token in 0..2 {
            cache(&mut pool, &tenant("a"), key(1, &[token]));
            cache(&mut pool, &tenant("b"), key(2, &[token]));
        }
        assert_eq!(pool.usage().free, 0);
        assert_eq!(pool.available(&tenant("c")), 2, "sequence_pages_max");
    }

    #[test]
    fn the_end_of_a_released_sequence_goes_first() {
        let mut pool = pool(2, 2, 0);
        let owner = tenant("a");
        let mut pages: Vec<u32> = (0..2).map(|_| pool.allocate(&owner).expect("a page")).collect();
        pool.publish(pages[0], key(1, &[0]));
        pool.publish(pages[1], key(1, &[1]));
        pool.release_all(&mut pages);
        pool.allocate(&owner).expect("evicts one");
        assert_eq!(pool.lookup(&owner, &[key(1, &[0])]).len(), 1, "the beginning stayed");
    }

    #[test]
    fn a_forgotten_tenant_leaves_nothing_to_find() {
        let mut pool = pool(4, 4, 4);
        let owner = tenant("a");
        cache(&mut pool, &owner, key(1, &[0]));
        let held = pool.allocate(&owner).expect("a page");
        pool.publish(held, key(1, &[1]));
        pool.forget(&owner);
        assert!(pool.lookup(&owner, &[key(1, &[0])]).is_empty() && pool.lookup(&owner, &[key(1, &[1])]).is_empty());
        pool.release(held);
        assert_eq!(pool.usage(), PoolUse { used: 0, cached: 0, free: 4 });
        pool.assert_consistent();
    }

    proptest! {
        #[test]
        fn no_sequence_of_operations_loses_or_shares_a_page_across_tenants(
            ops in prop::collection::vec((0_u8..5, 0_usize..3, 0_u32..6), 0..200),
            quota in 0_u32..6, floor in 0_u32..6,
        ) {
            let mut pool = pool(8, quota, floor);
            let names = [tenant("a"), tenant("b"), tenant("c")];
            let mut held: Vec<(usize, u32)> = Vec::new();
            for (op, who, what) in ops {
                match op {
                    0 => {
                        let available = pool.available(&names[who]);
                        let page = pool.allocate(&names[who]);
                        prop_assert_eq!(page.is_some(), available > 0);
                        held.extend(page.map(|page| (who, page)));
                    }
                    1 => held.extend(pool.lookup(&names[who], &[key(0, &[what])]).into_iter().map(|page| (who, page))),
                    2 => if let Some(&(_, page)) = held.get(what as usize) {
                        pool.publish(page, key(0, &[what]));
                    },
                    3 => if (what as usize) < held.len() {
                        let (_, page) = held.swap_remove(what as usize);
                        pool.release(page);
                    },
                    _ => pool.forget(&names[who]),
                }
                pool.assert_consistent();
                for &(who, page) in &held {
                    prop_assert!(held.iter().all(|&(other, same)| same != page || other == who), "page {} is held by two tenants", page);
                }
            }
            for (_, page) in held {
                pool.release(page);
            }
            prop_assert_eq!(pool.usage().used, 0);
        }
    }
}
