//! Which rows the next step has: decode rows first, then prompt chunks, within row, page and class limits.
//!
//! The engine calls [`Planner::plan`] before and [`Planner::measured`] after every step. Sequences come in order of
//! admission; when pages run out the youngest loses its own and computes them again later, so that the oldest
//! always gets on. Prompts are computed one after the other, the one first that has waited longest for its length:
//! one that shares its rows with others is done as late as the last of them, and all of them then begin to answer, and
//! end, at the same moment.
//! Whose turn it is among tenants is the fair queue's business; here only service classes with reserved step time
//! ([`reserve`]) come before others.

pub mod cost;
pub mod reserve;

use shared::tenant::Tier;

use crate::blocks::BlockPool;
use crate::sequence::{Phase, Sequence};
use cost::{CostModel, Load};
use reserve::{ClassReserve, Ledger, StepBudget, Wants};

/// Prompt rows always possible beside decoding sequences: prompts must get on. With eight, the floor and not the
/// stretch decided beside a single stream: a step of one row grew to 2.5 times.
const ROWS_BESIDE_MIN: usize = 4;

/// While sequences decode, one step in so many has no prompt rows: what prompts prolong cannot be known from steps that
/// all have some. Prompts lose less than a sixteenth of their pace.
const STEPS_PER_BARE_STEP: u64 = 16;

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanConfig {
    /// Most rows of a step, as the forward pass allows.
    pub rows_max: usize,
    /// Most prompt rows of a step: bounds how long decoding sequences wait for a prompt.
    pub prefill_rows_max: usize,
    /// How much prompts may prolong a step that also decodes, in times of what it takes without them: bounds how
    /// uneven the times between tokens are. A few rows are always possible.
    pub prefill_stretch: f64,
    /// Most rows of one sequence whose logits are all wanted: bounds memory (4 bytes × vocabulary each).
    pub logits_rows_max: usize,
    /// Step time reserved for service classes.
    pub reserve: ClassReserve,
}

/// Rows of one sequence in the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Index of the sequence in the list given to [`Planner::plan`].
    pub at: usize,
    /// Its next rows.
    pub n_rows: usize,
}

impl Planned {
    /// What it adds to a step.
    fn load(&self, sequences: &[Sequence]) -> Load {
        Load { n_rows: self.n_rows, n_logits: sequences[self.at].wanted_logits(self.n_rows).len() }
    }
}

/// The next step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// In row order: equal adapters stand together, then oldest first.
    pub runs: Vec<Planned>,
    /// Sequences that lost their pages.
    pub n_preempted: usize,
}

impl StepPlan {
    /// What the step computes.
    pub fn load(&self, sequences: &[Sequence]) -> Load {
        let mut load = Load::default();
        self.runs.iter().for_each(|run| load += run.load(sequences));
        load
    }

    /// Rows of the step.
    pub fn n_rows(&self) -> usize {
        self.runs.iter().map(|run| run.n_rows).sum()
    }
}

/// Plans steps.
#[derive(Debug)]
pub struct Planner {
    config: PlanConfig,
    ledger: Ledger,
    n_steps: u64,
    /// Prompt rows planned so far: the clock by which prompts wait.
    n_prompt_rows: u64,
}

impl Planner {
    /// A planner that has planned nothing.
    ///
    /// # Panics
    /// When a row limit is 0.
    pub fn new(config: PlanConfig) -> Self {
        assert!(config.rows_max > 0 && config.prefill_rows_max > 0 && config.logits_rows_max > 0, "a step has rows");
        Self { config, ledger: Ledger::new(config.reserve), n_steps: 0, n_prompt_rows: 0 }
    }

