//! Step time reserved for service classes: how much the other classes may put into the next step.
//!
//! While a class with reserve *r* has rows to run, all other classes together use at most 1 − r of the step time.
//! Each such class keeps an account of what the others may still use: its own time t earns them t·(1 − r)/r, their
//! time is taken off; the account never holds more than `delay_max`, so no step is longer than that because of
//! others. Also while the class is idle, the rows of any other class in one step take at most `delay_max` (sequences
//! take turns): that is the longest a reserved row that arrives then waits for each of them. Pure: time comes in as
//! measured durations.

use std::time::Duration;

use shared::tenant::Tier;

use super::cost::{Cost, CostModel, Load};

/// Largest reserve: others must get on, if slowly.
const SHARE_MAX: f64 = 0.95;
/// An account in debt by more than this many `delay_max` forgets the rest: estimates can be wrong once.
const DEBT_MAX: f64 = 10.0;

/// Shares of step time promised to classes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassReserve {
    /// By [`Tier`]; 0 reserves nothing, more than 0.95 counts as 0.95.
    pub shares: [f32; 3],
    /// Longest that rows of other classes may prolong one step (at least one row is always possible).
    pub delay_max: Duration,
}

impl ClassReserve {
    /// No class is preferred.
    pub const NONE: Self = Self { shares: [0.0; 3], delay_max: Duration::MAX };

    fn share(&self, class: usize) -> f64 {
        f64::from(self.shares[class]).clamp(0.0, SHARE_MAX)
    }

    fn delay_secs_max(&self) -> f64 {
        self.delay_max.as_secs_f64()
    }
}

/// The accounts.
#[derive(Debug)]
pub(crate) struct Ledger {
    reserve: ClassReserve,
    /// Seconds the others may still use, per class with a reserve that has rows to run; else `None`.
    accounts: [Option<f64>; 3],
}

impl Ledger {
    pub(crate) fn new(reserve: ClassReserve) -> Self {
        Self { reserve, accounts: [None; 3] }
    }

    /// Starts a step in which these classes have rows to run.
    pub(crate) fn open(&mut self, classes: [Wants; 3], cost: Cost) -> StepBudget {
        for (class, wants) in classes.into_iter().enumerate() {
            let counts = wants.to_run && self.reserve.share(class) > 0.0;
            self.accounts[class] = counts.then(|| self.accounts[class].unwrap_or(0.0));
        }
        StepBudget {
            reserve: self.reserve,
            accounts: self.accounts,
            prompts: classes.map(|wants| wants.prompts),
            cost,
            used: [0.0; 3],
        }
    }

    /// Books a step with this load per class.
    pub(crate) fn close(&mut self, loads: [Load; 3], took: Duration, model: &CostModel) {
        let mut total = Load::default();
        loads.iter().for_each(|load| total += *load);
        for (class, load) in loads.into_iter().enumerate() {
            let share = self.reserve.share(class);
            let Some(account) = &mut self.accounts[class] else {
                continue;
            };
            let own = model.part(load, total);
            let took = took.as_secs_f64();
            *account += took * own * (1.0 - share) / share - took * (1.0 - own);
            // At least a row must be affordable, or the others never run.
            let most = self.reserve.delay_secs_max().max(model.cost().decode());
            *account = account.clamp(-DEBT_MAX * most, most);
        }
    }
}

/// What a class has for the next step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wants {
    /// Rows of any kind.
    pub(crate) to_run: bool,
    /// Prompt rows.
    pub(crate) prompts: bool,
}

/// What classes may still put into the step being planned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepBudget {
    reserve: ClassReserve,
    accounts: [Option<f64>; 3],
    /// Classes with prompts to compute.
    prompts: [bool; 3],
    cost: Cost,
    /// Seconds that each class has put into the step.
    used: [f64; 3],
}

impl StepBudget {
    /// Everyone may use everything.
    pub(crate) fn unlimited(cost: Cost) -> Self {
        Self { reserve: ClassReserve::NONE, accounts: [None; 3], prompts: [false; 3], cost, used: [0.0; 3] }
    }

    /// Classes in the order in which they are served: the most wronged reserve first, then the other reserves,
    /// then the rest.
    pub(crate) fn order(&self) -> [Tier; 3] {
        let mut order = Tier::ALL;
        order.sort_by(|a, b| {
            let account = |tier: &Tier| self.accounts[*tier as usize].unwrap_or(f64::INFINITY);
            account(a).total_cmp(&account(b)).then(b.cmp(a))
        });
        order
    }

    /// Decode rows that a class may add: of bounded time, three quarters, so that prompts get on too.
    pub(crate) fn decode_rows(&self, tier: Tier) -> usize {
        let n_rows = self.secs_for(tier) / self.cost.decode();
        ((n_rows * 0.75) as usize).max((n_rows as usize).min(1))
    }

    /// Prompt rows that a class may add.
    pub(crate) fn prefill_rows(&self, tier: Tier) -> usize {
        (self.secs_for(tier) / self.cost.row) as usize
    }

    /// Prompt rows that prolong a step with these decoding rows by at most `stretch` times what it takes anyway.
    pub(crate) fn prefill_rows_beside(&self, n_decode: usize, stretch: f64) -> usize {
        ((self.cost.step + self.cost.of(Load::decode(n_decode))) * stretch / self.cost.row) as usize
    }

    /// Notes planned rows.
    pub(crate) fn take(&mut self, tier: Tier, load: Load) {
        self.used[tier as usize] += self.cost.of(load);
    }

    /// Seconds by which this class may still prolong the step.
    fn secs_for(&self, tier: Tier) -> f64 {
        self.accounts_leave(tier).min(self.delay_left(tier))
    }

    /// Bounded when another class has a reserve, which must not wait long for the end of a step.
    fn delay_left(&self, tier: Tier) -> f64 {
        let protects_others = (0..3).any(|class| class != tier as usize && self.reserve.share(class) > 0.0);
        let most = self.reserve.delay_secs_max().max(self.cost.decode());
        if protects_others { most - self.used[tier as usize] } else { f64::INFINITY }
    }

    /// Seconds that the accounts of other classes leave to this one.
    fn accounts_leave(&self, tier: Tier) -> f64 {
        // The most wronged class is never held back by accounts, so that two reserves cannot block one another.
        if self.accounts[tier as usize].is_some() && self.order()[0] == tier {
            return f64::INFINITY;
        }
        let total: f64 = self.used.iter().sum();
        let most = self.reserve.delay_secs_max().max(self.cost.decode());
        let left = |class: usize| {
            let (share, used) = (self.reserve.share(class), self.used[class]);
            let own = if used == 0.0 { 0.0 } else { self.cost.step + used };
            let account = self.accounts[class].map(|account| (account + own * (1.0 - share) / share).min(most));
            // Its first tokens wait for nobody: the others come when its prompts are done, or when their due is full.
            let due = account.map(|account| if self.prompts[class] && account < most { 0.0 } else { account });
            due.map(|due| due - (total - used))
        };
        (0..3).filter(|&class| class != tier as usize).filter_map(left).fold(f64::INFINITY, f64::min)
    }
}
