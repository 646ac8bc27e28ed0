//! One modelled node: requests that wait for their adapter or a place, a batch, and an LRU of adapters.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use shared::cluster::NodeLoad;

use super::super::Speed;
use super::queue::{Queue, What};

/// Loads of adapters at once.
const LOADS_MAX: usize = 4;
/// Prompt tokens in a step without decoding rows.
const PROMPT_STEP: usize = 256;
/// Fewest prompt tokens in a step beside decoding rows.
const PROMPT_MIN: usize = 16;

/// One request, wherever it is.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) tenant: usize,
    pub(super) asked_at: u64,
    pub(super) first_at: Option<u64>,
    pub(super) hit: bool,
    pub(super) tokens_left: u32,
    /// Between the last token on a node that died and the next one.
    pub(super) pause: Option<u64>,
    last_at: u64,
    prompt: u32,
    answer: u32,
    prompt_left: u32,
    moved: bool,
}

impl Request {
    pub(super) fn new(tenant: usize, asked_at: u64, prompt: u32, answer: u32) -> Self {
        Self {
            tenant,
            asked_at,
            first_at: None,
            hit: false,
            tokens_left: answer,
            pause: None,
            last_at: asked_at,
            prompt,
            answer,
            prompt_left: prompt,
            moved: false,
        }
    }

    /// It starts on another node from what was delivered.
    fn restart(&mut self) {
        self.prompt_left = self.prompt + self.answer - self.tokens_left;
        self.moved = self.first_at.is_some();
    }

    /// True when it was the last.
    fn on_token(&mut self, now: u64) -> bool {
        self.first_at.get_or_insert(now);
        if std::mem::take(&mut self.moved) {
            self.pause = Some(now - self.last_at);
        }
        self.last_at = now;
        self.tokens_left -= 1;
        self.tokens_left == 0
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) alive: bool,
    pub(super) life: u32,
    pub(super) born: u64,
    /// Time spent in steps.
    pub(super) busy: u64,
    speed: Speed,
    slots: usize,
    running: Vec<usize>,
    waiting: VecDeque<usize>,
    /// Prompt tokens that the present step computes of requests.
    chunks: BTreeMap<usize, u32>,
    steps: bool,
    resident: BTreeMap<usize, u64>,
    /// Requests here by tenant: their adapters stay.
    leases: BTreeMap<usize, u32>,
    loading: BTreeSet<usize>,
    wanted: VecDeque<usize>,
    warming: VecDeque<usize>,
}

impl Worker {
    pub(super) fn new(slots: usize, speed: &Speed) -> Self {
        Self {
            alive: true,
            life: 0,
            born: 0,
            busy: 0,
            speed: speed.clone(),
            slots,
            running: Vec::new(),
            waiting: VecDeque::new(),
            chunks: BTreeMap::new(),
            steps: false,
            resident: BTreeMap::new(),
            leases: BTreeMap::new(),
            loading: BTreeSet::new(),
            wanted: VecDeque::new(),
            warming: VecDeque::new(),
        }
    }

    pub(super) fn load(&self) -> NodeLoad {
        let n = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        NodeLoad { running: n(self.running.len()), places: self.speed.places, waiting: n(self.waiting.len()) }
    }

    /// The requests that were here.
    pub(super) fn die(&mut self) -> Vec<usize> {
        let mut lost = std::mem::take(&mut self.running);
        lost.extend(std::mem::take(&mut self.waiting));
        let dead = Self { alive: false, life: self.life + 1, busy: self.busy, ..Self::new(self.slots, &self.speed) };
        *self = dead;
        lost
    }

    pub(super) fn come_back(&mut self, now: u64) {
        (self.alive, self.born) = (true, now);
    }

    /// A request comes, for the first time or after its node died.
    pub(super) fn take(&mut self, now: u64, me: usize, request: usize, requests: &mut [Request], queue: &mut Queue) {
        let asked = &mut requests[request];
        let tenant = asked.tenant;
        let hit = self.resident.contains_key(&tenant);
        if asked.asked_at == now {
            asked.hit = hit;
        }
        asked.restart();
        *self.leases.entry(tenant).or_default() += 1;
        self.waiting.push_back(request);
        if !hit && !self.loading.contains(&tenant) && !self.wanted.contains(&tenant) {
            self.wanted.push_back(tenant);
        }
        self.start_loads(now, me, queue);
        self.start_step(now, me, requests, queue);
    }

