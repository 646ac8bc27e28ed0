//! Rows of a step: bounds, turns between prompts, and step time kept for reserved classes.

use std::time::Duration;

use proptest::prelude::*;
use shared::hash::ContentHash;

use super::*;
use crate::blocks::PoolConfig;
use crate::sequence::SequenceInit;

const PAGE: usize = 4;

fn pool(n_pages: u32) -> BlockPool {
    BlockPool::new(PoolConfig { n_pages, tenant_quota_pages: 0, tenant_floor_pages: 0, sequence_pages_max: n_pages })
}

fn config(reserve: ClassReserve) -> PlanConfig {
    PlanConfig { rows_max: 64, prefill_rows_max: 32, prefill_stretch: 100.0, logits_rows_max: 8, reserve }
}

/// An entered sequence with a prompt of this many tokens.
fn sequence(request: u64, tier: Tier, n_prompt: usize, adapter: Option<u8>, pool: &mut BlockPool) -> Sequence {
    let mut sequence = Sequence::new(SequenceInit {
        request,
        choice: 0,
        tier,
        tenant: format!("t{request}").parse().expect("valid"),
        cache_secret: [0; 32],
        base: ContentHash([0; 32]),
        adapter: adapter.map(|byte| ContentHash([byte; 32])),
        prompt: vec![1; n_prompt],
        emitted: Vec::new(),
        held: false,
        all_logits: false,
        page_tokens: PAGE,
    });
    sequence.enter(pool);
    sequence
}

/// Advances as a step would; decoding sequences emit a token and never end.
fn run(plan: &StepPlan, sequences: &mut [Sequence], pool: &mut BlockPool) {
    for planned in &plan.runs {
        sequences[planned.at].advance(planned.n_rows, pool);
        if sequences[planned.at].n_pending() == 0 {
            sequences[planned.at].push(1);
        }
    }
}

fn rows(plan: &StepPlan) -> Vec<(usize, usize)> {
    plan.runs.iter().map(|run| (run.at, run.n_rows)).collect()
}

/// A planner that is given prompts of these lengths; each turn of the result is one step's rows.
fn turns(prompts: &[usize], n_steps: usize) -> Vec<Vec<(usize, usize)>> {
    let mut pool = pool(1000);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let mut sequences: Vec<Sequence> =
        prompts.iter().zip(1..).map(|(&n, request)| sequence(request, Tier::Shared, n, None, &mut pool)).collect();
    let mut step = || {
        let plan = planner.plan(&mut sequences, &mut pool, &CostModel::default());
        run(&plan, &mut sequences, &mut pool);
        rows(&plan)
    };
    (0..n_steps).map(|_| step()).collect()
}

#[test]
fn decode_rows_come_first_and_prompts_have_the_rest() {
    assert_eq!(turns(&[3, 100, 20], 2), [vec![(0, 3), (1, 9), (2, 20)], vec![(0, 1), (1, 32), (2, 1)]]);
}

#[test]
fn equal_prompts_are_done_one_after_the_other() {
    let done_at: Vec<usize> = (0..4)
        .map(|at| turns(&[32; 4], 8).iter().position(|rows| rows.contains(&(at, 1))).expect("all get on"))
        .collect();
    assert_eq!(done_at, [1, 2, 3, 4], "the first decodes while the others wait");
}

#[test]
fn a_short_prompt_passes_a_long_one_that_is_passed_no_longer_than_its_length_explains() {
    let mut pool = pool(10_000);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let mut sequences = vec![sequence(1, Tier::Shared, 400, None, &mut pool)];
    let mut n_answered = 0;
    let mut n_steps = 0;
    while sequences[0].phase() == Phase::Prefill {
        if sequences.len() < 2 {
            sequences.push(sequence(2 + n_steps, Tier::Shared, 30, None, &mut pool));
        }
        let plan = planner.plan(&mut sequences, &mut pool, &CostModel::default());
        run(&plan, &mut sequences, &mut pool);
        if sequences[1].phase() == Phase::Decode {
            n_answered += 1;
            sequences.remove(1).finish(&mut pool);
        }
        n_steps += 1;
        assert!(n_steps < 100, "the long prompt never gets on");
    }
    assert!(n_answered >= 5, "{n_answered} short prompts were done in {n_steps} steps");
}

