// Optimizer updates in place: all tensors of a step in one launch, gradients unscaled and clipped on the way.
//
// The table lists runs of elements (`Change`): p, m, v in one dtype (tag), g in its own. Both kernels begin with
//          g = round(round(g · unscale) · clip), rounded to g's dtype: GradScaler's division and clip_grad_norm_'s
//          multiplication, which PyTorch does in place; g itself stays as it is
// adamw  PyTorch's chain of tensor ops (contract 6.2); `each` is p's tag where every op rounds (the single-tensor and
//        foreach loops) or F32 where only the results do (the fused kernel):
//          p = p·(1 − lr·wd);  m = lerp(m, g, 1 − β1);  v = v·β2, then v + (1 − β2)·g·g
//          denominator = √v / √(1 − β2^t) + ε;  p = p + (−lr/(1 − β1^t))·m / denominator
//        The scalars are computed in f64 by the host, as PyTorch does, and arrive as f32.
// sgd    d = g + wd·p, rounded; p = p + (−lr)·d.
// moved[block] = Σ (new p − old p)² of the run: f32 pairs within a thread, f64 across the block. Elements that move by less
// than 1e-22 count as not moved.
// Bytes: adamw n·(6·size p + size g); sgd n·(2·size p + size g). About 25 flops an element.
// Launch: one block of 256 threads a run.
#include "common.cuh"

// The order of src/device/cuda/update.rs.
struct Change {
    void *p, *m, *v;  // of the run's first element; m and v are not touched by sgd
    const void* g;
    u32 count;
    int tag, g_tag, each;
    float decay;  // adamw: 1 − lr·wd, 1 leaves every bit of p alone; sgd: wd
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float root_correction2;  // √(1 − β2^t)
    float epsilon;
    float minus_step_size;  // adamw: −lr/(1 − β1^t); sgd: −lr
    float unused;
};

static __shared__ double moves[256];

// The block's sum, in a fixed order. All threads must call.
__device__ __forceinline__ void sum_moves(double* moved, Pair mine) {
    // TwoSum makes NaN of an infinity; the sum itself stays infinite.
    moves[threadIdx.x] = mine.high < INFINITY ? pair_value(mine) : (double)mine.high;
    for (u32 half_block = blockDim.x / 2; half_block > 0; half_block /= 2) {
        __syncthreads();
        if (threadIdx.x < half_block) moves[threadIdx.x] += moves[threadIdx.x + half_block];
    }
    if (threadIdx.x == 0) moved[blockIdx.x] = moves[0];
}

__device__ __forceinline__ float gradient_at(const Change& c, u32 i, float unscale, float clip) {
    float g = load(c.g, i, c.g_tag);
    if (unscale != 1.0f) g = round_to(g * unscale, c.g_tag);
    if (clip != 1.0f) g = round_to(g * clip, c.g_tag);
    return g;
}

// Stores p and notes how far it went.
__device__ __forceinline__ void move_to(const Change& c, u32 i, float before, float after, Pair& moved) {
    store(c.p, i, after, c.tag);
    pair_add_square(moved, round_to(after, c.tag) - before);
}

extern "C" __global__ void adamw(double* moved, const Change* changes, float unscale, float clip) {
    Change c = changes[blockIdx.x];
    Pair total = {0.0f, 0.0f};
    for (u32 i = threadIdx.x; i < c.count; i += blockDim.x) {
        float gradient = gradient_at(c, i, unscale, clip);
        float before = load(c.p, i, c.tag), weight = round_to(before * c.decay, c.each);
        float first = load(c.m, i, c.tag), difference = gradient - first;
        // aten's lerp starts from the other end where the weight is 0.5 or more. fmaf where its kernels contract.
        first = c.one_minus_beta1 < 0.5f ? fmaf(c.one_minus_beta1, difference, first)
                                         : fmaf(c.one_minus_beta1 - 1.0f, difference, gradient);
        first = round_to(first, c.each);
        float second = fmaf(c.one_minus_beta2 * gradient, gradient, round_to(load(c.v, i, c.tag) * c.beta2, c.each));
        second = round_to(second, c.each);
        float root = round_to(sqrtf(second), c.each);
        float denominator = round_to(round_to(root / c.root_correction2, c.each) + c.epsilon, c.each);
        store(c.m, i, first, c.tag);
        store(c.v, i, second, c.tag);
        move_to(c, i, before, weight + c.minus_step_size * first / denominator, total);
    }
    sum_moves(moved, total);
}

extern "C" __global__ void sgd(double* moved, const Change* changes, float unscale, float clip) {
    Change c = changes[blockIdx.x];
    Pair total = {0.0f, 0.0f};
    for (u32 i = threadIdx.x; i < c.count; i += blockDim.x) {
        float gradient = gradient_at(c, i, unscale, clip), weight = load(c.p, i, c.tag);
        if (c.decay != 0.0f) gradient = round_to(fmaf(c.decay, weight, gradient), c.tag);
        move_to(c, i, weight, fmaf(c.minus_step_size, gradient, weight), total);
    }
    sum_moves(moved, total);
}
