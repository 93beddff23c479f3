//! The device's own worker threads, and how outputs are cut into pieces for them.
//!
//! A piece is whole rows, and no operation lets a row's value depend on the cut: results are the same at any
//! thread count. Work too small to be worth waking a thread runs on the caller.
//!
//! A step is thousands of operations of some hundred microseconds. Helpers therefore wait for the next one awake, for a
//! moment, before they sleep; a sleeping thread takes longer to wake than many operations last.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Below about this many simple element operations a wake-up (some microseconds) costs more than it saves.
const WORTH_SHARING: usize = 1 << 15;
/// How long a helper waits awake.
const AWAKE: Duration = Duration::from_micros(60);

/// Worker threads of one [`super::CpuDevice`]: the caller and its helpers.
pub struct Workers {
    team: Arc<Team>,
    helpers: Vec<JoinHandle<()>>,
    /// Held while a job runs. Who finds it taken (another caller, or a task of the job) works alone.
    turn: Mutex<()>,
    threads: usize,
}

/// What callers and helpers share.
#[derive(Default)]
struct Team {
    /// Counts jobs and the order to stop; what helpers watch while awake.
    epoch: AtomicUsize,
    board: Mutex<Board>,
    posted: Condvar,
    stop: AtomicBool,
}

/// The job that is open, and how many helpers sleep until the next.
#[derive(Default)]
struct Board {
    job: Option<Arc<Job>>,
    asleep: usize,
}

/// Tasks 0..tasks of one closure.
struct Job {
    run: Closure,
    tasks: usize,
    next: AtomicUsize,
    /// Helpers at work on it.
    helping: AtomicUsize,
    panicked: AtomicBool,
}

/// A borrowed closure whose lifetime [`Workers::each`] vouches for.
struct Closure(*const (dyn Fn(usize) + Sync));
// SAFETY: the closure is `Sync`; `Workers::each` keeps it alive until no helper runs it.
unsafe impl Send for Closure {}
// SAFETY: as above.
unsafe impl Sync for Closure {}

impl Job {
    /// Takes tasks until none is left.
    fn work(&self) {
        // SAFETY: `Workers::each` does not return, nor unwind, before every helper has left the job.
        let run = unsafe { &*self.run.0 };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            run(task);
        }
    }
}

