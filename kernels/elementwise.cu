// Elementwise arithmetic over tensors of n elements, each f32, bf16 or f16 by its tag; computed in f32, each result rounded
// once to its tensor's dtype.
//
// add             out = a + b                 Bytes: n · (size a + size b + size out)
// scale           out = x · s                 Bytes: n · (size x + size out); in place when out == x
// accumulate      acc = acc + g               Bytes: n · (2·size acc + size g)
// accumulate_units  acc = acc + g[0], then + g[1], … of g [units, n], rounded to acc's dtype after each
//                 Bytes: n · (2·size acc + units · size g)
// add_scaled      y = y + round(v · s, v), in place: the end of a linear with its LoRA branch
//                 Bytes: n · (2·size y + size v)
// add_in_turn     out = before + round(term, out), rounded, then + round(own, out): the gradient of an input that several
//                 linears share. before (in out's dtype) and term may be null; out may be the memory of any operand of its
//                 own dtype.                  Bytes: n · (2·size out + size term + size own)
// perturb         out = x · (1 + h · u), u symmetric noise in (−1, 1), h half an ulp of a dtype
// dropout         out = x · (u < p ? 0 : factor), u uniform in [0, 1), factor 1/(1 − p) in x's dtype
//                 Both draw from src/device/noise.rs's generator: a pure function of (seed, stream, element).
//                 Bytes: n · 2·size x
// dropout_bits    out = x · (bit i of bits ? factor : 0): masks that the host drew.
//                 Bytes: n · (2·size x + 1/8)
// *_measured      the same, and the statistics of what is stored, without a read for them (measure.cuh)
// Launch: 256 threads, grid-stride, no shared memory; *_measured: one block of 256 threads a run.
#include "measure.cuh"

__device__ __forceinline__ float add_one(void* out, int out_tag, const void* a, int a_tag, const void* b, int b_tag, u64 i) {
    return stored(out, i, load(a, i, a_tag) + load(b, i, b_tag), out_tag);
}

extern "C" __global__ void add(void* out, int out_tag, const void* a, int a_tag, const void* b, int b_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) add_one(out, out_tag, a, a_tag, b, b_tag, i);
}

extern "C" __global__ void add_measured(void* out, int out_tag, const void* a, int a_tag, const void* b, int b_tag,
                                        Partial* partials, const Run* runs, Limits limits) {
    measured(partials, out, out_tag, runs, limits, [&](u64 i) { return add_one(out, out_tag, a, a_tag, b, b_tag, i); });
}

extern "C" __global__ void scale(void* out, int out_tag, const void* x, int x_tag, float s, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) store(out, i, load(x, i, x_tag) * s, out_tag);
}

extern "C" __global__ void accumulate(void* acc, int acc_tag, const void* g, int g_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        store(acc, i, load(acc, i, acc_tag) + load(g, i, g_tag), acc_tag);
    }
}

extern "C" __global__ void accumulate_units(void* acc, int acc_tag, const void* g, int g_tag, u64 units, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float sum = load(acc, i, acc_tag);
        for (u64 unit = 0; unit < units; unit++) sum = round_to(sum + load(g, unit * n + i, g_tag), acc_tag);
        store(acc, i, sum, acc_tag);
    }
}

__device__ __forceinline__ float add_scaled_one(void* y, int y_tag, const void* v, int v_tag, float s, u64 i) {
    return stored(y, i, load(y, i, y_tag) + round_to(load(v, i, v_tag) * s, v_tag), y_tag);
}

extern "C" __global__ void add_scaled(void* y, int y_tag, const void* v, int v_tag, float s, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) add_scaled_one(y, y_tag, v, v_tag, s, i);
}

extern "C" __global__ void add_scaled_measured(void* y, int y_tag, const void* v, int v_tag, float s, Partial* partials,
                                               const Run* runs, Limits limits) {
    measured(partials, y, y_tag, runs, limits, [&](u64 i) { return add_scaled_one(y, y_tag, v, v_tag, s, i); });
}

__device__ __forceinline__ float add_in_turn_one(void* out, int out_tag, const void* before, const void* term, int term_tag,
                                                 const void* own, int own_tag, u64 i) {
    float sum = round_to(load(own, i, own_tag), out_tag);
    if (term) {
        float first = round_to(load(term, i, term_tag), out_tag);
        if (before) first = round_to(load(before, i, out_tag) + first, out_tag);
        sum = first + sum;
    } else if (before) {
        sum = load(before, i, out_tag) + sum;
    }
    return stored(out, i, sum, out_tag);
}

extern "C" __global__ void add_in_turn(void* out, int out_tag, const void* before, const void* term, int term_tag,
                                       const void* own, int own_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        add_in_turn_one(out, out_tag, before, term, term_tag, own, own_tag, i);
    }
}

extern "C" __global__ void add_in_turn_measured(void* out, int out_tag, const void* before, const void* term, int term_tag,
                                                const void* own, int own_tag, Partial* partials, const Run* runs,
                                                Limits limits) {
    measured(partials, out, out_tag, runs, limits,
             [&](u64 i) { return add_in_turn_one(out, out_tag, before, term, term_tag, own, own_tag, i); });
}

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The top 24 of 64 mixed bits of one element; `start` is noise::start(seed, stream).
__device__ __forceinline__ u32 noise_bits(u64 start, u64 element) {
    return (u32)(mix(start + element * 0x9E3779B97F4A7C15ull) >> 40);
}

extern "C" __global__ void perturb(void* out, const void* x, int tag, float half_ulp, u64 start, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float noise = (float)(2 * (int)noise_bits(start, i) + 1 - (1 << 24)) * 0x1p-24f;
        store(out, i, load(x, i, tag) * (1.0f + half_ulp * noise), tag);
    }
}

extern "C" __global__ void dropout(void* out, const void* x, int tag, float factor, float p, u64 start, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float uniform = (float)noise_bits(start, i) * 0x1p-24f;
        store(out, i, load(x, i, tag) * (uniform >= p ? factor : 0.0f), tag);
    }
}

extern "C" __global__ void dropout_bits(void* out, const void* x, int tag, float factor, const u32* bits, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        store(out, i, load(x, i, tag) * (bits[i / 32] >> (i % 32) & 1 ? factor : 0.0f), tag);
    }
}
