//! A pool of threads for work that is cut into many short tasks.
//!
//! The calling thread works too, so one thread means no other thread at all. Between two calls a worker spins for a moment
//! and then sleeps: the phases of a plan follow each other within microseconds, plans do not.
#![allow(unsafe_code)] // a closure is lent to other threads for the length of a call

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{env, hint, panic, process, thread};

/// How long a worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(200);

/// Number of threads to use: `LEWM_NUM_THREADS`, or what the machine and the cgroup allow.
///
/// # Errors
/// The variable holds something else than a positive number.
pub fn default_threads() -> Result<usize, crate::Error> {
    match env::var("LEWM_NUM_THREADS") {
        Ok(text) => match text.trim().parse() {
            Ok(number @ 1..=1024) => Ok(number),
            _ => Err(crate::Error::Argument(format!("LEWM_NUM_THREADS must be a number from 1 to 1024, got {text:?}"))),
        },
        Err(_) => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// One call of [`Pool::run`], as the workers see it.
#[derive(Clone, Copy)]
struct Job {
    /// The closure, borrowed for the duration of the call only.
    task: *const (dyn Fn(usize, usize) + Sync),
    tasks: usize,
}

struct Shared {
    /// Counts the jobs; a worker that sees it change takes the job.
    epoch: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    /// The next task of the job.
    next: AtomicUsize,
    /// Workers that have not finished the job.
    busy: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `job` is written only while no worker is busy and read only after `epoch` said so.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in it is used only while `run`, which borrows the closure, waits.
unsafe impl Send for Shared {}

/// Threads that run the tasks of one call at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<thread::JoinHandle<()>>,
    /// Held by the call that uses the workers.
    turn: Mutex<()>,
    /// Threads do not survive a fork: in a child there is only the caller.
    process: u32,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: Mutex::new(0),
            wake: Condvar::new(),
        });
        // A thread that cannot be started is one worker less, not an error.
        let workers = (1..threads.max(1))
            .filter_map(|worker| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("lewm-{worker}")).spawn(move || shared.work(worker)).ok()
            })
            .collect();
        Self { shared, workers, turn: Mutex::new(()), process: process::id() }
    }

    /// The pool that everything in this process shares, made anew in a forked child.
    ///
    /// # Errors
    /// As [`default_threads`].
    pub fn global() -> Result<Arc<Self>, crate::Error> {
        static GLOBAL: OnceLock<Mutex<Option<Arc<Pool>>>> = OnceLock::new();
        let mut global = GLOBAL.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = global.as_ref().filter(|pool| pool.process == process::id()) {
            return Ok(Arc::clone(pool));
        }
        let pool = Arc::new(Self::new(default_threads()?));
        // A pool from before a fork cannot join threads that do not exist here.
        if let Some(stale) = global.replace(Arc::clone(&pool)) {
            std::mem::forget(stale);
        }
        Ok(pool)
    }

    /// Threads that work, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(index, worker)` for every index below `tasks`; workers are numbered below [`Pool::threads`].
    ///
    /// A second caller at the same time, or one in a forked child, runs its tasks by itself.
    ///
    /// # Panics
    /// If a task panics.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        let turn = self.turn.try_lock().ok();
        if tasks <= 1 || self.workers.is_empty() || turn.is_none() || self.process != process::id() {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: the lifetime is forgotten only until `wait` below, which runs before this function is left.
        let task: *const (dyn Fn(usize, usize) + Sync) = unsafe {
            std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), &'static (dyn Fn(usize, usize) + Sync)>(task)
        };
        // SAFETY: no worker is busy, so none reads it.
        unsafe { *shared.job.get() = Some(Job { task, tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::Release);
        if *shared.asleep.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            shared.wake.notify_all();
        }
        let mine = panic::catch_unwind(panic::AssertUnwindSafe(|| shared.take_tasks(Job { task, tasks }, 0)));
        let mut spins = 0_u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                thread::yield_now();
            }
            hint::spin_loop();
        }
        let theirs = shared.panicked.swap(false, Ordering::Relaxed);
        drop(turn);
        if let Err(payload) = mine {
            panic::resume_unwind(payload);
        }
        assert!(!theirs, "a task panicked on another thread");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        drop(self.shared.asleep.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            if self.process == process::id() {
                let _ = worker.join();
            } else {
                std::mem::forget(worker);
            }
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: `wait` has seen the epoch that was raised after the job was written.
            if let Some(job) = unsafe { *self.job.get() } {
                if panic::catch_unwind(panic::AssertUnwindSafe(|| self.take_tasks(job, worker))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for another epoch than `seen`.
    fn wait(&self, seen: usize) -> usize {
        let started = Instant::now();
        loop {
            for _ in 0..64 {
                let epoch = self.epoch.load(Ordering::Acquire);
                if epoch != seen {
                    return epoch;
                }
                hint::spin_loop();
            }
            if started.elapsed() > SPIN {
                break;
            }
        }
        let mut asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        *asleep += 1;
        let epoch = loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                break epoch;
            }
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        };
        *asleep -= 1;
        epoch
    }

    fn take_tasks(&self, job: Job, worker: usize) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.tasks {
                return;
            }
            // SAFETY: `run` keeps the closure alive until no worker is busy.
            unsafe { (*job.task)(index, worker) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_a_worker_of_the_pool() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 3, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, &|index, worker| {
                        assert!(worker < threads);
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn a_sleeping_worker_wakes_and_two_callers_do_not_wait_for_each_other() {
        let pool = Pool::new(2);
        thread::sleep(SPIN * 20);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(10, &|index, _| {
                            sum.fetch_add(index, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 100 * 45);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..8 {
            let run = || pool.run(8, &|index, _| assert_ne!(index, bad));
            assert!(panic::catch_unwind(panic::AssertUnwindSafe(run)).is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(8, &|index, _| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
