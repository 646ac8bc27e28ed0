//! What the queue can tell: per class and per tenant, for metrics and for operators. Never on the hot path.

use std::time::{Duration, Instant};

use shared::id::TenantId;
use shared::tenant::Tier;

use super::FairQueue;

/// One class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassStats {
    /// Which.
    pub tier: Tier,
    /// Requests that wait.
    pub waiting: usize,
    /// Tenants with a waiting request.
    pub tenants_waiting: usize,
    /// Sequences in the engine.
    pub running_sequences: u32,
    /// How long its oldest request waits.
    pub oldest_wait: Duration,
    /// Service received, in weighted tokens over weight.
    pub service_tokens: u64,
}

/// One tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantStats {
    /// Who.
    pub tenant: TenantId,
    /// In which class.
    pub tier: Tier,
    /// Requests that wait.
    pub waiting: u32,
    /// Sequences in the engine.
    pub running_sequences: u32,
    /// Service received, in weighted tokens over weight, lifts included.
    pub service_tokens: u64,
}

/// The whole queue at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// In the order of [`Tier::ALL`].
    pub classes: Vec<ClassStats>,
    /// Known tenants by class and name.
    pub tenants: Vec<TenantStats>,
    /// Requests picked and not left.
    pub running: usize,
}

impl<T> FairQueue<T> {
    /// Counts everything; visits every tenant and route.
    pub fn stats(&self, now: Instant) -> QueueStats {
        let classes = Tier::ALL.map(|tier| {
            let class = self.class(tier);
            let lines = self.routes.iter().filter(|(_, line)| line.tier == tier).map(|(_, line)| line);
            let heads = lines.clone().filter_map(|line| line.items.first_key_value());
            let oldest = heads.map(|(_, entry)| entry.item.admitted_at).min();
            ClassStats {
                tier,
                waiting: lines.map(|line| line.items.len()).sum(),
                tenants_waiting: class.waiting.len(),
                running_sequences: class.running_sequences,
                oldest_wait: oldest.map_or(Duration::ZERO, |at| now.saturating_duration_since(at)),
                service_tokens: class.service.tokens(),
            }
        });
        let mut tenants: Vec<TenantStats> = self
            .tenants
            .iter()
            .map(|(_, lines)| TenantStats {
                tenant: lines.id.clone(),
                tier: lines.tier,
                waiting: lines.waiting,
                running_sequences: lines.running_sequences,
                service_tokens: lines.service.tokens(),
            })
            .collect();
        tenants.sort_by(|a, b| (a.tier, &a.tenant).cmp(&(b.tier, &b.tenant)));
        QueueStats { classes: classes.to_vec(), tenants, running: self.running.len() }
    }
}
