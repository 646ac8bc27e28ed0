//! Random operations: whatever happens, nothing is lost, nothing comes out twice, no limit is passed, and
//! the sets inside agree with the lines.

use super::sim::Rng;
use super::*;

/// Where every accepted request ended up.
#[derive(Default)]
struct Ledger {
    accepted: BTreeSet<u128>,
    waiting: BTreeSet<u128>,
    running: BTreeMap<u128, (usize, u32)>,
    out: BTreeSet<u128>,
}

impl Ledger {
    fn leaves_queue(&mut self, id: u128) {
        assert!(self.waiting.remove(&id), "request {id} came out that did not wait");
    }

    fn ends(&mut self, id: u128) {
        assert!(self.out.insert(id), "request {id} ended twice");
    }
}

fn random_item(rng: &mut Rng, now: Instant, id: u128) -> Item {
    let tenant_no = rng.below(6) as usize;
    let task = ["support", "sales", "legal"][rng.below(3) as usize];
    Item {
        route: Route { tenant: tenant(tenant_no), task: Some(task.parse().expect("task")) },
        tier: Tier::ALL[tenant_no % 3],
        weight: 1 + rng.below(4) as u32,
        concurrency: 3,
        queue_depth: 12,
        adapter: (rng.below(4) > 0).then(|| adapter(tenant_no * 4 + rng.below(2) as usize)),
        n_sequences: 1 + u32::from(rng.below(8) == 0) * 4,
        prompt_tokens: 1 + rng.below(300) as u32,
        kv_tokens: 1 + rng.below(500) as u32,
        deadline: now + Duration::from_millis(1 + rng.below(400)),
        ..item(now, id, tenant_no)
    }
}

fn check(queue: &FairQueue<u128>, ledger: &Ledger, now: Instant) {
    assert_eq!(queue.n_waiting() + queue.expired.len(), ledger.waiting.len());
    assert_eq!(queue.n_running(), ledger.running.len());
    assert_eq!(queue.deadlines.len(), queue.n_waiting());
    let stats = queue.stats(now);
    assert_eq!(stats.classes.iter().map(|class| class.waiting).sum::<usize>(), queue.n_waiting());
    for entry in &stats.tenants {
        let of_tenant = ledger.running.values().filter(|(n, _)| tenant(*n) == entry.tenant);
        assert_eq!(entry.running_sequences, of_tenant.clone().map(|(_, sequences)| sequences).sum::<u32>());
        assert!(entry.running_sequences <= 3 || of_tenant.count() == 1, "over the cap: {entry:?}");
    }
    for (idx, lines) in queue.tenants.iter() {
        let waiting = queue.routes.iter().filter(|(_, line)| line.tenant == idx && !line.items.is_empty());
        assert_eq!(lines.open.len() + lines.parked.len(), waiting.count());
        assert_eq!(queue.class(lines.tier).waiting.contains(&(lines.service, idx)), lines.waiting > 0);
    }
    let grouped: usize = queue.groups.values().map(|group| group.routes.len()).sum();
    let heads = queue.routes.iter().filter(|(idx, _)| queue.head(*idx).is_some_and(|head| head.adapter.is_some()));
    assert_eq!(grouped, heads.count());
}

fn run(seed: u64) {
    let mut rng = Rng::new(seed);
    let clock = ManualClock::default();
    let mut queue: FairQueue<u128> = FairQueue::new(FairConfig {
        waiting_max: 100,
        pass_tokens_max: 500,
        class_sequences_reserved: [0, 1, 1],
        ..FairConfig::default()
    });
    let mut view = View::default();
    let mut ledger = Ledger::default();
    for op in 0..600_u128 {
        let now = clock.now();
        match rng.below(12) {
            0..=4 => {
                if queue.submit(now, random_item(&mut rng, now, op), op).is_ok() {
                    ledger.accepted.insert(op);
                    ledger.waiting.insert(op);
                }
            }
            5..=6 => {
                let used: u32 = ledger.running.values().map(|(_, sequences)| sequences).sum();
                let room = Room { sequences: 12_u32.saturating_sub(used), kv_tokens: rng.below(600) as u32 };
                let nothing_runs = ledger.running.is_empty();
                if let Some(picked) = queue.next(now, room, &mut view) {
                    let fits = picked.item.n_sequences <= room.sequences && picked.item.kv_tokens <= room.kv_tokens;
                    assert!(fits || nothing_runs);
                    assert!(picked.item.deadline > now, "a dead request reached the engine");
                    assert!(matches!(picked.residency, Residency::Ready | Residency::Failed));
                    if rng.below(8) == 0 {
                        queue.put_back(picked);
                    } else {
                        ledger.leaves_queue(picked.payload);
                        let tenant_no = (0..6).find(|&n| tenant(n) == picked.item.route.tenant).expect("known");
                        ledger.running.insert(picked.payload, (tenant_no, picked.item.n_sequences));
                    }
                }
            }
            7 => {
                if let Some((&id, _)) = ledger.running.iter().nth(rng.below(8) as usize) {
                    assert!(queue.left(RequestId(id)));
                    ledger.running.remove(&id);
                    ledger.ends(id);
                }
            }
            8 => {
                let id = u128::from(rng.below(op as u64 + 1));
                if queue.cancel(RequestId(id)).is_some() {
                    ledger.leaves_queue(id);
                    ledger.ends(id);
                }
            }
            9 => {
                for (_, id) in queue.expire(now) {
                    ledger.leaves_queue(id);
                    ledger.ends(id);
                }
                clock.advance(Duration::from_millis(rng.below(60)));
            }
            10 => {
                let tenant_no = rng.below(6) as usize;
                let route = random_item(&mut rng, now, 0).route;
                queue.charge(Tier::ALL[tenant_no % 3], &route, rng.below(100) as u32, rng.below(20) as u32);
            }
            _ => {
                let states =
                    [Residency::Ready, Residency::Loading, Residency::NoSlot, Residency::Absent, Residency::Failed];
                view.set(adapter(rng.below(24) as usize), states[rng.below(5) as usize]);
            }
        }
        check(&queue, &ledger, clock.now());
    }
    for (_, id) in queue.drain() {
        ledger.leaves_queue(id);
        ledger.ends(id);
    }
    let running = ids(ledger.running.keys().copied());
    assert!(ledger.waiting.is_empty());
    assert_eq!(ledger.accepted, &ledger.out | &running);
}

#[test]
fn nothing_is_lost_or_doubled_under_random_operations() {
    for seed in 0..200 {
        if let Err(cause) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}
