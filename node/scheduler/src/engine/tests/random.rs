//! Random mixes of requests, page budgets, chunk sizes, cancels and slow readers against the single-request reference.

use proptest::prelude::*;
use shared::request::{Emitted, EmittedChoice, Generation, Sampling};
use shared::token::TokenEvent;

use super::stub::{Bench, Job, Receiver, Shape, generation, prompt_logprobs, reference};

#[derive(Debug, Clone)]
struct Arrival {
    job: Job,
    /// How many tokens of each choice another engine emitted, and whether it told of their ends.
    emitted: Option<(Vec<prop::sample::Index>, bool)>,
    /// Iterations before it is submitted.
    after: usize,
    /// Iterations after submission at which it is cancelled, and whether by flag or by going away.
    cancel: Option<(usize, bool)>,
    /// Events read per iteration, from the second iteration on in which anything was there.
    reads: usize,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let sizes = (1_usize..6, 10_usize..50, 6_usize..24, 1_usize..24, 20_usize..70);
    let cache = (any::<bool>(), 0_u32..20, 0_u32..10, any::<bool>());
    let shares = prop::array::uniform3(prop::sample::select(vec![0.0_f32, 0.0, 0.4, 0.9]));
    (sizes, cache, shares).prop_map(|(sizes, (prefix_cache, quota, floor, honest), shares)| {
        let (page_tokens, n_pages, rows_max, prefill_rows_max, context) = sizes;
        Shape { page_tokens, n_pages, rows_max, prefill_rows_max, context, prefix_cache, quota, floor, shares, honest }
    })
}

/// Prompts have few distinct beginnings, so that they meet in the prefix caches.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    (0_u32..3, 0_usize..24, prop::collection::vec(0_u32..60, 1..6))
        .prop_map(|(kind, n_common, own)| (0..n_common as u32).map(|at| (at * 7 + kind) % 60).chain(own).collect())
}

fn samplings() -> impl Strategy<Value = Sampling> {
    let penalty = prop::sample::select(vec![0.0_f32, 0.0, 1.5]);
    (prop::sample::select(vec![0.0_f32, 0.7, 1.3]), any::<u64>(), prop::sample::select(vec![0_u32, 5]), penalty)
        .prop_map(|(temperature, seed, top_k, penalty)| Sampling {
            temperature,
            seed,
            top_k,
            presence_penalty: penalty,
            repetition_penalty: 1.0 + penalty / 5.0,
            ..Sampling::default()
        })
}

fn jobs() -> impl Strategy<Value = Job> {
    let who = (0_usize..3, prop::option::of(1_u8..4));
    let stops = prop::collection::vec("[A-F]{1,2}", 0..3);
    let lengths = (1_u32..20, 0_u32..4, any::<bool>(), prop::sample::select(vec![1_u32, 1, 2, 4]));
    let extras = (prop::option::of(0_u32..4), any::<bool>(), prop::sample::select(vec![4_usize, 16, 4096]));
    (who, prompts(), samplings(), stops, lengths, extras).prop_map(|(who, prompt, sampling, stop, lengths, extras)| {
        let ((tenant, adapter), (max_tokens, min_tokens, ignore_eos, n)) = (who, lengths);
        let (logprobs, ask_prompt, capacity) = extras;
        let prompt_logprobs = if ask_prompt { logprobs } else { None };
        let generation = Generation {
            n,
            max_tokens,
            min_tokens,
            ignore_eos,
            stop,
            sampling,
            logprobs,
            prompt_logprobs,
            stop_token_ids: vec![17],
            ..generation(&prompt)
        };
        Job { tenant, adapter, generation, capacity, ..Job::default() }
    })
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let cancel = prop::option::weighted(0.2, (0_usize..20, any::<bool>()));
    let emitted = prop::option::weighted(0.4, (prop::collection::vec(any::<prop::sample::Index>(), 4), any::<bool>()));
    let arrival = (jobs(), emitted, 0_usize..4, cancel, 1_usize..4)
        .prop_map(|(job, emitted, after, cancel, reads)| Arrival { job, emitted, after, cancel, reads });
    prop::collection::vec(arrival, 1..14)
}

impl Arrival {
    /// Puts the beginning of its answer into the request, as another engine would have emitted it.
    fn resume(&mut self, shape: &Shape) {
        let Some((cuts, told_ends)) = &self.emitted else { return };
        let cut = |((mut tokens, _), cut): ((Vec<u32>, _), &prop::sample::Index)| {
            let n_all = tokens.len();
            tokens.truncate(cut.index(n_all + 1));
            EmittedChoice { finished: *told_ends && tokens.len() == n_all, tokens }
        };
        let mut choices: Vec<EmittedChoice> = reference(&self.job, shape).into_iter().zip(cuts).map(cut).collect();
        if choices.iter().all(|choice| choice.finished) {
            choices[0].finished = false;
        }
        self.job.emitted = Emitted(choices);
    }
}

