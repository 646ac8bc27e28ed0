//! Who keeps a record, how far it lags, what becomes of it when its entry node dies, and what is billed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::cluster::{NodeLoad, NodePhase};
use shared::id::{Route, TenantId};
use shared::request::{Emitted, Envelope, Generation};
use shared::tenant::Tier;
use wire::node::{JournalDelta, JournalRecord};

use super::idempotency::{Claims, RequestIds, Ruling, Stance, ruling, same};
use super::records::{Found, GAP, KEPT_FOR, Records, TAKEN, understood};
use super::trail::{BEHIND, BEHIND_TOKENS, Kept, Put, Trail};
use super::*;
use crate::membership::{ClusterView, Member, MemberSpec, SHARE_PARTS};
use crate::ring::RingKey;
use crate::route::Routes;
use crate::testing::{now, spec_of_node};

const ID: RequestId = RequestId(7);

fn node(i: usize) -> NodeId {
    format!("n{i}").parse().expect("valid name")
}

fn tenant() -> TenantId {
    "acme".parse().expect("valid name")
}

/// Nodes n0 …, seen by `me`; those in `dead` are.
pub(crate) fn table(n: usize, me: usize, dead: &[usize]) -> RoutingTable {
    table_of(n, me, |i| (if dead.contains(&i) { Health::Dead } else { Health::Alive }, 1))
}

/// Nodes n0 …, seen by `me`, with the health and the life that `seen` says.
fn table_of(n: usize, me: usize, seen: impl Fn(usize) -> (Health, u64)) -> RoutingTable {
    table_with(n, me, |i| (seen(i).0, seen(i).1, spec_of_node(&node(i), 1)))
}

fn table_with(n: usize, me: usize, seen: impl Fn(usize) -> (Health, u64, MemberSpec)) -> RoutingTable {
    let member = |i: usize| {
        let (health, incarnation, spec) = seen(i);
        let (spec, phase, load) = (Arc::new(spec), NodePhase::Serving, NodeLoad { running: 0, places: 8, waiting: 0 });
        Member { spec, health, phase, incarnation, share: SHARE_PARTS, load, serves: None }
    };
    let members: BTreeMap<NodeId, Member> = (0..n).map(|i| (node(i), member(i))).collect();
    let view = ClusterView { epoch: 1, me: node(me), members };
    Routes::new(RingKey::derive(b"test")).table(Arc::new(view))
}

pub(crate) fn envelope(at: Instant, prompt: &[u32]) -> Envelope {
    let generation = Generation::new(prompt, 64);
    Envelope {
        id: ID,
        route: Route { tenant: tenant(), task: None },
        tier: Tier::Shared,
        weight: 1,
        concurrency: 4,
        queue_depth: 16,
        base: "smollm2".parse().expect("valid base"),
        pin: Default::default(),
        adapter: None,
        fell_back: false,
        cache_secret: [0; 32],
        generation: Arc::new(generation),
        contract_epoch: 1,
        admitted_at: at,
        deadline: at + Duration::from_secs(30),
    }
}

fn emitted(n_tokens: u32, finished: bool) -> Emitted {
    Emitted(vec![shared::request::EmittedChoice { tokens: (0..n_tokens).collect(), finished }])
}

fn record(at: Instant, attempt: u32, n_tokens: u32) -> JournalRecord {
    JournalRecord { envelope: envelope(at, &[1, 2]), attempt, answer: vec![9], emitted: emitted(n_tokens, false) }
}

fn delta(attempt: u32, tokens: std::ops::Range<u32>) -> JournalDelta {
    JournalDelta { id: ID, attempt, choice: 0, from: tokens.start, tokens: tokens.collect(), finished: false }
}

mod choosing {
    use super::*;

    #[test]
    fn every_request_has_another_keeper_and_it_is_among_the_first_that_are_asked() {
        let seen: BTreeSet<NodeId> = (0..200)
            .map(|i| {
                let id = RequestId(i);
                let keeper = keeper(&table(5, 0, &[]), id, None).expect("five nodes");
                assert_ne!(keeper, node(0), "a node's own death takes its records along");
                let asked = whom_to_ask(&table(5, 3, &[0]), id, None);
                assert!(asked.iter().position(|node| *node == keeper) <= Some(1), "{keeper} in {asked:?}");
                assert!(!asked.contains(&node(0)), "the dead are not asked");
                keeper
            })
            .collect();
        assert_eq!(seen.len(), 4, "records are spread");
        assert_eq!(keeper(&table(1, 0, &[]), ID, None), None);
    }

