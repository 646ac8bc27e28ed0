//! Small builders for this crate's tests.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use shared::clock::{Clock, SystemClock};
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::hash::ContentHash;
use shared::id::NodeId;
use shared::tenant::{Fallback, Limits, Tier};

use crate::membership::MemberSpec;
use crate::registry::command::TenantSpec;
use crate::registry::record::{AdapterKind, AdapterRecord};

/// Some instant to count from.
pub(crate) fn now() -> Instant {
    SystemClock.now()
}

/// Limits that are easy to reckon with.
pub(crate) const LIMITS: Limits = Limits {
    concurrency: 4,
    queue_depth: 16,
    deadline_ms: 30_000,
    requests_per_minute: 60,
    tokens_per_minute: 6000,
    burst_requests: 2,
};

/// A tenant on base `smollm2` that may name it, with the task `support`.
pub(crate) fn spec(tenant: &str) -> TenantSpec {
    TenantSpec {
        tenant: tenant.parse().expect("valid tenant id"),
        display_name: format!("The {tenant} company"),
        contact: Some(format!("ops@{tenant}.example")),
        tier: Tier::Shared,
        weight: 1,
        bases: vec!["smollm2".parse().expect("valid base")],
        allow_base: true,
        fallback: Fallback::Refuse,
        limits: LIMITS,
        region: None,
        pool: None,
        cost_center: Some("cc-1".to_owned()),
        tasks: BTreeSet::from(["support".parse().expect("valid task")]),
    }
}

/// A version record; its content is named by `content`.
pub(crate) fn adapter(name: &str, content: &str) -> AdapterRecord {
    let name: shared::id::AdapterName = name.parse().expect("valid version name");
    AdapterRecord {
        hash: ContentHash::of(content.as_bytes()),
        bytes: 1 << 20,
        rank: 16,
        kind: AdapterKind::Peft,
        uploaded_at_s: 1_800_000_000,
        base: name.base.clone(),
        name,
    }
}

/// The first heartbeat of a life that serves and is idle.
pub(crate) fn beat(incarnation: u64) -> Heartbeat {
    Heartbeat {
        incarnation,
        seq: 0,
        uptime_ms: 0,
        epoch: 0,
        phase: NodePhase::Serving,
        load: NodeLoad { running: 0, places: 8, waiting: 0 },
    }
}

/// A node of the default pool that hosts `smollm2`.
pub(crate) fn spec_of_node(id: &NodeId, capacity: u32) -> MemberSpec {
    let bases = vec!["smollm2".parse().expect("valid base")];
    MemberSpec { id: id.clone(), capacity, pool: "default".to_owned(), region: None, bases }
}

/// A directory that goes when the test ends.
pub(crate) struct TestDir(pub(crate) PathBuf);

impl TestDir {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tenantry-registry-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&dir);
        Self(dir)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Commands that collide often: few tenants, keys, versions and tasks, some of them invalid.
pub(crate) mod commands {
    use std::sync::{Arc, LazyLock};

    use proptest::prelude::*;
    use proptest::sample::select;

    use super::{adapter, spec};
    use crate::auth::{KeyRecord, Scope};
    use crate::registry::command::{Action, Command, TenantPatch};
    use crate::registry::secrets::Secrets;
    use shared::seal::ClusterKey;
    use shared::tenant::{Fallback, Tier};

    pub(crate) static SECRETS: LazyLock<Arc<Secrets>> = LazyLock::new(|| Arc::new(Secrets::new(ClusterKey::random())));
    static KEYS: LazyLock<Vec<KeyRecord>> = LazyLock::new(|| {
        (0..24).map(|i| SECRETS.api_key([Scope::Infer].into(), 100 + i, (i % 3 == 0).then_some(150)).1).collect()
    });

    fn tenant() -> impl Strategy<Value = String> {
        select(vec!["acme".to_owned(), "baker".to_owned(), "cedar-clinic".to_owned()])
    }

    fn version() -> impl Strategy<Value = String> {
        let base = select(vec!["smollm2", "qwen2", "foreign"]);
        (tenant(), base, 0_u32..3).prop_map(|(tenant, base, minor)| format!("{tenant}-support-{base}-v1.{minor}.0"))
    }

    fn patch() -> impl Strategy<Value = TenantPatch> {
        let bases = select(vec![vec!["smollm2"], vec!["smollm2", "qwen2"], vec!["qwen2"], vec![]]);
        let weight = proptest::option::of(0_u32..2000);
        (proptest::option::of(bases), weight, any::<bool>()).prop_map(|(bases, weight, premium)| TenantPatch {
            bases: bases.map(|bases| bases.iter().map(|base| base.parse().expect("valid base")).collect()),
            weight,
            tier: premium.then_some(Tier::Premium),
            fallback: premium.then_some(Fallback::Base),
            region: (!premium).then_some(None),
            pool: premium.then(|| Some("fast".to_owned())),
            ..TenantPatch::default()
        })
    }

    fn action() -> impl Strategy<Value = Action> {
        let task = || select(vec!["support", "billing", "smollm2"]).prop_map(|task| task.parse().expect("valid task"));
        let key = || (0..KEYS.len()).prop_map(|i| KEYS[i].clone());
        let id = || tenant().prop_map(|tenant| tenant.parse().expect("valid tenant"));
        prop_oneof![
            4 => (tenant(), key()).prop_map(|(tenant, key)| SECRETS.create_tenant(spec(&tenant), vec![key], 7)),
            2 => (id(), patch()).prop_map(|(tenant, patch)| Action::UpdateTenant { tenant, patch: patch.into() }),
            1 => id().prop_map(|tenant| Action::SuspendTenant { tenant }),
            1 => id().prop_map(|tenant| Action::ResumeTenant { tenant }),
            1 => id().prop_map(|tenant| Action::DeleteTenant { tenant, at_s: 9 }),
            6 => (id(), key()).prop_map(|(tenant, key)| Action::AddKey { tenant, key }),
            2 => (id(), key()).prop_map(|(tenant, key)| Action::RevokeKey { tenant, key_id: key.id, at_s: 120 }),
            6 => (id(), version(), select(vec!["one", "two"])).prop_map(|(tenant, name, content)| {
                Action::AddAdapterVersion { tenant, adapter: adapter(&name, content) }
            }),
            2 => (id(), version()).prop_map(|(tenant, name)| {
                Action::RemoveAdapterVersion { tenant, name: name.parse().expect("valid version") }
            }),
            4 => (id(), task(), proptest::option::of(version())).prop_map(|(tenant, task, version)| {
                let version = version.map(|name| name.parse().expect("valid version"));
                Action::PointTask { tenant, task, version }
            }),
            1 => (id(), task()).prop_map(|(tenant, task)| Action::RemoveTask { tenant, task }),
        ]
    }

    /// Up to `max` commands; about one in ten expects a small epoch.
    pub(crate) fn sequence(max: usize) -> impl Strategy<Value = Vec<Command>> {
        let expected = prop_oneof![9 => Just(None), 1 => (0_u64..5).prop_map(Some)];
        let command = (action(), expected).prop_map(|(action, expected_epoch)| Command { expected_epoch, action });
        proptest::collection::vec(command, 0..max)
    }
}
