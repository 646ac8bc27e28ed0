//! A request that another engine could not finish goes on as if nothing had happened: the events after the last
//! delivered token are the very events that would have come there, wherever the cut was.

use shared::request::{Emitted, EmittedChoice, Generation, Grammar, Sampling};
use shared::token::{FinishReason, TokenEvent};

use super::stub::{Bench, Job, Shape, generation};
use crate::grammar::{CompiledGrammar, GrammarCompiler};

/// Choices of every request here.
const N: u32 = 3;

fn grammar() -> (Grammar, CompiledGrammar) {
    let compiler = GrammarCompiler::new(&super::stub::vocabulary()).expect("compiles");
    let grammar = Grammar::Lark("start: \"{\" /[a-c]{6,14}/ \"}\"".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let tenant = "acme".parse().expect("valid");
    let compiled = runtime.block_on(compiler.compile(&tenant, &grammar)).expect("compiles");
    (grammar, compiled)
}

/// One job per way of choosing tokens and of ending.
fn jobs() -> Vec<(&'static str, Job)> {
    let base = || Generation { n: N, max_tokens: 18, logprobs: Some(2), ..generation(&[7; 11]) };
    let seeded = || Sampling { temperature: 1.2, top_p: 0.95, seed: 42, ..Sampling::default() };
    let penalties = Sampling {
        repetition_penalty: 1.3,
        presence_penalty: 0.7,
        frequency_penalty: 0.4,
        temperature: 0.0,
        ..seeded()
    };
    // Of the stub's 62 letters; two-letter texts are partly held back when the cut falls inside them.
    let stop: Vec<String> = ["AB", "C", "Q"].map(str::to_owned).into();
    let (grammar, compiled) = grammar();
    let job = |generation| Job { generation, ..Job::default() };
    vec![
        ("greedy", job(base())),
        ("seeded", job(Generation { sampling: seeded(), ..base() })),
        ("penalties", job(Generation { sampling: penalties, ..base() })),
        ("stop texts", job(Generation { sampling: seeded(), stop, min_tokens: 3, max_tokens: 40, ..base() })),
        ("end tokens", job(Generation { sampling: seeded(), ignore_eos: false, max_tokens: 90, ..base() })),
        (
            "a grammar",
            Job {
                grammar: Some(compiled),
                ..job(Generation { sampling: seeded(), grammar: Some(grammar), max_tokens: 40, ..base() })
            },
        ),
    ]
}

fn run(job: &Job) -> Vec<TokenEvent> {
    let mut bench = Bench::new(Shape::default());
    let mut receiver = bench.submit(job);
    bench.run_until_idle();
    assert_eq!((bench.used_pages(), bench.permits()), (0, 0), "nothing stays behind");
    bench.engine.batch.pool.assert_consistent();
    receiver.drain()
}

/// Tokens and end of one choice, without what depends on time.
fn of_choice(events: &[TokenEvent], wanted: u32) -> Vec<(u32, Option<FinishReason>, Option<TokenEvent>)> {
    let part = |event: &TokenEvent| match event {
        TokenEvent::Token { choice, seq, .. } if *choice == wanted => Some((*seq, None, Some(event.clone()))),
        TokenEvent::Finished { choice, reason, .. } if *choice == wanted => {
            Some((u32::MAX, Some(reason.clone()), None))
        }
        _ => None,
    };
    events.iter().filter_map(part).collect()
}

/// What the client has when `n_tokens` of each choice were delivered, and its end if all were and `told`.
fn cut(events: &[TokenEvent], n_tokens: usize, told: bool) -> Emitted {
    let choice = |choice| {
        let ids = events.iter().filter_map(|event| match event {
            TokenEvent::Token { choice: found, id, .. } if *found == choice => Some(*id),
            _ => None,
        });
        let all: Vec<u32> = ids.collect();
        EmittedChoice { finished: told && n_tokens >= all.len(), tokens: all.into_iter().take(n_tokens).collect() }
    };
    Emitted((0..N).map(choice).collect())
}

#[test]
fn from_every_position_the_rest_is_what_would_have_come() {
    for (name, job) in jobs() {
        let whole = run(&job);
        let n_longest = (0..N).map(|choice| of_choice(&whole, choice).len() - 1).max().expect("choices");
        assert!(n_longest >= 8, "{name}: answers of {n_longest} tokens show little");
        for n_tokens in 0..=n_longest {
            for told in [false, true] {
                let emitted = cut(&whole, n_tokens, told);
                if emitted.0.iter().all(|choice| choice.finished) {
                    continue;
                }
                let resumed = run(&Job { emitted: emitted.clone(), ..job.clone() });
                assert!(matches!(resumed[0], TokenEvent::Started { .. }));
                for choice in 0..N {
                    let mut expected = of_choice(&whole, choice);
                    expected.drain(..emitted.tokens(choice).len());
                    if emitted.is_finished(choice) {
                        expected.clear();
                    }
                    assert_eq!(of_choice(&resumed, choice), expected, "{name} after {n_tokens} tokens, told {told}");
                }
            }
        }
    }
}

#[test]
fn choices_at_different_places_share_the_prompt() {
    let generation = Generation { n: N, max_tokens: 20, ..generation(&[7; 18]) };
    let job = Job { generation, ..Job::default() };
    let whole = run(&job);
    let mut emitted = cut(&whole, 20, true);
    emitted.0[0].finished = true;
    emitted.0[1] = EmittedChoice { tokens: emitted.tokens(1)[..5].to_vec(), finished: false };
    emitted.0[2] = EmittedChoice::default();
    let mut bench = Bench::new(Shape::default());
    let mut receiver = bench.submit(&Job { emitted, ..job });
    bench.run_until_idle();
    let resumed = receiver.drain();
    assert!(of_choice(&resumed, 0).is_empty(), "an answer that was told to its end is not computed again");
    assert_eq!(of_choice(&resumed, 1), of_choice(&whole, 1)[5..]);
    assert_eq!(of_choice(&resumed, 2), of_choice(&whole, 2));
    // The second choice computes prompt and tokens; the third shares the four full pages of the prompt.
    let stats = bench.engine.stats().snapshot();
    assert_eq!((stats.rows_prefill, stats.requests_resumed), (18 + 5 + 2, 1));
    assert_eq!(bench.source().charged(), (18, 15 + 20), "the tenant pays for the prompt and for what is new");
}

#[test]
fn an_answer_that_had_come_to_its_end_is_only_told_so() {
    let job = Job { generation: Generation { max_tokens: 4, ..generation(&[1, 2]) }, ..Job::default() };
    let whole = run(&job);
    let mut emitted = cut(&whole, 4, false);
    emitted.0.truncate(1);
    let mut bench = Bench::new(Shape::default());
    let mut receiver = bench.submit(&Job { emitted, ..job });
    bench.run_until_idle();
    let events = receiver.drain();
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(matches!(events[1], TokenEvent::Finished { choice: 0, reason: FinishReason::Length, .. }));
    let stats = bench.engine.stats().snapshot();
    assert_eq!((stats.steps, stats.requests_finished), (0, 1));
    assert_eq!(bench.permits(), 0);
}

#[test]
fn tokens_that_cannot_have_been_emitted_are_refused() {
    let job = Job { generation: Generation { max_tokens: 4, ..generation(&[1, 2]) }, ..Job::default() };
    let choice = |tokens: &[u32]| EmittedChoice { tokens: tokens.to_vec(), finished: false };
    for (name, choices) in [
        ("past the end", vec![choice(&[1, 1, 1, 1, 1])]),
        ("more choices than wanted", vec![choice(&[1]), choice(&[1])]),
        ("outside the vocabulary", vec![choice(&[64])]),
    ] {
        let events = run(&Job { emitted: Emitted(choices), ..job.clone() });
        assert!(matches!(&events[..], [TokenEvent::Failed(_)]), "{name}: {events:?}");
    }
}
