//! What a step takes: a fixed part, a part per row and a part per row whose logits are sampled, fitted to measured
//! steps.
//!
//! The planner uses it to bound how long prompts make running streams wait and to share step time between service
//! classes. Weighted least squares that forget, with coefficients that cannot be negative and a weak pull
//! towards the usual proportions: steps that are all alike say what a step takes, but not which part of it is whose.
//! Short steps weigh most, because rows cost less the more there are and it is short steps that are decided about: with
//! equal weights a few steps full of prompts set what a row beside a decoding one takes a third too low.
//!
//! No line goes through steps of few rows, which are computed eight at a time: a fifth row can take three times what the
//! fourth took. So what steps without prompts take is kept by their number of rows as well, and decides there how a
//! step is divided between classes. Pure.

use std::time::Duration;

/// Weight of the past per step: the model follows a change within about 100 steps.
const MEMORY: f64 = 0.99;
/// Pull towards [`USUAL`] against one measured step.
const PULL: f64 = 1e-4;
/// Steps that took less count as if they had taken this: no clock is finer, and no step weighs infinitely much.
const SECS_MIN: f64 = 1e-6;
/// Usual proportions of the three parts: reading the weights takes as long as computing some ten rows.
const USUAL: [f64; 3] = [10.0, 1.0, 0.8];

/// Steps without prompts are told apart up to so many rows.
const DECODE_ROWS_MAX: usize = 64;
/// Weight of the newest of them: about the last twenty count.
const NEWEST: f64 = 0.05;

/// What a step, or a part of it, has to compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Rows through the layers.
    pub n_rows: usize,
    /// Rows through the output head as well.
    pub n_logits: usize,
}

impl Load {
    /// `n` rows of decoding sequences.
    pub fn decode(n: usize) -> Self {
        Self { n_rows: n, n_logits: n }
    }

    fn is_decode(self) -> bool {
        self.n_rows == self.n_logits
    }
}

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.n_rows += other.n_rows;
        self.n_logits += other.n_logits;
    }
}

/// Seconds by part, each positive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Of any step.
    pub step: f64,
    /// More per row.
    pub row: f64,
    /// More per row with logits.
    pub logits: f64,
}

impl Cost {
    /// Seconds that `load` adds to a step.
    pub fn of(&self, load: Load) -> f64 {
        self.row * load.n_rows as f64 + self.logits * load.n_logits as f64
    }

    /// Seconds that a decoding sequence adds.
    pub fn decode(&self) -> f64 {
        self.row + self.logits
    }
}

/// The fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostModel {
    /// Sums over steps, each weighted by seconds⁻³, of x·xᵀ with x = (1, rows, logits), of x·seconds, and of 1.
    squares: [[f64; 3]; 3],
    products: [f64; 3],
    weight: f64,
    /// Seconds that each part contributes to the mean step.
    parts: [f64; 3],
    /// Steps per second without prompts, by rows; 0 where there were none. Means of rates heed a stalled step little.
    decode_rates: [f64; DECODE_ROWS_MAX + 1],
}

impl Default for CostModel {
    /// A guess that few measured steps outweigh: 1 ms a step and 1 ms a decoded row.
    fn default() -> Self {
        let mut model = Self {
            squares: [[0.0; 3]; 3],
            products: [0.0; 3],
            weight: 0.0,
            parts: [1e-3; 3],
            decode_rates: [0.0; DECODE_ROWS_MAX + 1],
        };
        for _ in 0..20 {
            for (n_rows, n_logits, micros) in [(1, 1, 2000), (17, 17, 18_000), (17, 0, 17_900)] {
                model.learn(Load { n_rows, n_logits }, Duration::from_micros(micros));
            }
        }
        // As much as a tenth of a measured step.
        let few = 0.1 / 60.0;
        model.squares.iter_mut().flatten().chain(&mut model.products).for_each(|sum| *sum *= few);
        model.weight *= few;
        model.decode_rates.fill(0.0);
        model
    }
}

