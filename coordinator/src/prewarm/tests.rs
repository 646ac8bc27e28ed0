//! What is learnt from requests, what is planned from it, and what a trace of four weeks gains.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use shared::adapter::AdapterRef;
use shared::hash::ContentHash;
use shared::id::Route;

use super::activity::Activity;
use super::plan::{AHEAD, Caution, EVERY, Known, Room, Step, loads_max, plan};
use super::*;
use crate::membership::detector::Health;
use crate::membership::{ClusterView, Member, SHARE_PARTS};
use crate::ring::RingKey;
use crate::route::Routes;
use crate::testing::spec_of_node;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
const WEEK: u64 = 7 * DAY;

fn route(i: usize) -> Route {
    Route { tenant: format!("tenant-{i}").parse().expect("valid"), task: Some("support".parse().expect("valid")) }
}

fn adapter(i: usize) -> AdapterRef {
    AdapterRef { tenant: route(i).tenant, hash: ContentHash::of(&i.to_le_bytes()) }
}

fn at(s: u64) -> Duration {
    Duration::from_secs(s)
}

mod learning {
    use super::*;

    const SOON: Duration = Duration::from_secs(900);

    #[test]
    fn a_busy_route_is_likely_and_forgotten_when_it_falls_silent() {
        let mut activity = Activity::default();
        (0..60).for_each(|i| activity.on_request(at(i * 60), &route(1)));
        assert!(activity.likely(at(HOUR), SOON, &route(1)) > 0.9);
        assert!(activity.likely(at(4 * HOUR), SOON, &route(1)) < 0.1);
        assert!(activity.likely(at(HOUR), SOON, &route(2)) < f64::EPSILON);
    }

    #[test]
    fn an_hour_of_the_week_becomes_a_habit_and_ceases_to_be_one() {
        let mut activity = Activity::default();
        let monday_nine = |week: u64| week * WEEK + 9 * HOUR;
        for week in 0..3 {
            activity.on_request(at(monday_nine(week) + 600), &route(1));
        }
        let before = |week| activity.likely(at(monday_nine(week) - 300), SOON, &route(1));
        assert!(before(3) > 0.95, "{}", before(3));
        assert!(activity.likely(at(monday_nine(3) - 3 * HOUR), SOON, &route(1)) < 0.05, "not before");
        assert!(activity.likely(at(monday_nine(3) + DAY - 300), SOON, &route(1)) < 0.05, "not on tuesdays");
        assert!((0.4..0.6).contains(&before(4)), "{}: once missed", before(4));
        assert!(before(7) < 0.1);
    }

    #[test]
    fn half_of_the_weeks_are_half_a_habit() {
        let mut activity = Activity::default();
        for week in (0..20).step_by(2) {
            activity.on_request(at(week * WEEK + 9 * HOUR), &route(1));
        }
        let likely = activity.likely(at(19 * WEEK + 9 * HOUR - 300), SOON, &route(1));
        assert!((0.3..0.7).contains(&likely), "{likely}");
    }
}

mod planning {
    use super::*;

    fn known(i: usize, likely: f64, resident: bool, leased: bool) -> Known {
        Known { adapter: adapter(i), bytes: 10, likely, resident, leased }
    }

    fn room(slots: usize) -> Room {
        Room { slots, bytes: 1000, loads: 4 }
    }

    #[test]
    fn the_likeliest_fill_free_places() {
        let known = vec![known(1, 0.6, false, false), known(2, 0.9, false, false), known(3, 0.2, false, false)];
        let steps = plan(known.clone(), room(8), Caution::default());
        assert_eq!(steps, [Step::Warm(adapter(2)), Step::Warm(adapter(1))]);
        assert_eq!(plan(known, room(1), Caution::default()), [Step::Warm(adapter(2))]);
    }