    /// Of nodes n0 … every second lies in the east, the others lie in the west.
    fn two_regions(n: usize, dead: &[usize]) -> RoutingTable {
        table_with(n, 0, |i| {
            let region = Some(if i % 2 == 1 { "east" } else { "west" }.to_owned());
            let health = if dead.contains(&i) { Health::Dead } else { Health::Alive };
            (health, 1, MemberSpec { region, ..spec_of_node(&node(i), 1) })
        })
    }

    #[test]
    fn the_record_of_a_tenant_that_is_bound_to_a_region_is_kept_and_looked_for_there_only() {
        let east = [node(1), node(3)];
        for id in (0..50).map(RequestId) {
            let kept = keeper(&two_regions(4, &[]), id, Some("east")).expect("two nodes are there");
            assert!(east.contains(&kept), "{kept}, asked by a node of the west");
            assert!(whom_to_ask(&two_regions(4, &[]), id, Some("east")).iter().all(|node| east.contains(node)));
        }
        assert_eq!(keeper(&two_regions(4, &[1, 3]), ID, Some("east")), None, "rather none than one elsewhere");
        assert_eq!(keeper(&two_regions(2, &[]), ID, Some("west")), None, "the node itself is no other");
        let mut trail = Trail::new(ID, Some("east".into()));
        trail.on_table(&two_regions(4, &[1]));
        assert_eq!(trail.keeper(), Some(&node(3)));
        trail.on_table(&two_regions(4, &[1, 3]));
        assert_eq!(trail.keeper(), None);
        assert_eq!(trail.next(now(), &emitted(9, false), 1), None);
    }

    #[test]
    fn a_keeper_that_dies_is_replaced_and_one_that_serves_is_kept() {
        let mut trail = Trail::new(ID, None);
        trail.on_table(&table(5, 0, &[]));
        let first = trail.keeper().cloned().expect("five nodes");
        trail.on_table(&table(9, 0, &[]));
        assert_eq!(trail.keeper(), Some(&first));
        let index = first.as_str()[1..].parse().expect("a number");
        trail.on_table(&table(5, 0, &[index]));
        assert_ne!(trail.keeper(), Some(&first));
    }

    /// A node that was cut off twice within minutes trusts no other for seconds; its requests were kept nowhere, and
    /// when it died then, nobody remembered them (simulator, one trouble at a time, seed 778).
    #[test]
    fn a_node_that_trusts_nobody_yet_keeps_records_at_those_it_hears_again() {
        let usual = keeper(&table(5, 0, &[]), ID, None);
        let returning = |i| (if i == 0 { Health::Alive } else { Health::Returning }, 1);
        assert_eq!(keeper(&table_of(5, 0, returning), ID, None), usual);
        let one_alive = |i| (if i == 3 { Health::Alive } else { Health::Returning }, 1);
        assert_eq!(keeper(&table_of(5, 0, one_alive), ID, None), Some(node(3)));
        let silent = |i| (if i == 0 { Health::Alive } else { Health::Suspect }, 1);
        assert_eq!(keeper(&table_of(5, 0, silent), ID, None), None);
    }
}

mod writing {
    use super::*;

    #[test]
    fn a_keeper_in_another_life_gets_the_whole_record() {
        let start = now();
        let (mut trail, first) = opened(start);
        let lives = |life| move |i| (if i == 0 { Health::Alive } else { Health::Returning }, life);
        trail.on_table(&table_of(3, 0, lives(1)));
        assert_eq!(trail.next(start, &emitted(0, false), 1), None);
        trail.on_table(&table_of(3, 0, lives(2)));
        assert_eq!(trail.next(start, &emitted(0, false), 1), Some((first, Put::Open)));
    }