impl CostModel {
    /// Takes a measured step into account.
    pub fn learn(&mut self, load: Load, took: Duration) {
        let (x, secs) = ([1.0, load.n_rows as f64, load.n_logits as f64], took.as_secs_f64().max(SECS_MIN));
        let weight = secs.powi(-3);
        for i in 0..3 {
            for j in 0..3 {
                self.squares[i][j] = self.squares[i][j] * MEMORY + weight * x[i] * x[j];
            }
            self.products[i] = self.products[i] * MEMORY + weight * x[i] * secs;
        }
        self.weight = self.weight * MEMORY + weight;
        self.solve();
        if let Some(rate) = self.decode_rates.get_mut(load.n_rows).filter(|_| load.is_decode()) {
            *rate += (1.0 / secs - *rate) * if *rate == 0.0 { 1.0 } else { NEWEST };
        }
    }

    /// Seconds of a step with this load alone, if it has no prompts and there were such steps.
    fn decode_secs(&self, load: Load) -> Option<f64> {
        let rate = self.decode_rates.get(load.n_rows).filter(|_| load.is_decode())?;
        (*rate > 0.0).then(|| 1.0 / rate)
    }

    /// The part of a step with load `total` that is due to `own`: what it would take alone, against that and what the
    /// rest adds. The fixed part belongs to whoever has rows: it would take the step without the others too.
    pub fn part(&self, own: Load, total: Load) -> f64 {
        if own.n_rows == 0 {
            return 0.0;
        }
        let cost = self.cost();
        let secs = self.decode_secs(own).unwrap_or(cost.step + cost.of(own));
        let added = match (self.decode_secs(own), self.decode_secs(total)) {
            (Some(without), Some(with)) => (with - without).max(0.0),
            _ => cost.of(total) - cost.of(own),
        };
        secs / (secs + added)
    }

    /// Means of x; parts that never occur count as rare, not as absent.
    fn means(&self) -> [f64; 3] {
        self.squares[0].map(|sum| (sum / self.weight).max(1e-3))
    }

    /// Least squares over the mean step's parts. None may be negative: when the free solution has such a one, the best
    /// of those with some parts at zero.
    fn solve(&mut self) {
        let means = self.means();
        let mean_secs = self.products[0] / self.weight;
        let usual: [f64; 3] = std::array::from_fn(|i| USUAL[i] * means[i]);
        let usual_sum: f64 = usual.iter().sum();
        let mut matrix = [[0.0; 3]; 3];
        let mut target = [0.0; 3];
        for i in 0..3 {
            for j in 0..3 {
                matrix[i][j] = self.squares[i][j] / (self.weight * means[i] * means[j]);
            }
            matrix[i][i] += PULL;
            target[i] = self.products[i] / (self.weight * means[i]) + PULL * mean_secs * usual[i] / usual_sum;
        }
        // At the minimum over a support the objective is −target·parts.
        let gain = |parts: &[f64; 3]| -> f64 { parts.iter().zip(&target).map(|(part, target)| part * target).sum() };
        let supports = (1..8_u8).map(|bits| [bits & 1 > 0, bits & 2 > 0, bits & 4 > 0]);
        let solutions = supports.map(|support| solve_within(support, matrix, target));
        let allowed = solutions.filter(|parts| parts.iter().all(|&part| part >= 0.0));
        if let Some(best) = allowed.max_by(|a, b| gain(a).total_cmp(&gain(b))) {
            self.parts = best;
        }
    }

    /// What the parts take now.
    pub fn cost(&self) -> Cost {
        const TINY: f64 = 1e-9;
        let means = self.means();
        let [step, row, logits] = std::array::from_fn(|i| TINY.max(self.parts[i] / means[i]));
        Cost { step, row, logits }
    }
}

