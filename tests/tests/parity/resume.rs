//! A request that another engine could not finish goes on with the same tokens, from every position, on the real
//! forward pass and the real scheduler: greedy, seeded, with penalties, with a stop text, with a JSON schema, alone
//! and among others.
//!
//! Three runs are compared. *Whole*: nobody disturbs it, every token comes by decoding. *Prefill*: prompt and answer
//! are one long prompt, so every logit comes by prefill; they must have the bits of the whole run at each position,
//! which is what makes a cut anywhere harmless. *Resumed*: cut at a position and continued to the end from prompt and
//! emitted tokens; tokens, logits and end must be those of the whole run.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use adapters::lease::Lease;
use candle_core::quantized::GgmlDType;
use model::adapter::LoraAdapter;
use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions, kv_layout};
use model::info::{Linear, Numerics};
use model::step::{Forward, Step};
use node::base_text::vocabulary;
use scheduler::engine::{Engine, EngineConfig};
use scheduler::grammar::{CompiledGrammar, GrammarCompiler};
use scheduler::source::{CancelFlag, Charge, Room, Work, WorkSource};
use scheduler::vocab::Vocabulary;
use shared::clock::{Clock, SystemClock};
use shared::id::{RequestId, Route};
use shared::request::{AdapterPin, Emitted, EmittedChoice, Envelope, Generation, Grammar, Sampling};
use shared::tenant::Tier;
use shared::token::{FinishReason, TokenEvent};
use tests::tiny::{self, AdapterSpec, Quantisation, Random, TinySpec};
use tokio::sync::mpsc;

use crate::{lab, lab::digest};

/// Longest answer: every position up to here is compared.
const ANSWER_MAX: u32 = 256;
/// Where a stop text begins.
const STOP_AT: usize = 200;
/// A list so long that no answer reaches its end before [`ANSWER_MAX`].
const SCHEMA: &str = r#"{"type":"array","minItems":200,"items":{"type":"object","properties":{"id":{"type":"integer"},"ok":{"type":"boolean"},"name":{"type":"string","maxLength":12}},"required":["id","ok","name"]}}"#;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Greedy,
    Seeded,
    Penalties,
    Stop,
    Json,
}

const STYLES: [Style; 5] = [Style::Greedy, Style::Seeded, Style::Penalties, Style::Stop, Style::Json];

/// One request.
#[derive(Debug, Clone)]
struct Job {
    generation: Generation,
    adapter: Option<usize>,
    emitted: Vec<u32>,
}

/// What one request got.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    end: Option<FinishReason>,
    /// Digest of the logits after each position that were computed.
    digests: BTreeMap<usize, blake3::Hash>,
}

/// A model, what may be put on it, and how its answers are constrained.
struct Bench {
    base: Arc<BaseModel>,
    adapters: Vec<Arc<LoraAdapter>>,
    vocabulary: Arc<Vocabulary>,
    grammar: CompiledGrammar,
}

// === the engine's surroundings ===

/// The forward pass, noting the logits of every row it was asked for. Sequences are told apart by their first token.
struct Recorder {
    runtime: Runtime,
    /// First token by first page.
    owners: HashMap<u32, u32>,
    digests: Arc<Mutex<HashMap<u32, BTreeMap<usize, blake3::Hash>>>>,
}

impl Forward for Recorder {
    fn page_tokens(&self) -> usize {
        self.runtime.page_tokens()
    }

    fn n_pages(&self) -> usize {
        self.runtime.n_pages()
    }

    fn rows_max(&self) -> usize {
        self.runtime.rows_max()
    }

    fn vocab(&self) -> usize {
        self.runtime.vocab()
    }

    fn forward(&mut self, step: &Step) -> &[f32] {
        let vocab = self.runtime.vocab();
        let logits = self.runtime.forward(step);
        let mut rows = logits.chunks_exact(vocab);
        let mut digests = self.digests.lock().expect("not poisoned");
        for run in &step.runs {
            if run.start == 0 {
                self.owners.insert(run.pages[0], run.tokens[0]);
            }
            let of_owner = digests.entry(self.owners[&run.pages[0]]).or_default();
            for (offset, row) in run.logits.iter().zip(rows.by_ref()) {
                let before = of_owner.insert(run.start + offset, digest(row));
                assert_eq!(before, None, "nothing is computed twice without a preemption");
            }
        }
        logits
    }

    fn page_freed(&mut self, page: u32) {
        self.runtime.page_freed(page);
    }
}