#[test]
fn equal_adapters_stand_together() {
    let mut pool = pool(100);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let adapters = [Some(2), None, Some(1), Some(2), None];
    let mut sequences: Vec<Sequence> = adapters
        .into_iter()
        .zip(1..)
        .map(|(adapter, request)| sequence(request, Tier::Shared, 1, adapter, &mut pool))
        .collect();
    let plan = planner.plan(&mut sequences, &mut pool, &CostModel::default());
    assert_eq!(plan.runs.iter().map(|run| run.at).collect::<Vec<_>>(), [1, 4, 2, 0, 3]);
}

#[test]
fn the_youngest_loses_its_pages_and_the_oldest_gets_on() {
    let mut pool = pool(4);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let cost = CostModel::default();
    let mut sequences =
        vec![sequence(1, Tier::Shared, 7, None, &mut pool), sequence(2, Tier::Shared, 7, None, &mut pool)];
    let mut n_preempted = 0;
    for _ in 0..9 {
        let plan = planner.plan(&mut sequences, &mut pool, &cost);
        assert!(plan.runs.iter().any(|run| run.at == 0), "the oldest runs in every step");
        n_preempted += plan.n_preempted;
        run(&plan, &mut sequences, &mut pool);
    }
    assert_eq!((n_preempted, sequences[1].phase()), (1, Phase::Waiting));
    sequences[0].finish(&mut pool);
    assert_eq!(rows(&planner.plan(&mut sequences, &mut pool, &cost)), [(1, 9)], "it comes back with prompt and answer");
}

#[test]
fn a_younger_sequence_never_takes_an_older_ones_pages() {
    let mut pool = pool(4);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let mut sequences =
        vec![sequence(1, Tier::Shared, 8, None, &mut pool), sequence(2, Tier::Shared, 8, None, &mut pool)];
    for sequence in &mut sequences {
        sequence.reserve(8, &mut pool);
    }
    sequences[1].advance(8, &mut pool);
    sequences[1].push(1);
    let plan = planner.plan(&mut sequences, &mut pool, &CostModel::default());
    assert_eq!((rows(&plan), plan.n_preempted), (vec![(0, 8)], 0), "the younger one waits, though it decodes");
}

#[test]
fn a_parked_sequence_has_no_rows_and_yields_its_pages_to_anyone() {
    let mut pool = pool(4);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let cost = CostModel::default();
    let mut sequences =
        vec![sequence(1, Tier::Shared, 8, None, &mut pool), sequence(2, Tier::Shared, 8, None, &mut pool)];
    let plan = planner.plan(&mut sequences, &mut pool, &cost);
    run(&plan, &mut sequences, &mut pool);
    sequences[0].parked = true;
    let plan = planner.plan(&mut sequences, &mut pool, &cost);
    assert_eq!((rows(&plan), plan.n_preempted), (vec![(1, 1)], 1));
    assert_eq!(sequences[0].phase(), Phase::Waiting);
}

#[test]
fn the_oldest_waiting_sequence_comes_back_on_a_parked_ones_pages() {
    let mut pool = pool(4);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let cost = CostModel::default();
    let mut sequences =
        vec![sequence(1, Tier::Shared, 8, None, &mut pool), sequence(2, Tier::Shared, 8, None, &mut pool)];
    let plan = planner.plan(&mut sequences, &mut pool, &cost);
    run(&plan, &mut sequences, &mut pool);
    sequences[0].preempt(&mut pool);
    sequences[1].parked = true;
    let plan = planner.plan(&mut sequences, &mut pool, &cost);
    assert_eq!((rows(&plan), plan.n_preempted), (vec![(0, 9)], 1));
    assert_eq!(sequences[1].phase(), Phase::Waiting);
}

#[test]
fn prompts_with_logits_are_computed_in_smaller_chunks() {
    let mut pool = pool(100);
    let mut planner = Planner::new(config(ClassReserve::NONE));
    let mut sequences = vec![sequence(1, Tier::Shared, 30, None, &mut pool)];
    sequences[0].all_logits = true;
    assert_eq!(rows(&planner.plan(&mut sequences, &mut pool, &CostModel::default())), [(0, 8)]);
}

