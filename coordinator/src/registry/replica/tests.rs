//! Which change of members comes next.

use openraft::{LogId, Membership, StoredMembership};

use super::*;

type Metrics = RaftMetrics<u64, openraft::BasicNode>;

fn node(name: &str) -> NodeId {
    name.parse().expect("valid node name")
}

fn ids(names: &[&str]) -> BTreeSet<u64> {
    names.iter().map(|name| raft_id(&node(name))).collect()
}

/// `a+ b-`: a votes, b follows.
fn members(text: &str) -> Vec<Member> {
    let parse = |word: &str| Member { node: node(&word[..word.len() - 1]), votes: word.ends_with('+') };
    text.split_whitespace().map(parse).collect()
}

/// A leader of `present` whose log ends at 100, with the last entry each of them has.
fn leader_of(present: &str, matched: &[(&str, u64)]) -> Metrics {
    let present = members(present);
    let voters = present.iter().filter(|member| member.votes).map(|member| raft_id(&member.node)).collect();
    let nodes: BTreeMap<u64, _> = present.iter().map(|one| (raft_id(&one.node), member(&one.node))).collect();
    let mut metrics = Metrics::new_initial(1);
    metrics.last_log_index = Some(100);
    metrics.membership_config = Arc::new(StoredMembership::new(None, Membership::new(vec![voters], nodes)));
    let at = |index| Some(LogId { index, ..LogId::default() });
    metrics.replication = Some(matched.iter().map(|(name, index)| (raft_id(&node(name)), at(*index))).collect());
    metrics
}

fn step(configured: &str, metrics: &Metrics) -> Option<Step> {
    next_step(&members(configured), metrics)
}

#[test]
fn new_nodes_follow_before_anybody_votes() {
    let metrics = leader_of("a+", &[]);
    assert!(matches!(step("a+ b+ c+", &metrics), Some(Step::Follow(_))));
    assert_eq!(step("a+", &metrics), None);
}

#[test]
fn voters_change_at_once_and_only_when_all_have_caught_up() {
    let behind = leader_of("a+ b- c-", &[("b", 100), ("c", 12)]);
    assert_eq!(step("a+ b+ c+", &behind), None);
    let level = leader_of("a+ b- c-", &[("b", 100), ("c", 95)]);
    assert_eq!(step("a+ b+ c+", &level), Some(Step::Vote(ids(&["a", "b", "c"]))));
    assert_eq!(step("a+ b- c-", &level), None, "followers stay followers");
}

#[test]
fn nodes_that_are_gone_from_the_file_leave_after_they_lost_their_vote() {
    let metrics = leader_of("a+ b+ c+ d-", &[("b", 100), ("c", 100), ("d", 100)]);
    assert_eq!(step("a+ b+ d+", &metrics), Some(Step::Vote(ids(&["a", "b", "d"]))));
    let metrics = leader_of("a+ b+ c- d+", &[("b", 100), ("c", 100), ("d", 100)]);
    assert_eq!(step("a+ b+ d+", &metrics), Some(Step::Leave(ids(&["c"]))));
}

#[test]
fn a_configuration_without_voters_changes_nothing() {
    let metrics = leader_of("a+ b-", &[("b", 100)]);
    assert_eq!(step("a- b-", &metrics), None);
}
