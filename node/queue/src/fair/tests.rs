//! Behaviour of the fair queue, alone and against a simulated engine and adapter cache.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use shared::clock::{Clock, ManualClock};
use shared::hash::ContentHash;
use shared::id::TenantId;

use super::*;
use crate::item::{AdapterView, Room};

mod sim;
mod shares;
mod slots;
mod random;

/// Adapters that are all resident, or as set.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) epoch: u64,
    pub(super) states: BTreeMap<AdapterId, Residency>,
}

impl View {
    fn set(&mut self, adapter_id: AdapterId, state: Residency) {
        self.states.insert(adapter_id, state);
        self.epoch += 1;
    }
}

impl AdapterView for View {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn residency(&mut self, adapter_id: &AdapterId) -> Residency {
        self.states.get(adapter_id).copied().unwrap_or(Residency::Ready)
    }

    fn settled(&mut self, out: &mut Vec<AdapterId>) {
        out.extend(
            self.states
                .iter()
                .filter(|(_, state)| matches!(state, Residency::Ready | Residency::Failed))
                .map(|(&adapter_id, _)| adapter_id),
        );
    }
}

pub(super) fn tenant(n: usize) -> TenantId {
    format!("tenant-{n}").parse().expect("valid name")
}

pub(super) fn adapter(n: usize) -> AdapterId {
    AdapterId(ContentHash::of(&n.to_le_bytes()).0)
}

pub(super) fn item(now: Instant, id: u128, tenant_no: usize) -> Item {
    Item {
        id: RequestId(id),
        route: Route { tenant: tenant(tenant_no), task: None },
        tier: Tier::Shared,
        weight: 1,
        concurrency: 64,
        queue_depth: 1000,
        adapter: None,
        n_sequences: 1,
        prompt_tokens: 10,
        kv_tokens: 20,
        admitted_at: now,
        deadline: now + Duration::from_secs(3600),
    }
}

const ROOM: Room = Room { sequences: 64, kv_tokens: 1 << 20 };

struct Bench {
    clock: ManualClock,
    queue: FairQueue<u128>,
    view: View,
}

impl Bench {
    fn new() -> Self {
        Self { clock: ManualClock::default(), queue: FairQueue::new(FairConfig::default()), view: View::default() }
    }

    fn submit(&mut self, item: Item) {
        let id = item.id.0;
        self.queue.submit(self.clock.now(), item, id).expect("accepted");
    }

    fn next(&mut self) -> Option<u128> {
        self.queue.next(self.clock.now(), ROOM, &mut self.view).map(|picked| picked.payload)
    }

    fn item(&self, id: u128, tenant_no: usize) -> Item {
        item(self.clock.now(), id, tenant_no)
    }
}

#[test]
fn a_line_is_first_come_first_served_and_tenants_take_turns() {
    let mut b = Bench::new();
    for id in 0..6 {
        b.submit(b.item(id, usize::from(id >= 3)));
    }
    let order: Vec<u128> = std::iter::from_fn(|| b.next()).collect();
    assert_eq!(order, [0, 3, 1, 4, 2, 5]);
}

#[test]
fn a_burst_of_picks_between_two_charges_is_spread_by_prompt_length() {
    let mut b = Bench::new();
    for id in 0..20 {
        b.submit(Item { prompt_tokens: if id < 10 { 100 } else { 400 }, ..b.item(id, usize::from(id >= 10)) });
    }
    let picked: Vec<u128> = (0..10).filter_map(|_| b.next()).collect();
    let long = picked.iter().filter(|&&id| id >= 10).count();
    assert_eq!(long, 2, "800 tokens each: {picked:?}");
}

