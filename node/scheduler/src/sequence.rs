//! One running choice: its tokens, how far they are computed, and the KV pages that hold them.
//!
//! A sequence is Waiting (holds no pages: preempted, or a further choice before the first one's prompt is done),
//! then Prefill (several tokens still to compute), then Decode (exactly the newest token to compute), then Done.
//! Preemption leads back to Waiting, and a request that comes from another engine starts there with tokens emitted
//! already; because rows are batch-invariant, computing prompt and emitted tokens again
//! gives the same bits. It does not decide when it runs: [`crate::plan`] does.

use shared::hash::ContentHash;
use shared::id::TenantId;
use shared::tenant::Tier;

use crate::blocks::{BlockPool, PageKey};

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Holds no pages.
    Waiting,
    /// Prompt, or prompt and emitted tokens after a preemption or from another engine, are being computed.
    Prefill,
    /// The newest emitted token is to be computed.
    Decode,
    /// Ended; holds nothing.
    Done,
}

/// What a sequence is made of.
#[derive(Debug, Clone)]
pub struct SequenceInit {
    /// Number of the request, in order of admission.
    pub request: u64,
    /// Choice index.
    pub choice: u32,
    /// Queue class.
    pub tier: Tier,
    /// Owner of the pages.
    pub tenant: TenantId,
    /// Key of the tenant's prefix cache.
    pub cache_secret: [u8; 32],
    /// Base model.
    pub base: ContentHash,
    /// Adapter; rows of equal adapters stand together.
    pub adapter: Option<ContentHash>,
    /// Not empty.
    pub prompt: Vec<u32>,
    /// Tokens emitted by an engine before this one.
    pub emitted: Vec<u32>,
    /// Another choice of the request computes the prompt; see [`Sequence::enter_beside`].
    pub held: bool,
    /// The logits of every prompt position are wanted, so nothing of the prompt may come from the cache.
    pub all_logits: bool,
    /// Tokens per page.
    pub page_tokens: usize,
}

/// One running choice.
#[derive(Debug)]
pub struct Sequence {
    /// Number of the request, in order of admission.
    pub request: u64,
    /// Choice index.
    pub choice: u32,
    /// Queue class.
    pub tier: Tier,
    /// Owner of the pages.
    pub tenant: TenantId,
    /// Adapter.
    pub adapter: Option<ContentHash>,
    /// Skipped while its reader is slow; first to lose its pages.
    pub parked: bool,
    /// A further choice that waits for the first one's prompt.
    pub held: bool,
    /// Logits of every prompt position are still wanted.
    pub all_logits: bool,
    /// Number of the last step it had rows in.
    pub last_step: u64,
    /// Prompt rows the planner had planned when this sequence first stood there with a prompt.
    pub waits_since: Option<u64>,
    secret: [u8; 32],
    page_tokens: usize,
    tokens: Vec<u32>,
    prompt_len: usize,
    computed: usize,
    charged: usize,
    pages: Vec<u32>,
    root: PageKey,
    keys: Vec<PageKey>,
    n_published: usize,
    phase: Phase,
}

