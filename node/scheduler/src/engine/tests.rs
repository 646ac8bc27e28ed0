//! A stub forward pass drives the engine: its logits are a hash of what stands in the pages, so a wrong page, a
//! missing row or a foreign adapter gives other tokens.

mod random;
mod resume;
mod stub;

use std::time::Duration;

use shared::error::ErrorKind;
use shared::request::{Generation, Grammar, Sampling};
use shared::token::{FinishReason, TokenEvent};

use self::stub::{Bench, Job, Shape, generation, reference};
use super::*;
use crate::grammar::GrammarCompiler;

fn bench() -> Bench {
    Bench::new(Shape::default())
}

#[test]
fn a_request_gets_started_tokens_and_one_end() {
    let mut bench = bench();
    let job = Job { generation: Generation { max_tokens: 5, ..generation(&[1, 2, 3]) }, ..Job::default() };
    let mut receiver = bench.submit(&job);
    bench.run_until_idle();
    let events = receiver.drain();
    assert!(matches!(events[0], TokenEvent::Started { cached_tokens: 0, .. }));
    assert_eq!(receiver.answers(), reference(&job, &bench.shape));
    assert_eq!(events.len(), 1 + 5 + 1);
    assert!(matches!(events[6], TokenEvent::Finished { choice: 0, reason: FinishReason::Length, .. }));
    assert_eq!(bench.permits(), 0);
    assert_eq!(bench.source().charged(), (3, 5), "three prompt tokens, five answer tokens");
}

#[test]
fn a_repeated_prompt_comes_from_the_tenants_own_cache_only() {
    let mut bench = bench();
    let job = |tenant| Job { tenant, generation: generation(&[5; 13]), ..Job::default() };
    let mut cached = |tenant| {
        let mut receiver = bench.submit(&job(tenant));
        bench.run_until_idle();
        let events = receiver.drain();
        assert_eq!(receiver.answers(), reference(&job(tenant), &Shape::default()));
        match events[0] {
            TokenEvent::Started { cached_tokens, .. } => cached_tokens,
            ref other => panic!("{other:?}"),
        }
    };
    assert_eq!(cached(0), 0);
    assert_eq!(cached(0), 12, "three full pages of four");
    assert_eq!(cached(1), 0, "another tenant finds nothing");
    let stats = bench.engine.stats().snapshot();
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (39, 12));
    assert_eq!((stats.requests_started, stats.requests_finished, stats.kv_pages_used), (3, 3, 0));
}

#[test]
fn a_forgotten_tenants_pages_are_gone_within_a_step() {
    let mut bench = bench();
    let job = |tenant| Job { tenant, generation: generation(&[5; 13]), ..Job::default() };
    let (mut erased, mut other) = (bench.submit(&job(0)), bench.submit(&job(1)));
    bench.run_until_idle();
    drop((erased.drain(), other.drain()));
    bench.source().forgotten.push("tenant0".parse().expect("valid"));
    bench.step();
    bench.engine.batch.pool.assert_consistent();
    for (tenant, expected) in [(0, 0), (1, 12)] {
        let mut receiver = bench.submit(&job(tenant));
        bench.run_until_idle();
        assert!(matches!(receiver.drain()[0], TokenEvent::Started { cached_tokens, .. } if cached_tokens == expected));
        assert_eq!(receiver.answers(), reference(&job(tenant), &bench.shape));
    }
}

#[test]
fn another_adapter_or_version_finds_nothing_in_the_cache() {
    let mut bench = bench();
    for (adapter, expected) in [(None, 0), (Some(1), 0), (Some(2), 0), (Some(1), 12), (None, 12)] {
        let job = Job { adapter, generation: generation(&[5; 13]), ..Job::default() };
        let mut receiver = bench.submit(&job);
        bench.run_until_idle();
        assert!(matches!(receiver.drain()[0], TokenEvent::Started { cached_tokens, .. } if cached_tokens == expected));
        assert_eq!(receiver.answers(), reference(&job, &bench.shape));
    }
}

