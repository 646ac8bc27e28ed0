//! One request on three nodes that die, stall, drain, refuse and return.

use std::sync::Arc;

use shared::cluster::NodeLoad;
use shared::id::BaseName;
use shared::request::EmittedChoice;
use shared::token::FinishReason;

use super::*;
use crate::membership::{ClusterView, Member, SHARE_PARTS};
use crate::ring::RingKey;
use crate::route::Routes;
use crate::testing::{now, spec_of_node};

fn id(i: usize) -> NodeId {
    format!("n{i}").parse().expect("valid name")
}

fn place() -> Place {
    Place::anywhere("smollm2".parse::<BaseName>().expect("valid base"))
}

fn error(kind: ErrorKind) -> RequestError {
    RequestError::new(kind, "some_error", "for a test")
}

/// Nodes n0 …, of which n0 has the request; `a` is the tenant's home, `b` its successor.
struct Bench {
    now: Instant,
    members: std::collections::BTreeMap<NodeId, Member>,
    routes: Routes,
    budget: RetryBudget,
    failover: Failover,
    a: NodeId,
    b: NodeId,
}

impl Bench {
    fn new() -> Self {
        let load = NodeLoad { running: 1, places: 8, waiting: 0 };
        let member = |i| Member {
            spec: spec_of_node(&id(i), 1).into(),
            health: Health::Alive,
            phase: NodePhase::Serving,
            incarnation: 1,
            share: SHARE_PARTS,
            load,
            serves: None,
        };
        let members = (0..4).map(|i| (id(i), member(i))).collect();
        let tenant: TenantId = "acme".parse().expect("valid tenant");
        let mut bench = Self {
            now: now(),
            members,
            routes: Routes::new(RingKey::derive(b"test")),
            budget: RetryBudget::new(now()),
            failover: Failover::new(place(), tenant.clone(), 1, Mark::default()),
            a: id(0),
            b: id(0),
        };
        let table = bench.table();
        let owners = table.owners(&place(), &tenant).expect("four nodes");
        (bench.a, bench.b) = (owners.home.clone(), owners.successor.expect("four").clone());
        bench
    }

    /// With the first run started at home.
    fn begun() -> Self {
        let mut bench = Self::new();
        let home = bench.a.clone();
        assert_eq!(bench.act(|failover, around| failover.begin(around)), [start(1, &home)]);
        bench
    }

    /// With `n` tokens from the first run.
    fn running(n: u32) -> Self {
        let mut bench = Self::begun();
        assert_eq!(bench.event(1, started()), Verdict::Deliver(None));
        for _ in 0..n {
            assert_eq!(bench.token(1), Verdict::Deliver(None));
        }
        bench
    }

    fn table(&mut self) -> RoutingTable {
        let view = ClusterView { epoch: 1, me: id(0), members: self.members.clone() };
        self.routes.table(Arc::new(view))
    }

