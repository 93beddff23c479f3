//! The device's own worker threads, and how outputs are cut into pieces for them.
//!
//! A piece is whole rows, and no operation lets a row's value depend on the cut: results are the same at any
//! thread count. Work too small to be worth waking a thread runs on the caller.

use rayon::prelude::*;

use crate::{Error, Result};

/// Below about this many simple element operations a wake-up (some microseconds) costs more than it saves.
const WORTH_SHARING: usize = 1 << 15;

/// Worker threads of one [`super::CpuDevice`].
pub struct Workers {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Workers {
    /// `threads` workers; one means that everything runs on the caller.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = match threads {
            0 => return Err(Error::usage("0 threads cannot compute").next("give --threads 1 or more")),
            1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("cpu-{i}")).build().map_err(
                    |e| Error::device(format!("cannot start {n} threads: {e}")).next("give fewer --threads"),
                )?,
            ),
        };
        Ok(Self { pool, threads })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The pool, where `work` element operations are worth it.
    fn pool_for(&self, work: usize) -> Option<&rayon::ThreadPool> {
        self.pool.as_ref().filter(|_| work >= WORTH_SHARING)
    }

    /// f(0), f(1), … f(tasks − 1), in any order and on any thread.
    pub fn each(&self, tasks: usize, work: usize, f: impl Fn(usize) + Sync + Send) {
        match self.pool_for(work) {
            Some(pool) if tasks > 1 => pool.install(|| (0..tasks).into_par_iter().for_each(f)),
            _ => (0..tasks).for_each(f),
        }
    }

    /// [f(0), f(1), …], computed on any thread, in order.
    pub fn map<T: Send>(&self, tasks: usize, work: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        match self.pool_for(work) {
            Some(pool) if tasks > 1 => pool.install(|| (0..tasks).into_par_iter().map(f).collect()),
            _ => (0..tasks).map(f).collect(),
        }
    }

    /// Cuts `out` (rows of `columns`) into runs of rows and calls f(first row, run) on each. `cost`: element
    /// operations per element, for the decision whether to share.
    pub fn rows(&self, out: &mut [f32], columns: usize, cost: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let columns = columns.max(1);
        match self.pool_for(out.len() * cost) {
            Some(pool) => {
                let step = self.step(out.len() / columns);
                pool.install(|| {
                    out.par_chunks_mut(step * columns).enumerate().for_each(|(i, run)| f(i * step, run));
                });
            }
            None => f(0, out),
        }
    }

    /// As [`Self::rows`] for two outputs with the same rows; `columns` of each.
    pub fn rows2(
        &self,
        (a, b): (&mut [f32], &mut [f32]),
        columns: (usize, usize),
        cost: usize,
        f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
    ) {
        let columns = (columns.0.max(1), columns.1.max(1));
        match self.pool_for(a.len() * cost) {
            Some(pool) => {
                let step = self.step(a.len() / columns.0);
                pool.install(|| {
                    a.par_chunks_mut(step * columns.0)
                        .zip(b.par_chunks_mut(step * columns.1))
                        .enumerate()
                        .for_each(|(i, (a, b))| f(i * step, a, b));
                });
            }
            None => f(0, a, b),
        }
    }

    /// Rows a piece: a few pieces per thread, so that a slow thread does not hold up the rest.
    fn step(&self, rows: usize) -> usize {
        rows.div_ceil(self.threads * 4).max(1)
    }
}

/// A mutable slice that several tasks write at once, each its own elements.
pub struct Shared<'a> {
    start: *mut f32,
    length: usize,
    owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `slice`, whose callers promise that no two tasks touch the same element.
unsafe impl Sync for Shared<'_> {}
// SAFETY: as above; f32 may move between threads.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), owner: std::marker::PhantomData }
    }

    /// Elements `at..at + count`.
    ///
    /// # Safety
    /// No other live slice, on any thread, may overlap them.
    #[allow(clippy::mut_from_ref)] // the point of this type; the caller promises disjointness
    pub unsafe fn slice(&self, at: usize, count: usize) -> &mut [f32] {
        assert!(at + count <= self.length, "task writes {at}+{count} of {} elements", self.length);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise, alive by 'a.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), count) }
    }

    /// Address of element `at`, after checking that `end` elements exist; for kernels that store whole tiles.
    pub fn pointer(&self, at: usize, end: usize) -> *mut f32 {
        assert!(at <= end && end <= self.length, "tile ends at {end} of {} elements", self.length);
        self.start.wrapping_add(at)
    }

    /// Element `at`, which must belong to the calling task.
    pub fn get(&self, at: usize) -> f32 {
        // SAFETY: in bounds by the assertion in `slice`; tasks only touch elements of their own tiles.
        unsafe { self.slice(at, 1)[0] }
    }

    /// Sets element `at`, which must belong to the calling task.
    pub fn set(&self, at: usize, value: f32) {
        // SAFETY: as for `get`.
        unsafe { self.slice(at, 1)[0] = value };
    }
}