#[test]
fn further_choices_compute_the_prompt_once() {
    let mut bench = bench();
    let sampling = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
    let job =
        Job { generation: Generation { n: 4, sampling, max_tokens: 6, ..generation(&[7; 18]) }, ..Job::default() };
    let mut receiver = bench.submit(&job);
    bench.run_until_idle();
    receiver.drain();
    assert_eq!(receiver.answers(), reference(&job, &bench.shape));
    assert_eq!(bench.source().charged(), (18, 24));
    // 16 tokens in shared pages; the partial page's two are computed per choice.
    assert_eq!(bench.engine.stats().snapshot().rows_prefill, 18 + 3 * 2);
}

#[test]
fn the_compute_of_all_choices_adds_up_to_the_time_of_the_steps() {
    let mut bench = bench();
    let sampling = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
    let generation = Generation {
        n: 8,
        sampling,
        max_tokens: 20,
        stop: vec!["A".to_owned(), "Q".to_owned()],
        ..generation(&[7; 18])
    };
    let mut receiver = bench.submit(&Job { generation, ..Job::default() });
    bench.run_until_idle();
    let compute = |event: &TokenEvent| {
        if let TokenEvent::Finished { compute, .. } = event { Some(*compute) } else { None }
    };
    let computes: Vec<Duration> = receiver.drain().iter().filter_map(compute).collect();
    let total = bench.engine.stats().snapshot().forward_ns as f64;
    assert_eq!(computes.len(), 8);
    let sum = computes.iter().sum::<Duration>().as_nanos() as f64;
    assert!((sum / total - 1.0).abs() < 1e-3, "{computes:?} of {total} ns");
}

#[test]
fn prompt_logprobs_cover_all_but_the_first_token_and_skip_the_cache() {
    let mut bench = bench();
    let plain = Job { generation: generation(&[9; 14]), ..Job::default() };
    let asking = Generation { prompt_logprobs: Some(2), logprobs: Some(1), max_tokens: 2, ..generation(&[9; 14]) };
    let asking = Job { generation: asking, ..Job::default() };
    bench.submit(&plain);
    bench.run_until_idle();
    let mut receiver = bench.submit(&asking);
    bench.run_until_idle();
    let events = receiver.drain();
    assert!(matches!(events[0], TokenEvent::Started { cached_tokens: 0, .. }));
    let TokenEvent::Prompt { logprobs } = &events[1] else { panic!("{:?}", events[1]) };
    assert_eq!(logprobs.len(), 13);
    assert!(logprobs.iter().all(|position| position.chosen.id == 9 && position.top.len() == 2));
    assert_eq!(*logprobs, stub::prompt_logprobs(&asking, 2));
    assert!(matches!(&events[2], TokenEvent::Token { logprobs: Some(position), id, .. } if position.chosen.id == *id));
}

#[test]
fn a_spent_deadline_never_reaches_the_forward_pass() {
    let mut bench = bench();
    let mut receiver = bench.submit(&Job { deadline: Some(Duration::ZERO), ..Job::default() });
    bench.run_until_idle();
    let events = receiver.drain();
    assert!(matches!(&events[..], [TokenEvent::Failed(error)] if error.kind == ErrorKind::Deadline));
    assert_eq!(bench.engine.stats().snapshot().steps, 0);
    assert_eq!(bench.source().charged(), (0, 0), "nothing is billed");
}

#[test]
fn a_deadline_that_passes_ends_the_request_within_a_step() {
    let mut bench = bench();
    let long = Generation { max_tokens: 1000, ..generation(&[1]) };
    let mut receiver =
        bench.submit(&Job { deadline: Some(Duration::from_millis(10)), generation: long, ..Job::default() });
    bench.run_until_idle();
    let events = receiver.drain();
    assert!((30..45).contains(&events.len()), "{} events of 250 µs", events.len());
    assert!(matches!(events.last(), Some(TokenEvent::Failed(error)) if error.kind == ErrorKind::Deadline));
    assert_eq!(bench.used_pages(), 0);
}

