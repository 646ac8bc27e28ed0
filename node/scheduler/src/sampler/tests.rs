//! Tokens against plain definitions of every sampling rule, and the random stream against published vectors.

use proptest::prelude::*;

use super::*;

fn sampling(temperature: f32) -> Sampling {
    Sampling { temperature, ..Sampling::default() }
}

fn draw<'a>(logits: &'a [f32], sampling: &'a Sampling, history: &'a History, position: u32) -> Draw<'a> {
    Draw { logits, sampling, history, mask: None, unwanted: &[], choice: 0, position }
}

fn sample(logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
    let history = History::default();
    Sampler::default().sample(&draw(logits, sampling, &history, position)).expect("a token")
}

/// Shares of `n` draws at positions 0…n.
fn shares(logits: &[f32], sampling: &Sampling, n: u32) -> Vec<f64> {
    let mut counts = vec![0.0; logits.len()];
    (0..n).for_each(|position| counts[sample(logits, sampling, position) as usize] += 1.0 / f64::from(n));
    counts
}

#[test]
fn greedy_takes_the_best_and_ties_go_to_the_lower_id() {
    let mut logits = vec![0.0; 1000];
    (logits[900], logits[300], logits[301]) = (5.0, 5.0, 5.0);
    assert_eq!(sample(&logits, &sampling(0.0), 0), 300);
    logits[999] = 5.1;
    assert_eq!(sample(&logits, &sampling(0.0), 0), 999);
}

#[test]
fn not_a_number_is_never_chosen_and_an_infinite_row_is_an_error() {
    assert_eq!(sample(&[f32::NAN, 1.0, f32::NEG_INFINITY], &sampling(0.0), 0), 1);
    let (settings, history) = (sampling(1.0), History::default());
    for row in [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [0.0, f32::INFINITY, 1.0]] {
        let result = Sampler::default().sample(&draw(&row, &settings, &history, 0));
        assert_eq!(result, Err(SampleError::NotFinite));
    }
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [1.0_f32, 3.0, 2.0, -50.0];
    let shares = shares(&logits, &sampling(0.7), 20_000);
    let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / 0.7).exp()).collect();
    for (share, weight) in shares.iter().zip(&weights) {
        let expected = weight / weights.iter().sum::<f64>();
        assert!((share - expected).abs() < 0.012, "{share} instead of {expected}");
    }
}

#[test]
fn the_same_seed_choice_and_position_give_the_same_token() {
    let logits: Vec<f32> = (0..500).map(|at| ((at * 37) % 101) as f32 / 20.0).collect();
    let with = |seed, choice, position| {
        let (settings, history) = (Sampling { seed, ..Sampling::default() }, History::default());
        Sampler::default().sample(&Draw { choice, ..draw(&logits, &settings, &history, position) }).expect("a token")
    };
    let stream = |seed, choice| (0..50).map(|position| with(seed, choice, position)).collect::<Vec<_>>();
    assert_eq!(stream(7, 0), stream(7, 0));
    assert_ne!(stream(7, 0), stream(8, 0));
    assert_ne!(stream(7, 0), stream(7, 1));
    assert_ne!(stream(7, 0), stream(7 + (1 << 32), 0));
}

#[test]
fn top_k_top_p_and_min_p_cut_the_tail() {
    // Probabilities 0.5, 0.25, 0.15, 0.1.
    let logits = [0.15_f32.ln(), 0.5_f32.ln(), 0.1_f32.ln(), 0.25_f32.ln()];
    let seen = |settings: Sampling| -> Vec<usize> {
        let shares = shares(&logits, &settings, 400);
        (0..4).filter(|&id| shares[id] > 0.0).collect()
    };
    assert_eq!(seen(sampling(1.0)), [0, 1, 2, 3]);
    assert_eq!(seen(Sampling { top_k: 2, ..sampling(1.0) }), [1, 3]);
    assert_eq!(seen(Sampling { top_k: 1, ..sampling(1.0) }), [1]);
    assert_eq!(seen(Sampling { top_p: 0.74, ..sampling(1.0) }), [1, 3]);
    assert_eq!(seen(Sampling { top_p: 0.8, ..sampling(1.0) }), [0, 1, 3]);
    assert_eq!(seen(Sampling { top_p: 1e-6, ..sampling(1.0) }), [1]);
    assert_eq!(seen(Sampling { min_p: 0.4, ..sampling(1.0) }), [1, 3]);
    // top_p is taken of what top_k left: of 0.5 and 0.25, the first alone is two thirds.
    assert_eq!(seen(Sampling { top_k: 2, top_p: 0.6, ..sampling(1.0) }), [1]);
}