/// Runs `n_steps` steps of decoding sequences with a true cost of 2 ms a step and 1 ms a row; returns the time of
/// each class: marginal rows for the others, the rest for `owner`, as far as it has rows.
fn class_times(tiers: &[Tier], reserve: ClassReserve, owner: Tier, n_steps: usize) -> (f64, f64) {
    let mut pool = pool(100_000);
    let mut planner = Planner::new(config(reserve));
    let mut cost = CostModel::default();
    let mut sequences: Vec<Sequence> =
        tiers.iter().zip(1..).map(|(&tier, request)| sequence(request, tier, 1, None, &mut pool)).collect();
    let (mut own, mut others) = (0.0, 0.0);
    for _ in 0..n_steps {
        let plan = planner.plan(&mut sequences, &mut pool, &cost);
        let n_own = plan.runs.iter().filter(|run| sequences[run.at].tier == owner).count() as f64;
        let n_others = plan.n_rows() as f64 - n_own;
        let fixed = 2.0;
        own += if n_own > 0.0 { fixed + n_own } else { 0.0 };
        others += if n_own > 0.0 { n_others } else { fixed + n_others };
        let took = Duration::from_secs_f64((fixed + plan.n_rows() as f64) / 1000.0);
        cost.learn(plan.load(&sequences), took);
        planner.measured(&plan, &sequences, took, &cost);
        run(&plan, &mut sequences, &mut pool);
    }
    (own, others)
}

fn reserve(shares: [f32; 3]) -> ClassReserve {
    ClassReserve { shares, delay_max: Duration::from_millis(20) }
}

#[test]
fn a_reserved_class_keeps_its_share_of_step_time_against_a_flood() {
    let mut tiers = vec![Tier::Shared; 50];
    tiers.push(Tier::Premium);
    for share in [0.3, 0.5, 0.9] {
        let (own, others) = class_times(&tiers, reserve([0.0, share, 0.0]), Tier::Premium, 2000);
        let found = others / (own + others);
        let most = 1.0 - f64::from(share);
        assert!(found <= most * 1.02 && found >= most * 0.9, "others used {found} of the time, allowed {most}");
    }
}

#[test]
fn two_reserves_hold_at_once_and_nothing_stalls() {
    let mut tiers = vec![Tier::Shared; 30];
    tiers.extend([Tier::Premium; 10]);
    tiers.push(Tier::Isolated);
    let shares = reserve([0.0, 0.4, 0.4]);
    let (own, others) = class_times(&tiers, shares, Tier::Isolated, 2000);
    assert!(others / (own + others) <= 0.62, "isolated has {own} of {}", own + others);
    let (own, others) = class_times(&tiers, shares, Tier::Premium, 2000);
    assert!(others / (own + others) <= 0.62, "premium has {own} of {}", own + others);
}

#[test]
fn an_idle_reserve_bounds_the_steps_of_others_and_starves_nobody() {
    let mut pool = pool(10_000);
    let mut planner = Planner::new(config(reserve([0.0, 0.9, 0.0])));
    let cost = CostModel::default();
    let mut sequences: Vec<Sequence> =
        (1..41).map(|request| sequence(request, Tier::Shared, 30, None, &mut pool)).collect();
    for _ in 0..300 {
        let plan = planner.plan(&mut sequences, &mut pool, &cost);
        assert!(plan.n_rows() <= 20, "20 ms at 1 ms a row");
        run(&plan, &mut sequences, &mut pool);
    }
    // 300 steps of 20 rows, 1200 of them prompts; once all decode, three quarters of a step's time are used.
    let emitted: Vec<usize> = sequences.iter().map(Sequence::n_emitted).collect();
    assert!(emitted.iter().all(|&n| n > 30), "{emitted:?}");
    assert!(emitted.iter().sum::<usize>() > 3000, "{emitted:?}");
}

