//! Which token comes next: a row of logits, the request's settings and the tokens so far → one token.
//!
//! Called by the engine for every row whose logits were wanted. Nothing is remembered between calls but buffers:
//! the result is a function of (logits, settings, tokens so far, seed, choice, position), so that a request can be
//! resumed anywhere (ARCHITECTURE decision 5). Order of the rules, as in vLLM: grammar mask; end-of-answer tokens
//! before `min_tokens`; logit bias; repetition, frequency and presence penalties; temperature (0: the best token,
//! ties to the lower id); min_p; top_k; top_p; then one draw from what is left, best first.
//!
//! Exponentials are computed here with plain arithmetic instead of the system's library, so that equal logits
//! give equal tokens on every machine.

mod philox;

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use shared::request::Sampling;
use shared::token::{PositionLogprobs, TokenLogprob};
use toktrie::SimpleVob;

pub use philox::philox4x32_10;

/// Below this temperature sampling is greedy, as in vLLM: dividing by less overflows.
const TEMPERATURE_MIN: f32 = 1e-5;
/// Tokens whose scaled logit is this far below the best are never drawn: 150,000 of them weigh below 2e-9.
const SPREAD_MAX: f32 = 32.0;
/// Candidates this far below the best are only looked at when the nearer ones do not decide a draw.
const SPREAD_LIKELY: f32 = 6.0;
/// Candidates sorted at first; most draws end among them.
const SORTED_FIRST: usize = 64;

/// Why no token can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The weights (usually an adapter's) overflow on this input.
    #[error("the model produced no finite number for the next token")]
    NotFinite,
    /// Mask and bias together forbid every token.
    #[error("no token is allowed to come next")]
    NothingAllowed,
}

/// The tokens so far, as the penalties see them: a function of prompt and emitted tokens.
#[derive(Debug, Clone, Default)]
pub struct History {
    prompt: HashSet<u32>,
    answer: HashMap<u32, u32>,
}

impl History {
    /// The history of a request; stays empty when its settings need none.
    pub fn new(sampling: &Sampling, prompt: &[u32], emitted: &[u32]) -> Self {
        let mut history = Self::default();
        if sampling.repetition_penalty != 1.0 {
            history.prompt = prompt.iter().copied().collect();
        }
        if penalizes(sampling) {
            emitted.iter().for_each(|&id| history.push(id));
        }
        history
    }

    /// Counts an emitted token.
    pub fn push(&mut self, id: u32) {
        *self.answer.entry(id).or_default() += 1;
    }
}

/// One decision to make.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// The model's logits `[vocab]`.
    pub logits: &'a [f32],
    /// The request's settings.
    pub sampling: &'a Sampling,
    /// The tokens so far.
    pub history: &'a History,
    /// Tokens the grammar allows; ids beyond the mask are not allowed.
    pub mask: Option<&'a SimpleVob>,
    /// Tokens not wanted yet (end of answer before `min_tokens`); allowed after all when the mask leaves nothing else.
    pub unwanted: &'a [u32],
    /// Choice index.
    pub choice: u32,
    /// Tokens emitted before this one.
    pub position: u32,
}

