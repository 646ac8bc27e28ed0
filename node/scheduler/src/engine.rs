//! The loop: pull → plan → forward → sample → emit → publish pages → charge, on a thread of its own.
//!
//! The base model's actor makes an [`Engine`], moves it to an OS thread and calls [`Engine::run`]; simulations call
//! [`Engine::step`]. It owns the forward pass, the KV pages and all running requests. It holds no backlog but
//! preempted sequences: work is pulled only when there is room. A panic inside a step fails every running request
//! with an event, then the thread ends and its supervisor starts another one.

mod batch;
mod request;
mod stats;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use model::step::Forward;
use shared::clock::Clock;
use shared::hash::ContentHash;

use crate::plan::reserve::ClassReserve;
use crate::source::WorkSource;
use crate::vocab::Vocabulary;
use batch::Batch;

pub use stats::{EngineSnapshot, EngineStats, STEP_ROWS_BOUNDS, STEP_ROWS_BUCKETS};

/// Longest wait for work when idle: how late an engine notices that it should stop.
const PARK_IDLE: Duration = Duration::from_millis(50);
/// Longest wait while requests are parked: how late a reader that caught up is noticed.
const PARK_BUSY: Duration = Duration::from_millis(2);

/// What an engine is allowed to do.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// The base model, as part of every page's key.
    pub base: ContentHash,
    /// Longest sequence, prompt and answer, in tokens.
    pub context: usize,
    /// Most sequences in the batch; at most the forward pass's rows, so that all can decode in one step.
    pub sequences_max: usize,
    /// Most prompt rows of a step.
    pub prefill_rows_max: usize,
    /// How much prompts may prolong a step that also decodes, in times of what it takes without them.
    pub prefill_stretch: f64,
    /// Most rows of one sequence whose logits are all wanted (prompt log-probabilities).
    pub logits_rows_max: usize,
    /// Step time reserved for service classes.
    pub reserve: ClassReserve,
    /// Whether tenants' prefixes are kept.
    pub prefix_cache: bool,
    /// Most unreferenced pages kept per tenant.
    pub cache_quota_pages: u32,
    /// Unreferenced pages per tenant that other tenants cannot push out.
    pub cache_floor_pages: u32,
    /// Longest a request with a full channel is kept.
    pub park_max: Duration,
}

impl EngineConfig {
    /// Values that suit one or two cores and a small model.
    pub fn new(base: ContentHash, context: usize) -> Self {
        Self {
            base,
            context,
            sequences_max: 64,
            prefill_rows_max: 128,
            prefill_stretch: 0.8,
            logits_rows_max: 64,
            reserve: ClassReserve { shares: [0.0; 3], delay_max: Duration::from_millis(50) },
            prefix_cache: true,
            cache_quota_pages: 256,
            cache_floor_pages: 16,
            park_max: Duration::from_secs(10),
        }
    }
}

/// Sizes that the forward pass dictates.
#[derive(Debug, Clone, Copy)]
struct EngineShape {
    page_tokens: usize,
    n_pages: usize,
    rows_max: usize,
    vocab: usize,
}

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineEnd {
    /// The source closed and all requests are done.
    Drained,
    /// A step panicked; every request was failed. The text is for the log.
    Panicked(String),
}

/// One engine: a forward pass, a source of work and the batch between them.
pub struct Engine<F, S> {
    forward: F,
    source: S,
    clock: Arc<dyn Clock>,
    batch: Batch,
    stats: Arc<EngineStats>,
}

impl<F: Forward, S: WorkSource> Engine<F, S> {
    /// An idle engine.
    ///
    /// # Panics
    /// When `config` does not fit the forward pass: more sequences than rows, or no pages.
    pub fn new(
        forward: F,
        source: S,
        vocabulary: Arc<Vocabulary>,
        clock: Arc<dyn Clock>,
        config: EngineConfig,
    ) -> Self {
        let shape = EngineShape {
            page_tokens: forward.page_tokens(),
            n_pages: forward.n_pages(),
            rows_max: forward.rows_max(),
            vocab: forward.vocab(),
        };
        assert!(config.sequences_max <= shape.rows_max, "every sequence can decode in one step");
        assert!(shape.n_pages > 0 && shape.page_tokens > 0, "there is KV memory");
        let batch = Batch::new(config, shape, vocabulary);
        let stats = Arc::new(EngineStats::default());
        stats.store(&batch.stats);
        Self { forward, source, clock, batch, stats }
    }

    /// The numbers, for other threads.
    pub fn stats(&self) -> Arc<EngineStats> {
        Arc::clone(&self.stats)
    }

    /// True when nothing runs.
    pub fn is_idle(&self) -> bool {
        self.batch.is_empty()
    }

    /// Steps until the source closes and everything is done, or a step panics. Failing what was left may panic
    /// again, for the first panic may have left anything behind: the end is told all the same.
    pub fn run(mut self) -> EngineEnd {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.step())) {
                Ok(0) if self.is_idle() && self.source.closed() => return EngineEnd::Drained,
                Ok(0) => self.source.park(if self.is_idle() { PARK_IDLE } else { PARK_BUSY }),
                Ok(_) => {}
                Err(panic) => {
                    let message = panic_message(panic.as_ref());
                    tracing::error!(%message, "an engine step panicked; all its requests fail");
                    for last_duty in [|engine: &mut Self| engine.batch.fail_everything(), Self::report] {
                        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| last_duty(&mut self))) {
                            let message = panic_message(panic.as_ref());
                            tracing::error!(%message, "an engine that panicked panicked again at its end");
                        }
                    }
                    return EngineEnd::Panicked(message);
                }
            }
        }
    }

    /// One iteration; returns the rows computed, 0 when nothing could run.
    pub fn step(&mut self) -> usize {
        let now = self.clock.now();
        // 1. Let go of what nobody wants, take in what fits.
        self.batch.sweep(now);
        self.source.forgotten().iter().for_each(|tenant| self.batch.pool.forget(tenant));
        while let Some(room) = self.batch.room().filter(|_| !self.source.closed()) {
            let Some(work) = self.source.pull(now, room) else {
                break;
            };
            self.batch.admit(work, now);
        }
        // 2. Choose rows; from here on their pages stay where they are until the step is done.
        let plan = self.batch.plan();
        self.batch.pool.take_freed().into_iter().for_each(|page| self.forward.page_freed(page));
        // 3. Compute them, then choose tokens, publish pages and send events.
        let n_rows = plan.n_rows();
        if n_rows > 0 {
            let step = self.batch.step(&plan);
            let started = self.clock.now();
            let logits = self.forward.forward(&step);
            let finished = self.clock.now();
            self.batch.settle(&plan, logits, finished.saturating_duration_since(started), finished);
        }
        // 4. Tell the forward pass, the queue and the readers of numbers.
        self.batch.pool.take_freed().into_iter().for_each(|page| self.forward.page_freed(page));
        self.report();
        n_rows
    }

    /// Fails every running request: their clients get an event instead of silence.
    pub fn fail_all(&mut self) {
        self.batch.fail_everything();
        self.report();
    }

    fn report(&mut self) {
        self.batch
            .take_charges()
            .into_iter()
            .for_each(|(tier, route, charge)| self.source.charge(tier, &route, charge));
        self.batch.update_stats();
        self.stats.store(&self.batch.stats);
    }
}

impl<F, S> std::fmt::Debug for Engine<F, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("stats", &self.batch.stats).finish_non_exhaustive()
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without text").to_owned()
}

#[cfg(test)]
mod tests;