/// Requests in the order given, all at once.
struct Line(VecDeque<Work>);

impl WorkSource for Line {
    fn pull(&mut self, _: Instant, _: Room) -> Option<Work> {
        self.0.pop_front()
    }

    fn charge(&mut self, _: Tier, _: &Route, _: Charge) {}

    fn park(&mut self, _: Duration) {}

    fn closed(&self) -> bool {
        false
    }
}

// === impl Bench ===

impl Bench {
    fn new(base: Arc<BaseModel>, adapters: Vec<Arc<LoraAdapter>>) -> Self {
        let vocabulary = Arc::new(vocabulary(&base.info, &base.tokenizer));
        let compiler = GrammarCompiler::new(&vocabulary).expect("a vocabulary for grammars");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let tenant = "acme".parse().expect("valid");
        let grammar = runtime.block_on(compiler.compile(&tenant, &Grammar::JsonSchema(SCHEMA.to_owned())));
        Self { base, adapters, vocabulary, grammar: grammar.expect("compiles") }
    }

    /// Request number `n` of a batch: a prompt that begins with its own token, an adapter or none.
    fn job(&self, n: usize, style: Style) -> Job {
        let mut random = Random::new(n as u64);
        let vocab = self.base.info.vocab;
        let first = (vocab / 2 + n) as u32;
        let rest = (0..10 + n).map(|_| random.below(vocab) as u32);
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let seeded = Sampling { temperature: 0.8, top_p: 0.95, seed: 7 + n as u64, ..Sampling::default() };
        let sampling = match style {
            Style::Greedy => greedy,
            Style::Seeded | Style::Json => seeded,
            // Never repeats itself, so that a text is new late in the answer.
            Style::Stop => Sampling { temperature: 1.2, ..seeded },
            Style::Penalties => Sampling {
                repetition_penalty: 1.2,
                presence_penalty: 0.5,
                frequency_penalty: 0.3,
                logit_bias: vec![(first, 2.0)],
                ..seeded
            },
        };
        let prompt: Vec<u32> = std::iter::once(first).chain(rest).collect();
        let generation = Generation {
            min_tokens: 2,
            sampling,
            grammar: (style == Style::Json).then(|| Grammar::JsonSchema(SCHEMA.to_owned())),
            ..Generation::greedy(prompt, ANSWER_MAX)
        };
        Job { generation, adapter: n.checked_sub(1).filter(|at| *at < self.adapters.len()), emitted: Vec::new() }
    }

    fn work(&self, job: &Job) -> (Work, mpsc::Receiver<TokenEvent>) {
        let adapter = job.adapter.map(|at| &self.adapters[at]);
        let now = SystemClock.now();
        let name = "acme-task-base-v1.0.0".parse().expect("valid");
        let envelope = Envelope {
            id: RequestId(u128::from(job.generation.prompt[0])),
            route: Route { tenant: "acme".parse().expect("valid"), task: None },
            tier: Tier::Shared,
            weight: 1,
            concurrency: 100,
            queue_depth: 100,
            base: "base".parse().expect("valid"),
            pin: Default::default(),
            adapter: adapter.map(|adapter| AdapterPin { name, hash: adapter.hash }),
            fell_back: false,
            cache_secret: [1; 32],
            generation: Arc::new(job.generation.clone()),
            contract_epoch: 1,
            admitted_at: now,
            deadline: now + Duration::from_secs(3600),
        };
        let (sink, events) = mpsc::channel(4 * ANSWER_MAX as usize);
        let emitted = EmittedChoice { tokens: job.emitted.clone(), finished: false };
        let work = Work {
            envelope: Arc::new(envelope),
            emitted: Emitted(vec![emitted]),
            lease: adapter.map(|adapter| Lease::untracked(Arc::clone(adapter))),
            adapter_hit: None,
            grammar: job.generation.grammar.is_some().then(|| self.grammar.clone()),
            sink,
            cancel: CancelFlag::default(),
            permit: Box::new(()),
        };
        (work, events)
    }

