//! Whose grammar is compiled next, and the few threads that compile.
//!
//! [`super::GrammarCompiler`] hands in one job per grammar it does not know. Tenants take turns, and one tenant
//! compiles one grammar at a time: whoever sends heavy schemas waits for its own. Compiling is bounded by fuel,
//! not by time, so a job that its caller gave up on keeps its thread, and its tenant's turn, until it ends. The
//! threads live as long as the pool: what they allocate and free stays in the few arenas they have.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use shared::id::TenantId;

/// Compiling threads: half of a small machine at most, and one is always free of any single tenant.
const THREADS: usize = 2;
/// Grammars of one tenant that may wait or compile: a burst of different schemas, not a flood.
pub(super) const JOBS_PER_TENANT_MAX: usize = 8;
/// Grammars that may wait in all: 16 MiB of text.
const JOBS_MAX: usize = 256;
/// Stack of a compiling thread: recursion is bounded by [`super::SCHEMA_DEPTH_MAX`], its frames are large.
const STACK_BYTES: usize = 16 * 1024 * 1024;

/// Why a job was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// The tenant has [`JOBS_PER_TENANT_MAX`] under way.
    Tenant,
    /// [`JOBS_MAX`] wait.
    All,
}

/// Tenants' jobs and whose turn it is (core).
#[derive(Debug)]
struct Turns<J> {
    lanes: BTreeMap<TenantId, Lane<J>>,
    /// Tenants with waiting jobs; the first that compiles nothing is next.
    order: VecDeque<TenantId>,
    n_waiting: usize,
}

#[derive(Debug)]
struct Lane<J> {
    waiting: VecDeque<J>,
    compiling: bool,
}

impl<J> Default for Turns<J> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new(), order: VecDeque::new(), n_waiting: 0 }
    }
}

impl<J> Turns<J> {
    fn push(&mut self, tenant: &TenantId, job: J) -> Result<(), Full> {
        if self.n_waiting >= JOBS_MAX {
            return Err(Full::All);
        }
        let fresh = || Lane { waiting: VecDeque::new(), compiling: false };
        let lane = self.lanes.entry(tenant.clone()).or_insert_with(fresh);
        if lane.waiting.len() + usize::from(lane.compiling) >= JOBS_PER_TENANT_MAX {
            return Err(Full::Tenant);
        }
        if lane.waiting.is_empty() {
            self.order.push_back(tenant.clone());
        }
        lane.waiting.push_back(job);
        self.n_waiting += 1;
        Ok(())
    }

    /// The next job; its tenant gets no other before [`Self::ended`].
    fn next(&mut self) -> Option<(TenantId, J)> {
        let at = self.order.iter().position(|tenant| !self.lanes[tenant].compiling)?;
        let tenant = self.order.remove(at)?;
        let lane = self.lanes.get_mut(&tenant)?;
        let job = lane.waiting.pop_front()?;
        lane.compiling = true;
        if !lane.waiting.is_empty() {
            self.order.push_back(tenant.clone());
        }
        self.n_waiting -= 1;
        Some((tenant, job))
    }

    fn ended(&mut self, tenant: &TenantId) {
        let Some(lane) = self.lanes.get_mut(tenant) else { return };
        lane.compiling = false;
        if lane.waiting.is_empty() {
            self.lanes.remove(tenant);
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    turns: Turns<Work>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        while !state.closed {
            let Some((tenant, work)) = state.turns.next() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            // Whoever waits hears of a panic by the end of its channel.
            let _ = catch_unwind(AssertUnwindSafe(work));
            state = self.state();
            state.turns.ended(&tenant);
        }
    }
}

/// The threads. They end, after their present job, when the pool is dropped.
pub(super) struct Pool(Arc<Shared>);

impl Pool {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(super) fn start() -> io::Result<Self> {
        let pool = Self(Arc::default());
        for _ in 0..THREADS {
            let shared = Arc::clone(&pool.0);
            let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            thread.spawn(move || shared.run())?;
        }
        Ok(pool)
    }

    /// Lets `work` wait for its tenant's turn.
    ///
    /// # Errors
    /// When too many wait already; nothing of it stays.
    pub(super) fn submit(&self, tenant: &TenantId, work: impl FnOnce() + Send + 'static) -> Result<(), Full> {
        self.0.state().turns.push(tenant, Box::new(work))?;
        self.0.changed.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        name.parse().expect("valid")
    }

    #[test]
    fn tenants_take_turns_and_each_compiles_one_at_a_time() {
        let mut turns = Turns::default();
        for (name, job) in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5)] {
            turns.push(&tenant(name), job).expect("room");
        }
        let mut next = |ended: Option<&str>| {
            ended.into_iter().for_each(|name| turns.ended(&tenant(name)));
            turns.next().map(|(_, job)| job)
        };
        assert_eq!([next(None), next(None), next(None)], [Some(1), Some(4), None], "both are at work");
        assert_eq!(next(Some("b")), Some(5), "a's first job is still under way");
        assert_eq!([next(Some("a")), next(Some("a"))], [Some(2), Some(3)]);
        assert_eq!(next(Some("a")), None);
        turns.ended(&tenant("b"));
        assert!(turns.lanes.is_empty() && turns.order.is_empty() && turns.n_waiting == 0, "nothing stays behind");
    }

    #[test]
    fn a_flood_of_one_tenant_is_refused_and_leaves_room_for_others() {
        let mut turns = Turns::default();
        let mut push = |name: &str| turns.push(&tenant(name), ());
        for _ in 0..JOBS_PER_TENANT_MAX {
            assert_eq!(push("a"), Ok(()));
        }
        assert_eq!((push("a"), push("b")), (Err(Full::Tenant), Ok(())));
        let others = (0..).map(|i| push(&format!("t{i}"))).take_while(Result::is_ok).count();
        assert_eq!(others, JOBS_MAX - JOBS_PER_TENANT_MAX - 1);
        assert_eq!(turns.push(&tenant("z"), ()), Err(Full::All));
    }

    #[test]
    fn work_that_panics_takes_no_thread_with_it() {
        let pool = Pool::start().expect("threads");
        for _ in 0..3 * THREADS {
            let (done, result) = mpsc::channel::<()>();
            pool.submit(&tenant("a"), move || {
                let _done = done;
                panic!("on purpose");
            })
            .expect("room");
            assert!(result.recv().is_err(), "its channel ends");
        }
        let (done, result) = mpsc::channel();
        pool.submit(&tenant("a"), move || done.send(7).expect("somebody waits")).expect("room");
        assert_eq!(result.recv(), Ok(7));
    }
}