/// Solves `matrix · x = target` over the indices of `support` by elimination; the others are 0. The matrix is positive
/// definite, so no pivot is 0.
fn solve_within(support: [bool; 3], mut matrix: [[f64; 3]; 3], mut target: [f64; 3]) -> [f64; 3] {
    for i in (0..3).filter(|&i| !support[i]) {
        (0..3).for_each(|j| (matrix[i][j], matrix[j][i]) = (0.0, 0.0));
        (matrix[i][i], target[i]) = (1.0, 0.0);
    }
    for i in 0..3 {
        for row in i + 1..3 {
            let factor = matrix[row][i] / matrix[i][i];
            (i..3).for_each(|column| matrix[row][column] -= factor * matrix[i][column]);
            target[row] -= factor * target[i];
        }
    }
    for i in (0..3).rev() {
        let known: f64 = (i + 1..3).map(|column| matrix[i][column] * target[column]).sum();
        target[i] = (target[i] - known) / matrix[i][i];
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    fn took(load: Load) -> Duration {
        Duration::from_secs_f64(3e-3 + 250e-6 * load.n_rows as f64 + 200e-6 * load.n_logits as f64)
    }

    fn near(found: f64, expected: f64) -> bool {
        (found / expected - 1.0).abs() < 0.05
    }

    #[test]
    fn mixed_steps_show_all_three_parts() {
        let mut model = CostModel::default();
        for at in 0..600_usize {
            let n_logits = 1 + at % 17;
            let load = Load { n_rows: n_logits + at % 5 * 8, n_logits };
            model.learn(load, took(load));
        }
        let cost = model.cost();
        assert!(near(cost.step, 3e-3) && near(cost.row, 250e-6) && near(cost.logits, 200e-6), "{cost:?}");
    }

    #[test]
    fn steps_that_are_all_alike_are_predicted_and_split_in_the_usual_way() {
        let mut model = CostModel::default();
        (0..2000).for_each(|_| model.learn(Load::decode(8), Duration::from_millis(4)));
        let cost = model.cost();
        assert!(near(cost.step + cost.of(Load::decode(8)), 4e-3), "{cost:?}");
        assert!(cost.step > cost.row && cost.row > 1e-5 && cost.logits > 1e-5, "{cost:?}");
    }

    #[test]
    fn steps_full_of_prompts_do_not_decide_what_few_rows_take() {
        // Beyond 16 rows each takes two thirds.
        let took = |load: Load| {
            let (dear, cheap) = (load.n_rows.min(16), load.n_rows.saturating_sub(16));
            Duration::from_secs_f64(2e-3 + 340e-6 * dear as f64 + 235e-6 * cheap as f64)
        };
        let mut model = CostModel::default();
        for at in 0..600_usize {
            let load = match at % 16 {
                0 => Load { n_rows: 256, n_logits: 0 },
                8 => Load::decode(1),
                some => Load { n_rows: 5 + some % 4, n_logits: 1 },
            };
            model.learn(load, took(load));
        }
        let cost = model.cost();
        let found = cost.of(Load { n_rows: 7, n_logits: 1 }) + cost.step;
        let expected = took(Load { n_rows: 7, n_logits: 1 }).as_secs_f64();
        assert!((found / expected - 1.0).abs() < 0.1 && cost.row > 290e-6, "{found} for {expected}: {cost:?}");
    }

    #[test]
    fn a_row_is_charged_with_what_it_adds_where_that_is_known() {
        // The fifth row begins another tile.
        let took = |n: usize| Duration::from_micros(3000 + if n > 4 { 1000 } else { 0 });
        let mut model = CostModel::default();
        (0..400).for_each(|at| model.learn(Load::decode(1 + at % 5), took(1 + at % 5)));
        let part = |own, total| model.part(Load::decode(own), Load::decode(total));
        assert!(near(part(4, 5), 0.75) && near(part(3, 4), 1.0), "{} {}", part(4, 5), part(3, 4));
        assert!(near(part(1, 5), 0.75) && part(0, 5) == 0.0, "the fixed part is everybody's own");
        let beside_prompts = model.part(Load::decode(4), Load { n_rows: 20, n_logits: 4 });
        assert!((0.1..0.9).contains(&beside_prompts), "{beside_prompts}: as the line has it");
    }

    #[test]
    fn a_change_of_speed_is_followed() {
        let mut model = CostModel::default();
        let steps = || (0..600_usize).map(|at| Load { n_rows: 4 + at % 30, n_logits: 4 });
        steps().for_each(|load| model.learn(load, took(load)));
        steps().for_each(|load| model.learn(load, 2 * took(load)));
        let cost = model.cost();
        assert!(near(cost.row, 500e-6), "{cost:?}");
    }
}