#[test]
fn a_full_route_is_refused_with_a_hint_and_others_are_not() {
    let mut b = Bench::new();
    for id in 0..10_000 {
        let item = Item { queue_depth: 64, ..b.item(id, 0) };
        let answer = b.queue.submit(b.clock.now(), item, id);
        match (id < 64, answer) {
            (true, Ok(())) => {}
            (false, Err(SubmitError::RouteFull { waiting: 64, limit: 64, retry_after })) => {
                assert!(retry_after >= Duration::from_millis(750) && retry_after <= Duration::from_secs(75));
            }
            (_, other) => panic!("request {id}: {other:?}"),
        }
    }
    assert_eq!(b.queue.n_waiting(), 64);
    b.submit(b.item(20_000, 1));
    assert_eq!((b.next(), b.next()), (Some(0), Some(20_000)));
}

#[test]
fn a_tenant_with_many_tasks_is_bounded_over_all_of_them() {
    let mut b = Bench::new();
    b.queue.configure(FairConfig { tenant_waiting_max: 6, ..FairConfig::default() });
    let of_task = |b: &Bench, id: u128| {
        let item = b.item(id, 0);
        let task = Some(format!("task{id}").parse().expect("a task"));
        Item { route: Route { task, ..item.route.clone() }, ..item }
    };
    for id in 0..6 {
        b.submit(of_task(&b, id));
    }
    let refused = b.queue.submit(b.clock.now(), of_task(&b, 6), 6);
    assert!(matches!(refused, Err(SubmitError::TenantFull { waiting: 6, limit: 6, .. })), "{refused:?}");
    b.submit(b.item(20, 1));
    assert!(b.next().is_some());
    assert!(b.queue.submit(b.clock.now(), of_task(&b, 7), 7).is_ok(), "one left, one may come");
}

#[test]
fn the_last_eighth_of_a_full_node_is_kept_for_newcomers() {
    let mut b = Bench::new();
    b.queue.configure(FairConfig { waiting_max: 80, ..FairConfig::default() });
    for id in 0..70 {
        b.submit(b.item(id, 0));
    }
    let refused = b.queue.submit(b.clock.now(), b.item(70, 0), 70);
    assert!(matches!(refused, Err(SubmitError::NodeFull { waiting: 70, limit: 70, .. })), "{refused:?}");
    for n in 1..=10 {
        b.submit(b.item(100 + n as u128, n));
    }
    assert!(matches!(b.queue.submit(b.clock.now(), b.item(99, 99), 99), Err(SubmitError::NodeFull { limit: 80, .. })));
}

#[test]
fn a_request_past_its_deadline_is_never_picked_and_is_reported_once() {
    let mut b = Bench::new();
    b.submit(Item { deadline: b.clock.now() + Duration::from_millis(5), ..b.item(1, 0) });
    b.submit(b.item(2, 0));
    assert_eq!(b.queue.next_deadline(), Some(b.clock.now() + Duration::from_millis(5)));
    b.clock.advance(Duration::from_millis(5));
    assert_eq!(b.next(), Some(2));
    let expired: Vec<u128> = b.queue.expire(b.clock.now()).into_iter().map(|(_, id)| id).collect();
    assert_eq!((expired, b.queue.expire(b.clock.now()).len()), (vec![1], 0));
    let late = Item { deadline: b.clock.now(), ..b.item(3, 0) };
    assert_eq!(b.queue.submit(b.clock.now(), late, 3), Err(SubmitError::DeadlinePassed));
}

#[test]
fn cancelling_takes_out_what_waits_and_leaves_what_runs() {
    let mut b = Bench::new();
    for id in 0..3 {
        b.submit(b.item(id, 0));
    }
    assert_eq!(b.queue.cancel(RequestId(1)).map(|(_, id)| id), Some(1));
    assert!(b.queue.cancel(RequestId(1)).is_none());
    assert_eq!((b.next(), b.next(), b.next()), (Some(0), Some(2), None));
    assert!(b.queue.cancel(RequestId(2)).is_none());
    assert_eq!(b.queue.submit(b.clock.now(), b.item(2, 0), 2), Err(SubmitError::Duplicate(RequestId(2))));
    assert!(b.queue.left(RequestId(2)) && !b.queue.left(RequestId(2)));
    assert_eq!(b.queue.n_running(), 1);
}