    #[test]
    fn an_idle_adapter_gives_way_only_to_a_much_likelier_one_and_a_leased_never() {
        let plan_against = |likely, leased| {
            plan(vec![known(1, likely, true, leased), known(2, 0.9, false, false)], room(1), Caution::default())
        };
        assert_eq!(plan_against(0.1, false), [Step::Cool(adapter(1)), Step::Warm(adapter(2))]);
        assert_eq!(plan_against(0.8, false), []);
        assert_eq!(plan_against(0.0, true), []);
    }

    #[test]
    fn bytes_and_loads_are_bounded() {
        let many: Vec<Known> = (0..20).map(|i| known(i, 0.9, false, false)).collect();
        assert_eq!(plan(many.clone(), room(20), Caution::default()).len(), 4);
        let tight = Room { slots: 20, bytes: 25, loads: 20 };
        assert_eq!(plan(many, tight, Caution::default()).len(), 2);
    }
}

#[test]
fn a_new_node_is_told_of_the_routes_it_gets() {
    let member = |i: usize| {
        let id: NodeId = format!("n{i}").parse().expect("valid");
        let spec = spec_of_node(&id, 1).into();
        let member = Member {
            spec,
            health: Health::Alive,
            phase: shared::cluster::NodePhase::Serving,
            incarnation: 1,
            share: SHARE_PARTS,
            load: Default::default(),
            serves: None,
        };
        (id, member)
    };
    let mut routes = Routes::new(RingKey::derive(b"test"));
    let mut table = |n: usize| {
        let members: BTreeMap<NodeId, Member> = (0..n).map(member).collect();
        routes.table(Arc::new(ClusterView { epoch: n as u64, me: "n0".parse().expect("valid"), members }))
    };
    let (before, after) = (table(3), table(4));
    let place = Place::anywhere("smollm2".parse().expect("valid"));
    let all: Vec<Route> = (0..400).map(route).collect();
    let moved = moved(&before, &after, all.iter().map(|route| (route, &place)));
    assert!((50..150).contains(&moved.len()), "{} of 400", moved.len());
    assert!(moved.iter().all(|(_, to)| to.as_str() == "n3"));
}

/// A trace and what a cache makes of it.
mod replay {
    use super::*;

    const TENANTS: usize = 200;
    const SLOTS: usize = 40;
    /// A request after a longer pause opens a session.
    const SESSION_GAP: u64 = HOUR / 2;