    /// Chooses the rows of the next step and reserves their pages. `sequences` are in order of admission; `cost`
    /// is what rows have taken so far. Empty only if nothing can run.
    pub fn plan(&mut self, sequences: &mut [Sequence], pool: &mut BlockPool, cost: &CostModel) -> StepPlan {
        self.n_steps += 1;
        let n_preempted = readmit(sequences, pool);
        for sequence in sequences.iter_mut().filter(|sequence| sequence.phase() == Phase::Prefill) {
            sequence.waits_since.get_or_insert(self.n_prompt_rows);
        }
        let classes = Tier::ALL.map(|tier| {
            let ready = || sequences.iter().filter(|sequence| sequence.tier == tier && is_ready(sequence));
            Wants { to_run: ready().next().is_some(), prompts: ready().any(|s| s.phase() == Phase::Prefill) }
        });
        let budget = self.ledger.open(classes, cost.cost());
        let (step, n_prompt_rows) = (self.n_steps, self.n_prompt_rows);
        let mut draft =
            Draft { sequences, pool, step, n_prompt_rows, budget, config: self.config, runs: Vec::new(), n_preempted };
        draft.fill();
        if draft.runs.is_empty() && classes.iter().any(|class| class.to_run) {
            // A reserve must not stop the engine when its own class cannot run.
            draft.budget = StepBudget::unlimited(cost.cost());
            draft.fill();
        }
        let Draft { mut runs, n_preempted, sequences, .. } = draft;
        let prompts = runs.iter().filter(|run| sequences[run.at].phase() == Phase::Prefill);
        self.n_prompt_rows += prompts.map(|run| run.n_rows as u64).sum::<u64>();
        runs.sort_by_key(|run| (sequences[run.at].adapter, run.at));
        StepPlan { runs, n_preempted }
    }

    /// Books the time a planned step took.
    pub fn measured(&mut self, plan: &StepPlan, sequences: &[Sequence], took: std::time::Duration, cost: &CostModel) {
        let mut loads = [Load::default(); 3];
        plan.runs.iter().for_each(|run| loads[sequences[run.at].tier as usize] += run.load(sequences));
        self.ledger.close(loads, took, cost);
    }
}

fn is_ready(sequence: &Sequence) -> bool {
    matches!(sequence.phase(), Phase::Prefill | Phase::Decode) && !sequence.parked
}

/// Lets preempted sequences back, oldest first, when there is room for all their tokens: less would soon cost
/// them their pages again. The oldest may have the pages of parked ones, youngest first. Returns how many lost theirs.
fn readmit(sequences: &mut [Sequence], pool: &mut BlockPool) -> usize {
    let is_waiting = |sequence: &Sequence| sequence.phase() == Phase::Waiting && !sequence.held && !sequence.parked;
    let waiting: Vec<usize> = (0..sequences.len()).filter(|&at| is_waiting(&sequences[at])).collect();
    let fits =
        |sequence: &Sequence, pool: &BlockPool| pool.available(&sequence.tenant) as usize >= sequence.n_pages_missing();
    let mut n_preempted = 0;
    if let Some(&oldest) = waiting.first() {
        for at in (0..sequences.len()).rev() {
            if fits(&sequences[oldest], pool) {
                break;
            }
            if sequences[at].parked && holds_pages(&sequences[at]) {
                sequences[at].preempt(pool);
                n_preempted += 1;
            }
        }
    }
    for at in waiting {
        if !fits(&sequences[at], pool) {
            break;
        }
        sequences[at].enter(pool);
    }
    n_preempted
}

fn holds_pages(sequence: &Sequence) -> bool {
    matches!(sequence.phase(), Phase::Prefill | Phase::Decode) && !sequence.pages().is_empty()
}

/// A step in the making.
struct Draft<'a> {
    sequences: &'a mut [Sequence],
    pool: &'a mut BlockPool,
    step: u64,
    n_prompt_rows: u64,
    budget: StepBudget,
    config: PlanConfig,
    runs: Vec<Planned>,
    n_preempted: usize,
}