    #[test]
    fn a_keeper_that_died_is_not_waited_for() {
        let start = now();
        let (mut trail, first) = opened(start);
        let (_, put) = trail.next(start, &emitted(8, false), 1).expect("eight tokens");
        assert_eq!(put, Put::Add(vec![delta(1, 0..8)]));
        let dead = first.as_str()[1..].parse().expect("a number");
        trail.on_table(&table(3, 0, &[dead]));
        let (second, put) = trail.next(start, &emitted(8, false), 1).expect("it is sent to another one at once");
        assert_eq!(put, Put::Open);
        assert_ne!(second, first);
        trail.on_kept(start, &first, Kept::Unknown);
        assert_eq!(trail.next(start, &emitted(16, false), 1), None, "the former one's silence is not the new one's");
        trail.on_kept(start, &second, Kept::Yes);
        assert!(trail.is_complete(&emitted(8, false)));
    }

    fn opened(start: Instant) -> (Trail, NodeId) {
        let mut trail = Trail::new(ID, None);
        trail.on_table(&table(3, 0, &[]));
        let (keeper, put) = trail.next(start, &emitted(0, false), 1).expect("the record is sent at once");
        assert_eq!(put, Put::Open);
        trail.on_kept(start, &keeper, Kept::Yes);
        (trail, keeper)
    }

    #[test]
    fn the_record_lags_by_eight_tokens_or_fifty_milliseconds() {
        let start = now();
        let (mut trail, keeper) = opened(start);
        trail.on_progress(start);
        let few = BEHIND_TOKENS as u32 - 1;
        assert_eq!(trail.next(start, &emitted(few, false), 1), None);
        assert_eq!(trail.wake_at(), Some(start + BEHIND));
        let (_, put) = trail.next(start, &emitted(few + 1, false), 1).expect("eight tokens");
        assert_eq!(put, Put::Add(vec![delta(1, 0..8)]));
        trail.on_progress(start);
        assert_eq!(trail.next(start + BEHIND, &emitted(20, false), 1), None, "one message at a time");
        trail.on_kept(start, &keeper, Kept::Yes);
        let (_, put) = trail.next(start + BEHIND, &emitted(9, false), 2).expect("fifty milliseconds");
        assert_eq!(put, Put::Add(vec![delta(2, 8..9)]));
        trail.on_kept(start, &keeper, Kept::Yes);
        assert_eq!(trail.wake_at(), None, "nothing is behind");
        let (_, put) = trail.next(start, &emitted(9, true), 2).expect("the end is told at once");
        assert_eq!(put, Put::Add(vec![JournalDelta { finished: true, ..delta(2, 9..9) }]));
        trail.on_kept(start, &keeper, Kept::Yes);
        assert!(trail.is_complete(&emitted(9, true)));
    }

    /// Found by the simulator: the beginning of an answer woke its carrier for ever.
    #[test]
    fn what_brings_no_token_wakes_nobody() {
        let start = now();
        let (mut trail, _) = opened(start);
        trail.on_progress(start);
        assert_eq!(trail.next(start + BEHIND, &emitted(0, false), 1), None);
        assert_eq!(trail.wake_at(), None);
    }

    #[test]
    fn a_request_that_changed_is_sent_whole_even_when_its_record_is_on_its_way() {
        let start = now();
        let mut trail = Trail::new(ID, None);
        trail.on_table(&table(3, 0, &[]));
        let (keeper, _) = trail.next(start, &emitted(0, false), 1).expect("the record is sent at once");
        trail.on_change();
        trail.on_kept(start, &keeper, Kept::Yes);
        for answer in [Kept::Unknown, Kept::Yes] {
            let at = trail.wake_at().unwrap_or(start);
            assert_eq!(trail.next(at, &emitted(9, false), 1).map(|(_, put)| put), Some(Put::Open));
            trail.on_kept(at, &keeper, answer);
        }
        assert!(trail.is_complete(&emitted(9, false)));
    }

    #[test]
    fn a_gap_or_a_new_keeper_gets_the_whole_and_a_silent_one_is_asked_again() {
        let start = now();
        let (mut trail, keeper) = opened(start);
        trail.on_progress(start);
        trail.next(start, &emitted(9, false), 1).expect("nine tokens");
        trail.on_kept(start, &keeper, Kept::Unknown);
        assert_eq!(trail.next(start, &emitted(9, false), 1), None, "not in a loop");
        let again = trail.wake_at().expect("later");
        assert_eq!(trail.next(again, &emitted(9, false), 1).map(|(_, put)| put), Some(Put::Add(vec![delta(1, 0..9)])));
        trail.on_kept(start, &keeper, Kept::Gap);
        assert_eq!(trail.next(again, &emitted(9, false), 1).map(|(_, put)| put), Some(Put::Open));
        let index = keeper.as_str()[1..].parse().expect("a number");
        trail.on_table(&table(3, 0, &[index]));
        trail.on_kept(start, &keeper, Kept::Yes);
        let (other, put) = trail.next(again, &emitted(9, false), 1).expect("another keeper");
        assert_eq!((other == keeper, put), (false, Put::Open));
        trail.on_kept(start, &other, Kept::Taken);
        assert_eq!((trail.next(again, &emitted(30, false), 1), trail.wake_at()), (None, None));
    }
}