/// Buffers for choosing tokens.
#[derive(Debug, Default)]
pub struct Sampler {
    row: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Candidate {
    /// Best first, ties by lower id.
    fn order(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

impl Sampler {
    /// Chooses a token.
    ///
    /// # Errors
    /// See [`SampleError`].
    pub fn sample(&mut self, draw: &Draw<'_>) -> Result<u32, SampleError> {
        let plain = draw.mask.is_none()
            && draw.unwanted.is_empty()
            && draw.sampling.logit_bias.is_empty()
            && !penalizes(draw.sampling);
        if plain {
            return self.choose(draw.logits, draw);
        }
        let mut row = std::mem::take(&mut self.row);
        adjust(&mut row, draw, draw.unwanted);
        let mut chosen = self.choose(&row, draw);
        if chosen.is_err() && !draw.unwanted.is_empty() {
            adjust(&mut row, draw, &[]);
            chosen = self.choose(&row, draw);
        }
        self.row = row;
        // Had the model's own logits been at fault, masking would not matter.
        chosen.map_err(|error| if best(draw.logits).is_some() { SampleError::NothingAllowed } else { error })
    }

    fn choose(&mut self, logits: &[f32], draw: &Draw<'_>) -> Result<u32, SampleError> {
        let top = best(logits).ok_or(SampleError::NotFinite)?;
        if draw.sampling.temperature < TEMPERATURE_MIN {
            return Ok(top.id);
        }
        Ok(self.draw(logits, top.logit, draw))
    }

    /// Draws by walking down the sorted candidates until their weight passes the random number.
    fn draw(&mut self, logits: &[f32], top: f32, draw: &Draw<'_>) -> u32 {
        let sampling = draw.sampling;
        let scale = 1.0 / sampling.temperature;
        let spread = if sampling.min_p > 0.0 { (-sampling.min_p.ln()).clamp(0.0, SPREAD_MAX) } else { SPREAD_MAX };
        let lowest = top - spread * sampling.temperature;
        let likely = top - SPREAD_LIKELY * sampling.temperature;
        let mut sorted = Sorted::new(&mut self.candidates, logits, lowest, likely);
        let weight = |candidate: Candidate| f64::from(exp((candidate.logit - top) * scale));
        let mut total = if sampling.top_k > 0 {
            sorted.keep(sampling.top_k as usize);
            sorted.candidates.iter().map(|&candidate| weight(candidate)).sum()
        } else {
            sum_exp(logits, top, scale, lowest)
        };
        if sampling.top_p < 1.0 {
            let wanted = total * f64::from(sampling.top_p);
            let (mut sum, mut kept) = (0.0, 0);
            while let Some(candidate) = sorted.at(kept).filter(|_| kept == 0 || sum < wanted) {
                sum += weight(candidate);
                kept += 1;
            }
            sorted.keep(kept);
            total = sum;
        }
        let target = total * uniform(sampling.seed, draw.choice, draw.position);
        let (mut sum, mut at, mut chosen) = (0.0, 0, 0);
        // Rounding may leave the whole sum a hair below the target: then the last candidate it is.
        while let Some(candidate) = sorted.at(at).filter(|_| at == 0 || sum <= target) {
            sum += weight(candidate);
            chosen = candidate.id;
            at += 1;
        }
        chosen
    }

    /// Log-probabilities at a position under the model's own distribution: of `chosen`, and the `n_top` best.
    pub fn logprobs(&mut self, logits: &[f32], chosen: u32, n_top: u32) -> PositionLogprobs {
        let top = best(logits).map_or(0.0, |candidate| candidate.logit);
        let log_total = f64::from(top) + sum_exp(logits, top, 1.0, f32::NEG_INFINITY).ln();
        let logprob = |logit: f32| (f64::from(logit) - log_total) as f32;
        let chosen = TokenLogprob { id: chosen, logprob: logprob(logits[chosen as usize]) };
        let n_top = (n_top as usize).min(logits.len());
        // A short sorted list: almost every token fails the first comparison.
        self.candidates.clear();
        let mut lowest = f32::NEG_INFINITY;
        for (&logit, id) in logits.iter().zip(0..) {
            let wanted = n_top > 0 && (self.candidates.len() < n_top || logit > lowest);
            if wanted && !logit.is_nan() {
                let at = self.candidates.partition_point(|candidate| candidate.logit >= logit);
                self.candidates.truncate(n_top - 1);
                self.candidates.insert(at, Candidate { logit, id });
                lowest = self.candidates.last().map_or(lowest, |candidate| candidate.logit);
            }
        }
        let top = self.candidates.iter().map(|c| TokenLogprob { id: c.id, logprob: logprob(c.logit) }).collect();
        PositionLogprobs { chosen, top }
    }
}

/// Candidates that are collected and put in order only as far as someone looks.
struct Sorted<'a> {
    candidates: &'a mut Vec<Candidate>,
    n_sorted: usize,
    /// Where the less likely candidates are: logits from `lowest` to below `likely`.
    rest: Option<(&'a [f32], f32, f32)>,
}

impl<'a> Sorted<'a> {
    fn new(candidates: &'a mut Vec<Candidate>, logits: &'a [f32], lowest: f32, likely: f32) -> Self {
        candidates.clear();
        let mut sorted = Self { candidates, n_sorted: 0, rest: Some((logits, lowest, likely)) };
        sorted.collect(logits, lowest.max(likely), f32::INFINITY);
        sorted
    }

    /// Appends the logits in `[from, below)`.
    fn collect(&mut self, logits: &[f32], from: f32, below: f32) {
        let found = logits.iter().zip(0..).filter(|&(&logit, _)| logit >= from && logit < below);
        self.candidates.extend(found.map(|(&logit, id)| Candidate { logit, id }));
    }

    fn collect_rest(&mut self) {
        if let Some((logits, lowest, likely)) = self.rest.take() {
            self.collect(logits, lowest, likely);
        }
    }

    /// Drops all but the `n` best and sorts them.
    fn keep(&mut self, n: usize) {
        if self.candidates.len() < n {
            self.collect_rest();
        }
        self.rest = None;
        if n < self.candidates.len() {
            self.candidates.select_nth_unstable_by(n - 1, Candidate::order);
            self.candidates.truncate(n);
        }
        self.candidates.sort_unstable_by(Candidate::order);
        self.n_sorted = self.candidates.len();
    }

    /// The candidate of rank `at`, if there are so many.
    fn at(&mut self, at: usize) -> Option<Candidate> {
        if at >= self.candidates.len() {
            self.collect_rest();
        }
        if at >= self.n_sorted {
            let rest = &mut self.candidates[self.n_sorted..];
            let more = self.n_sorted.max(SORTED_FIRST).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more - 1, Candidate::order);
            }
            rest[..more].sort_unstable_by(Candidate::order);
            self.n_sorted += more;
        }
        self.candidates.get(at).copied()
    }
}

fn penalizes(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0
}

/// Writes the logits with mask, bias and penalties applied into `row`.
fn adjust(row: &mut Vec<f32>, draw: &Draw<'_>, unwanted: &[u32]) {
    row.clear();
    row.extend_from_slice(draw.logits);
    if let Some(mask) = draw.mask {
        let words = mask.as_slice().iter().copied().chain(std::iter::repeat(0));
        for (lane, word) in row.chunks_mut(32).zip(words) {
            if word != u32::MAX {
                let forbidden = lane.iter_mut().enumerate().filter(|(bit, _)| word & (1 << bit) == 0);
                forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }
    let mut change = |id: u32, f: &dyn Fn(f32) -> f32| {
        if let Some(logit) = row.get_mut(id as usize) {
            *logit = f(*logit);
        }
    };
    unwanted.iter().for_each(|&id| change(id, &|_| f32::NEG_INFINITY));
    draw.sampling.logit_bias.iter().for_each(|&(id, bias)| change(id, &|logit| logit + bias));
    // Every token is changed on its own, so the order of these maps reaches nothing.
    let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *draw.sampling;
    let repeat = |logit: f32| if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
    let History { prompt, answer } = draw.history;
    prompt.iter().filter(|id| !answer.contains_key(id)).for_each(|&id| change(id, &repeat));
    for (&id, &count) in answer {
        change(id, &|logit| repeat(logit) - frequency_penalty * count as f32 - presence_penalty);
    }
}

/// The best finite logit, ties to the lower id; `None` when there is none, or when one is +∞.
fn best(logits: &[f32]) -> Option<Candidate> {
    // Blocks let the compiler search for the maximum with vector instructions; few blocks improve on it.
    const BLOCK: usize = 256;
    let mut top = f32::NEG_INFINITY;
    let mut block_at = 0;
    for (at, block) in logits.chunks(BLOCK).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (whole, rest) = block.as_chunks::<16>();
        for chunk in whole {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane = if logit > *lane { logit } else { *lane };
            }
        }
        let block_top =
            lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &logit| if logit > top { logit } else { top });
        if block_top > top {
            (top, block_at) = (block_top, at);
        }
    }
    if !top.is_finite() {
        return None;
    }
    let start = block_at * BLOCK;
    let offset = logits[start..].iter().position(|&logit| logit == top)?;
    Some(Candidate { logit: top, id: (start + offset) as u32 })
}

