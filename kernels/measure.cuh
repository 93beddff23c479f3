// What a tensor is measured by, wherever that happens: in a pass of its own (statistics.cu) or in the kernel that makes it
// (`*_measured` in elementwise.cu, gate.cu, norm.cu, rope.cu).
//
// A run is a stretch of elements of one unit, one block's work, and gives one Partial; statistics_combine adds up a unit's.
// Counts are exact. A thread takes eight elements at a time: where all eight are ordinary (finite, non-zero, between 2^-40
// and 2^40, below overflow) their squares are added in f32, and those eight-sums are kept as f32 pairs (sum and its
// rounding error, TwoSum) up to the block's total: Σx² is off by at most 8 roundings, 4.8e-7 of it. Any other eight are
// counted one by one, squares in three ranges scaled by powers of two, so that neither 1e-30 nor 1e30 leaves f32's range. No f64 but one conversion a block: it runs at 1/64 rate on consumer cards.
// About 10 flops an element where all eight are ordinary, 30 where not.
// Launch of a measured kernel: one block a run, `*_measured` with at most 256 threads, a power of two.
#pragma once
#include "common.cuh"

struct Run {
    u64 begin;  // of the tensor's elements
    u32 count;
    u32 unused;
};

// The order of src/device/cuda/measure.rs.
struct Partial {
    double sum_squares;
    u64 nan, pos_inf, neg_inf, zero, subnormal, underflow, overflow;
    float max_abs, min_abs;  // min_abs: infinity when there is no non-zero finite element
};

struct Limits {
    float smallest_normal;  // magnitudes below: subnormal
    float rounds_to_zero;   // magnitudes up to this one
    float rounds_to_inf;    // magnitudes from this one
};

// One thread's, and in shared memory the block's.
struct Tally {
    Pair small, middle, large;
    u32 nan, pos_inf, neg_inf, zero, subnormal, underflow, overflow;
    float max_abs, min_abs;
};

__device__ __forceinline__ void count(Tally& t, float x, const Limits& limits) {
    float magnitude = fabsf(x);
    if (!(magnitude < INFINITY)) {
        t.nan += x != x;
        t.pos_inf += x == INFINITY;
        t.neg_inf += x == -INFINITY;
        return;
    }
    if (magnitude == 0.0f) {
        t.zero += 1;
        return;
    }
    t.subnormal += magnitude < limits.smallest_normal;
    t.underflow += magnitude <= limits.rounds_to_zero;
    t.overflow += magnitude >= limits.rounds_to_inf;
    t.max_abs = fmaxf(t.max_abs, magnitude);
    t.min_abs = fminf(t.min_abs, magnitude);
    if (magnitude < 0x1p-40f) {
        pair_add_square(t.small, x * 0x1p90f);
    } else if (magnitude < 0x1p40f) {
        pair_add_square(t.middle, x);
    } else {
        pair_add_square(t.large, x * 0x1p-80f);
    }
}


__device__ __forceinline__ Tally empty_tally() {
    Tally t = {{0, 0}, {0, 0}, {0, 0}, 0, 0, 0, 0, 0, 0, 0, 0.0f, INFINITY};
    return t;
}

__device__ __forceinline__ void pair_merge(Pair& total, const Pair& other) {
    pair_add(total, other.high);
    total.low += other.low;
}

__device__ __forceinline__ void merge(Tally& a, const Tally& b) {
    pair_merge(a.small, b.small);
    pair_merge(a.middle, b.middle);
    pair_merge(a.large, b.large);
    a.nan += b.nan;
    a.pos_inf += b.pos_inf;
    a.neg_inf += b.neg_inf;
    a.zero += b.zero;
    a.subnormal += b.subnormal;
    a.underflow += b.underflow;
    a.overflow += b.overflow;
    a.max_abs = fmaxf(a.max_abs, b.max_abs);
    a.min_abs = fminf(a.min_abs, b.min_abs);
}