mod keeping {
    use super::*;

    fn refused(error: RequestError) -> (&'static str, Kept) {
        (error.code, understood(&error))
    }

    #[test]
    fn what_another_node_goes_on_with_is_written_by_its_former_entry_node_no_more() {
        let (start, mut records) = (now(), Records::default());
        records.open(start, &node(0), record(start, 1, 0)).expect("new");
        records.put(start, &node(0), &delta(1, 0..8)).expect("next");
        records.put(start, &node(0), &delta(2, 4..10)).expect("overlaps");
        let taken = records.take(start, ID).expect("is here");
        assert_eq!(taken.emitted, emitted(10, false));
        assert!(taken.attempt > 2 + 8, "an entry node starts fewer runs: {}", taken.attempt);
        records.open(start, &node(2), record(start, taken.attempt, 10)).expect("the new entry node");
        let late = records.put(start, &node(0), &delta(3, 10..12)).map_err(refused);
        assert_eq!(late, Err((TAKEN, Kept::Taken)));
        assert_eq!(records.open(start, &node(0), record(start, 3, 12)).map_err(refused), Err((TAKEN, Kept::Taken)));
        records.put(start, &node(2), &delta(taken.attempt + 1, 10..11)).expect("goes on");
        assert_eq!(records.take(start, ID).map(|record| record.emitted), Some(emitted(11, false)));
    }

    /// A client of another tenant can make its node ask for any record; the node finds whose it is only then.
    #[test]
    fn a_copy_with_which_nobody_goes_on_changes_nothing() {
        let (start, mut records) = (now(), Records::default());
        records.open(start, &node(0), record(start, 1, 0)).expect("new");
        records.put(start, &node(0), &delta(1, 0..8)).expect("next");
        let foreign = records.take(start, ID).expect("is here");
        records.put(start, &node(0), &delta(2, 8..12)).expect("its entry node writes on");
        records.open(start, &node(0), record(start, 3, 12)).expect("and as a whole");
        records.put(start, &node(0), &JournalDelta { finished: true, ..delta(3, 12..13) }).expect("to its end");
        let own = records.take(start, ID).expect("is here");
        assert_eq!(own.emitted, emitted(13, true));
        assert!(own.attempt > foreign.attempt + 8, "the later copy is the one that counts");
    }

    #[test]
    fn of_two_copies_the_later_one_wins_whoever_opens_first() {
        let start = now();
        for earlier_first in [true, false] {
            let mut records = Records::default();
            records.open(start, &node(0), record(start, 1, 4)).expect("new");
            let [earlier, later] = [(); 2].map(|()| records.take(start, ID).expect("is here").attempt);
            let mut open = |from, attempt| records.open(start, &node(from), record(start, attempt, 4));
            if earlier_first {
                open(1, earlier).expect("goes on");
                open(2, later).expect("goes on from there");
            } else {
                open(2, later).expect("goes on");
                assert_eq!(open(1, earlier).map_err(refused), Err((TAKEN, Kept::Taken)));
            }
            let late = records.put(start, &node(1), &delta(earlier + 1, 4..5)).map_err(refused);
            assert_eq!(late, Err((TAKEN, Kept::Taken)));
            records.put(start, &node(2), &delta(later + 1, 4..5)).expect("the one that goes on");
        }
    }

    use shared::error::RequestError;

    /// The keeper did not answer when the second node looked for the record and found an older copy elsewhere.
    #[test]
    fn who_took_the_request_over_from_another_keeper_owns_the_record_here() {
        let (start, mut records) = (now(), Records::default());
        records.open(start, &node(0), record(start, 2, 8)).expect("new");
        let code = |outcome: Result<(), RequestError>| outcome.map_err(|error| error.code);
        assert_eq!(code(records.open(start, &node(2), record(start, 2, 9))), Err(TAKEN), "no later than the owner");
        records.open(start, &node(2), record(start, 17, 4)).expect("it goes on with the request");
        assert_eq!(code(records.put(start, &node(0), &delta(3, 8..9))), Err(TAKEN));
        records.put(start, &node(2), &delta(18, 4..5)).expect("its own");
    }