    /// Runs these requests in one batch.
    fn run(&self, jobs: &[Job]) -> Vec<Answer> {
        let tokens = |job: &Job| job.generation.prompt.len() + ANSWER_MAX as usize + 32;
        let positions: usize = jobs.iter().map(tokens).sum();
        let options = RuntimeOptions {
            threads: 2,
            rows_max: 128,
            kv_bytes: positions.div_ceil(kernels::kv::PAGE_TOKENS) * kv_layout(&self.base.info).bytes_per_page(),
            n_logits_max: 64,
            poison_freed_pages: true,
        };
        let runtime = Runtime::new(Arc::clone(&self.base), options).expect("a runtime");
        let digests = Arc::default();
        let recorder = Recorder { runtime, owners: HashMap::new(), digests: Arc::clone(&digests) };
        let (line, readers): (VecDeque<Work>, Vec<_>) = jobs.iter().map(|job| self.work(job)).unzip();
        let config =
            EngineConfig { prefix_cache: false, ..EngineConfig::new(self.base.info.hash, self.base.info.context) };
        let mut engine = Engine::new(recorder, Line(line), Arc::clone(&self.vocabulary), Arc::new(SystemClock), config);
        while engine.step() > 0 {}
        assert!(engine.is_idle());
        assert_eq!(engine.stats().snapshot().preemptions, 0, "there are pages for all");
        let mut digests = digests.lock().expect("not poisoned");
        let answer = |(job, mut events): (&Job, mpsc::Receiver<TokenEvent>)| {
            let digests = digests.remove(&job.generation.prompt[0]).unwrap_or_default();
            let mut answer = Answer { tokens: job.emitted.clone(), end: None, digests };
            while let Ok(event) = events.try_recv() {
                match event {
                    TokenEvent::Token { seq, id, .. } => {
                        assert_eq!(seq as usize, answer.tokens.len(), "seq goes on where it was");
                        answer.tokens.push(id);
                    }
                    TokenEvent::Finished { reason, .. } => answer.end = Some(reason),
                    TokenEvent::Started { .. } | TokenEvent::Prompt { .. } => {}
                    TokenEvent::Failed(error) => panic!("{error}"),
                }
            }
            answer
        };
        jobs.iter().zip(readers).map(answer).collect()
    }

    /// Three tokens of an answer as a text that does not come earlier in it, somewhere after [`STOP_AT`].
    fn stop_text(&self, tokens: &[u32]) -> String {
        let text = |ids: &[u32]| -> Vec<u8> { ids.iter().flat_map(|&id| self.vocabulary.text(id).to_vec()).collect() };
        let found = (STOP_AT..tokens.len() - 3).find_map(|at| {
            let (before, stop) = (text(&tokens[..at]), text(&tokens[at..at + 3]));
            let is_new = stop.len() > 2 && before.windows(stop.len()).all(|window| window != stop);
            String::from_utf8(stop).ok().filter(|_| is_new)
        });
        found.expect("an answer has some readable text")
    }
}

// === the test ===

/// `n` positions of an answer, spread over it, never its beginning or its end.
fn positions(n_tokens: usize, n: usize) -> Vec<usize> {
    let mut random = Random::new(n_tokens as u64);
    let slot = (n_tokens - 1) / n;
    (0..n).map(|i| 1 + i * slot + random.below(slot)).collect()
}