static __shared__ Tally thread_tallies[256];

// The block's tallies, added in a fixed order, as its run's partial. All threads must call.
__device__ __forceinline__ void finish(Partial* partial, const Tally& mine) {
    __syncthreads();  // the readers of an earlier call are done
    thread_tallies[threadIdx.x] = mine;
    for (u32 half_block = blockDim.x / 2; half_block > 0; half_block /= 2) {
        __syncthreads();
        if (threadIdx.x < half_block) merge(thread_tallies[threadIdx.x], thread_tallies[threadIdx.x + half_block]);
    }
    if (threadIdx.x > 0) return;
    const Tally& t = thread_tallies[0];
    Partial p;
    p.sum_squares = pair_value(t.small) * 0x1p-180 + pair_value(t.middle) + pair_value(t.large) * 0x1p160;
    p.nan = t.nan;
    p.pos_inf = t.pos_inf;
    p.neg_inf = t.neg_inf;
    p.zero = t.zero;
    p.subnormal = t.subnormal;
    p.underflow = t.underflow;
    p.overflow = t.overflow;
    p.max_abs = t.max_abs;
    p.min_abs = t.min_abs;
    *partial = p;
}

// Eight elements in f32; see the top.
struct Eight {
    float squares, most, least;
    u32 subnormal, underflow;
};

__device__ __forceinline__ void add_to(Eight& e, float x, const Limits& limits) {
    float magnitude = fabsf(x);
    e.squares = fmaf(x, x, e.squares);
    e.most = fmaxf(e.most, magnitude);
    e.least = fminf(e.least, magnitude);
    // Elsewhere ordinary elements are normal: no thread counts.
    if (limits.smallest_normal > 0x1p-40f) {
        e.subnormal += magnitude < limits.smallest_normal;
        e.underflow += magnitude <= limits.rounds_to_zero;
    }
}

// Whether all eight were ordinary and are tallied. fmaxf and fminf lose a NaN, the squares do not.
__device__ __forceinline__ bool tallied(Tally& t, const Eight& e, const Limits& limits) {
    if (!(e.least > 0x1p-40f && e.most < 0x1p40f && e.most < limits.rounds_to_inf && e.squares == e.squares)) return false;
    pair_add(t.middle, e.squares);
    t.max_abs = fmaxf(t.max_abs, e.most);
    t.min_abs = fminf(t.min_abs, e.least);
    t.subnormal += e.subnormal;
    t.underflow += e.underflow;
    return true;
}

// Calls make(i), which stores element i of `out` and returns it as stored, for this thread's share of begin ≤ i < begin +
// count, and tallies what comes back. Eight that are not ordinary are read back: the thread's own stores, from its cache.
template <typename Make>
__device__ __forceinline__ void tally_run(Tally& t, const void* out, int tag, u64 begin, u32 count_of_run,
                                          const Limits& limits, const Make& make) {
    u32 i = threadIdx.x;
    for (; (u64)i + 7 * blockDim.x < count_of_run; i += 8 * blockDim.x) {
        Eight e = {0.0f, 0.0f, INFINITY, 0, 0};
#pragma unroll 1
        for (u32 k = 0; k < 8; k++) add_to(e, make(begin + i + k * blockDim.x), limits);
        if (tallied(t, e, limits)) continue;
#pragma unroll 1
        for (u32 k = 0; k < 8; k++) count(t, load(out, begin + i + k * blockDim.x, tag), limits);
    }
    for (; i < count_of_run; i += blockDim.x) count(t, make(begin + i), limits);
}

// An elementwise kernel's whole body: its run made and measured.
template <typename Make>
__device__ __forceinline__ void measured(Partial* partials, const void* out, int tag, const Run* runs, const Limits& limits,
                                         const Make& make) {
    Run run = runs[blockIdx.x];
    Tally t = empty_tally();
    tally_run(t, out, tag, run.begin, run.count, limits, make);
    finish(partials + blockIdx.x, t);
}