#[test]
fn a_cancel_storm_frees_everything_within_a_step() {
    let mut bench = Bench::new(Shape { n_pages: 64, ..Shape::default() });
    for round in 0..1000_u32 {
        let prompt = vec![round % 50; 1 + round as usize % 20];
        let job = Job {
            tenant: round as usize % 3,
            generation: Generation { max_tokens: 50, ..generation(&prompt) },
            ..Job::default()
        };
        let receiver = bench.submit(&job);
        for _ in 0..round % 4 {
            bench.step();
        }
        // Half say so, half just go away.
        if round % 2 == 0 { receiver.cancel.cancel() } else { drop(receiver) }
    }
    bench.step();
    assert!(bench.engine.is_idle());
    assert_eq!(bench.used_pages(), 0);
    bench.engine.batch.pool.assert_consistent();
    assert_eq!(bench.permits(), 0, "every concurrency credit is back");
}

#[test]
fn a_slow_reader_is_parked_then_failed_while_others_go_on() {
    let mut bench = bench();
    let long = Generation { max_tokens: 100, ..generation(&[1]) };
    let mut slow = bench.submit(&Job { capacity: 6, generation: long.clone(), ..Job::default() });
    let other = Job { tenant: 1, generation: long, ..Job::default() };
    let mut reader = bench.submit(&other);
    for _ in 0..500 {
        bench.step();
    }
    assert_eq!(bench.engine.stats().snapshot().requests_parked, 1);
    reader.drain();
    assert_eq!(reader.answers(), reference(&other, &bench.shape));
    bench.clock.advance(Duration::from_secs(10));
    bench.run_until_idle();
    let events = slow.drain();
    assert!(
        matches!(events.last(), Some(TokenEvent::Failed(error)) if error.code == "client_too_slow"),
        "{:?}",
        events.last()
    );
    assert_eq!(events.len(), 6);
    assert_eq!(bench.used_pages(), 0);
}