/// A poisoned lock guards no broken state here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Team {
    fn post(&self, job: Arc<Job>) {
        let asleep = {
            let mut board = lock(&self.board);
            board.job = Some(job);
            // Under the lock: a helper between looking and sleeping would miss it.
            self.epoch.fetch_add(1, Ordering::Release);
            board.asleep
        };
        if asleep > 0 {
            self.posted.notify_all();
        }
    }

    /// Closes the job to newcomers and waits for those who are at work on it.
    fn close(&self, job: &Job) {
        lock(&self.board).job = None;
        let mut spins = 0u32;
        while job.helping.load(Ordering::Acquire) > 0 {
            spins = spins.saturating_add(1);
            if spins < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }

    /// A helper's life.
    fn help(&self) {
        let mut seen = 0;
        while !self.stop.load(Ordering::Acquire) {
            seen = self.await_epoch(seen);
            let job = {
                let board = lock(&self.board);
                // Counted under the lock, so that `close` sees either the helper or a closed job.
                board.job.as_ref().inspect(|job| _ = job.helping.fetch_add(1, Ordering::AcqRel)).cloned()
            };
            if let Some(job) = job {
                if catch_unwind(AssertUnwindSafe(|| job.work())).is_err() {
                    job.panicked.store(true, Ordering::Release);
                }
                job.helping.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Waits, awake at first, until the epoch is another than `seen`; returns it.
    fn await_epoch(&self, seen: usize) -> usize {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let epoch = self.epoch.load(Ordering::Acquire);
                if epoch != seen {
                    return epoch;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > AWAKE {
                break;
            }
        }
        let mut board = lock(&self.board);
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            board.asleep += 1;
            board = self.posted.wait(board).unwrap_or_else(PoisonError::into_inner);
            board.asleep -= 1;
        }
    }
}

impl Workers {
    /// `threads` workers; one means that everything runs on the caller.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::usage("0 threads cannot compute").next("give --threads 1 or more"));
        }
        let mut workers = Self { team: Arc::default(), helpers: Vec::new(), turn: Mutex::new(()), threads };
        for i in 1..threads {
            let team = Arc::clone(&workers.team);
            let started = std::thread::Builder::new().name(format!("cpu-{i}")).spawn(move || team.help());
            workers.helpers.push(started.map_err(|e| {
                Error::device(format!("cannot start {threads} threads: {e}")).next("give fewer --threads")
            })?);
        }
        Ok(workers)
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// f(0), f(1), … f(tasks − 1), in any order and on any thread.
    pub fn each(&self, tasks: usize, work: usize, f: impl Fn(usize) + Sync + Send) {
        let alone = self.helpers.is_empty() || work < WORTH_SHARING || tasks < 2;
        let turn = if alone { None } else { self.turn.try_lock().ok() };
        if turn.is_none() {
            (0..tasks).for_each(f);
            return;
        }
        let run: *const (dyn Fn(usize) + Sync + '_) = &f;
        // SAFETY: only the lifetime changes; `Close` below outlives every use by a helper.
        let run = Closure(unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(run)
        });
        let (next, helping, panicked) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let job = Arc::new(Job { run, tasks, next, helping, panicked });
        self.team.post(Arc::clone(&job));
        let close = Close { team: &self.team, job: &job };
        job.work();
        drop(close);
        assert!(!job.panicked.load(Ordering::Acquire), "a worker thread panicked");
    }

    /// [f(0), f(1), …], computed on any thread, in order.
    pub fn map<T: Send + Sync>(&self, tasks: usize, work: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        let slots: Vec<OnceLock<T>> = (0..tasks).map(|_| OnceLock::new()).collect();
        self.each(tasks, work, |task| _ = slots[task].set(f(task)));
        // Every task ran, so no slot is empty.
        slots.into_iter().filter_map(OnceLock::into_inner).collect()
    }

    /// Cuts `out` (rows of `columns`) into runs of rows and calls f(first row, run) on each. `cost`: element
    /// operations per element, for the decision whether to share.
    pub fn rows(&self, out: &mut [f32], columns: usize, cost: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let columns = columns.max(1);
        let (work, rows) = (out.len() * cost, out.len() / columns);
        let tasks = self.pieces(rows, work);
        let out = Shared::new(out);
        self.each(tasks, work, |task| {
            let rows = rows * task / tasks..rows * (task + 1) / tasks;
            // SAFETY: the runs of different tasks do not overlap.
            f(rows.start, unsafe { out.slice(rows.start * columns, rows.len() * columns) });
        });
    }

    /// As [`Self::rows`] for two outputs of the same shape.
    pub fn rows2(
        &self,
        (a, b): (&mut [f32], &mut [f32]),
        columns: usize,
        cost: usize,
        f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
    ) {
        let columns = columns.max(1);
        let (work, rows) = (a.len() * cost, a.len() / columns);
        assert!(b.len() >= rows * columns);
        let tasks = self.pieces(rows, work);
        let (a, b) = (Shared::new(a), Shared::new(b));
        self.each(tasks, work, |task| {
            let rows = rows * task / tasks..rows * (task + 1) / tasks;
            let (first, n) = (rows.start * columns, rows.len() * columns);
            // SAFETY: the runs of different tasks do not overlap.
            let (a, b) = unsafe { (a.slice(first, n), b.slice(first, n)) };
            f(rows.start, a, b);
        });
    }

    /// Tasks for so many rows: a few per thread, so that a slow thread does not hold up the rest; one where sharing is
    /// not worth it.
    fn pieces(&self, rows: usize, work: usize) -> usize {
        if work < WORTH_SHARING || self.threads == 1 { 1 } else { rows.clamp(1, self.threads * 4) }
    }
}

/// Ends a job when dropped, also when the caller's own share of it panics.
struct Close<'a> {
    team: &'a Team,
    job: &'a Job,
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.team.close(self.job);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.team.stop.store(true, Ordering::Release);
        {
            let _board = lock(&self.team.board);
            self.team.epoch.fetch_add(1, Ordering::Release);
        }
        self.team.posted.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches its tasks' panics; there is nothing to learn from its end.
            _ = helper.join();
        }
    }
}

/// A mutable slice that several tasks write at once, each its own elements.
pub struct Shared<'a, T = f32> {
    start: *mut T,
    length: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose callers promise that no two tasks touch the same element.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above; T may move between threads.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), owner: std::marker::PhantomData }
    }

    /// Elements `at..at + count`.
    ///
    /// # Safety
    /// No other live slice, on any thread, may overlap them.
    #[allow(clippy::mut_from_ref)] // the point of this type; the caller promises disjointness
    pub unsafe fn slice(&self, at: usize, count: usize) -> &mut [T] {
        assert!(at + count <= self.length, "task writes {at}+{count} of {} elements", self.length);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise, alive by 'a.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), count) }
    }

    /// Address of element `at`, after checking that `end` elements exist; for kernels that store whole tiles.
    pub fn pointer(&self, at: usize, end: usize) -> *mut T {
        assert!(at <= end && end <= self.length, "tile ends at {end} of {} elements", self.length);
        self.start.wrapping_add(at)
    }

    /// Element `at`, which must belong to the calling task.
    pub fn get(&self, at: usize) -> T
    where
        T: Copy,
    {
        // SAFETY: in bounds by the assertion in `slice`; tasks only touch elements of their own tiles.
        unsafe { self.slice(at, 1)[0] }
    }
}
