//! The engine's own small thread pool: fork-join over a few threads, many times per token.
//!
//! Called by every kernel that splits its work. The caller takes part; workers spin for a bounded time between
//! runs of one step and park when the step is over. A worker that comes late finds nothing to do and is never
//! waited for, so a busy machine costs speed but no stall. It decides nothing about results: kernels split
//! over output rows and columns only.
//!
//! Protocol. `ticket` holds (epoch, next task). A thread owns task `i` of an epoch once it moved the ticket from
//! (epoch, i) to (epoch, i + 1). The caller returns only after all tasks of its epoch have been counted in
//! `done`, so an owned task's closure is alive. Before the caller rewrites the job it closes the ticket (next =
//! `CLOSED`), so a worker that read a mixture of two jobs fails to move the ticket and looks again.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Spins of a worker before it parks: about 50 µs, several times the serial gap between two kernels of a step.
const SPINS_BEFORE_PARK: u32 = 2_000;
/// Spins of the caller before it yields the core to a worker that owns a task but was descheduled.
const SPINS_BEFORE_YIELD: u32 = 2_000;
/// Most parts of a run that threads take chunks from; beyond it threads share parts.
const PARTS_MAX: usize = 16;
/// "Next task" of a ticket that nobody may move.
const CLOSED: u32 = u32::MAX;

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// A fixed set of threads that run the same closure over task indices.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held during a run; a second caller (or a nested call) runs its tasks alone instead of waiting.
    run_lock: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    /// epoch << 32 | next task.
    ticket: AtomicU64,
    /// Thin pointer to the caller's fat reference to the closure.
    job: AtomicPtr<()>,
    n_tasks: AtomicUsize,
    done: AtomicUsize,
    stop: AtomicBool,
    /// Parked workers; the caller wakes them only when there are some.
    parked: AtomicUsize,
    park_lock: Mutex<()>,
    wake: Condvar,
    /// First panic of the current run.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// === impl Pool ===

impl Pool {
    /// Starts `threads - 1` workers; the caller of [`Pool::run`] is the remaining thread. 0 counts as 1.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(u64::from(CLOSED)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            n_tasks: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            park_lock: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("kernel-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system can start a worker thread")
            })
            .collect();
        Self { shared, workers, run_lock: Mutex::new(()) }
    }

    /// Threads that may run tasks, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(0)`, …, `f(n_tasks - 1)`, each once, in no particular order, and returns when all have ended.
    /// Does not allocate. Called while another run of the same pool is going on (also from a task), it runs
    /// all tasks on the calling thread.
    ///
    /// # Panics
    /// With the first panic of a task, after all tasks have ended.
    pub fn run(&self, n_tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let guard = if n_tasks > 1 && !self.workers.is_empty() { self.run_lock.try_lock().ok() } else { None };
        if guard.is_none() {
            (0..n_tasks).for_each(f);
            return;
        }
        assert!(n_tasks < CLOSED as usize, "{n_tasks} tasks in one run");
        self.shared.publish(n_tasks, &f);
        while self.shared.try_task() {}
        self.shared.wait_done(n_tasks);
        let panicked = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Released before unwinding, so that the lock is not poisoned and the pool stays usable.
        drop(guard);
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }

    /// Runs `f` on stretches of `0..n` of at most `chunk`. Each thread goes through a part of its own in order, so that
    /// what it reads follows on what it read before, and then helps with what others have left.
    pub(crate) fn run_chunks(&self, n: usize, chunk: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
        self.run_stretches(n, chunk, &|_, stretch| f(stretch));
    }

    /// As [`Pool::run_chunks`], telling `f` which of at most [`Pool::threads`] tasks it runs in; stretches of one task
    /// never overlap in time.
    pub(crate) fn run_stretches(&self, n: usize, chunk: usize, f: &(dyn Fn(usize, Range<usize>) + Sync)) {
        let n_chunks = n.div_ceil(chunk);
        let n_tasks = n_chunks.min(self.threads());
        let n_parts = n_tasks.min(PARTS_MAX);
        let taken: [Taken; PARTS_MAX] = std::array::from_fn(|_| Taken(AtomicUsize::new(0)));
        let bound = |part: usize| n_chunks * part / n_parts;
        self.run(n_tasks, &|task| {
            for turn in 0..n_parts {
                let part = (task + turn) % n_parts;
                loop {
                    let index = bound(part) + taken[part].0.fetch_add(1, Ordering::Relaxed);
                    if index >= bound(part + 1) {
                        break;
                    }
                    f(task, index * chunk..((index + 1) * chunk).min(n));
                }
            }
        });
    }
}

