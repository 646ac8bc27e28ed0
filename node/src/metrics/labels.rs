//! Which label values exist: how many tenants, and how many adapters and tasks of each, have series of their own.
//!
//! A series is never dropped while the node runs, so whoever can make up names could fill its memory. Whoever comes
//! first keeps a value of its own; the rest share [`OTHER`]. Asked by [`super`] for every label that names a tenant or
//! something of a tenant's.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::RwLock;
use shared::id::{AdapterName, TaskName, TenantId};

/// Tenants that get a label value of their own: keeps the series count bounded, as llm-d's scheduler does.
pub const TENANTS_MAX: usize = 1000;
/// Adapter versions of one tenant that do, and tasks: its present ones and some that went.
pub const NAMES_MAX: usize = 32;
/// Label value of everybody past a cap.
pub const OTHER: &str = "_other";
/// Label value of what runs on the base itself.
const BASE: &str = "_base";

/// The values given so far.
#[derive(Debug, Default)]
pub struct Labels(RwLock<BTreeMap<TenantId, Names>>);

/// What a tenant's names became.
#[derive(Debug, Default)]
struct Names {
    adapters: BTreeSet<String>,
    tasks: BTreeSet<String>,
}

// === impl Labels ===

impl Labels {
    /// No value is given yet.
    pub const fn new() -> Self {
        Self(RwLock::new(BTreeMap::new()))
    }

    /// The value of a tenant.
    pub fn tenant(&self, tenant: &TenantId) -> String {
        let (is_known, n_known) = {
            let seen = self.0.read();
            (seen.contains_key(tenant), seen.len())
        };
        if is_known {
            return tenant.to_string();
        }
        if n_known >= TENANTS_MAX {
            return OTHER.to_owned();
        }
        let mut seen = self.0.write();
        // Others may have come since.
        if seen.len() >= TENANTS_MAX && !seen.contains_key(tenant) {
            return OTHER.to_owned();
        }
        seen.entry(tenant.clone()).or_default();
        tenant.to_string()
    }

    /// The value of a tenant's adapter; `None` is the base.
    pub fn adapter(&self, tenant: &TenantId, adapter: Option<&AdapterName>) -> String {
        self.name(tenant, |names| &mut names.adapters, adapter.map(ToString::to_string))
    }

    /// The value of a tenant's task; `None` is the base.
    pub fn task(&self, tenant: &TenantId, task: Option<&TaskName>) -> String {
        self.name(tenant, |names| &mut names.tasks, task.map(ToString::to_string))
    }

    fn name(&self, tenant: &TenantId, of: fn(&mut Names) -> &mut BTreeSet<String>, name: Option<String>) -> String {
        let Some(name) = name else { return BASE.to_owned() };
        // A tenant without a value of its own has none for its names either.
        self.tenant(tenant);
        let mut seen = self.0.write();
        let Some(names) = seen.get_mut(tenant).map(of) else { return OTHER.to_owned() };
        if !names.contains(&name) {
            if names.len() >= NAMES_MAX {
                return OTHER.to_owned();
            }
            names.insert(name.clone());
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(index: usize) -> TenantId {
        format!("t{index}").parse().expect("an id")
    }

    #[test]
    fn the_thousand_and_first_tenant_shares_a_label() {
        let labels = Labels::new();
        let given: BTreeSet<String> = (0..2 * TENANTS_MAX).map(|index| labels.tenant(&tenant(index))).collect();
        assert_eq!(given.len(), TENANTS_MAX + 1);
        assert_eq!(labels.tenant(&tenant(0)), "t0", "who had a label keeps it");
        assert_eq!(labels.tenant(&tenant(5000)), OTHER);
    }

    #[test]
    fn a_tenant_that_uploads_version_after_version_shares_a_label_among_them_and_harms_nobody_else() {
        let labels = Labels::new();
        let version =
            |of: usize, n: usize| -> AdapterName { format!("t{of}-a-tiny-v1.0.{n}").parse().expect("a name") };
        let task = |n: usize| -> TaskName { format!("task{n}").parse().expect("a name") };
        let given: BTreeSet<String> = (0..1024).map(|n| labels.adapter(&tenant(1), Some(&version(1, n)))).collect();
        assert_eq!(given.len(), NAMES_MAX + 1);
        assert!(given.contains(OTHER));
        assert_eq!(
            labels.adapter(&tenant(1), Some(&version(1, 0))),
            version(1, 0).to_string(),
            "the first keep theirs"
        );
        assert_eq!(labels.adapter(&tenant(2), Some(&version(2, 0))), version(2, 0).to_string());
        let given: BTreeSet<String> = (0..64).map(|n| labels.task(&tenant(1), Some(&task(n)))).collect();
        assert_eq!(given.len(), NAMES_MAX + 1);
        assert_eq!((labels.adapter(&tenant(1), None), labels.task(&tenant(1), None)), (BASE.into(), BASE.into()));
    }

    #[test]
    fn names_of_a_tenant_past_the_cap_share_its_label() {
        let labels = Labels::new();
        (0..TENANTS_MAX).for_each(|index| drop(labels.tenant(&tenant(index))));
        assert_eq!(labels.task(&tenant(TENANTS_MAX), Some(&"support".parse().expect("a name"))), OTHER);
    }
}