    /// Numbers that look random, from a seed.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, n: u64) -> u64 {
            self.next() % n
        }

        fn chance(&mut self, p: f64) -> bool {
            ((self.next() >> 11) as f64) < p * (1_u64 << 53) as f64
        }
    }

    /// Requests of five weeks in order: `(second, tenant)`. Tenants work nine to five on weekdays in one of three
    /// time zones. A fifth of them have four fifths of the sessions: eight of ten working hours; the others have two
    /// hours of every working day that are theirs. A habitual hour is kept four times of five, and a seventh of all
    /// sessions come at no usual hour.
    fn trace(seed: u64) -> Vec<(u64, usize)> {
        let mut random = Random(seed);
        let mut requests = Vec::new();
        for tenant in 0..TENANTS {
            let zone = random.below(3) * 8 * HOUR;
            let heavy = tenant % 5 == 0;
            let hours: Vec<u64> = (0..8).filter(|_| random.chance(if heavy { 0.8 } else { 0.06 })).collect();
            for day in (0..35).filter(|day| day % 7 < 5) {
                for hour in 0..8 {
                    let habitual = hours.contains(&hour) && random.chance(0.8);
                    let odd = random.chance(if heavy { 0.1 } else { 0.01 });
                    if habitual || odd {
                        let begin = day * DAY + zone + (9 + hour) * HOUR + random.below(HOUR * 3 / 4);
                        let n = 3 + random.below(10);
                        requests.extend((0..n).map(|i| (begin + i * (20 + random.below(60)), tenant)));
                    }
                }
            }
        }
        requests.sort_unstable();
        requests
    }

    #[derive(Debug, Default, PartialEq)]
    struct Outcome {
        sessions: u32,
        cold_sessions: u32,
        loads: u32,
    }

    /// The last two weeks of the trace on one node with an LRU of `SLOTS`, with or without plans.
    fn run(trace: &[(u64, usize)], prewarm: bool) -> Outcome {
        let adapters: Vec<AdapterRef> = (0..TENANTS).map(adapter).collect();
        let routes: Vec<Route> = (0..TENANTS).map(route).collect();
        let index: BTreeMap<&AdapterRef, usize> = adapters.iter().zip(0..).collect();
        let mut activity = Activity::default();
        let mut outcome = Outcome::default();
        let mut resident = BTreeMap::<usize, u64>::new();
        let mut last = BTreeMap::<usize, u64>::new();
        let mut planned_at = 0;
        for (now, tenant) in trace {
            while prewarm && planned_at + EVERY.as_secs() <= *now {
                planned_at += EVERY.as_secs();
                let wall = at(planned_at);
                let known = (0..TENANTS).map(|i| Known {
                    adapter: adapters[i].clone(),
                    bytes: 1,
                    likely: activity.likely(wall, AHEAD, &routes[i]),
                    resident: resident.contains_key(&i),
                    leased: last.get(&i).is_some_and(|at| planned_at - at < 5),
                });
                let room = Room { slots: SLOTS, bytes: SLOTS as u64, loads: loads_max(SLOTS) };
                for step in plan(known.collect(), room, Caution::default()) {
                    match step {
                        Step::Cool(adapter) => _ = resident.remove(&index[&adapter]),
                        Step::Warm(adapter) => {
                            outcome.loads += u32::from(planned_at >= 3 * WEEK);
                            resident.insert(index[&adapter], planned_at);
                        }
                    }
                }
            }
            let opens = last.insert(*tenant, *now).is_none_or(|at| now - at > SESSION_GAP);
            let cold = resident.insert(*tenant, *now).is_none();
            if resident.len() > SLOTS {
                let oldest = resident.iter().min_by_key(|(_, at)| **at).map(|(tenant, _)| *tenant);
                oldest.map(|oldest| resident.remove(&oldest));
            }
            activity.on_request(at(*now), &routes[*tenant]);
            if *now >= 3 * WEEK {
                outcome.sessions += u32::from(opens);
                outcome.cold_sessions += u32::from(opens && cold);
                outcome.loads += u32::from(cold);
            }
        }
        outcome
    }

    #[test]
    fn the_trace_is_skewed_and_keeps_business_hours() {
        let trace = trace(1);
        let heavy = trace.iter().filter(|(_, tenant)| tenant % 5 == 0).count();
        let share = heavy as f64 / trace.len() as f64;
        assert!((0.75..0.85).contains(&share), "a fifth of the tenants send {share:.2} of the requests");
        assert!(trace.iter().map(|(_, tenant)| tenant).collect::<BTreeSet<_>>().len() > TENANTS / 2);
        assert_eq!(trace.iter().filter(|(at, _)| (at % WEEK) / DAY == 6 && at % DAY > 12 * HOUR).count(), 0);
    }

    /// Issue 4, 8: at least half fewer sessions that begin cold, at most a fifth more loads.
    #[test]
    fn prewarming_halves_the_sessions_that_begin_cold() {
        for seed in 1..4 {
            let trace = trace(seed);
            let (lru, warm) = (run(&trace, false), run(&trace, true));
            let cold = f64::from(warm.cold_sessions) / f64::from(lru.cold_sessions);
            let loads = f64::from(warm.loads) / f64::from(lru.loads);
            eprintln!("seed {seed}: LRU {lru:?}, pre-warmed {warm:?}: cold × {cold:.2}, loads × {loads:.2}");
            assert!(cold <= 0.5 && loads <= 1.2, "cold × {cold:.2}, loads × {loads:.2}");
        }
    }
}
