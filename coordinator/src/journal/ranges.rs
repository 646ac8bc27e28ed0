//! Which tokens of a request are billed: every delivered one once, whoever delivered it (core).
//!
//! An entry node says what it delivered as ranges of `seq`, at-least-once: [`Delivered`]. One that goes on with another's
//! request begins with what the client proved to have, since the first may have died before it could say so. Whoever
//! adds usage up counts the union: [`Ledger`]. So neither a second attempt, nor a second entry node, nor a log that is
//! read twice bills a token twice; the prompt is billed once for the request.

use std::collections::BTreeMap;

use shared::id::RequestId;
use shared::request::Emitted;
use shared::token::TokenEvent;

/// Tokens `from..to` of one choice were delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// Of which request.
    pub request: RequestId,
    /// Choice index.
    pub choice: u32,
    /// First `seq`.
    pub from: u32,
    /// Behind the last.
    pub to: u32,
}

/// What one entry node delivered of one request.
#[derive(Debug, Clone)]
pub struct Delivered {
    request: RequestId,
    /// By choice: said until, delivered until.
    choices: Vec<(u32, u32)>,
}

/// What is billed, from everything that was said.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// Ranges by choice, rising, apart from one another.
    requests: BTreeMap<RequestId, BTreeMap<u32, Vec<(u32, u32)>>>,
}

// === impl Delivered ===

impl Delivered {
    /// Of a request of so many choices whose client has the first `have` tokens of each; shorter is none.
    pub fn new(request: RequestId, n: u32, have: &[u32]) -> Self {
        let choice = |choice| (0, have.get(choice as usize).copied().unwrap_or(0));
        Self { request, choices: (0..n).map(choice).collect() }
    }

    /// The client took an event.
    pub fn on_event(&mut self, event: &TokenEvent) {
        if let TokenEvent::Token { choice, seq, .. } = event
            && let Some((_, until)) = self.choices.get_mut(*choice as usize)
        {
            *until = (*until).max(seq.saturating_add(1));
        }
    }

    /// What was not said yet. Said from now on: write it before anything is built on it.
    pub fn unsaid(&mut self) -> Vec<Range> {
        let request = self.request;
        let ranges = (0..).zip(&mut self.choices).filter(|(_, (said, until))| said < until);
        let say = |(choice, (said, until)): (u32, &mut (u32, u32))| {
            let from = std::mem::replace(said, *until);
            Range { request, choice, from, to: *until }
        };
        ranges.map(say).collect()
    }
}

/// What a keeper knows was delivered.
pub fn of_record(request: RequestId, emitted: &Emitted) -> Vec<Range> {
    let to = |tokens: &Vec<u32>| u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    let choices = (0..).zip(&emitted.0).filter(|(_, choice)| !choice.tokens.is_empty());
    choices.map(|(choice, emitted)| Range { request, choice, from: 0, to: to(&emitted.tokens) }).collect()
}

// === impl Ledger ===

impl Ledger {
    /// Takes a range in; says how many of its tokens were not billed before.
    pub fn bill(&mut self, range: Range) -> u32 {
        let ranges = self.requests.entry(range.request).or_default().entry(range.choice).or_default();
        let (mut from, mut to) = (range.from, range.to);
        if from >= to {
            return 0;
        }
        let before: u32 = ranges.iter().map(|(from, to)| to - from).sum();
        ranges.retain(|(other_from, other_to)| {
            let apart = *other_to < from || to < *other_from;
            if !apart {
                (from, to) = (from.min(*other_from), to.max(*other_to));
            }
            apart
        });
        let at = ranges.partition_point(|(other, _)| *other < from);
        ranges.insert(at, (from, to));
        ranges.iter().map(|(from, to)| to - from).sum::<u32>() - before
    }

    /// Tokens billed of a request, all choices together.
    pub fn billed(&self, request: RequestId) -> u64 {
        let choices = self.requests.get(&request).into_iter().flat_map(BTreeMap::values).flatten();
        choices.map(|(from, to)| u64::from(to - from)).sum()
    }

    /// Whether a request is billed at all, and so its prompt is, once.
    pub fn has(&self, request: RequestId) -> bool {
        self.requests.contains_key(&request)
    }
}