    /// Loads an adapter when nothing that is asked for waits for a load.
    pub(super) fn warm(&mut self, now: u64, me: usize, tenant: usize, queue: &mut Queue) {
        if self.alive && !self.resident.contains_key(&tenant) {
            self.warming.push_back(tenant);
            self.start_loads(now, me, queue);
        }
    }

    fn start_loads(&mut self, now: u64, me: usize, queue: &mut Queue) {
        while self.loading.len() < LOADS_MAX {
            let Some(tenant) = self.wanted.pop_front().or_else(|| self.warming.pop_front()) else { return };
            if !self.resident.contains_key(&tenant) && self.loading.insert(tenant) {
                let at = now + (self.speed.load_ms * 1e3) as u64;
                queue.put(at, What::Loaded { worker: me, life: self.life, tenant });
            }
        }
    }

    pub(super) fn on_loaded(
        &mut self,
        now: u64,
        me: usize,
        tenant: usize,
        requests: &mut [Request],
        queue: &mut Queue,
    ) {
        self.loading.remove(&tenant);
        self.resident.insert(tenant, now);
        if self.resident.len() > self.slots {
            let idle = self.resident.iter().filter(|(tenant, _)| !self.leases.contains_key(tenant));
            // What is in use stays, so that a full cache may be a little too large.
            let oldest = idle.min_by_key(|(_, at)| **at).map(|(tenant, _)| *tenant);
            oldest.map(|oldest| self.resident.remove(&oldest));
        }
        self.start_loads(now, me, queue);
        self.start_step(now, me, requests, queue);
    }

    fn start_step(&mut self, now: u64, me: usize, requests: &mut [Request], queue: &mut Queue) {
        if self.steps {
            return;
        }
        let mut i = 0;
        while self.running.len() < self.speed.places as usize && i < self.waiting.len() {
            if self.resident.contains_key(&requests[self.waiting[i]].tenant) {
                self.running.extend(self.waiting.remove(i));
            } else {
                i += 1;
            }
        }
        if self.running.is_empty() {
            return;
        }
        let rows = self.running.iter().filter(|request| requests[**request].prompt_left == 0).count();
        let beside = (self.speed.step_ms(rows, 0) / self.speed.prompt_token_ms) as usize;
        let most = if rows == 0 { PROMPT_STEP } else { beside.clamp(PROMPT_MIN, PROMPT_STEP) };
        let mut left = u32::try_from(most).unwrap_or(u32::MAX);
        self.chunks.clear();
        for request in &self.running {
            let chunk = requests[*request].prompt_left.min(left);
            if chunk > 0 {
                self.chunks.insert(*request, chunk);
                left -= chunk;
            }
        }
        let took = (self.speed.step_ms(rows, self.chunks.values().sum::<u32>() as usize) * 1e3) as u64;
        (self.steps, self.busy) = (true, self.busy + took);
        queue.put(now + took, What::StepEnds { worker: me, life: self.life });
    }

    pub(super) fn on_step(&mut self, now: u64, me: usize, requests: &mut [Request], queue: &mut Queue) {
        self.steps = false;
        let (chunks, leases, resident) = (&self.chunks, &mut self.leases, &mut self.resident);
        self.running.retain(|running| {
            let request = &mut requests[*running];
            if request.prompt_left > 0 {
                request.prompt_left -= chunks.get(running).copied().unwrap_or(0);
                if request.prompt_left > 0 {
                    return true;
                }
            }
            let ended = request.on_token(now);
            if ended {
                resident.insert(request.tenant, now);
                let left = leases.entry(request.tenant).or_default();
                *left -= 1;
                if *left == 0 {
                    leases.remove(&request.tenant);
                }
            }
            !ended
        });
        self.start_step(now, me, requests, queue);
    }
}
