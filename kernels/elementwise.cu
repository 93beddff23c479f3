// Elementwise arithmetic; each result is rounded once to its tensor's dtype.
//
// add             out = a + b                 Bytes: n · (size a + size b + size out)
// scale           out = x · s                 Bytes: n · (size x + size out); in place when out == x
// accumulate      acc = acc + g               Bytes: n · (2·size acc + size g)
// perturb         out = x · (1 + h · u), u symmetric noise in (−1, 1), h half an ulp of a dtype
// dropout         out = x · (u < p ? 0 : 1/(1 − p)), u uniform in [0, 1)
//                 Both draw from src/device/noise.rs's generator: a pure function of (seed, stream, element).
//                 Bytes: n · 2·size x
// Launch: 256 threads, grid-stride, no shared memory.
#include "common.cuh"

extern "C" __global__ void add(void* out, int out_tag, const void* a, int a_tag, const void* b, int b_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) store(out, i, load(a, i, a_tag) + load(b, i, b_tag), out_tag);
}

extern "C" __global__ void scale(void* out, int out_tag, const void* x, int x_tag, float s, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) store(out, i, load(x, i, x_tag) * s, out_tag);
}

extern "C" __global__ void accumulate(void* acc, int acc_tag, const void* g, int g_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        store(acc, i, load(acc, i, acc_tag) + load(g, i, g_tag), acc_tag);
    }
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

extern "C" __global__ void dropout(void* out, const void* x, int tag, float p, float kept, u64 start, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float uniform = (float)noise_bits(start, i) * 0x1p-24f;
        store(out, i, load(x, i, tag) * (uniform >= p ? kept : 0.0f), tag);
    }
}
