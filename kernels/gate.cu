// SwiGLU's gate and its gradient, elementwise over n, all tensors in one dtype (tag) except as noted.
//
// gate       act = round(silu(g)); out = round(act · up)
// gate_grad  d_up = round(d·act); d_act = round(d·up); d_gate = round(d_act·σ(g)·(1 + g·(1 − σ(g))))
// σ(g) = 1/(1 + e^−g) in f32; each line is one PyTorch op with one rounding.
// *_measured: the same, and the statistics of what is stored, without a read for them (measure.cuh).
// Bytes: gate n·3·size, gate_grad n·5·size. Launch: 256 threads, grid-stride, no shared memory; *_measured: one block of 256
// threads a run.
#include "measure.cuh"

__device__ __forceinline__ float silu(float g) { return g / (1.0f + expf(-g)); }

__device__ __forceinline__ float gate_one(void* out, const void* g, int tag, const void* up, int up_tag, u64 i) {
    float act = round_to(silu(load(g, i, tag)), tag);
    return stored(out, i, act * load(up, i, up_tag), tag);
}

extern "C" __global__ void gate(void* out, const void* g, int tag, const void* up, int up_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) gate_one(out, g, tag, up, up_tag, i);
}

extern "C" __global__ void gate_measured(void* out, const void* g, int tag, const void* up, int up_tag, Partial* partials,
                                         const Run* runs, Limits limits) {
    measured(partials, out, tag, runs, limits, [&](u64 i) { return gate_one(out, g, tag, up, up_tag, i); });
}

struct GateGrad {
    void *d_gate, *d_up;
    const void *d_out, *g, *up;
    int d_tag, tag, up_tag;

    // Stores both gradients of element i and says what was stored.
    __device__ void one(u64 i, float& of_gate, float& of_up) const {
        float d = load(d_out, i, d_tag), x = load(g, i, tag);
        of_up = stored(d_up, i, d * round_to(silu(x), tag), up_tag);
        float d_act = round_to(d * load(up, i, up_tag), tag);
        float sigmoid = 1.0f / (1.0f + expf(-x));
        of_gate = stored(d_gate, i, d_act * sigmoid * (1.0f + x * (1.0f - sigmoid)), tag);
    }
};

extern "C" __global__ void gate_grad(void* d_gate, void* d_up, const void* d_out, int d_tag, const void* g, int tag,
                                     const void* up, int up_tag, u64 n) {
    GateGrad grad = {d_gate, d_up, d_out, g, up, d_tag, tag, up_tag};
    float of_gate, of_up;
    for (u64 i = global_thread(); i < n; i += all_threads()) grad.one(i, of_gate, of_up);
}

// partials: those of d_gate's runs, then those of d_up's.
extern "C" __global__ void gate_grad_measured(void* d_gate, void* d_up, const void* d_out, int d_tag, const void* g, int tag,
                                              const void* up, int up_tag, Partial* partials, const Run* runs,
                                              Limits limits) {
    GateGrad grad = {d_gate, d_up, d_out, g, up, d_tag, tag, up_tag};
    Run run = runs[blockIdx.x];
    Tally of_gate = empty_tally(), of_up = empty_tally();
    u32 i = threadIdx.x;
    for (; (u64)i + 7 * blockDim.x < run.count; i += 8 * blockDim.x) {
        Eight a = {0.0f, 0.0f, INFINITY, 0, 0}, b = a;
        u64 first = run.begin + i;
#pragma unroll 1
        for (u32 k = 0; k < 8; k++) {
            float to_gate, to_up;
            grad.one(first + k * blockDim.x, to_gate, to_up);
            add_to(a, to_gate, limits);
            add_to(b, to_up, limits);
        }
        bool gate_done = tallied(of_gate, a, limits), up_done = tallied(of_up, b, limits);
        if (gate_done && up_done) continue;
#pragma unroll 1
        for (u32 k = 0; k < 8; k++) {
            if (!gate_done) count(of_gate, load(d_gate, first + k * blockDim.x, tag), limits);
            if (!up_done) count(of_up, load(d_up, first + k * blockDim.x, up_tag), limits);
        }
    }
    for (; i < run.count; i += blockDim.x) {
        float a, b;
        grad.one(run.begin + i, a, b);
        count(of_gate, a, limits);
        count(of_up, b, limits);
    }
    finish(partials + blockIdx.x, of_gate);
    finish(partials + gridDim.x + blockIdx.x, of_up);
}
