//! The model's time: what happens next, in order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    /// All nodes send a heartbeat.
    Beat,
    /// The membership looks at them.
    Tick,
    /// A tenant begins to work.
    Session,
    /// A tenant asks, and will so many times with this.
    Ask { tenant: usize, left: u64 },
    /// A node's step ends, in one of its lives.
    StepEnds { worker: usize, life: u32 },
    /// A node has an adapter in memory, in one of its lives.
    Loaded { worker: usize, life: u32, tenant: usize },
    /// The node that dies does.
    Die,
    /// It is started again.
    Return,
}

/// Events by time, in the order of their coming where times are equal.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BinaryHeap<Reverse<(u64, u64, What)>>,
    put: u64,
}

impl Queue {
    /// Lets something happen at a time, in µs.
    pub(super) fn put(&mut self, at: u64, what: What) {
        self.put += 1;
        self.waiting.push(Reverse((at, self.put, what)));
    }

    /// What happens next, and when.
    pub(super) fn next(&mut self) -> Option<(u64, What)> {
        self.waiting.pop().map(|Reverse((at, _, what))| (at, what))
    }
}