    #[test]
    fn gaps_are_refused() {
        let (start, mut records) = (now(), Records::default());
        let code = |outcome: Result<(), RequestError>| outcome.map_err(|error| error.code);
        assert_eq!(code(records.put(start, &node(0), &delta(1, 0..1))), Err(GAP));
        records.open(start, &node(0), record(start, 1, 4)).expect("new");
        assert_eq!(code(records.put(start, &node(0), &delta(1, 5..6))), Err(GAP));
        assert_eq!(code(records.put(start, &node(0), &JournalDelta { choice: 1, ..delta(1, 0..1) })), Err(GAP));
    }

    #[test]
    fn records_are_kept_for_a_minute_behind_their_end_and_then_handed_out() {
        let (start, mut records) = (now(), Records::default());
        records.open(start, &node(0), record(start, 1, 4)).expect("new");
        let deadline = start + Duration::from_secs(30);
        records.forget(deadline + KEPT_FOR);
        assert_eq!(records.len(), 1, "it may still run");
        records.forget(deadline + KEPT_FOR + Duration::from_millis(1));
        assert!(records.is_empty() && records.take(start, ID).is_none());
        records.open(start, &node(0), record(start, 1, 4)).expect("new");
        records.put(start, &node(0), &JournalDelta { finished: true, ..delta(1, 4..4) }).expect("its end");
        assert!(records.take(start + KEPT_FOR, ID).is_some());
        records.forget(start + KEPT_FOR * 3);
        assert!(records.is_empty());
    }

    /// The keeper billed a minute later, and died before that (simulator, one trouble at a time, seed 23).
    #[test]
    fn what_a_dead_node_delivered_is_billed_as_soon_as_its_death_is_seen_and_once() {
        let (start, mut records) = (now(), Records::default());
        let billed = |records: &mut Records, table| {
            let orphans = records.orphans(&table);
            orphans.iter().map(|record| record.emitted.n_tokens()).collect::<Vec<_>>()
        };
        let lives = |life| move |i| (Health::Alive, if i == 0 { life } else { 1 });
        records.open(start, &node(0), record(start, 1, 0)).expect("new");
        assert!(billed(&mut records, table(3, 2, &[0])).is_empty(), "nothing was delivered");
        records.put(start, &node(0), &delta(1, 0..8)).expect("next");
        assert!(billed(&mut records, table(3, 2, &[1])).is_empty(), "its owner lives");
        assert_eq!(billed(&mut records, table(3, 2, &[0])), [8]);
        assert!(billed(&mut records, table(3, 2, &[0])).is_empty());
        records.put(start, &node(0), &delta(1, 8..9)).expect("it was only cut off");
        assert!(billed(&mut records, table_of(3, 2, lives(1))).is_empty());
        assert_eq!(billed(&mut records, table_of(3, 2, lives(2))), [9], "it came back before its silence was noticed");
        assert!(billed(&mut records, table_of(3, 2, lives(2))).is_empty());
        records.open(start, &node(1), record(start, 30, 9)).expect("another goes on");
        assert!(billed(&mut records, table(3, 2, &[0])).is_empty());
        assert_eq!(records.before_leaving().len(), 1, "a keeper that leaves bills for whoever dies behind it");
        assert!(records.before_leaving().is_empty());
    }

    #[test]
    fn of_two_records_the_one_that_is_further_counts() {
        let start = now();
        let records = [(1, 9), (17, 4), (17, 6), (2, 20)].map(|(attempt, n)| Some(record(start, attempt, n)));
        let Found { record, is_one_silent } = records.into_iter().map(Ok::<_, ()>).collect();
        assert_eq!(record.map(|record| (record.attempt, record.emitted.n_tokens())), Some((17, 6)));
        assert!(!is_one_silent);
    }

