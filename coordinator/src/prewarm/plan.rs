//! Which adapters to load ahead of time (core): the likeliest first, within a budget.

use std::time::Duration;

use shared::adapter::AdapterRef;

/// Between two plans of a node.
pub const EVERY: Duration = Duration::from_secs(300);
/// How far ahead a plan looks.
pub const AHEAD: Duration = Duration::from_secs(900);

/// Loads that one plan may start on a node with this many places.
pub fn loads_max(slots: usize) -> usize {
    slots.div_ceil(5)
}

/// An adapter that a node could have in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// Which.
    pub adapter: AdapterRef,
    /// Bytes of engine memory.
    pub bytes: u64,
    /// Probability that it is asked for soon.
    pub likely: f64,
    /// It is in memory or on its way.
    pub resident: bool,
    /// Requests hold it: it is never taken for another.
    pub leased: bool,
}

/// What pre-warming may use of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Places for adapters in all.
    pub slots: usize,
    /// Bytes for adapters in all.
    pub bytes: u64,
    /// Loads that one plan may start: what tenants ask for now loads beside them.
    pub loads: usize,
}

/// How sure one must be to load ahead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Caution {
    /// Less likely adapters are left alone: a load that nobody uses costs as much as one that is used.
    pub likely_min: f64,
    /// An idle adapter is taken out only for one this much likelier.
    pub margin: f64,
}

impl Default for Caution {
    fn default() -> Self {
        Self { likely_min: 0.5, margin: 0.25 }
    }
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Take an idle adapter out.
    Cool(AdapterRef),
    /// Load one.
    Warm(AdapterRef),
}

/// The steps for one node, in order. Empty when nothing is worth a load.
pub fn plan(mut known: Vec<Known>, room: Room, caution: Caution) -> Vec<Step> {
    known.sort_by(|a, b| b.likely.total_cmp(&a.likely).then_with(|| a.adapter.cmp(&b.adapter)));
    let resident = || known.iter().filter(|known| known.resident);
    let mut slots = room.slots.saturating_sub(resident().count());
    let mut bytes = room.bytes.saturating_sub(resident().map(|known| known.bytes).sum());
    // The least likely last, so that they are taken first.
    let mut idle: Vec<&Known> = resident().filter(|known| !known.leased).collect();
    let mut steps = Vec::new();
    let wanted = known.iter().filter(|known| !known.resident && known.likely >= caution.likely_min);
    for wanted in wanted.take(room.loads) {
        let mut out = Vec::new();
        while (slots == 0 || bytes < wanted.bytes) && out.len() < idle.len() {
            let victim = idle[idle.len() - 1 - out.len()];
            if victim.likely + caution.margin > wanted.likely {
                break;
            }
            (slots, bytes) = (slots + 1, bytes.saturating_add(victim.bytes));
            out.push(victim);
        }
        if slots == 0 || bytes < wanted.bytes {
            // A smaller one further down may still fit, but it is less likely: simple beats full.
            break;
        }
        idle.truncate(idle.len() - out.len());
        (slots, bytes) = (slots - 1, bytes - wanted.bytes);
        steps.extend(out.into_iter().map(|victim| Step::Cool(victim.adapter.clone())));
        steps.push(Step::Warm(wanted.adapter.clone()));
    }
    steps
}