impl Draft<'_> {
    fn fill(&mut self) {
        for tier in self.budget.order() {
            self.add_decodes(tier);
        }
        for tier in self.budget.order() {
            self.add_prefills(tier);
        }
    }

    fn n_rows(&self) -> usize {
        self.runs.iter().map(|run| run.n_rows).sum()
    }

    /// Sequences of a class in this phase that can run, oldest first.
    fn members(&self, tier: Tier, phase: Phase) -> Vec<usize> {
        let wanted = |sequence: &Sequence| sequence.tier == tier && sequence.phase() == phase && is_ready(sequence);
        (0..self.sequences.len()).filter(|&at| wanted(&self.sequences[at])).collect()
    }

    /// How long a prompt has waited for its length, in rows of prompts per row it still needs (highest response ratio
    /// next): a short one passes a long one soon, and no one is passed for ever.
    fn response_ratio(&self, at: usize) -> f64 {
        let sequence = &self.sequences[at];
        let waited = self.n_prompt_rows - sequence.waits_since.unwrap_or(self.n_prompt_rows);
        waited as f64 / sequence.n_pending().max(1) as f64
    }

    fn add_decodes(&mut self, tier: Tier) {
        let mut members = self.members(tier, Phase::Decode);
        members.sort_by_key(|&at| self.sequences[at].last_step);
        let n_allowed = self.budget.decode_rows(tier).min(self.config.rows_max - self.n_rows());
        members.truncate(n_allowed);
        // Oldest first: who is planned cannot be preempted in this step.
        members.sort_unstable();
        for at in members {
            self.add(at, 1);
        }
    }

    fn add_prefills(&mut self, tier: Tier) {
        let mut members = self.members(tier, Phase::Prefill);
        members.sort_by(|&a, &b| {
            let pending = |at: usize| self.sequences[at].n_pending();
            self.response_ratio(b).total_cmp(&self.response_ratio(a)).then(pending(a).cmp(&pending(b)))
        });
        let prefills = self.runs.iter().filter(|run| self.sequences[run.at].phase() == Phase::Prefill);
        let (n_prefills, n_planned) = prefills.fold((0, 0), |(n, rows), run| (n + 1, rows + run.n_rows));
        let n_decode = self.runs.len() - n_prefills;
        let n_beside = match n_decode {
            0 => usize::MAX,
            _ if self.step.is_multiple_of(STEPS_PER_BARE_STEP) => 0,
            _ => self.budget.prefill_rows_beside(n_decode, self.config.prefill_stretch).max(ROWS_BESIDE_MIN),
        };
        let mut n_left = (self.config.prefill_rows_max.min(n_beside).saturating_sub(n_planned))
            .min(self.config.rows_max - self.n_rows())
            .min(self.budget.prefill_rows(tier));
        for at in members {
            let sequence = &self.sequences[at];
            let n_max = if sequence.all_logits { self.config.logits_rows_max } else { usize::MAX };
            // Who finds no pages leaves its rows to the others; the oldest always finds some.
            n_left -= self.add(at, sequence.n_pending().min(n_max).min(n_left));
        }
    }

    /// Plans up to `n_rows` rows of a sequence, preempting younger ones while not even one fits. Returns the rows.
    fn add(&mut self, at: usize, n_rows: usize) -> usize {
        // A sequence may have been preempted since it was listed.
        while n_rows > 0 && is_ready(&self.sequences[at]) {
            let n_rows = self.sequences[at].reserve(n_rows, self.pool);
            if n_rows > 0 {
                let planned = Planned { at, n_rows };
                self.budget.take(self.sequences[at].tier, planned.load(self.sequences));
                self.sequences[at].last_step = self.step;
                self.runs.push(planned);
                return n_rows;
            }
            let Some(victim) = self.victim(at) else {
                break;
            };
            self.sequences[victim].preempt(self.pool);
            self.n_preempted += 1;
        }
        0
    }

    /// Whose pages `at` may have: a parked sequence's, else the youngest that is younger; never a planned one's.
    fn victim(&self, at: usize) -> Option<usize> {
        let free_to_go = |other: &usize| {
            holds_pages(&self.sequences[*other]) && *other != at && self.runs.iter().all(|run| run.at != *other)
        };
        let candidates = || (0..self.sequences.len()).rev().filter(free_to_go);
        candidates().find(|&other| self.sequences[other].parked).or_else(|| candidates().find(|&other| other > at))
    }
}

#[cfg(test)]
mod tests;