#[test]
fn penalties_follow_their_formulas() {
    let settings =
        Sampling { repetition_penalty: 2.0, presence_penalty: 0.5, frequency_penalty: 0.25, ..sampling(0.0) };
    let history = History::new(&settings, &[0, 1], &[1, 2, 2]);
    let logits = [4.0, -1.0, 6.0, 0.5];
    let mut row = Vec::new();
    adjust(&mut row, &draw(&logits, &settings, &history, 3), &[]);
    assert_eq!(row, [2.0, -2.0 - 0.25 - 0.5, 3.0 - 0.5 - 0.5, 0.5]);
}

#[test]
fn bias_and_unwanted_tokens_change_the_choice() {
    let logits = [3.0, 2.0, 1.0];
    let biased = Sampling { logit_bias: vec![(2, 5.0), (0, -100.0), (77, 1.0)], ..sampling(0.0) };
    assert_eq!(sample(&logits, &biased, 0), 2);
    let (settings, history) = (sampling(0.0), History::default());
    let late = Draw { unwanted: &[0], ..draw(&logits, &settings, &history, 0) };
    assert_eq!(Sampler::default().sample(&late), Ok(1));
}

#[test]
fn the_mask_outranks_everything_else() {
    let mut mask = SimpleVob::alloc(40);
    mask.allow_token(33);
    let mut logits = vec![9.0; 70];
    logits[33] = -5.0;
    let (settings, history) = (Sampling { logit_bias: vec![(1, 100.0)], ..sampling(1.0) }, History::default());
    let masked = Draw { mask: Some(&mask), ..draw(&logits, &settings, &history, 0) };
    assert_eq!(Sampler::default().sample(&masked), Ok(33));
    // The only allowed token is unwanted: it is taken rather than none.
    assert_eq!(Sampler::default().sample(&Draw { unwanted: &[33], ..masked }), Ok(33));
    logits[33] = f32::NEG_INFINITY;
    let masked = Draw { mask: Some(&mask), ..draw(&logits, &settings, &history, 0) };
    assert_eq!(Sampler::default().sample(&masked), Err(SampleError::NothingAllowed));
}

#[test]
fn logprobs_are_those_of_the_raw_row_with_ties_by_lower_id() {
    let logits = [1.0_f32, 4.0, 2.0, 4.0, -3.0];
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
    let found = Sampler::default().logprobs(&logits, 2, 3);
    assert!((f64::from(found.chosen.logprob) - (2.0 - total)).abs() < 1e-6);
    assert_eq!(found.top.iter().map(|top| top.id).collect::<Vec<_>>(), [1, 3, 2]);
    assert!((f64::from(found.top[0].logprob) - (4.0 - total)).abs() < 1e-6);
    assert!(Sampler::default().logprobs(&logits, 0, 0).top.is_empty());
    assert_eq!(Sampler::default().logprobs(&logits, 0, 20).top.len(), 5);
}

#[test]
fn exponentials_are_accurate() {
    let worst = (0..87_000).map(|at| -(at as f32) / 1000.0).map(|x| {
        let exact = f64::from(x).exp();
        ((f64::from(exp(x)) - exact) / exact).abs()
    });
    let worst = worst.fold(0.0, f64::max);
    assert!(worst < 2e-7, "relative error {worst}");
    assert_eq!((exp(-90.0), exp(f32::NEG_INFINITY), exp(f32::NAN)), (0.0, 0.0, 0.0));
}

proptest! {
    /// The lazy walk equals a plain one over a fully sorted list.
    #[test]
    fn draws_equal_a_fully_sorted_walk(
        logits in prop::collection::vec((-60_i32..60).prop_map(|x| x as f32 / 4.0), 1..700),
        temperature in 0.1_f32..2.0, top_k in 0_u32..90, top_p in 0.05_f32..1.0, position in 0_u32..1000,
    ) {
        let settings = Sampling { top_k, top_p, ..sampling(temperature) };
        let mut all: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        if top_k > 0 {
            all.truncate(top_k as usize);
        }
        let weights: Vec<f64> = all.iter().map(|&(logit, _)| (f64::from(logit - all[0].0) / f64::from(temperature)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut cumulative = Vec::new();
        weights.iter().for_each(|weight| cumulative.push(weight + cumulative.last().unwrap_or(&0.0)));
        let kept = 1 + cumulative.iter().take_while(|&&sum| sum < total * f64::from(top_p)).count().min(all.len() - 1);
        let target = cumulative[kept - 1] * uniform(0, 0, position);
        let chosen = sample(&logits, &settings, position);
        let rank = all.iter().position(|&(_, id)| id == chosen);
        prop_assert!(rank.is_some(), "token {} was cut", chosen);
        let rank = rank.expect("checked");
        // Within rounding of the boundaries, which are computed in another way here.
        let slack = total * 1e-5;
        prop_assert!(cumulative[rank] > target - slack);
        prop_assert!(rank == 0 || cumulative[rank - 1] <= target + slack);
        prop_assert!(rank < kept + 1);
    }
}