/// Chunks taken of a part, in a cache line of its own.
#[repr(align(64))]
struct Taken(AtomicUsize);

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _lock = self.shared.park_lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks, so joining cannot fail for a reason worth a second panic.
            let _ = worker.join();
        }
    }
}

// === impl Shared ===

impl Shared {
    fn publish(&self, n_tasks: usize, f: &Task<'_>) {
        let epoch = (self.ticket.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Closing comes first in the modification order of `ticket`; the Release stores of the job below make
        // it visible to whoever sees a part of the new job.
        self.ticket.store((epoch << 32) | u64::from(CLOSED), Ordering::SeqCst);
        self.done.store(0, Ordering::Release);
        self.job.store(std::ptr::from_ref(f).cast_mut().cast(), Ordering::Release);
        self.n_tasks.store(n_tasks, Ordering::Release);
        self.ticket.store(epoch << 32, Ordering::SeqCst);
        // SeqCst on both sides: either the worker sees the new ticket before it parks, or we see it parked.
        if self.parked.load(Ordering::SeqCst) > 0 {
            let _lock = self.park_lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Takes and runs one task of the current epoch; false when there is none.
    fn try_task(&self) -> bool {
        let mut ticket = self.ticket.load(Ordering::SeqCst);
        loop {
            let next = ticket as u32;
            let n_tasks = self.n_tasks.load(Ordering::Acquire);
            let job = self.job.load(Ordering::Acquire);
            if next == CLOSED || next as usize >= n_tasks {
                return false;
            }
            match self.ticket.compare_exchange_weak(ticket, ticket + 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => {
                    // SAFETY: the ticket moved, so `job` is the pointer published with this epoch (a mixture fails
                    // the exchange, see the file comment), and the caller of that epoch is still in `run`, because
                    // `done` cannot reach `n_tasks` before this task has been counted.
                    let f: Task<'_> = unsafe { *job.cast::<Task<'_>>() };
                    self.run_task(f, next as usize);
                    return true;
                }
                Err(seen) => ticket = seen,
            }
        }
    }

    fn run_task(&self, f: Task<'_>, index: usize) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| f(index))) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        self.done.fetch_add(1, Ordering::Release);
    }

    fn wait_done(&self, n_tasks: usize) {
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < n_tasks {
            if spins < SPINS_BEFORE_YIELD {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn has_task(&self) -> bool {
        let next = self.ticket.load(Ordering::SeqCst) as u32;
        next != CLOSED && (next as usize) < self.n_tasks.load(Ordering::Acquire)
    }

    fn work(&self) {
        let mut spins = 0;
        while !self.stop.load(Ordering::Acquire) {
            if self.try_task() {
                spins = 0;
            } else if spins < SPINS_BEFORE_PARK {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.park();
                spins = 0;
            }
        }
    }

    fn park(&self) {
        let lock = self.park_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.parked.fetch_add(1, Ordering::SeqCst);
        let lock = self
            .wake
            .wait_while(lock, |()| !self.has_task() && !self.stop.load(Ordering::SeqCst))
            .unwrap_or_else(PoisonError::into_inner);
        self.parked.fetch_sub(1, Ordering::SeqCst);
        drop(lock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 3, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for n_tasks in [0, 1, 2, 7, 64] {
                let counts: Vec<AtomicU32> = (0..n_tasks).map(|_| AtomicU32::new(0)).collect();
                pool.run(n_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn bursts_of_runs_with_pauses_lose_no_task() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        for round in 0..5_000 {
            pool.run(1 + round % 5, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
            if round % 500 == 0 {
                // Long enough for the workers to park.
                std::thread::sleep(Duration::from_millis(3));
            }
        }
        assert_eq!(total.into_inner(), 15_000);
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tasks_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let ended = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i| {
                assert!(i != 3, "task three");
                ended.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let payload = outcome.unwrap_err();
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"task three"));
        assert_eq!(ended.load(Ordering::Relaxed), 7);
        pool.run(4, &|_| {
            ended.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ended.into_inner(), 11);
    }

    #[test]
    fn a_nested_run_finishes_on_its_own_thread() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(3, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(total.into_inner(), 12);
    }

    #[test]
    fn callers_on_several_threads_all_get_their_tasks_done() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(3, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4_500);
    }
}
