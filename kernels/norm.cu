// RMSNorm of HF Llama, and its gradient with a frozen weight. One block a row, so a row's bits never depend on the
// rows beside it. x, dx [rows, columns] in x_tag; w [columns] in w_tag; r [rows] f32; y, dy in out_tag, dy_tag.
//
// rms_norm       r = 1/√(mean(x²) + eps); y = round(w · round(x·r, x), out)
// rms_norm_grad  g = round(dy·w, x); dx = g·r − ½·Σ(g·x)·r³/columns · 2x, rounded to x's dtype: aten's order of
//                mul, rsqrt, mean and pow backward; added to so_far (x_tag) if there is one, in f32 term by term
// Accumulator: f32, thread-strided, then warp butterfly, then over the warps.
// Bytes: forward rows·columns·(2·size x (second read hits L1/L2) + size out); backward the same with dy added.
// rms_norm_measured: the same, and the statistics of y, without a read for them (measure.cuh).
// Launch: rows blocks (rms_norm_measured: one a run, which is whole rows); 32…256 threads (a power of two), chosen by
// columns alone, so that the order of a row's sum is always the same.
#include "measure.cuh"

// 1/√(mean(x²) + eps) of one row, for every thread.
__device__ __forceinline__ float inverse_rms(float* r, const void* x, int x_tag, u64 row, u64 columns, float eps) {
    u64 first = row * columns;
    float sum = 0.0f;
    for (u64 c = threadIdx.x; c < columns; c += blockDim.x) {
        float value = load(x, first + c, x_tag);
        sum = fmaf(value, value, sum);
    }
    float scale = 1.0f / sqrtf(block_sum(sum) / (float)columns + eps);
    if (threadIdx.x == 0) r[row] = scale;
    return scale;
}

__device__ __forceinline__ float norm_one(void* y, int out_tag, const void* x, int x_tag, const void* w, int w_tag,
                                          float scale, u64 i, u64 c) {
    return stored(y, i, load(w, c, w_tag) * round_to(load(x, i, x_tag) * scale, x_tag), out_tag);
}

extern "C" __global__ void rms_norm(void* y, int out_tag, float* r, const void* x, int x_tag, const void* w, int w_tag,
                                    u64 columns, float eps) {
    u64 row = blockIdx.x, first = row * columns;
    float scale = inverse_rms(r, x, x_tag, row, columns, eps);
    for (u64 c = threadIdx.x; c < columns; c += blockDim.x) norm_one(y, out_tag, x, x_tag, w, w_tag, scale, first + c, c);
}

extern "C" __global__ void rms_norm_measured(void* y, int out_tag, float* r, const void* x, int x_tag, const void* w,
                                             int w_tag, u64 columns, float eps, Partial* partials, const Run* runs,
                                             Limits limits) {
    Run run = runs[blockIdx.x];
    Tally t = empty_tally();
    for (u64 first = run.begin; first < run.begin + run.count; first += columns) {
        float scale = inverse_rms(r, x, x_tag, first / columns, columns, eps);
        tally_run(t, y, out_tag, first, (u32)columns, limits,
                  [&](u64 i) { return norm_one(y, out_tag, x, x_tag, w, w_tag, scale, i, i - first); });
    }
    finish(partials + blockIdx.x, t);
}

extern "C" __global__ void rms_norm_grad(void* dx, const void* so_far, const void* dy, int dy_tag, const void* x, int x_tag, const void* w,
                                         int w_tag, const float* r, u64 columns) {
    u64 row = blockIdx.x, first = row * columns;
    float sum = 0.0f;
    for (u64 c = threadIdx.x; c < columns; c += blockDim.x) {
        float g = round_to(load(dy, first + c, dy_tag) * load(w, c, w_tag), x_tag);
        sum = fmaf(g, load(x, first + c, x_tag), sum);
    }
    float scale = r[row];
    float d_mean = -0.5f * block_sum(sum) * (scale * scale * scale) / (float)columns;
    for (u64 c = threadIdx.x; c < columns; c += blockDim.x) {
        float g = round_to(load(dy, first + c, dy_tag) * load(w, c, w_tag), x_tag);
        float by_scale = g * scale, by_mean = d_mean * (2.0f * load(x, first + c, x_tag));
        float sum = by_scale + by_mean;
        if (so_far) {
            float before = load(so_far, first + c, x_tag);
            sum = x_tag == F32 ? (before + by_scale) + by_mean : before + round_to(sum, x_tag);
        }
        store(dx, first + c, sum, x_tag);
    }
}