    /// A keeper that answered late counted as if nobody remembered the request (simulator, one trouble at a time, seed
    /// 1745).
    #[test]
    fn what_a_silent_node_may_keep_is_not_forgotten() {
        let nobody: Found = [Ok::<_, ()>(None), Ok(None)].into_iter().collect();
        assert!(nobody.record.is_none() && !nobody.is_one_silent);
        let unsure: Found = [Ok(None), Err(())].into_iter().collect();
        assert!(unsure.record.is_none() && unsure.is_one_silent);
        let found: Found = [Err(()), Ok(Some(record(now(), 1, 4)))].into_iter().collect();
        assert!(found.record.is_some());
    }
}

mod twice {
    use super::*;

    #[test]
    fn a_key_names_one_request_of_one_tenant() {
        let ids = RequestIds::derive(b"secret");
        let other: TenantId = "baker".parse().expect("valid name");
        assert_eq!(ids.of(&tenant(), b"key"), ids.of(&tenant(), b"key"));
        assert_ne!(ids.of(&tenant(), b"key"), ids.of(&other, b"key"));
        assert_ne!(ids.of(&tenant(), b"key"), ids.of(&tenant(), b"key2"));
        assert_ne!(ids.of(&tenant(), b"key"), RequestIds::derive(b"other").of(&tenant(), b"key"));
    }

    #[test]
    fn a_key_is_not_used_for_two_things() {
        let start = now();
        let (before, mut seeded) = (envelope(start, &[1, 2]), envelope(start + BEHIND, &[1, 2]));
        let mut generation = (*seeded.generation).clone();
        generation.sampling.seed = 5;
        seeded.generation = Arc::new(generation);
        assert_eq!(same(&before, &seeded), Ok(()));
        let code = same(&before, &envelope(start, &[1, 3])).map_err(|error| error.code);
        assert_eq!(code, Err("idempotency_key_reused"));
    }
}

mod claiming {
    use super::*;

    #[test]
    fn a_request_is_claimed_once_until_its_last_client_has_left() {
        let mut claims = Claims::default();
        assert!(claims.ask(ID) && !claims.ask(ID));
        assert_eq!(claims.stance(ID), Some(Stance::Asking));
        claims.grant(ID);
        claims.go_on(ID);
        claims.release(ID);
        assert_eq!(claims.stance(ID), Some(Stance::Answering));
        assert!(!claims.ask(ID));
        claims.release(ID);
        assert!(claims.stance(ID).is_none() && claims.ask(ID));
    }

    /// A node that was asked to begin a request: what it has done, and what it knows of the others.
    #[derive(Clone, Default)]
    struct Node {
        claims: Claims,
        asked: Vec<(NodeId, Stance)>,
        left_to_ask: Vec<usize>,
        is_over: bool,
    }

    /// Steps of the nodes in the order that `dice` says: claim, ask the others one by one, decide.
    fn play(n: usize, mut dice: u64) -> usize {
        let mut nodes = vec![Node::default(); n];
        let mut n_answers = 0;
        for step in 0.. {
            assert!(step < 100_000, "it goes on for ever");
            let open: Vec<usize> = (0..n).filter(|i| !nodes[*i].is_over).collect();
            let Some(&me) = open.get((dice % open.len().max(1) as u64) as usize) else { break };
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407).rotate_left(17);
            if nodes[me].claims.ask(ID) {
                nodes[me].left_to_ask = (0..n).filter(|i| *i != me).collect();
            } else if let Some(other) = nodes[me].left_to_ask.pop() {
                let stance = nodes[other].claims.stance(ID);
                nodes[me].asked.extend(stance.map(|stance| (node(other), stance)));
            } else {
                let asked = std::mem::take(&mut nodes[me].asked);
                match ruling(&node(me), asked.iter().map(|(node, stance)| (node, *stance))) {
                    Ruling::Begin => {
                        nodes[me].claims.grant(ID);
                        (nodes[me].is_over, n_answers) = (true, n_answers + 1);
                    }
                    Ruling::AskAgain => nodes[me].left_to_ask = (0..n).filter(|i| *i != me).collect(),
                    Ruling::GiveWay => {
                        nodes[me].claims.release(ID);
                        nodes[me].is_over = true;
                    }
                }
            }
        }
        n_answers
    }

    #[test]
    fn exactly_one_of_several_nodes_answers_in_whatever_order_they_ask() {
        for n in 1..=4 {
            for seed in 0..20_000_u64 {
                let dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                assert_eq!(play(n, dice), 1, "{n} nodes, seed {seed}");
            }
        }
    }
}