#[test]
fn prompts_prolong_a_decoding_step_only_as_far_as_allowed() {
    let mut pool = pool(1000);
    let mut planner = Planner::new(PlanConfig { rows_max: 64, prefill_stretch: 1.0, ..config(ClassReserve::NONE) });
    let mut cost = CostModel::default();
    for n in 1..400 {
        // 4 ms a step, 0.25 ms a row, as much again with logits.
        let load = Load { n_rows: n % 30 + 4, n_logits: n % 5 };
        cost.learn(load, Duration::from_micros(4000 + 250 * (load.n_rows + load.n_logits) as u64));
    }
    let mut sequences = vec![sequence(1, Tier::Shared, 1, None, &mut pool)];
    let plan = planner.plan(&mut sequences, &mut pool, &cost);
    run(&plan, &mut sequences, &mut pool);
    sequences.push(sequence(2, Tier::Shared, 500, None, &mut pool));
    let plan = planner.plan(&mut sequences, &mut pool, &cost);
    let n_prompt = plan.n_rows() - 1;
    assert!((16..=19).contains(&n_prompt), "4.5 ms more are 18 rows, not {n_prompt}");
    let n_bare = (0..32).filter(|_| planner.plan(&mut sequences, &mut pool, &cost).n_rows() == 1).count();
    assert_eq!(n_bare, 2, "they show what a step takes without prompts");
    sequences[0].parked = true;
    for _ in 0..STEPS_PER_BARE_STEP {
        let plan = planner.plan(&mut sequences, &mut pool, &cost);
        assert_eq!(plan.n_rows(), 32, "nobody waits: as much as a step may have");
    }
}

proptest! {
    #[test]
    fn a_step_stays_within_its_limits_and_someone_always_runs(
        prompts in prop::collection::vec((1_usize..60, 0_usize..3, prop::option::of(0_u8..3), any::<bool>()), 1..12),
        n_pages in 20_u32..60, rows_max in 12_usize..40, prefill_rows_max in 1_usize..40,
        shares in prop::array::uniform3(prop::sample::select(vec![0.0_f32, 0.3, 0.9])),
    ) {
        let mut pool = pool(n_pages);
        let mut planner = Planner::new(PlanConfig { rows_max, prefill_rows_max, prefill_stretch: 1.0, logits_rows_max: 8, reserve: reserve(shares) });
        let mut sequences: Vec<Sequence> = prompts
            .iter()
            .zip(1..)
            .map(|(&(n_prompt, tier, adapter, _), request)| sequence(request, Tier::ALL[tier], n_prompt, adapter, &mut pool))
            .collect();
        for (sequence, &(.., parked)) in sequences.iter_mut().zip(&prompts) {
            sequence.parked = parked;
        }
        let can_run = prompts.iter().any(|prompt| !prompt.3);
        for _ in 0..40 {
            let plan = planner.plan(&mut sequences, &mut pool, &CostModel::default());
            prop_assert_eq!(plan.runs.is_empty(), !can_run);
            prop_assert!(plan.n_rows() <= rows_max);
            let prefills = plan.runs.iter().filter(|run| sequences[run.at].phase() == Phase::Prefill);
            prop_assert!(prefills.map(|run| run.n_rows).sum::<usize>() <= prefill_rows_max);
            let mut planned: Vec<usize> = plan.runs.iter().map(|run| run.at).collect();
            let adapters: Vec<_> = planned.iter().map(|&at| sequences[at].adapter).collect();
            prop_assert!(adapters.is_sorted());
            planned.sort_unstable();
            planned.dedup();
            prop_assert_eq!(planned.len(), plan.runs.len());
            for run in &plan.runs {
                let sequence = &sequences[run.at];
                prop_assert!(!sequence.parked && run.n_rows <= sequence.n_pending());
                prop_assert!(sequence.pages().len() * PAGE >= sequence.computed() + run.n_rows);
            }
            pool.assert_consistent();
            run(&plan, &mut sequences, &mut pool);
            for sequence in sequences.iter_mut().filter(|sequence| sequence.n_emitted() > 15) {
                sequence.finish(&mut pool);
            }
            sequences.retain(|sequence| sequence.phase() != Phase::Done);
            if sequences.iter().all(|sequence| sequence.parked) {
                break;
            }
        }
    }
}