/// Requests of these styles in one batch: whole, by prefill, and resumed from `n_cuts` positions each. Returns the
/// positions compared and the continuations made.
fn check(bench: &Bench, styles: &[Style], n_cuts: usize) -> (usize, usize) {
    let mut jobs: Vec<Job> = styles.iter().enumerate().map(|(n, &style)| bench.job(n, style)).collect();
    if styles.contains(&Style::Stop) {
        let answers = bench.run(&jobs);
        for ((job, answer), style) in jobs.iter_mut().zip(&answers).zip(styles) {
            if *style == Style::Stop {
                job.generation.stop = vec!["never said by noise".to_owned(), bench.stop_text(&answer.tokens)];
            }
        }
    }
    let whole = bench.run(&jobs);
    for ((answer, style), job) in whole.iter().zip(styles).zip(&jobs) {
        let end = if *style == Style::Stop { FinishReason::StopText { index: 1 } } else { FinishReason::Length };
        assert_eq!(answer.end, Some(end), "{style:?}");
        assert!(answer.tokens.len() > STOP_AT, "{style:?} of {} tokens", job.generation.prompt.len());
    }

    // Every logit by prefill.
    let as_prompt = |(job, answer): (&Job, &Answer)| {
        let prompt = [&job.generation.prompt, &answer.tokens[..]].concat().into();
        let neutral = Sampling { temperature: 0.0, ..Sampling::default() };
        let generation = Generation {
            prompt,
            max_tokens: 1,
            prompt_logprobs: Some(0),
            sampling: neutral,
            grammar: None,
            stop: Vec::new(),
            ..job.generation.clone()
        };
        Job { generation, ..job.clone() }
    };
    let prompts: Vec<Job> = jobs.iter().zip(&whole).map(as_prompt).collect();
    let mut n_compared = 0;
    for ((whole, prefill), style) in whole.iter().zip(bench.run(&prompts)).zip(styles) {
        for (position, decoded) in &whole.digests {
            assert_eq!(prefill.digests.get(position), Some(decoded), "{style:?}: logits after position {position}");
        }
        assert_eq!(whole.digests.len(), whole.tokens.len());
        n_compared += whole.digests.len();
    }

    // Cut and continued.
    let cuts: Vec<Vec<usize>> = whole.iter().map(|answer| positions(answer.tokens.len(), n_cuts)).collect();
    for round in 0..n_cuts {
        let cut = |((job, answer), cuts): ((&Job, &Answer), &Vec<usize>)| {
            // Cuts of a round lie apart, so that the batch mixes long and short ways to go.
            let at = cuts[(round + job.generation.prompt.len()) % n_cuts];
            Job { emitted: answer.tokens[..at].to_vec(), ..job.clone() }
        };
        let resumed_jobs: Vec<Job> = jobs.iter().zip(&whole).zip(&cuts).map(cut).collect();
        let resumed = bench.run(&resumed_jobs);
        for (((whole, resumed), job), style) in whole.iter().zip(&resumed).zip(&resumed_jobs).zip(styles) {
            let at = job.emitted.len();
            assert_eq!((&resumed.tokens, &resumed.end), (&whole.tokens, &whole.end), "{style:?} from token {at}");
            let after = whole.digests.range(job.generation.prompt.len() + at - 1..);
            assert!(resumed.digests.iter().eq(after), "{style:?} from token {at}: logits differ");
        }
    }
    (n_compared, n_cuts * styles.len())
}

fn tiny_bench(test: &str, spec: &TinySpec, quantisation: Option<Quantisation>) -> Bench {
    let dir = lab::folder(test);
    let (path, numerics) = match quantisation {
        None => (spec.write_hf(&dir), Numerics::Exact),
        Some(quantisation) => (spec.write_gguf(&dir, quantisation), Numerics::Fast),
    };
    let base = lab::load(&path, numerics);
    let pack = |(seed, rank)| lab::pack(&base, &AdapterSpec::new(seed, rank, &Linear::ALL).files(spec));
    let adapters = [(1, 4), (2, 16)].map(pack).into();
    Bench::new(base, adapters)
}

/// Every style in batches of one, four and eight of its kind.
fn check_all(bench: &Bench) {
    for style in STYLES {
        for n in [1, 4, 8] {
            check(bench, &vec![style; n], 16);
        }
    }
}

#[test]
fn answers_go_on_unchanged_from_anywhere_with_exact_numerics() {
    check_all(&tiny_bench("resume-exact", &TinySpec::llama(), None));
}

#[test]
fn answers_go_on_unchanged_from_anywhere_with_fast_numerics() {
    check_all(&tiny_bench("resume-q8", &TinySpec::llama(), Some(Quantisation::All(GgmlDType::Q8_0))));
}

/// Batches of mixed styles: what runs beside a request is somebody else's. `TENANTRY_RESUME=all` checks every style
/// in every batch size from 16 positions, which takes minutes.
#[test]
fn answers_of_the_real_model_go_on_unchanged() {
    let base = lab::load(&tests::model_file(), Numerics::Fast);
    let adapters = ["harbor-logistics", "northbank"]
        .map(|name| lab::pack(&base, &tiny::read_adapter(&tests::data("adapters").join(name))));
    let bench = Bench::new(base, adapters.into());
    if std::env::var_os("TENANTRY_RESUME").is_some_and(|what| what == "all") {
        return check_all(&bench);
    }
    use Style::{Greedy, Json, Penalties, Seeded, Stop};
    let eight = [Greedy, Seeded, Penalties, Stop, Json, Json, Greedy, Seeded];
    for (styles, n_cuts) in [(&eight[..], 2), (&[Seeded, Json, Penalties, Stop][..], 2), (&[Seeded][..], 2)] {
        let (n_compared, n_resumed) = check(&bench, styles, n_cuts);
        assert!(n_compared >= STOP_AT * styles.len() && n_resumed == n_cuts * styles.len());
    }
}
