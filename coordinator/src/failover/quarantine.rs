//! Which requests kill nodes (core). Held by the entry node behind one short lock; asked at admission.
//!
//! A request is known by its fingerprint: tenant, adapter, prompt and parameters. One that was running when a node
//! died is marked; the mark goes when the same request finishes. Two deaths without progress between them put it into
//! quarantine for ten minutes: the same request is refused with 422 instead of killing a third node. A node that was
//! taken for dead and is back as it was died of nothing: whoever was charged with it is not any more. Every entry node
//! counts for itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::NodeId;

use crate::membership::detector::Health;
use crate::route::RoutingTable;

/// How long a mark lasts.
const MARK_LASTS: Duration = Duration::from_secs(600);

/// Fingerprints remembered; the oldest go first. A node that dies has at most a few hundred in its batch.
const MARKS_MAX: usize = 4096;

/// A node from one start to the next.
pub type Life = (NodeId, u64);

/// What is known of a request when it comes (again).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mark {
    /// Whose deaths it was present at without getting further.
    pub deaths: Vec<Life>,
    /// Tokens it had then.
    pub stood_at: usize,
}

#[derive(Debug)]
struct Entry {
    mark: Mark,
    at: Instant,
    poison: bool,
}

/// The marks of an entry node.
#[derive(Debug, Default)]
pub struct Quarantine {
    marks: BTreeMap<ContentHash, Entry>,
}

/// Told to a client whose request is in quarantine.
pub fn refusal() -> RequestError {
    let message = "this request was running each time two nodes failed and is not tried again for ten minutes; \
                   hint: change the request, or tell the operator its id";
    RequestError::new(ErrorKind::Unprocessable, "quarantined", message)
}

/// What that life of a node had is lost.
pub(super) fn is_dead(table: &RoutingTable, node: &NodeId, incarnation: u64) -> bool {
    table.members().get(node).is_none_or(|member| {
        matches!(member.health, Health::Dead | Health::Absent) || member.incarnation != incarnation
    })
}

/// That life of a node, if it was taken for dead, has not ended.
pub fn lives(table: &RoutingTable, (node, incarnation): &Life) -> bool {
    !is_dead(table, node, *incarnation)
}

// === impl Quarantine ===

impl Quarantine {
    /// Nothing is marked: no fingerprint needs computing.
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }

    /// What is known of a request. `lives` says of whom it is known now.
    ///
    /// # Errors
    /// 422 `quarantined`.
    pub fn admit(
        &mut self,
        now: Instant,
        fingerprint: &ContentHash,
        lives: impl Fn(&Life) -> bool,
    ) -> Result<Mark, RequestError> {
        self.marks.retain(|_, entry| now.saturating_duration_since(entry.at) < MARK_LASTS);
        let Some(entry) = self.marks.get_mut(fingerprint) else { return Ok(Mark::default()) };
        let n_deaths = entry.mark.deaths.len();
        entry.mark.deaths.retain(|life| !lives(life));
        entry.poison &= entry.mark.deaths.len() == n_deaths;
        if entry.poison { Err(refusal()) } else { Ok(entry.mark.clone()) }
    }

    /// A node died while the request, `n_tokens` far, was running there.
    pub fn on_death(&mut self, now: Instant, fingerprint: ContentHash, n_tokens: usize, life: Life) {
        if self.marks.len() >= MARKS_MAX && !self.marks.contains_key(&fingerprint) {
            let oldest = self.marks.iter().min_by_key(|(_, entry)| entry.at).map(|(fingerprint, _)| *fingerprint);
            oldest.and_then(|oldest| self.marks.remove(&oldest));
        }
        let entry = self.marks.entry(fingerprint).or_insert(Entry { mark: Mark::default(), at: now, poison: false });
        entry.at = now;
        // A hundred copies of it there are one death; the furthest is the one to get past.
        entry.mark = Mark { deaths: vec![life], stood_at: entry.mark.stood_at.max(n_tokens) };
    }

    /// The request is poison, for it was present at these deaths.
    pub fn on_poison(&mut self, now: Instant, fingerprint: ContentHash, deaths: &[Life]) {
        if let Some(entry) = self.marks.get_mut(&fingerprint) {
            (entry.poison, entry.at) = (true, now);
            entry.mark.deaths = deaths.to_vec();
        }
    }

    /// The request finished: it harms nobody.
    pub fn on_done(&mut self, fingerprint: &ContentHash) {
        self.marks.remove(fingerprint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::now;

    fn print(i: usize) -> ContentHash {
        ContentHash::of(&i.to_le_bytes())
    }

    fn life(name: &str, incarnation: u64) -> Life {
        (name.parse().expect("a node"), incarnation)
    }

    /// Nobody who was taken for dead is back.
    fn none(_: &Life) -> bool {
        false
    }

    #[test]
    fn poison_is_refused_for_ten_minutes() {
        let (start, mut quarantine) = (now(), Quarantine::default());
        assert_eq!(quarantine.admit(start, &print(1), none), Ok(Mark::default()));
        quarantine.on_death(start, print(1), 7, life("a", 1));
        assert_eq!(quarantine.admit(start, &print(1), none), Ok(Mark { deaths: vec![life("a", 1)], stood_at: 7 }));
        quarantine.on_poison(start, print(1), &[life("a", 1), life("b", 1)]);
        let error = quarantine.admit(start + Duration::from_secs(599), &print(1), none).expect_err("poison");
        assert_eq!((error.kind, error.code), (ErrorKind::Unprocessable, "quarantined"));
        assert_eq!(quarantine.admit(start, &print(2), none), Ok(Mark::default()), "others are not");
        assert_eq!(quarantine.admit(start + Duration::from_secs(600), &print(1), none), Ok(Mark::default()));
    }

    #[test]
    fn a_node_that_is_back_as_it_was_died_of_nothing() {
        let (start, mut quarantine) = (now(), Quarantine::default());
        quarantine.on_death(start, print(1), 7, life("a", 1));
        quarantine.on_poison(start, print(1), &[life("a", 1), life("b", 1)]);
        assert!(quarantine.admit(start, &print(1), |back| *back == life("a", 2)).is_err(), "it was started again");
        let mark = quarantine.admit(start, &print(1), |back| *back == life("a", 1));
        assert_eq!(mark, Ok(Mark { deaths: vec![life("b", 1)], stood_at: 7 }), "only the other counts");
        assert!(quarantine.admit(start, &print(1), none).is_ok(), "and it stays so");
    }

    #[test]
    fn finishing_once_clears_a_request() {
        let (start, mut quarantine) = (now(), Quarantine::default());
        quarantine.on_death(start, print(1), 7, life("a", 1));
        quarantine.on_done(&print(1));
        assert!(quarantine.is_empty());
    }

    #[test]
    fn marks_are_bounded_and_the_oldest_go() {
        let (start, mut quarantine) = (now(), Quarantine::default());
        for i in 0..MARKS_MAX + 10 {
            quarantine.on_death(start + Duration::from_micros(i as u64), print(i), 0, life("a", 1));
        }
        assert_eq!(quarantine.marks.len(), MARKS_MAX);
        assert!(!quarantine.marks.contains_key(&print(9)) && quarantine.marks.contains_key(&print(10)));
    }
}
