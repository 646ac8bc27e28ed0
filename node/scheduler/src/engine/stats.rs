//! What an engine has done and holds, as plain numbers that other threads may read at any time.
//!
//! The engine writes after every step; the node exports. Counters only grow; the rest is the state after the last
//! step. Numbers of one snapshot may be a step apart.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live numbers; written by the engine thread only.
        #[derive(Debug, Default)]
        pub struct EngineStats {
            $($name: AtomicU64,)*
        }

        /// The numbers at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct EngineSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl EngineStats {
            /// Reads all numbers.
            pub fn snapshot(&self) -> EngineSnapshot {
                EngineSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }

            /// Replaces all numbers.
            pub(super) fn store(&self, now: &EngineSnapshot) {
                $(self.$name.store(now.$name, Ordering::Relaxed);)*
            }
        }
    };
}

stats! {
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
    /// Counter: steps computed.
    steps,
    /// Counter: nanoseconds inside the forward pass.
    forward_ns,
    /// Counter: rows of prompts, including those computed again after preemption.
    rows_prefill,
    /// Counter: rows of answers.
    rows_decode,
    /// Rows of the last step.
    rows_last,
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
    /// Counter: requests whose choices all finished.
    requests_finished,
    /// Counter: requests ended by their client.
    requests_cancelled,
    /// Counter: requests ended by an error.
    requests_failed,
}
