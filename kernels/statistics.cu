// Statistics of any number of tensors, or units of rows of one, in one read of memory and two launches.
//
// A chunk is a run of elements of one unit; the table lists chunks in order (address, count, dtype tag), so the same kernel
// serves one tensor by micro-batch and all gradients of a step at once. Measured is round(x · factor): gradients as they
// will be once the loss scale is taken out, without a pass that does it.
// statistics_partials  one block of 256 threads a chunk → partials[chunk]
// statistics_combine   one block of 32 threads a unit → results[unit], partials begins[unit]..begins[unit+1]
//
// Counts are exact. Sums are f32 pairs (sum and its rounding error, TwoSum) within a thread, f64 across threads: no
// per-element f64, which runs at 1/64 rate on consumer cards. Squares are kept in three ranges scaled by powers of two
// (below 2^-40, up to 2^40, above), so that neither 1e-30 nor 1e30 leaves f32's range.
// Bytes: Σ elements · size. About 40 flops an element.
#include "common.cuh"

struct Chunk {
    u64 address;  // of the first element
    u32 count;
    u32 tag;
};

// The order of src/device/cuda/measure.rs.
struct Partial {
    double sum_squares, sum;
    u64 nan, pos_inf, neg_inf, zero, subnormal, underflow, overflow;
    float max_abs, min_abs;  // min_abs: infinity when there is no non-zero finite element
};

struct Limits {
    float smallest_normal;  // magnitudes below: subnormal
    float rounds_to_zero;   // magnitudes up to this one
    float rounds_to_inf;    // magnitudes from this one
};

__device__ __forceinline__ void merge(Partial& a, const Partial& b) {
    a.sum_squares += b.sum_squares;
    a.sum += b.sum;
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

__device__ __forceinline__ Partial nothing() {
    Partial p = {0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0.0f, INFINITY};
    return p;
}

struct Tally {
    Pair sum, large_sum, small, middle, large;
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
    // Thousands of the largest float would overflow a plain sum.
    if (magnitude < 0x1p100f) {
        pair_add(t.sum, x);
    } else {
        pair_add(t.large_sum, x * 0x1p-40f);
    }
    if (magnitude < 0x1p-40f) {
        pair_add_square(t.small, x * 0x1p90f);
    } else if (magnitude < 0x1p40f) {
        pair_add_square(t.middle, x);
    } else {
        pair_add_square(t.large, x * 0x1p-80f);
    }
}

static __shared__ Partial thread_partials[256];

extern "C" __global__ void statistics_partials(Partial* partials, const Chunk* chunks, Limits limits, float factor) {
    Chunk chunk = chunks[blockIdx.x];
    Tally t = {{0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, 0, 0, 0, 0, 0, 0, 0, 0.0f, INFINITY};
    for (u32 i = threadIdx.x; i < chunk.count; i += blockDim.x) {
        float x = load((const void*)chunk.address, i, chunk.tag);
        if (factor != 1.0f) x = round_to(x * factor, chunk.tag);
        count(t, x, limits);
    }
    Partial p = nothing();
    p.sum_squares = pair_value(t.small) * 0x1p-180 + pair_value(t.middle) + pair_value(t.large) * 0x1p160;
    p.sum = pair_value(t.sum) + pair_value(t.large_sum) * 0x1p40;
    p.nan = t.nan;
    p.pos_inf = t.pos_inf;
    p.neg_inf = t.neg_inf;
    p.zero = t.zero;
    p.subnormal = t.subnormal;
    p.underflow = t.underflow;
    p.overflow = t.overflow;
    p.max_abs = t.max_abs;
    p.min_abs = t.min_abs;
    thread_partials[threadIdx.x] = p;
    for (u32 half_block = blockDim.x / 2; half_block > 0; half_block /= 2) {
        __syncthreads();
        if (threadIdx.x < half_block) merge(thread_partials[threadIdx.x], thread_partials[threadIdx.x + half_block]);
    }
    if (threadIdx.x == 0) partials[blockIdx.x] = thread_partials[0];
}

extern "C" __global__ void statistics_combine(Partial* results, const Partial* partials, const u32* begins) {
    u32 unit = blockIdx.x;
    Partial p = nothing();
    for (u32 i = begins[unit] + threadIdx.x; i < begins[unit + 1]; i += blockDim.x) merge(p, partials[i]);
    thread_partials[threadIdx.x] = p;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 i = 1; i < blockDim.x; i++) merge(p, thread_partials[i]);
        results[unit] = p;
    }
}
