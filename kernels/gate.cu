// SwiGLU's gate and its gradient, elementwise over n, all tensors in one dtype (tag) except as noted.
//
// gate       act = round(silu(g)); out = round(act · up)
// gate_grad  d_up = round(d·act); d_act = round(d·up); d_gate = round(d_act·σ(g)·(1 + g·(1 − σ(g))))
// σ(g) = 1/(1 + e^−g) in f32; each line is one PyTorch op with one rounding.
// Bytes: gate n·3·size, gate_grad n·5·size. Launch: 256 threads, grid-stride, no shared memory.
#include "common.cuh"

__device__ __forceinline__ float silu(float g) { return g / (1.0f + expf(-g)); }

extern "C" __global__ void gate(void* out, const void* g, int tag, const void* up, int up_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float act = round_to(silu(load(g, i, tag)), tag);
        store(out, i, act * load(up, i, up_tag), tag);
    }
}

extern "C" __global__ void gate_grad(void* d_gate, void* d_up, const void* d_out, int d_tag, const void* g, int tag,
                                     const void* up, int up_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float d = load(d_out, i, d_tag), x = load(g, i, tag);
        store(d_up, i, d * round_to(silu(x), tag), up_tag);
        float d_act = round_to(d * load(up, i, up_tag), tag);
        float sigmoid = 1.0f / (1.0f + expf(-x));
        store(d_gate, i, d_act * sigmoid * (1.0f + x * (1.0f - sigmoid)), tag);
    }
}