impl Sequence {
    /// A waiting sequence.
    ///
    /// # Panics
    /// When the prompt is empty; admission refuses that.
    pub fn new(init: SequenceInit) -> Self {
        assert!(!init.prompt.is_empty() && init.page_tokens > 0, "a sequence has tokens and pages have room");
        Self {
            request: init.request,
            choice: init.choice,
            tier: init.tier,
            tenant: init.tenant,
            adapter: init.adapter,
            parked: false,
            held: init.held,
            all_logits: init.all_logits,
            last_step: 0,
            waits_since: None,
            secret: init.cache_secret,
            page_tokens: init.page_tokens,
            prompt_len: init.prompt.len(),
            tokens: [init.prompt, init.emitted].concat(),
            computed: 0,
            charged: 0,
            pages: Vec::new(),
            root: PageKey::root(&init.cache_secret, init.base, init.adapter),
            keys: Vec::new(),
            n_published: 0,
            phase: Phase::Waiting,
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Prompt and emitted tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Tokens emitted so far.
    pub fn n_emitted(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens whose keys and values stand in the pages.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens still to compute before the next one can be chosen.
    pub fn n_pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The pages, by position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Pages still missing to compute all tokens and one more.
    pub fn n_pages_missing(&self) -> usize {
        (self.tokens.len() + 1).div_ceil(self.page_tokens).saturating_sub(self.pages.len())
    }

    /// Enters the batch with whatever the tenant's cache has, except the last token, which is always computed so
    /// that there are logits. Returns the tokens found.
    ///
    /// # Panics
    /// When not waiting.
    pub fn enter(&mut self, pool: &mut BlockPool) -> usize {
        assert!(self.phase == Phase::Waiting && self.pages.is_empty() && self.computed == 0 && !self.held);
        self.phase = Phase::Prefill;
        if !self.all_logits {
            let n_full = (self.tokens.len() - 1) / self.page_tokens;
            self.extend_keys(n_full);
            self.pages = pool.lookup(&self.tenant, &self.keys[..n_full]);
        }
        self.adopt_pages()
    }

    /// Enters the batch on the pages of the first choice, which has just computed the same prompt.
    ///
    /// # Panics
    /// When not waiting for `first`.
    pub fn enter_beside(&mut self, first: &Self, pool: &mut BlockPool) {
        assert!(self.held && self.phase == Phase::Waiting && self.request == first.request);
        assert!(first.computed >= self.prompt_len);
        assert_eq!(self.tokens[..self.prompt_len], first.tokens[..self.prompt_len]);
        self.held = false;
        self.phase = Phase::Prefill;
        // Pages of nothing but the prompt; the last token is always computed, so that there are logits.
        let n_full = self.prompt_len.min(self.tokens.len() - 1) / self.page_tokens;
        self.pages = first.pages[..n_full].to_vec();
        self.pages.iter().for_each(|&page| pool.share(page));
        self.adopt_pages();
        // The prompt was computed once and is charged once.
        self.charged = self.prompt_len;
    }

    /// Of the next `n_rows`, those whose logits are wanted: all of a prompt with log-probabilities, else the newest
    /// token's.
    pub fn wanted_logits(&self, n_rows: usize) -> std::ops::Range<usize> {
        if self.all_logits {
            0..n_rows
        } else if n_rows == self.n_pending() {
            n_rows - 1..n_rows
        } else {
            0..0
        }
    }

    /// Makes room for up to `n_rows` more tokens; returns for how many there is.
    pub fn reserve(&mut self, n_rows: usize, pool: &mut BlockPool) -> usize {
        assert!(matches!(self.phase, Phase::Prefill | Phase::Decode) && n_rows <= self.n_pending());
        while self.pages.len() * self.page_tokens < self.computed + n_rows {
            match pool.allocate(&self.tenant) {
                Some(page) => self.pages.push(page),
                None => break,
            }
        }
        n_rows.min(self.pages.len() * self.page_tokens - self.computed)
    }

    /// Notes that the next `n_rows` tokens were computed and publishes the pages that became full. Returns the
    /// prompt tokens among them that were not computed before (preemption is not the tenant's cost).
    pub fn advance(&mut self, n_rows: usize, pool: &mut BlockPool) -> usize {
        assert!(n_rows > 0 && n_rows <= self.n_pending(), "a step computes pending tokens");
        self.computed += n_rows;
        assert!(self.computed <= self.pages.len() * self.page_tokens, "computed tokens stand in pages");
        let n_full = self.computed / self.page_tokens;
        self.extend_keys(n_full);
        for at in self.n_published..n_full {
            pool.publish(self.pages[at], self.keys[at]);
        }
        self.n_published = self.n_published.max(n_full);
        let reached = self.computed.min(self.prompt_len);
        let newly = reached.saturating_sub(self.charged);
        self.charged = self.charged.max(reached);
        newly
    }

    /// Appends the chosen token.
    ///
    /// # Panics
    /// When tokens before it are not computed.
    pub fn push(&mut self, id: u32) {
        assert!(self.n_pending() == 0 && self.phase != Phase::Done, "a token follows computed tokens");
        self.tokens.push(id);
        self.phase = Phase::Decode;
    }

    /// Gives its pages up; it starts again from its tokens.
    pub fn preempt(&mut self, pool: &mut BlockPool) {
        assert!(matches!(self.phase, Phase::Prefill | Phase::Decode), "only what runs is preempted");
        self.phase = Phase::Waiting;
        self.drop_pages(pool);
    }

    /// Ends; gives its pages up. Does nothing the second time.
    pub fn finish(&mut self, pool: &mut BlockPool) {
        self.phase = Phase::Done;
        self.drop_pages(pool);
    }

    fn drop_pages(&mut self, pool: &mut BlockPool) {
        pool.release_all(&mut self.pages);
        self.computed = 0;
        self.n_published = 0;
    }

    /// Takes the full pages it has been given as computed and charged to nobody.
    fn adopt_pages(&mut self) -> usize {
        self.computed = self.pages.len() * self.page_tokens;
        self.n_published = self.pages.len();
        self.charged = self.charged.max(self.computed.min(self.prompt_len));
        self.computed
    }

    fn extend_keys(&mut self, n_full: usize) {
        while self.keys.len() < n_full {
            let parent = self.keys.last().copied().unwrap_or(self.root);
            let start = self.keys.len() * self.page_tokens;
            self.keys.push(parent.next(&self.secret, &self.tokens[start..start + self.page_tokens]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::PoolConfig;

    fn pool() -> BlockPool {
        BlockPool::new(PoolConfig { n_pages: 8, tenant_quota_pages: 8, tenant_floor_pages: 0, sequence_pages_max: 8 })
    }

    fn sequence(choice: u32, prompt: &[u32]) -> Sequence {
        Sequence::new(SequenceInit {
            request: 1,
            choice,
            tier: Tier::Shared,
            tenant: "acme".parse().expect("valid"),
            cache_secret: [7; 32],
            base: ContentHash([0; 32]),
            adapter: None,
            prompt: prompt.to_vec(),
            emitted: Vec::new(),
            held: choice > 0,
            all_logits: false,
            page_tokens: 4,
        })
    }

    /// Computes everything pending.
    fn compute(sequence: &mut Sequence, pool: &mut BlockPool) -> usize {
        let n_rows = sequence.n_pending();
        assert_eq!(sequence.reserve(n_rows, pool), n_rows);
        sequence.advance(n_rows, pool)
    }

    #[test]
    fn the_last_prompt_token_is_always_computed() {
        let mut pool = pool();
        let mut first = sequence(0, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(first.enter(&mut pool), 0);
        assert_eq!(compute(&mut first, &mut pool), 8);
        first.finish(&mut pool);
        let mut second = sequence(0, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(second.enter(&mut pool), 4, "not 8: the second page holds the last token");
        assert_eq!(second.n_pending(), 4);
        assert_eq!(compute(&mut second, &mut pool), 4, "what the cache had is not charged");
    }

    #[test]
    fn emitted_tokens_are_found_after_a_preemption_and_not_charged_twice() {
        let mut pool = pool();
        let mut sequence = sequence(0, &[1, 2, 3]);
        sequence.enter(&mut pool);
        assert_eq!(compute(&mut sequence, &mut pool), 3);
        for id in 10..13 {
            sequence.push(id);
            assert_eq!(compute(&mut sequence, &mut pool), 0);
        }
        sequence.push(13);
        sequence.preempt(&mut pool);
        assert_eq!((sequence.phase(), sequence.pages().len()), (Phase::Waiting, 0));
        assert_eq!(sequence.enter(&mut pool), 4, "the page of 1 2 3 10 was published");
        assert_eq!(compute(&mut sequence, &mut pool), 0);
        assert_eq!(sequence.tokens(), [1, 2, 3, 10, 11, 12, 13]);
    }

    #[test]
    fn further_choices_share_the_full_pages_of_the_prompt() {
        let mut pool = pool();
        let (mut first, mut other) = (sequence(0, &[1, 2, 3, 4, 5, 6]), sequence(1, &[1, 2, 3, 4, 5, 6]));
        first.enter(&mut pool);
        compute(&mut first, &mut pool);
        other.enter_beside(&first, &mut pool);
        assert_eq!(other.pages(), &first.pages()[..1]);
        assert_eq!(other.n_pending(), 2);
        assert_eq!(compute(&mut other, &mut pool), 0, "the prompt is charged once");
        assert_ne!(other.pages()[1], first.pages()[1], "the partial page is its own");
        first.finish(&mut pool);
        other.finish(&mut pool);
        assert_eq!(pool.usage().used, 0);
    }
}