#[test]
fn a_preempted_request_with_a_slow_reader_holds_up_no_newcomer() {
    let mut bench = Bench::new(Shape { n_pages: 10, prefix_cache: false, ..Shape::default() });
    let job = |tenant, n_prompt, max_tokens, capacity| {
        let generation = Generation { max_tokens, ..generation(&vec![1; n_prompt]) };
        Job { tenant, capacity, generation, ..Job::default() }
    };
    let slow = job(0, 12, 20, 4);
    let mut slow_reader = bench.submit(&slow);
    for _ in 0..10 {
        bench.step();
    }
    let mut reader = bench.submit(&job(1, 16, 20, 4096));
    while bench.engine.stats().snapshot().sequences_preempted == 0 {
        assert!(bench.step() > 0, "the second request needs the first one's pages");
    }
    reader.cancel.cancel();
    let newcomer = job(2, 3, 5, 4096);
    let mut newcomers_reader = bench.submit(&newcomer);
    for _ in 0..20 {
        bench.step();
    }
    assert_eq!(bench.engine.stats().snapshot().requests_parked, 1);
    newcomers_reader.drain();
    assert_eq!(newcomers_reader.answers(), reference(&newcomer, &bench.shape));
    reader.drain();
    for _ in 0..200 {
        slow_reader.drain();
        bench.step();
    }
    slow_reader.drain();
    assert_eq!(slow_reader.answers(), reference(&slow, &bench.shape), "it comes back once its reader does");
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_with_a_reason() {
    let mut bench = bench();
    for (prompt, code) in
        [(vec![1; 500], "context_length_exceeded"), (vec![64], "invalid_token"), (vec![], "invalid_request")]
    {
        let mut receiver = bench.submit(&Job { generation: generation(&prompt), ..Job::default() });
        bench.run_until_idle();
        assert!(matches!(&receiver.drain()[..], [TokenEvent::Failed(error)] if error.code == code));
    }
}

#[test]
fn a_missing_or_wrong_lease_never_runs_and_is_counted() {
    let (mut bench, violations) = (bench(), shared::error::violations());
    for lease in [None, Some(2)] {
        let mut receiver = bench.submit(&Job { adapter: Some(1), lease: Some(lease), ..Job::default() });
        bench.run_until_idle();
        assert!(matches!(&receiver.drain()[..], [TokenEvent::Failed(error)] if error.kind == ErrorKind::Internal));
    }
    assert_eq!(bench.engine.stats().snapshot().steps, 0);
    assert!(shared::error::violations() >= violations + 2);
}

#[test]
fn a_panic_in_the_forward_pass_fails_every_request_and_ends_the_engine() {
    let mut bench = bench();
    bench.panic_at_step(3);
    let long = Generation { max_tokens: 100, ..generation(&[1]) };
    let mut receivers: Vec<_> =
        (0..3).map(|tenant| bench.submit(&Job { tenant, generation: long.clone(), ..Job::default() })).collect();
    let Bench { engine, permit, .. } = bench;
    assert_eq!(engine.run(), EngineEnd::Panicked("the stub was told to".to_owned()));
    for receiver in &mut receivers {
        assert!(matches!(receiver.drain().last(), Some(TokenEvent::Failed(error)) if error.code == "internal_error"));
    }
    assert_eq!(std::sync::Arc::strong_count(&permit), 1, "every concurrency credit is back");
}

#[test]
fn a_second_panic_while_failing_requests_is_no_other_end() {
    let mut bench = bench();
    bench.panic_at_step(3);
    bench.source().panic_when_left = true;
    let long = Generation { max_tokens: 100, ..generation(&[1]) };
    let mut receiver = bench.submit(&Job { generation: long, ..Job::default() });
    assert_eq!(bench.engine.run(), EngineEnd::Panicked("the stub was told to".to_owned()));
    assert!(matches!(receiver.drain().last(), Some(TokenEvent::Failed(error)) if error.code == "internal_error"));
}

#[test]
fn a_closed_engine_finishes_what_it_has() {
    let mut bench = bench();
    let job = Job { generation: Generation { max_tokens: 9, ..generation(&[1, 2]) }, ..Job::default() };
    let mut receiver = bench.submit(&job);
    bench.step();
    bench.source().closed = true;
    let late = bench.submit(&job);
    let shape = bench.shape;
    assert_eq!(bench.engine.run(), EngineEnd::Drained);
    receiver.drain();
    assert_eq!(receiver.answers(), reference(&job, &shape));
    drop(late);
}

#[test]
fn an_answer_follows_its_grammar_to_the_end() {
    let mut bench = bench();
    let compiler = GrammarCompiler::new(&stub::vocabulary()).expect("compiles");
    let grammar = Grammar::Lark("start: \"{\" /[a-c]{2,4}/ \"}\"".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let acme = "acme".parse().expect("valid");
    let compiled = runtime.block_on(compiler.compile(&acme, &grammar)).expect("compiles");
    let sampling = Sampling { temperature: 1.5, seed: 11, ..Sampling::default() };
    let generation = Generation { n: 3, max_tokens: 40, sampling, grammar: Some(grammar), ..generation(&[4, 5]) };
    let job = Job { generation, grammar: Some(compiled), ..Job::default() };
    let mut receiver = bench.submit(&job);
    bench.run_until_idle();
    receiver.drain();
    for (ids, reason) in receiver.answers() {
        let text: Vec<u8> = ids.iter().flat_map(|&id| stub::vocabulary().text(id).to_vec()).collect();
        let text = String::from_utf8(text).expect("ascii");
        let inner =
            text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or_else(|| panic!("{text:?}"));
        assert!((2..=4).contains(&inner.len()) && inner.bytes().all(|byte| (b'a'..=b'c').contains(&byte)), "{text:?}");
        assert_eq!(reason, Some(FinishReason::Stop));
    }
}
