// Cross-entropy of labelled rows, forward and gradient in one kernel. One block a row.
//
// logits, d_logits [rows, vocab] in tag; labels [rows] u32 (checked by the host); seed, loss [rows] f32.
// log p = (x − max) − log Σ e^(x − max); loss = −log p_label; d = e^(log p)·seed − one-hot·seed (aten's order), rounded
// to logits' dtype once.
// Accumulator: f32, thread-strided, warp butterfly, then over the warps. A NaN anywhere in a row makes loss and the
// whole gradient row NaN, as log_softmax does; +Inf likewise.
// d_logits may be logits: a thread reads each of its elements for the last time just before it writes it, and the label's
// is read by everybody before a barrier that all writes follow.
// Bytes: rows·vocab·size·(1 read from memory, 2 from L2 when a row fits, 1 write).
// Launch: rows blocks of 256 threads.
#include "common.cuh"

extern "C" __global__ void cross_entropy(float* loss, void* d_logits, const void* logits, int tag, const u32* labels,
                                         const float* seed, u64 vocab) {
    u64 row = blockIdx.x, first = row * vocab;
    float most = -INFINITY;
    for (u64 c = threadIdx.x; c < vocab; c += blockDim.x) most = fmaxf(most, load(logits, first + c, tag));
    most = block_max(most);
    float sum = 0.0f;
    for (u64 c = threadIdx.x; c < vocab; c += blockDim.x) sum += expf(load(logits, first + c, tag) - most);
    u64 label = labels[row];
    float at_label = load(logits, first + label, tag), weight = seed[row];
    float log_sum = logf(block_sum(sum));
    if (threadIdx.x == 0) loss[row] = -((at_label - most) - log_sum);
    for (u64 c = threadIdx.x; c < vocab; c += blockDim.x) {
        float p = expf((load(logits, first + c, tag) - most) - log_sum);
        store(d_logits, first + c, c == label ? p * weight - weight : p * weight, tag);
    }
}