#[test]
fn a_tenant_at_its_cap_waits_while_others_go_on() {
    let mut b = Bench::new();
    for id in 0..4 {
        b.submit(Item { concurrency: 2, ..b.item(id, 0) });
    }
    b.submit(Item { prompt_tokens: 1000, ..b.item(10, 1) });
    b.submit(Item { prompt_tokens: 1000, ..b.item(11, 1) });
    let picked: Vec<u128> = std::iter::from_fn(|| b.next()).collect();
    assert_eq!(picked, [0, 10, 1, 11]);
    b.queue.left(RequestId(0));
    assert_eq!((b.next(), b.next()), (Some(2), None));
}

#[test]
fn a_request_wider_than_the_cap_runs_alone_and_is_not_starved_by_narrow_ones() {
    let mut b = Bench::new();
    let task = |name: &str| Route { tenant: tenant(0), task: Some(name.parse().expect("task")) };
    b.submit(Item { concurrency: 4, route: task("narrow"), ..b.item(1, 0) });
    assert_eq!(b.next(), Some(1));
    b.submit(Item { concurrency: 4, n_sequences: 8, route: task("wide"), ..b.item(2, 0) });
    b.submit(Item { concurrency: 4, route: task("narrow"), ..b.item(3, 0) });
    b.queue.charge(Tier::Shared, &task("narrow"), 0, 50);
    assert_eq!(b.next(), None, "the wide request is next by fairness and waits for an empty house");
    b.queue.left(RequestId(1));
    assert_eq!((b.next(), b.next()), (Some(2), None));
    b.queue.left(RequestId(2));
    assert_eq!(b.next(), Some(3));
}

#[test]
fn a_fair_choice_that_does_not_fit_keeps_its_turn() {
    let mut b = Bench::new();
    b.submit(b.item(1, 0));
    assert_eq!(b.next(), Some(1));
    b.submit(Item { kv_tokens: 500, ..b.item(2, 1) });
    b.submit(b.item(3, 2));
    let small = Room { sequences: 4, kv_tokens: 100 };
    assert!(b.queue.next(b.clock.now(), small, &mut b.view).is_none());
    // Nothing runs any more: waiting cannot help, so it is handed out and the engine can refuse it.
    b.queue.left(RequestId(1));
    assert_eq!(b.queue.next(b.clock.now(), small, &mut b.view).map(|picked| picked.payload), Some(2));
}

#[test]
fn unused_prompt_tokens_are_given_back() {
    let mut b = Bench::new();
    b.submit(Item { prompt_tokens: 1000, ..b.item(1, 0) });
    b.submit(b.item(2, 1));
    assert_eq!((b.next(), b.next()), (Some(1), Some(2)));
    let served = |b: &Bench| b.queue.stats(b.clock.now()).tenants[0].service_tokens;
    assert_eq!(served(&b), 1000);
    b.queue.charge(Tier::Shared, &b.item(1, 0).route, 300, 0);
    assert_eq!(served(&b), 1000, "computed tokens come off what was charged at picking");
    b.queue.charge(Tier::Shared, &b.item(1, 0).route, 0, 5);
    b.queue.left(RequestId(1));
    assert_eq!(served(&b), 300 + 2 * 5);
}

#[test]
fn putting_back_restores_the_line_and_the_counters() {
    let mut b = Bench::new();
    let needs = |id| Item { adapter: Some(adapter(1)), ..b.item(id, 0) };
    let (first, second) = (needs(1), needs(2));
    b.submit(first);
    b.submit(second);
    let before = b.queue.stats(b.clock.now());
    let picked = b.queue.next(b.clock.now(), ROOM, &mut b.view).expect("ready");
    b.queue.put_back(picked);
    assert_eq!(b.queue.stats(b.clock.now()), before);
    assert_eq!(b.next(), None, "its adapter is asked about again only when something settled");
    b.view.set(adapter(1), Residency::Ready);
    assert_eq!((b.next(), b.next()), (Some(1), Some(2)));
}

