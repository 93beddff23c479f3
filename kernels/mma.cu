// The matrix unit itself: one mma.sync a step of k, so that a fingerprint sees the hardware's arithmetic and no library's.
//
// mma_linear    y[i, j] = sum over k of x[i, k] * w[j, k]; x [n, k], w [m, k] in f16, bf16 or f32 (rounded to tf32, ties
//               away), y [n, m] f32, accumulated in f32 as the unit does, steps of 16 (f16, bf16) or 8 (tf32) in
//               ascending k. n is a multiple of 16, m of 8, k of 16.
// Launch: one warp a tile of 16 x 8, grid (n / 16, m / 8), 32 threads, no shared memory. Compiled for compute_80, a module
// of its own: the unit's f32 accumulation of bf16 and tf32 begins there. Not for speed: nothing is staged or reused.
//
// Fragments: PTX ISA 8.0, "Matrix fragments for mma.m16n8k16" and "... mma.m16n8k8".
//
// Where there is no inline PTX (the emulator) a host twin stands in. It computes as published of the A100 (Fasi, Higham,
// Mikaitis, Pranesh, PeerJ CS 7:e330, 2021): blocks of 8 products (tf32: 4) and the accumulator, aligned to the largest,
// 24 bits below its leading one kept, cut off; the sum cut off to f32. It shows that this path and the fingerprint work,
// and nothing about a GPU.
#include "common.cuh"

struct Tile {
    const void *x, *w;
    u64 row, column, k;  // first row of x, first row of w, elements of both
};

__device__ __forceinline__ u16 bits16(const void* p, u64 i) { return ((const u16*)p)[i]; }
__device__ __forceinline__ float tf32_at(const void* p, u64 i) { return round_tf32(((const float*)p)[i]); }

#ifdef __CUDA_ARCH__

__device__ __forceinline__ u32 pair_at(const void* p, u64 i) { return (u32)bits16(p, i) | (u32)bits16(p, i + 1) << 16; }

// c += the tile's products of elements from, from + 1, ... of k.
__device__ __forceinline__ void multiply(const Tile& t, u64 from, int tag, float c[4]) {
    u32 group = threadIdx.x / 4, quad = threadIdx.x % 4;
    u64 low = (t.row + group) * t.k + from, high = low + 8 * t.k, b = (t.column + group) * t.k + from;
    if (tag == TF32) {
        u32 a0 = __float_as_uint(tf32_at(t.x, low + quad)), a1 = __float_as_uint(tf32_at(t.x, high + quad));
        u32 a2 = __float_as_uint(tf32_at(t.x, low + quad + 4)), a3 = __float_as_uint(tf32_at(t.x, high + quad + 4));
        u32 b0 = __float_as_uint(tf32_at(t.w, b + quad)), b1 = __float_as_uint(tf32_at(t.w, b + quad + 4));
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
        return;
    }
    u32 a0 = pair_at(t.x, low + quad * 2), a1 = pair_at(t.x, high + quad * 2);
    u32 a2 = pair_at(t.x, low + quad * 2 + 8), a3 = pair_at(t.x, high + quad * 2 + 8);
    u32 b0 = pair_at(t.w, b + quad * 2), b1 = pair_at(t.w, b + quad * 2 + 8);
    if (tag == BF16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

#else

static const int NONE = -2000;  // all terms are zero, or none is finite

// The host twin's sum of a block: `terms` exact products and, last, the accumulator; `exponent` the largest of theirs.
static float cut_off_sum(const double* terms, int count, int exponent) {
    if (exponent == NONE) exponent = 0;
    double plain = 0, sum = 0, quantum = std::ldexp(1.0, exponent - 24);
    for (int i = 0; i < count; i++) {
        plain += terms[i];
        sum += std::trunc(terms[i] / quantum) * quantum;
    }
    if (!std::isfinite(plain)) return (float)plain;
    float nearest = (float)sum;
    bool beyond = std::fabs((double)nearest) > std::fabs(sum) && std::isfinite(nearest);
    return beyond ? std::nextafterf(nearest, 0.0f) : nearest;
}

static void multiply(const Tile& t, u64 from, int tag, float c[4]) {
    u32 group = threadIdx.x / 4, quad = threadIdx.x % 4;
    int step = tag == TF32 ? 8 : 16, block = tag == TF32 ? 4 : 8;
    for (int place = 0; place < 4; place++) {
        u64 row = t.row + group + (place / 2) * 8, column = t.column + quad * 2 + place % 2;
        for (int begin = 0; begin < step; begin += block) {
            double terms[9];
            int largest = NONE;
            for (int i = 0; i < block; i++) {
                u64 k = from + begin + i;
                float a = tag == TF32 ? tf32_at(t.x, row * t.k + k) : load(t.x, row * t.k + k, tag);
                float b = tag == TF32 ? tf32_at(t.w, column * t.k + k) : load(t.w, column * t.k + k, tag);
                terms[i] = (double)a * b;
                if (a != 0 && b != 0 && std::isfinite(a) && std::isfinite(b)) largest = std::max(largest, std::ilogb(a) + std::ilogb(b));
            }
            terms[block] = c[place];
            if (c[place] != 0 && std::isfinite(c[place])) largest = std::max(largest, std::ilogb(c[place]));
            c[place] = cut_off_sum(terms, block + 1, largest);
        }
    }
}

#endif

extern "C" __global__ void mma_linear(const void* x, const void* w, float* y, int tag, u64 m, u64 k) {
    Tile tile = {x, w, (u64)blockIdx.x * 16, (u64)blockIdx.y * 8, k};
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (u64 from = 0; from < k; from += tag == TF32 ? 8 : 16) multiply(tile, from, tag, c);
    u32 group = threadIdx.x / 4, quad = threadIdx.x % 4;
    u64 at = (tile.row + group) * m + tile.column + quad * 2;
    y[at] = c[0];
    y[at + 1] = c[1];
    y[at + 8 * m] = c[2];
    y[at + 8 * m + 1] = c[3];
}