/// A submitted arrival and its reader; `None` when the reader went away.
struct Running {
    arrival: Arrival,
    receiver: Option<Receiver>,
    age: usize,
}

impl Running {
    fn tick(&mut self) {
        let Some(receiver) = &mut self.receiver else {
            return;
        };
        // Readers pause every third iteration, so that small channels fill up.
        if !self.age.is_multiple_of(3) {
            receiver.take(self.arrival.reads * 2);
        }
        match self.arrival.cancel {
            Some((after, true)) if after == self.age => receiver.cancel.cancel(),
            Some((after, false)) if after == self.age => self.receiver = None,
            _ => {}
        }
        self.age += 1;
    }

    fn check(&mut self, shape: &Shape) {
        let Some(receiver) = &mut self.receiver else {
            return;
        };
        receiver.drain();
        let job = &self.arrival.job;
        let found = receiver.answers();
        let n_prompt = job.generation.prompt.len();
        if n_prompt >= shape.context.min(shape.n_pages * shape.page_tokens) {
            let code = receiver.failure().map(|error| error.code);
            assert!(code == Some("context_length_exceeded") || code == Some("cancelled"), "{code:?}");
            return;
        }
        let expected = reference(job, shape);
        match receiver.failure() {
            None => assert_eq!(found, expected),
            Some(error) => {
                assert!(self.arrival.cancel.is_some() && error.code == "cancelled", "{error:?}");
                for ((ids, reason), (all_ids, all_reason)) in found.iter().zip(&expected) {
                    assert!(all_ids.starts_with(ids), "{ids:?} does not begin {all_ids:?}");
                    assert!(reason.is_none() || reason == all_reason);
                }
            }
        }
        let prompt = receiver.events.iter().find_map(|event| match event {
            TokenEvent::Prompt { logprobs } => Some(logprobs),
            _ => None,
        });
        if let (Some(n_top), Some(found)) = (job.generation.prompt_logprobs, prompt) {
            assert_eq!(*found, prompt_logprobs(job, n_top));
        }
        let expects_prompt = job.generation.prompt_logprobs.is_some() && job.emitted.is_empty();
        assert!(prompt.is_some() == expects_prompt || receiver.failure().is_some());
    }
}

fn play(shape: Shape, arrivals: Vec<Arrival>) -> super::EngineSnapshot {
    let mut bench = Bench::new(shape);
    let mut running: Vec<Running> = Vec::new();
    let step = |bench: &mut Bench, running: &mut Vec<Running>| {
        bench.step();
        bench.engine.batch.pool.assert_consistent();
        running.iter_mut().for_each(Running::tick);
    };
    for mut arrival in arrivals {
        arrival.resume(&shape);
        for _ in 0..arrival.after {
            step(&mut bench, &mut running);
        }
        let receiver = Some(bench.submit(&arrival.job));
        running.push(Running { arrival, receiver, age: 0 });
    }
    let mut n_steps = 0;
    while !(bench.engine.is_idle() && bench.source().waiting.is_empty()) {
        step(&mut bench, &mut running);
        n_steps += 1;
        assert!(n_steps < 5000, "the engine hangs: {:?}{}", bench.engine, bench.engine.batch.describe());
    }
    running.iter_mut().for_each(|running| running.check(&shape));
    assert_eq!((bench.used_pages(), bench.permits()), (0, 0));
    let usage = bench.engine.batch.pool.usage();
    assert_eq!((usage.cached + usage.free) as usize, shape.n_pages, "all pages are back");
    bench.engine.stats().snapshot()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_equals_the_one_the_request_would_get_alone(shape in shapes(), arrivals in arrivals()) {
        play(shape, arrivals);
    }
}

#[test]
fn the_random_mixes_do_preempt_hit_caches_park_and_resume() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, TestRng, TestRunner};

    let rng = TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let (mut preemptions, mut hits, mut cancelled, mut resumed) = (0, 0, 0, 0);
    for _ in 0..60 {
        let (shape, arrivals) = (shapes(), arrivals()).new_tree(&mut runner).expect("generates").current();
        let stats = play(shape, arrivals);
        preemptions += stats.preemptions;
        hits += stats.prefix_hits;
        cancelled += stats.requests_cancelled;
        resumed += stats.requests_resumed;
    }
    assert!(
        preemptions > 20 && hits > 20 && cancelled > 20 && resumed > 20,
        "{preemptions} preemptions, {hits} hits, {cancelled} cancels, {resumed} resumed"
    );
}