    fn act(&mut self, act: impl FnOnce(&mut Failover, &mut Around<'_>) -> Vec<Command>) -> Vec<Command> {
        let table = self.table();
        act(&mut self.failover, &mut Around { now: self.now, table: &table, budget: &mut self.budget })
    }

    fn set(&mut self, node: &NodeId, change: impl FnOnce(&mut Member)) -> Vec<Command> {
        change(self.members.get_mut(node).expect("a node of four"));
        self.act(|failover, around| failover.on_table(around))
    }

    fn kill(&mut self, node: &NodeId) -> Vec<Command> {
        self.set(node, |member| member.health = Health::Dead)
    }

    fn end(&mut self, attempt: Attempt, end: End) -> Vec<Command> {
        self.act(|failover, around| failover.on_ended(around, attempt, end))
    }

    /// The next token, 20 ms later.
    fn token(&mut self, attempt: Attempt) -> Verdict {
        let seq = u32::try_from(self.failover.emitted().tokens(0).len()).expect("few");
        self.token_at(attempt, seq)
    }

    fn token_at(&mut self, attempt: Attempt, seq: u32) -> Verdict {
        self.now += Duration::from_millis(20);
        self.failover.on_event(self.now, attempt, &TokenEvent::Token { choice: 0, seq, id: 100 + seq, logprobs: None })
    }

    fn event(&mut self, attempt: Attempt, event: TokenEvent) -> Verdict {
        self.failover.on_event(self.now, attempt, &event)
    }

    fn wait(&mut self, ms: u64) -> Vec<Command> {
        let end = self.now + Duration::from_millis(ms);
        while self.now < end {
            self.now += Duration::from_millis(10);
            let commands = self.act(|failover, around| failover.on_tick(around));
            if !commands.is_empty() {
                return commands;
            }
        }
        Vec::new()
    }

    fn spend_budget(&mut self) {
        while self.budget.withdraw(self.now) {}
    }
}

fn start(attempt: Attempt, node: &NodeId) -> Command {
    Command::Start { attempt, node: node.clone(), redirected: false }
}

fn started() -> TokenEvent {
    started_on(false)
}

fn started_on(fell_back: bool) -> TokenEvent {
    TokenEvent::Started { queue_wait: Duration::ZERO, cached_tokens: 0, fell_back, adapter_hit: None }
}

fn finished() -> TokenEvent {
    TokenEvent::Finished { choice: 0, reason: FinishReason::Length, compute: Duration::ZERO }
}

#[test]
fn a_request_runs_at_home_to_its_end() {
    let mut bench = Bench::begun();
    assert_eq!(bench.event(1, started()), Verdict::Deliver(None));
    assert_eq!(bench.token(1), Verdict::Deliver(None));
    assert_eq!(bench.event(1, finished()), Verdict::Deliver(None));
    assert!(bench.failover.is_over());
    assert_eq!(bench.token(1), Verdict::Drop);
    assert_eq!(bench.failover.emitted().tokens(0), [100]);
}

#[test]
fn death_moves_the_request_to_the_successor_without_budget() {
    let mut bench = Bench::running(5);
    bench.spend_budget();
    let (a, b) = (bench.a.clone(), bench.b.clone());
    assert_eq!(bench.kill(&a), [Command::Cancel(1), Command::Mark, start(2, &b)]);
    assert_eq!(bench.failover.emitted().n_tokens(), 5, "the record from which it goes on");
    assert_eq!(bench.event(2, started()), Verdict::Drop, "the client heard it already");
    assert_eq!(bench.token(2), Verdict::Deliver(None));
}

#[test]
fn late_events_of_a_dead_run_are_dropped() {
    let mut bench = Bench::running(5);
    let a = bench.a.clone();
    bench.kill(&a);
    assert_eq!(bench.token_at(1, 5), Verdict::Drop);
    assert_eq!(bench.token_at(2, 4), Verdict::Drop, "a token the client has");
    assert_eq!(bench.token_at(2, 5), Verdict::Deliver(None));
    assert_eq!(bench.token_at(2, 7), Verdict::Ended, "a gap is a fault of the run");
    assert_eq!(bench.event(1, finished()), Verdict::Drop);
}

#[test]
fn a_restart_faster_than_silence_is_a_death() {
    let mut bench = Bench::running(5);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    let commands = bench.set(&a, |member| member.incarnation = 2);
    assert_eq!(commands, [Command::Cancel(1), Command::Mark, start(2, &b)]);
}

#[test]
fn a_stall_is_challenged_and_the_first_token_decides() {
    for old_wins in [false, true] {
        let mut bench = Bench::running(5);
        let b = bench.b.clone();
        assert_eq!(bench.wait(240), []);
        assert_eq!(bench.wait(20), [start(2, &b)]);
        assert_eq!(bench.event(2, started()), Verdict::Drop);
        let (winner, loser) = if old_wins { (1, 2) } else { (2, 1) };
        assert_eq!(bench.token(winner), Verdict::Deliver(Some(loser)));
        assert_eq!(bench.token(loser), Verdict::Drop);
        assert_eq!(bench.token(winner), Verdict::Deliver(None));
        assert_eq!(bench.failover.current().map(|(attempt, _)| attempt), Some(winner));
    }
}

#[test]
fn a_slow_stream_is_given_four_of_its_gaps() {
    let mut bench = Bench::running(2);
    for _ in 0..30 {
        bench.now += Duration::from_millis(130);
        bench.token(1);
    }
    assert_eq!(bench.wait(550), []);
    assert_eq!(bench.wait(100).len(), 1, "four times 150 ms");
}

#[test]
fn a_reader_that_was_busy_blames_nobody() {
    let mut bench = Bench::running(5);
    bench.now += Duration::from_secs(2);
    bench.failover.on_listening(bench.now);
    assert_eq!(bench.wait(200), []);
}

#[test]
fn stalls_are_paid_for() {
    let mut bench = Bench::running(5);
    bench.spend_budget();
    assert_eq!(bench.wait(740), [], "nothing is left of the budget");
    let b = bench.b.clone();
    assert_eq!(bench.wait(600), [start(2, &b)], "one comes back a second");
}

#[test]
fn a_suspect_is_challenged_only_where_there_is_room() {
    for (running, commands) in [(1, 1), (7, 0)] {
        let mut bench = Bench::running(5);
        let (a, b) = (bench.a.clone(), bench.b.clone());
        bench.set(&b, |member| member.load.running = running);
        assert_eq!(bench.set(&a, |member| member.health = Health::Suspect).len(), commands);
    }
}

#[test]
fn a_challenger_takes_over_when_the_current_node_dies() {
    let mut bench = Bench::running(5);
    let a = bench.a.clone();
    bench.set(&a, |member| member.health = Health::Suspect);
    assert_eq!(bench.kill(&a), [Command::Cancel(1), Command::Mark]);
    assert_eq!(bench.token(2), Verdict::Deliver(None));
}

#[test]
fn a_challenger_that_dies_or_fails_is_forgotten() {
    let mut bench = Bench::running(5);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    assert_eq!(bench.set(&a, |member| member.health = Health::Suspect), [start(2, &b)]);
    // Found by the simulator: its stream stayed open, and a later challenger would have been the third.
    assert_eq!(bench.kill(&b), [Command::Cancel(2)]);
    assert_eq!(bench.token(1), Verdict::Deliver(None));
    bench.set(&b, |member| member.health = Health::Alive);
    bench.set(&a, |_| {});
    let failed = TokenEvent::Failed(error(ErrorKind::Deadline));
    assert_eq!(bench.event(3, failed), Verdict::Ended, "the race is about tokens");
    bench.end(3, End::Failed(error(ErrorKind::Deadline)));
    assert_eq!(bench.token(1), Verdict::Deliver(None));
}

#[test]
fn a_node_past_its_grace_hands_over_without_budget() {
    let mut bench = Bench::running(5);
    bench.spend_budget();
    let (a, b) = (bench.a.clone(), bench.b.clone());
    assert_eq!(bench.set(&a, |member| member.phase = NodePhase::Draining), [], "it may finish");
    assert_eq!(bench.set(&a, |member| member.phase = NodePhase::Leaving), [Command::Cancel(1), start(2, &b)]);

    let mut bench = Bench::running(5);
    bench.spend_budget();
    let hand_over = RequestError::new(ErrorKind::Unavailable, HAND_OVER, "for a test");
    assert_eq!(bench.event(1, TokenEvent::Failed(hand_over.clone())), Verdict::Ended);
    assert_eq!(bench.end(1, End::Failed(hand_over)), [start(2, &b)]);
}

#[test]
fn drains_of_three_nodes_in_turn_lose_nothing() {
    let mut bench = Bench::running(5);
    for attempt in 1..3 {
        let at = bench.failover.current().expect("runs").1.clone();
        let commands = bench.set(&at, |member| member.phase = NodePhase::Leaving);
        assert!(matches!(commands[1], Command::Start { .. }), "{commands:?}");
        assert_eq!(bench.token(attempt + 1), Verdict::Deliver(None));
        bench.set(&at, |member| (member.phase, member.incarnation) = (NodePhase::Serving, 2));
    }
}

#[test]
fn a_request_is_redirected_once() {
    let mut bench = Bench::begun();
    let other = id((0..4).find(|i| id(*i) != bench.a && id(*i) != bench.b).expect("four nodes"));
    let to = Command::Start { attempt: 2, node: other.clone(), redirected: true };
    assert_eq!(bench.end(1, End::Moved(other)), [to]);
    let b = bench.b.clone();
    let a = bench.a.clone();
    assert_eq!(bench.end(2, End::Moved(b)), [start(3, &a)], "a second one is a refusal");
    assert_eq!(bench.failover.n_runs(), 1);
}

#[test]
fn a_refusal_goes_to_the_other_candidate_and_then_to_the_client() {
    let mut bench = Bench::begun();
    let b = bench.b.clone();
    let full = error(ErrorKind::Unavailable);
    assert_eq!(bench.end(1, End::Refused(full.clone())), [start(2, &b)]);
    assert_eq!(bench.end(2, End::Refused(full.clone())), [Command::Fail(full)]);
}

#[test]
fn failures_of_the_node_are_tried_elsewhere_within_budget_and_of_the_request_are_told() {
    let mut bench = Bench::running(3);
    let b = bench.b.clone();
    let internal = error(ErrorKind::Internal);
    assert_eq!(bench.event(1, TokenEvent::Failed(internal.clone())), Verdict::Ended);
    assert_eq!(bench.end(1, End::Failed(internal)), [start(2, &b)]);
    assert_eq!(bench.event(2, TokenEvent::Failed(error(ErrorKind::Deadline))), Verdict::Deliver(None));
    assert!(bench.failover.is_over());
}

#[test]
fn a_lost_stream_without_budget_waits_for_the_death_to_be_known() {
    let mut bench = Bench::running(3);
    bench.spend_budget();
    assert_eq!(bench.end(1, End::Lost), []);
    assert_eq!(bench.wait(300), []);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    assert_eq!(bench.kill(&a), [start(2, &b)]);
}

#[test]
fn owner_and_successor_dead_is_an_honest_refusal_within_five_seconds() {
    let mut bench = Bench::running(30);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    bench.kill(&b);
    assert_eq!(bench.kill(&a), [Command::Cancel(1), Command::Mark]);
    let commands = bench.wait(4000);
    assert!(matches!(&commands[..], [Command::Fail(error)] if error.kind == ErrorKind::Unavailable), "{commands:?}");
}

#[test]
fn without_any_node_a_new_request_is_refused_at_once() {
    let mut bench = Bench::new();
    bench.members.values_mut().for_each(|member| member.health = Health::Dead);
    assert_eq!(bench.act(|failover, around| failover.begin(around)), [Command::Fail(no_node())]);
}

#[test]
fn a_request_that_dies_twice_at_the_same_token_gets_no_third_node() {
    let mut bench = Bench::running(40);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    bench.kill(&a);
    bench.token(2);
    bench.set(&a, |member| (member.health, member.incarnation) = (Health::Alive, 2));
    let commands = bench.kill(&b);
    assert_eq!(commands[..3], [Command::Cancel(2), Command::Mark, Command::Quarantine]);
    assert!(matches!(&commands[3], Command::Fail(error) if error.code == "quarantined"));
}

#[test]
fn a_node_that_was_only_silent_did_not_die_of_the_request() {
    let mut bench = Bench::running(40);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    bench.kill(&a);
    bench.token(2);
    bench.set(&a, |member| member.health = Health::Alive);
    assert_eq!(bench.kill(&b), [Command::Cancel(2), Command::Mark, start(3, &a)]);
    assert_eq!(bench.failover.deaths().len(), 1);
}

#[test]
fn a_marked_request_gets_one_node_only() {
    let mut bench = Bench::new();
    bench.failover = Failover::new(
        place(),
        "acme".parse().expect("valid"),
        1,
        Mark { deaths: vec![("z".parse().expect("a node"), 1)], stood_at: 3 },
    );
    bench.act(|failover, around| failover.begin(around));
    (0..3).for_each(|_| _ = bench.token(1));
    let a = bench.a.clone();
    assert!(bench.kill(&a).contains(&Command::Quarantine));
}

#[test]
fn a_request_that_got_further_between_two_deaths_goes_on() {
    let mut bench = Bench::running(5);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    bench.kill(&a);
    (0..20).for_each(|_| _ = bench.token(2));
    bench.set(&a, |member| (member.health, member.incarnation) = (Health::Alive, 2));
    assert_eq!(bench.kill(&b), [Command::Cancel(2), Command::Mark, start(3, &a)]);
    bench.set(&b, |member| (member.health, member.incarnation) = (Health::Alive, 2));
    (0..20).for_each(|_| _ = bench.token(3));
    let commands = bench.kill(&a);
    assert!(matches!(commands.last(), Some(Command::Fail(_))), "three attempts are enough: {commands:?}");
}

#[test]
fn a_resumed_request_tells_nothing_twice() {
    let mut bench = Bench::new();
    let choice = EmittedChoice { tokens: vec![100, 101], finished: false };
    let tenant = "acme".parse().expect("valid");
    bench.failover = Failover::resumed(place(), tenant, Emitted(vec![choice]), 4, false, Mark::default());
    let a = bench.a.clone();
    assert_eq!(bench.act(|failover, around| failover.begin(around)), [start(5, &a)]);
    assert_eq!(bench.event(5, started()), Verdict::Drop);
    assert_eq!(bench.token_at(5, 2), Verdict::Deliver(None));
}

#[test]
fn a_client_that_was_told_of_its_adapter_is_not_answered_by_the_base_nor_the_other_way_round() {
    for told in [false, true] {
        let mut bench = Bench::begun();
        let b = bench.b.clone();
        assert_eq!(bench.event(1, started_on(told)), Verdict::Deliver(None));
        assert_eq!(bench.end(1, End::Lost), [start(2, &b)]);
        assert_eq!(bench.event(2, started_on(!told)), Verdict::Ended);
        assert_eq!(bench.event(2, started_on(told)), Verdict::Drop);
    }
}

/// What a node says of the base, by a letter for its content and a name for its arithmetic.
fn says(content: u8, numerics: &str) -> Option<Arc<[wire::node::ServedBase]>> {
    let (name, hash) = (place().base, shared::hash::ContentHash([content; 32]));
    Some([wire::node::ServedBase { name, hash, text: None, numerics_id: numerics.to_owned() }].into())
}

/// A request for content 1 under way at `a`, a node with arithmetic `x`; `b` is as the arguments say.
fn begun_beside(content: u8, numerics: &str, n_tokens: u32) -> Bench {
    let mut bench = Bench::new();
    let (a, b) = (bench.a.clone(), bench.b.clone());
    bench.failover = Failover::new(place(), "acme".parse().expect("valid tenant"), 1, Mark::default())
        .pinned(BasePin { hash: Some(shared::hash::ContentHash([1; 32])), numerics: None });
    for member in bench.members.values_mut() {
        member.serves = says(1, "x");
    }
    assert_eq!(bench.act(|failover, around| failover.begin(around)), [start(1, &a)]);
    bench.event(1, started());
    (0..n_tokens).for_each(|_| assert_eq!(bench.token(1), Verdict::Deliver(None)));
    bench.members.get_mut(&b).expect("a node").serves = says(content, numerics);
    bench
}

#[test]
fn an_answer_goes_on_only_where_its_tokens_would_be_the_same() {
    let failed = |commands: &[Command]| match commands.last() {
        Some(Command::Fail(error)) => error.code,
        _ => "nothing",
    };
    // Alike: as ever.
    let mut bench = begun_beside(1, "x", 5);
    let (a, b) = (bench.a.clone(), bench.b.clone());
    assert_eq!(bench.failover.numerics(), Some("x"));
    assert_eq!(bench.kill(&a).last(), Some(&start(2, &b)));
    // Other arithmetic: not behind tokens of the first, whatever ends; without tokens it may begin there.
    let mut bench = begun_beside(1, "y", 5);
    assert_eq!(bench.kill(&a), [Command::Cancel(1), Command::Mark]);
    assert_eq!(failed(&bench.wait(4000)), "no_like_node");
    let mut bench = begun_beside(1, "y", 5);
    assert_eq!(bench.set(&a, |member| member.health = Health::Suspect), [], "no challenger either");
    let mut bench = begun_beside(1, "y", 0);
    assert_eq!(bench.kill(&a).last(), Some(&start(2, &b)));
    assert_eq!(bench.failover.numerics(), Some("y"), "nothing binds it to the first");
}

#[test]
fn a_node_with_another_content_is_never_sent_a_request_encoded_for_this_one() {
    for n_tokens in [0, 5] {
        let mut bench = begun_beside(2, "x", n_tokens);
        let (a, b) = (bench.a.clone(), bench.b.clone());
        let commands = bench.end(1, End::Moved(b.clone()));
        assert!(!commands.iter().any(|command| matches!(command, Command::Start { node, .. } if *node == b)));
        let mut bench = begun_beside(2, "x", n_tokens);
        let commands = [bench.kill(&a), bench.wait(4000)].concat();
        assert!(!commands.iter().any(|command| matches!(command, Command::Start { node, .. } if *node == b)));
    }
}
