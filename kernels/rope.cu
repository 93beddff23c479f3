// Rotary embedding, half-split (HF rotate_half), forward and inverse (its gradient).
//
// x [n, heads, dim] in x_tag; positions [n] u32; cos, sin [max_position, dim/2] in table_tag; out [n, heads, dim].
// y = round(round(x·cos) + round(rot(x)·sin)), all rounded to out_tag: three PyTorch ops, three roundings.
// rot(x)[i] = −x[i + dim/2] in the first half, x[i − dim/2] in the second; the inverse flips the sign of sin.
// Bytes: n·heads·dim·(2·size x + size out); tables stay in cache. No accumulator.
// rope_measured: the same, and the statistics of what is stored, without a read for them (measure.cuh).
// Launch: 256 threads, grid-stride, no shared memory; rope_measured: one block of 256 threads a run. Positions are checked
// by the host.
#include "measure.cuh"

struct Rotation {
    const u32* positions;
    const void *cosine, *sine;
    int table_tag;
    u32 heads, dim;
    int inverse;

    __device__ float one(void* out, int out_tag, const void* x, int x_tag, u64 i) const {
        u32 half_dim = dim / 2, d = (u32)(i % dim);
        u64 entry = (u64)positions[i / dim / heads] * half_dim + d % half_dim;
        bool first = d < half_dim;
        float straight = load(x, i, x_tag);
        float other = load(x, first ? i + half_dim : i - half_dim, x_tag);
        if (first != (inverse != 0)) other = -other;
        float a = round_to(straight * load(cosine, entry, table_tag), out_tag);
        float b = round_to(other * load(sine, entry, table_tag), out_tag);
        return stored(out, i, a + b, out_tag);
    }
};

extern "C" __global__ void rope(void* out, int out_tag, const void* x, int x_tag, const u32* positions, const void* cosine,
                                const void* sine, int table_tag, u32 heads, u32 dim, int inverse, u64 n) {
    Rotation rotation = {positions, cosine, sine, table_tag, heads, dim, inverse};
    for (u64 i = global_thread(); i < n; i += all_threads()) rotation.one(out, out_tag, x, x_tag, i);
}

extern "C" __global__ void rope_measured(void* out, int out_tag, const void* x, int x_tag, const u32* positions,
                                         const void* cosine, const void* sine, int table_tag, u32 heads, u32 dim,
                                         int inverse, Partial* partials, const Run* runs, Limits limits) {
    Rotation rotation = {positions, cosine, sine, table_tag, heads, dim, inverse};
    measured(partials, out, out_tag, runs, limits, [&](u64 i) { return rotation.one(out, out_tag, x, x_tag, i); });
}