#[test]
fn a_failed_adapter_is_handed_out_to_be_answered() {
    let mut b = Bench::new();
    b.view.set(adapter(1), Residency::Loading);
    b.submit(Item { adapter: Some(adapter(1)), ..b.item(1, 0) });
    assert_eq!(b.next(), None);
    b.view.set(adapter(1), Residency::Failed);
    let picked = b.queue.next(b.clock.now(), ROOM, &mut b.view).expect("handed out");
    assert_eq!((picked.payload, picked.residency), (1, Residency::Failed));
}

#[test]
fn reserved_places_stay_free_for_their_class() {
    let mut b = Bench::new();
    b.queue.configure(FairConfig { class_sequences_reserved: [0, 3, 0], ..FairConfig::default() });
    for id in 0..10 {
        b.submit(b.item(id, id as usize));
    }
    let mut free = 8;
    while b.queue.next(b.clock.now(), Room { sequences: free, kv_tokens: 1 << 20 }, &mut b.view).is_some() {
        free -= 1;
    }
    assert_eq!(free, 3);
    for id in 20..24 {
        b.submit(Item { tier: Tier::Premium, ..b.item(id, 50) });
    }
    for left in [3, 2, 1] {
        let picked = b.queue.next(b.clock.now(), Room { sequences: left, kv_tokens: 1 << 20 }, &mut b.view);
        assert_eq!(picked.map(|picked| picked.item.tier), Some(Tier::Premium));
    }
}

#[test]
fn drained_requests_come_out_oldest_first_and_leave_an_empty_queue() {
    let mut b = Bench::new();
    for id in 0..9 {
        b.submit(b.item(id, (id % 3) as usize));
    }
    let out: Vec<u128> = b.queue.drain().into_iter().map(|(_, id)| id).collect();
    assert_eq!(out, (0..9).collect::<Vec<_>>());
    assert_eq!((b.queue.n_waiting(), b.next()), (0, None));
}

#[test]
fn idle_tenants_are_forgotten_once_they_owe_nothing() {
    let mut b = Bench::new();
    for n in 0..100 {
        b.submit(b.item(n as u128, n));
        b.next();
        b.queue.left(RequestId(n as u128));
    }
    b.queue.expire(b.clock.now());
    b.clock.advance(Duration::from_secs(700));
    b.queue.expire(b.clock.now());
    assert_eq!(b.queue.stats(b.clock.now()).tenants, []);
    assert!(b.queue.by_tenant.is_empty() && b.queue.by_route.is_empty());
}

#[test]
fn wanted_adapters_come_in_fair_order_without_doubles() {
    let mut b = Bench::new();
    for n in [3_usize, 1, 2] {
        for _ in 0..2 {
            let id = b.queue.next_seq.into();
            b.submit(Item { adapter: Some(adapter(n)), ..b.item(id, n) });
        }
    }
    b.submit(b.item(99, 4));
    // Ties go to who came first.
    assert_eq!(b.queue.wanted(8), [adapter(3), adapter(1), adapter(2)]);
    b.view.set(adapter(3), Residency::NoSlot);
    b.view.set(adapter(2), Residency::NoSlot);
    assert!(b.next().is_some());
    assert_eq!(b.queue.wanted(8), [adapter(3), adapter(2), adapter(1)], "parked ones keep their turn");
    assert_eq!(b.queue.wanted(1), [adapter(3)]);
}

/// Ids of a set of payloads, for comparison.
pub(super) fn ids(payloads: impl IntoIterator<Item = u128>) -> BTreeSet<u128> {
    payloads.into_iter().collect()
}
