// Statistics of any number of tensors, or units of rows of one, in one read of memory and two launches.
//
// A chunk is a run of elements of one unit; the table lists chunks in order (address, count, dtype tag), so the same kernel
// serves one tensor by micro-batch and all gradients of a step at once. What is counted, and how: measure.cuh.
// statistics_partials  one block of 256 threads a chunk → partials[chunk]
// norms_partials       the same with every square in a pair of its own (Σx² to about 2^-40): gradient norms decide
//                      how far a step goes. Measured is round(x · factor): gradients as they will be once the loss scale is
//                      taken out, without a pass that does it
// statistics_combine   one block of 32 threads a unit → results[unit], partials begins[unit]..begins[unit+1]
// Bytes: Σ elements · size. About 10 flops an element (norms 30).
#include "measure.cuh"

struct Chunk {
    u64 address;  // of the first element
    u32 count;
    u32 tag;
};

__device__ __forceinline__ void merge(Partial& a, const Partial& b) {
    a.sum_squares += b.sum_squares;
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
    Partial p = {0.0, 0, 0, 0, 0, 0, 0, 0, 0.0f, INFINITY};
    return p;
}

extern "C" __global__ void statistics_partials(Partial* partials, const Chunk* chunks, Limits limits) {
    Chunk chunk = chunks[blockIdx.x];
    Tally t = empty_tally();
    const void* x = (const void*)chunk.address;
    tally_run(t, x, chunk.tag, 0, chunk.count, limits, [&](u64 i) { return load(x, i, chunk.tag); });
    finish(partials + blockIdx.x, t);
}

extern "C" __global__ void norms_partials(Partial* partials, const Chunk* chunks, Limits limits, float factor) {
    Chunk chunk = chunks[blockIdx.x];
    Tally t = empty_tally();
    for (u32 i = threadIdx.x; i < chunk.count; i += blockDim.x) {
        float x = load((const void*)chunk.address, i, chunk.tag);
        if (factor != 1.0f) x = round_to(x * factor, chunk.tag);
        count(t, x, limits);
    }
    finish(partials + blockIdx.x, t);
}

static __shared__ Partial unit_partials[32];

extern "C" __global__ void statistics_combine(Partial* results, const Partial* partials, const u32* begins) {
    u32 unit = blockIdx.x;
    Partial p = nothing();
    for (u32 i = begins[unit] + threadIdx.x; i < begins[unit + 1]; i += blockDim.x) merge(p, partials[i]);
    unit_partials[threadIdx.x] = p;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 i = 1; i < blockDim.x; i++) merge(p, unit_partials[i]);
        results[unit] = p;
    }
}
