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

/// Largest reserve: others must get on, if slowly.
const SHARE_MAX: f64 = 0.95;
/// An account in debt by more than this many `delay_max` forgets the rest: estimates can be wrong once.
const DEBT_MAX: f64 = 10.0;
/// Weight of the past per step in the cost model: it follows a change within about 50 steps.
const MEMORY: f64 = 0.98;

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

/// What a step takes: a fixed part and a part per row, fitted to measured steps by least squares that forget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostModel {
    weight: f64,
    rows: f64,
    secs: f64,
    rows_rows: f64,
    rows_secs: f64,
}

impl Default for CostModel {
    /// A guess that two measured steps outweigh: 1 ms a step and 1 ms a row.
    fn default() -> Self {
        let mut model = Self { weight: 0.0, rows: 0.0, secs: 0.0, rows_rows: 0.0, rows_secs: 0.0 };
        model.learn(1, Duration::from_millis(2));
        model.learn(17, Duration::from_millis(18));
        model
    }
}

impl CostModel {
    /// Takes a measured step into account.
    pub fn learn(&mut self, n_rows: usize, took: Duration) {
        let (rows, secs) = (n_rows as f64, took.as_secs_f64());
        self.weight = self.weight * MEMORY + 1.0;
        self.rows = self.rows * MEMORY + rows;
        self.secs = self.secs * MEMORY + secs;
        self.rows_rows = self.rows_rows * MEMORY + rows * rows;
        self.rows_secs = self.rows_secs * MEMORY + rows * secs;
    }

    /// (seconds per step, seconds per row), both positive.
    pub fn secs(&self) -> (f64, f64) {
        const TINY: f64 = 1e-9;
        let (mean_rows, mean_secs) = (self.rows / self.weight, self.secs / self.weight);
        let variance = self.rows_rows / self.weight - mean_rows * mean_rows;
        let slope = (self.rows_secs / self.weight - mean_rows * mean_secs) / variance;
        // Steps of one size tell nothing about the parts: then all of it is per row.
        let row = if variance > TINY && slope > 0.0 { slope.min(mean_secs / mean_rows) } else { mean_secs / mean_rows };
        (TINY.max(mean_secs - row * mean_rows), TINY.max(row))
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
    pub(crate) fn open(&mut self, runnable: [bool; 3], cost: CostModel) -> StepBudget {
        for (class, runnable) in runnable.into_iter().enumerate() {
            let counts = runnable && self.reserve.share(class) > 0.0;
            self.accounts[class] = counts.then(|| self.accounts[class].unwrap_or(0.0));
        }
        StepBudget { reserve: self.reserve, accounts: self.accounts, cost, rows: [0; 3] }
    }

    /// Books a step with these rows per class.
    pub(crate) fn close(&mut self, rows: [usize; 3], took: Duration, cost: &CostModel) {
        let (fixed, row) = cost.secs();
        let n_rows: usize = rows.iter().sum();
        for (class, own_rows) in rows.into_iter().enumerate() {
            let share = self.reserve.share(class);
            let Some(account) = &mut self.accounts[class] else {
                continue;
            };
            let own = if own_rows == 0 { 0.0 } else { (fixed + row * own_rows as f64) / (fixed + row * n_rows as f64) };
            let took = took.as_secs_f64();
            *account += took * own * (1.0 - share) / share - took * (1.0 - own);
            // At least a row must be affordable, or the others never run.
            let most = self.reserve.delay_secs_max().max(row);
            *account = account.clamp(-DEBT_MAX * most, most);
        }
    }
}

/// What classes may still put into the step being planned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepBudget {
    reserve: ClassReserve,
    accounts: [Option<f64>; 3],
    cost: CostModel,
    rows: [usize; 3],
}

impl StepBudget {
    /// Everyone may use everything.
    pub(crate) fn unlimited() -> Self {
        Self { reserve: ClassReserve::NONE, accounts: [None; 3], cost: CostModel::default(), rows: [0; 3] }
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
        let secs = self.secs_left(tier).min(self.delay_left(tier));
        self.rows_within(secs * 0.75).max(self.rows_within(secs).min(1))
    }

    /// Prompt rows that a class may add.
    pub(crate) fn prefill_rows(&self, tier: Tier) -> usize {
        self.rows_within(self.secs_left(tier).min(self.delay_left(tier)))
    }

    /// Notes planned rows.
    pub(crate) fn take(&mut self, tier: Tier, n_rows: usize) {
        self.rows[tier as usize] += n_rows;
    }

    /// Seconds by which this class may still prolong the step, given that another class has a reserve.
    fn delay_left(&self, tier: Tier) -> f64 {
        let protects_others = (0..3).any(|class| class != tier as usize && self.reserve.share(class) > 0.0);
        let (_, row) = self.cost.secs();
        let most = self.reserve.delay_secs_max().max(row);
        if protects_others { most - row * self.rows[tier as usize] as f64 } else { f64::INFINITY }
    }

    fn rows_within(&self, secs: f64) -> usize {
        let (_, row) = self.cost.secs();
        (secs / row) as usize
    }

    /// Seconds that the accounts of other classes leave to this one.
    fn secs_left(&self, tier: Tier) -> f64 {
        // The most wronged class is never held back by accounts, so that two reserves cannot block one another.
        if self.accounts[tier as usize].is_some() && self.order()[0] == tier {
            return f64::INFINITY;
        }
        let (fixed, row) = self.cost.secs();
        let left = |class: usize| {
            let share = self.reserve.share(class);
            let own = if self.rows[class] == 0 { 0.0 } else { fixed + row * self.rows[class] as f64 };
            let others: usize = (0..3).filter(|&other| other != class).map(|other| self.rows[other]).sum();
            let account = self.accounts[class].map(|account| account + own * (1.0 - share) / share);
            let most = self.reserve.delay_secs_max().max(row);
            account.map(|account| account.min(most) - row * others as f64)
        };
        (0..3).filter(|&class| class != tier as usize).filter_map(left).fold(f64::INFINITY, f64::min)
    }
}
