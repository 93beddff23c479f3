// Optimizer updates in place, one launch a tensor; p, m, v of n elements in one dtype, g in its own.
//
// adamw  PyTorch's chain of tensor ops (contract 6.2); `each` is p's tag where every op rounds (the single-tensor and
//        foreach loops) or F32 where only the results do (the fused kernel):
//          p = p·(1 − lr·wd);  m = lerp(m, g, 1 − β1);  v = v·β2, then v + (1 − β2)·g·g
//          denominator = √v / √(1 − β2^t) + ε;  p = p + (−lr/(1 − β1^t))·m / denominator
//        The scalars are computed in f64 by the host, as PyTorch does, and arrive as f32.
// sgd    d = g + wd·p, rounded; p = p + (−lr)·d.
// Unscaling (GradScaler) and clipping have changed g before, by elementwise.cu's scale: PyTorch rounds there as well.
// Bytes: adamw n·(6·size p + size g); sgd n·(2·size p + size g).
// Launch: 256 threads, grid-stride, no shared memory.
#include "common.cuh"

struct AdamW {
    float decay;             // 1 − lr·wd; 1 leaves every bit of p alone
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float root_correction2;  // √(1 − β2^t)
    float epsilon;
    float minus_step_size;   // −lr/(1 − β1^t)
    int each;
};

extern "C" __global__ void adamw(void* p, const void* g, int g_tag, void* m, void* v, int tag, AdamW a, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float gradient = load(g, i, g_tag);
        float weight = round_to(load(p, i, tag) * a.decay, a.each);
        float first = load(m, i, tag), difference = gradient - first;
        // aten's lerp starts from the other end where the weight is 0.5 or more. fmaf where its kernels contract.
        first = a.one_minus_beta1 < 0.5f ? fmaf(a.one_minus_beta1, difference, first)
                                         : fmaf(a.one_minus_beta1 - 1.0f, difference, gradient);
        first = round_to(first, a.each);
        float second = fmaf(a.one_minus_beta2 * gradient, gradient, round_to(load(v, i, tag) * a.beta2, a.each));
        second = round_to(second, a.each);
        float root = round_to(sqrtf(second), a.each);
        float denominator = round_to(round_to(root / a.root_correction2, a.each) + a.epsilon, a.each);
        store(m, i, first, tag);
        store(v, i, second, tag);
        store(p, i, weight + a.minus_step_size * first / denominator, tag);
    }
}

extern "C" __global__ void sgd(void* p, int p_tag, const void* g, int g_tag, float minus_rate, float weight_decay, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) {
        float weight = load(p, i, p_tag), gradient = load(g, i, g_tag);
        if (weight_decay != 0.0f) gradient = round_to(fmaf(weight_decay, weight, gradient), p_tag);
        store(p, i, fmaf(minus_rate, gradient, weight), p_tag);
    }
}
