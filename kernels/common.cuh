// What every kernel shares: dtype tags, loads and stores with one rounding, reductions of a fixed order.
//
// Storage is f32, bf16 or f16; arithmetic is f32. A tensor arrives as a pointer and a tag: the tag is the same for
// all threads, so the branch costs a predicate, and one kernel serves every mix of dtypes that the precision plan can
// ask for. bf16 is converted by bit operations (its intrinsics need sm_80; this module runs from sm_75 on).
// Compiled with --fmad=false: a multiply and an add are two roundings as in PyTorch's op chain; where one is wanted
// (dot products) the source says fmaf.
//
// No float atomics anywhere: partial results in one launch, combined in a second, always in the same order.
#pragma once
#include <cuda_fp16.h>

#ifndef INFINITY  // NVRTC has no math.h
#define INFINITY __int_as_float(0x7F800000)
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The order of src/device/cuda/kernels.rs.
enum Tag { F32 = 0, BF16 = 1, F16 = 2, TF32 = 3 };

__device__ __forceinline__ float bf16_to_f32(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Round to nearest even; NaN becomes the quiet NaN 0x7FC0 (c10::BFloat16 does the same).
__device__ __forceinline__ u16 f32_to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return (u16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Operand of a TF32 product: 10 mantissa bits, ties away from zero as cvt.rna.tf32 has it, NaN and Inf kept.
__device__ __forceinline__ float round_tf32(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7F800000u) == 0x7F800000u) return x;
    return __uint_as_float((bits + 0x1000u) & 0xFFFFE000u);
}

__device__ __forceinline__ float load(const void* p, u64 i, int tag) {
    if (tag == F32) return ((const float*)p)[i];
    u16 bits = ((const u16*)p)[i];
    return tag == BF16 ? bf16_to_f32(bits) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ void store(void* p, u64 i, float x, int tag) {
    if (tag == F32) {
        ((float*)p)[i] = x;
    } else {
        ((u16*)p)[i] = tag == BF16 ? f32_to_bf16(x) : __half_as_ushort(__float2half_rn(x));
    }
}

// x as it would come back after being stored with this tag.
__device__ __forceinline__ float round_to(float x, int tag) {
    if (tag == F32) return x;
    if (tag == BF16) return bf16_to_f32(f32_to_bf16(x));
    if (tag == F16) return __half2float(__float2half_rn(x));
    return round_tf32(x);
}

__device__ __forceinline__ u64 global_thread() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 all_threads() { return (u64)gridDim.x * blockDim.x; }

// Stores x and says what was stored.
__device__ __forceinline__ float stored(void* p, u64 i, float x, int tag) {
    store(p, i, x, tag);
    return round_to(x, tag);
}

// Butterflies: addition commutes, so every lane ends with the same bits.
__device__ __forceinline__ float warp_sum(float x) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    return x;
}
// NaN is lost here (fmaxf), and comes back when the caller subtracts the maximum from the NaN itself.
__device__ __forceinline__ float warp_max(float x) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, lanes));
    return x;
}

static __shared__ float warp_results[32];

// Sum and maximum over the block, for every thread. blockDim.x is a multiple of 32; all threads must call.
__device__ __forceinline__ float block_sum(float x) {
    x = warp_sum(x);
    __syncthreads();  // the previous reduction's readers are done
    if (threadIdx.x % 32 == 0) warp_results[threadIdx.x / 32] = x;
    __syncthreads();
    u32 lane = threadIdx.x % 32;
    return warp_sum(lane < blockDim.x / 32 ? warp_results[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float x) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warp_results[threadIdx.x / 32] = x;
    __syncthreads();
    u32 lane = threadIdx.x % 32;
    return warp_max(lane < blockDim.x / 32 ? warp_results[lane] : -INFINITY);
}

// A sum with its rounding error, about 48 bits: f64 would run at 1/64 rate on consumer cards.
struct Pair {
    float high, low;
};

// Knuth's TwoSum; the error terms add up in `low`.
__device__ __forceinline__ void pair_add(Pair& total, float x) {
    float sum = total.high + x;
    float part = sum - total.high;
    total.low += (total.high - (sum - part)) + (x - part);
    total.high = sum;
}
__device__ __forceinline__ void pair_add_square(Pair& total, float x) {
    float square = x * x;
    pair_add(total, square);
    total.low += fmaf(x, x, -square);
}
__device__ __forceinline__ double pair_value(Pair p) { return (double)p.high + (double)p.low; }
