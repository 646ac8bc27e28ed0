//! What an engine has done and holds, as plain numbers that other threads may read at any time.
//!
//! The engine writes after every step; the node exports. Counters only grow; the rest is the state after the last
//! step. Numbers of one snapshot may be a step apart.

use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the buckets of [`EngineSnapshot::steps_by_rows`], in rows: vLLM's for
/// `vllm:iteration_tokens_total`, so that dashboards fit. One more bucket holds what is larger.
pub const STEP_ROWS_BOUNDS: [u64; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384];
/// Buckets of steps by rows.
pub const STEP_ROWS_BUCKETS: usize = STEP_ROWS_BOUNDS.len() + 1;

macro_rules! stats {
    (state { $($(#[$state_doc:meta])* $state:ident,)* } counters { $($(#[$doc:meta])* $counter:ident,)* }) => {
        /// The live numbers; written by the engine thread only.
        #[derive(Debug, Default)]
        pub struct EngineStats {
            $($state: AtomicU64,)*
            $($counter: AtomicU64,)*
            steps_by_rows: [AtomicU64; STEP_ROWS_BUCKETS],
        }

        /// The numbers at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct EngineSnapshot {
            $($(#[$state_doc])* pub $state: u64,)*
            $($(#[$doc])* pub $counter: u64,)*
            /// Counter: steps by their number of rows, in the buckets of [`STEP_ROWS_BOUNDS`]; not cumulative.
            pub steps_by_rows: [u64; STEP_ROWS_BUCKETS],
        }

        impl EngineStats {
            /// Reads all numbers.
            pub fn snapshot(&self) -> EngineSnapshot {
                EngineSnapshot {
                    $($state: self.$state.load(Ordering::Relaxed),)*
                    $($counter: self.$counter.load(Ordering::Relaxed),)*
                    steps_by_rows: std::array::from_fn(|idx| self.steps_by_rows[idx].load(Ordering::Relaxed)),
                }
            }

            /// Replaces all numbers.
            pub(super) fn store(&self, now: &EngineSnapshot) {
                $(self.$state.store(now.$state, Ordering::Relaxed);)*
                $(self.$counter.store(now.$counter, Ordering::Relaxed);)*
                for (live, now) in self.steps_by_rows.iter().zip(now.steps_by_rows) {
                    live.store(now, Ordering::Relaxed);
                }
            }
        }

        impl EngineSnapshot {
            /// These numbers with the counters of engines that ended before this one added, so that a counter
            /// never falls when an engine is started again.
            #[must_use]
            pub fn after(mut self, earlier: &Self) -> Self {
                $(self.$counter += earlier.$counter;)*
                for (own, earlier) in self.steps_by_rows.iter_mut().zip(earlier.steps_by_rows) {
                    *own += earlier;
                }
                self
            }
        }
    };
}

stats! {
    state {
        /// Requests in the engine.
        requests,
        /// Sequences that hold pages.
        sequences_running,
        /// Sequences that wait for pages after a preemption.
        sequences_preempted,
        /// Requests skipped because their reader is slow.
        requests_parked,
        /// KV pages in all.
        kv_pages,
        /// KV pages held by sequences.
        kv_pages_used,
        /// KV pages kept in prefix caches only.
        kv_pages_cached,
        /// Empty KV pages.
        kv_pages_free,
        /// Rows of the last step.
        rows_last,
    }
    counters {
        /// Counter: steps computed.
        steps,
        /// Counter: nanoseconds inside the forward pass.
        forward_ns,
        /// Counter: rows of prompts, including those computed again after preemption.
        rows_prefill,
        /// Counter: rows of answers.
        rows_decode,
        /// Counter: prompt tokens computed for the first time.
        tokens_prompt,
        /// Counter: tokens emitted.
        tokens_emitted,
        /// Counter: sequences that lost their pages.
        preemptions,
        /// Counter: prompt tokens looked up in a prefix cache.
        prefix_queries,
        /// Counter: prompt tokens found there.
        prefix_hits,
        /// Counter: requests that entered.
        requests_started,
        /// Counter: of these, requests that went on from tokens another engine had emitted.
        requests_resumed,
        /// Counter: requests whose choices all finished.
        requests_finished,
        /// Counter: requests ended by their client.
        requests_cancelled,
        /// Counter: requests ended by an error.
        requests_failed,
    }
}

impl EngineSnapshot {
    /// Counts a step of `n_rows`.
    pub(super) fn count_step(&mut self, n_rows: u64) {
        self.steps += 1;
        self.rows_last = n_rows;
        self.steps_by_rows[STEP_ROWS_BOUNDS.partition_point(|&bound| bound < n_rows)] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_falls_into_the_first_bucket_that_holds_it() {
        let mut stats = EngineSnapshot::default();
        for n_rows in [1, 2, 8, 9, 16_384, 16_385] {
            stats.count_step(n_rows);
        }
        assert_eq!((stats.steps, stats.rows_last), (6, 16_385));
        assert_eq!(stats.steps_by_rows, [1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn counters_go_on_after_another_engine_and_the_state_does_not() {
        let mut earlier = EngineSnapshot { requests: 3, tokens_emitted: 40, ..EngineSnapshot::default() };
        earlier.count_step(5);
        let mut own = EngineSnapshot { requests: 1, tokens_emitted: 2, ..EngineSnapshot::default() };
        own.count_step(1);
        let both = own.after(&earlier);
        assert_eq!((both.requests, both.tokens_emitted, both.steps, both.rows_last), (1, 42, 2, 1));
        assert_eq!(both.steps_by_rows[..2], [1, 1]);
    }
}