/// Σ exp((logit − top)·scale) over the logits from `lowest` up, in eight fixed lanes.
fn sum_exp(logits: &[f32], top: f32, scale: f32, lowest: f32) -> f64 {
    // A plain loop over a block is what the compiler turns into vector instructions.
    const BLOCK: usize = 64;
    let mut terms = [0.0_f32; BLOCK];
    let mut lanes = [0.0_f64; 8];
    for block in logits.chunks(BLOCK) {
        terms[block.len()..].fill(0.0);
        for (term, &logit) in terms.iter_mut().zip(block) {
            let value = exp((logit - top) * scale);
            *term = if logit >= lowest { value } else { 0.0 };
        }
        for chunk in terms.as_chunks::<8>().0 {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &term)| *lane += f64::from(term));
        }
    }
    lanes.iter().sum()
}

/// eˣ for x ≤ 0 with a relative error below 2e-7; 0 below −87 and for NaN. Method and coefficients: Cephes `expf`.
#[inline]
fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low bits: no conversion, so that the
    // compiler can use vector instructions.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let value = (p * r * r + r + 1.0) * f32::from_bits(exponent << 23);
    if x > -87.0 { value } else { 0.0 }
}

/// A number in [0, 1) that depends on nothing but its arguments.
fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    let [high, low, ..] = philox4x32_10([position, choice, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(high) << 21) | (u64::from(low) >> 11);
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests;
