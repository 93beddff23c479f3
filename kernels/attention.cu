// Causal attention over ragged rows, forward with log-sum-exp and backward, grouped-query heads, sliding window.
//
// q, o, d_o, dq [n, heads, dim]; k, v, dk, dv [n, kv_heads, dim]; lse, delta [n, heads] f32. Any dim up to 256.
// Query head h reads key head h / (heads / kv_heads). Query i sees keys j of its row with i − window < j ≤ i.
//
// Operands are rounded to `compute` as they are read, scores, softmax and all accumulators are f32; where the flash
// kernels of PyTorch feed a half matrix product (P into P·V and Pᵀ·dO, dS into dS·K and dSᵀ·Q), P and dS are rounded
// to `compute` too. dQ and dK get the softmax scale once, at the end.
//   forward   s = scale·q·k; P = e^(s − max), unnormalised; o = Σ P v / Σ P; lse = max + log Σ P
//   backward  P = e^(s − lse); delta = Σ d_o·o; dS = P·(d_o·v − delta); dq = scale·Σ dS k; dk = scale·Σ dS q; dv = Σ P d_o
// No S×S matrix is stored, nothing is added atomically: dq has one owner (a query tile), dk and dv another (a key tile).
//
// One block owns `tile` rows of one sequence for one head: 8 threads a row, each with every 8th column of the result in
// registers. Tiles of the other operand pass through shared memory.
//   kernel suffix   dim      forward tile  threads   backward tile  threads
//   _narrow         ≤ 128    32            256       16             128
//   _wide           ≤ 256    16            128        8              64
// Launch: (tiles, heads) blocks, for dk/dv (tiles, kv_heads). tiles[] = {first row of tile, its sequence's begin, end}.
// Bytes: o + q once; k, v once per query tile (L2). Flops: forward 4·dim per pair, dq 6·dim, dk and dv 8·dim.
#include "common.cuh"

struct Tile {
    u32 first, begin, end;
};

struct Geometry {
    u32 heads, kv_heads, dim, window;  // window: 0xFFFFFFFF when there is none
    float scale;
    int compute;  // operands, P and dS
    int result;   // what PyTorch's kernels hand over: compute, but F32 for TF32
};

#define LANES 8  // threads a row

// Not inlined: unrolled over a row's registers, every mix of dtypes would come to a megabyte of PTX.
__device__ __noinline__ float rounded(float x, int tag) { return round_to(x, tag); }
__device__ __noinline__ void put(void* p, u64 i, float x, int tag) { store(p, i, x, tag); }

// Static shared memory stays below 48 KiB a kernel: 37 KiB forward, 35 KiB backward.
static __shared__ float queries[32 * 129];         // forward: Q
static __shared__ float keys_or_values[32 * 129];  // forward: K, then V
static __shared__ float probabilities[32 * 33];    // forward: P
static __shared__ float own_a[16 * 129];           // backward: Q or K of the owner
static __shared__ float own_b[16 * 129];           // backward: dO or V of the owner
static __shared__ float passing_a[16 * 129];       // backward: K or Q of the tiles that pass by
static __shared__ float passing_b[16 * 129];       // backward: V or dO of the tiles that pass by
static __shared__ float weights_p[16 * 17];
static __shared__ float weights_ds[16 * 17];

// Copies rows first..first+tile of head `head` to shared memory, rounded to `compute`; rows from `end` on become 0.
template <int TILE>
__device__ __forceinline__ void fetch(float* to, const void* from, int tag, const Geometry& g, u32 of_heads, u32 head,
                                      u32 first, u32 end) {
    u32 stride = g.dim + 1;  // odd for even dims: the 8 lanes of a row hit 8 banks
#pragma unroll 1
    for (u32 i = threadIdx.x; i < TILE * g.dim; i += blockDim.x) {
        u32 r = i / g.dim, c = i % g.dim;
        float x = 0.0f;
        if (first + r < end) x = round_to(load(from, ((u64)(first + r) * of_heads + head) * g.dim + c, tag), g.compute);
        to[r * stride + c] = x;
    }
}

__device__ __forceinline__ float dot(const float* a, const float* b, u32 dim) {
    float sum = 0.0f;
#pragma unroll 4
    for (u32 c = 0; c < dim; c++) sum = fmaf(a[c], b[c], sum);
    return sum;
}

__device__ __forceinline__ bool sees(u32 query, u32 key, u32 end, u32 window) {
    return query < end && key < end && key <= query && query - key < window;
}

// Reductions over the 8 lanes of a row.
__device__ __forceinline__ float lanes_sum(float x) {
    for (int lanes = LANES / 2; lanes > 0; lanes >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    return x;
}
__device__ __forceinline__ float lanes_max(float x) {
    for (int lanes = LANES / 2; lanes > 0; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, lanes));
    return x;
}

// First key tile that the oldest query of the tile can see, as a multiple of TILE from the sequence's begin.
template <int TILE>
__device__ __forceinline__ u32 first_key(const Tile& t, u32 window) {
    u32 offset = t.first - t.begin;
    u32 oldest = offset + 1 > window ? offset + 1 - window : 0;
    return t.begin + oldest / TILE * TILE;
}

template <int TILE, int WIDTH>
__device__ __forceinline__ void forward(void* o, int o_tag, float* lse, const void* q, int q_tag, const void* k, int k_tag,
                                        const void* v, int v_tag, const Tile* tiles, const Geometry& g) {
    Tile t = tiles[blockIdx.x];
    u32 head = blockIdx.y, kv_head = head / (g.heads / g.kv_heads);
    u32 row = threadIdx.x / LANES, lane = threadIdx.x % LANES, query = t.first + row, stride = g.dim + 1;
    u32 last = t.first + TILE < t.end ? t.first + TILE : t.end;
    float most = -INFINITY, total = 0.0f, sum[WIDTH / LANES];
#pragma unroll
    for (int i = 0; i < WIDTH / LANES; i++) sum[i] = 0.0f;
    fetch<TILE>(queries, q, q_tag, g, g.heads, head, t.first, t.end);
    for (u32 key = first_key<TILE>(t, g.window); key < last; key += TILE) {
        __syncthreads();  // the previous tile's V has been read
        fetch<TILE>(keys_or_values, k, k_tag, g, g.kv_heads, kv_head, key, t.end);
        __syncthreads();
        float score[TILE / LANES], tile_most = -INFINITY;
#pragma unroll
        for (int i = 0; i < TILE / LANES; i++) {
            u32 j = lane + i * LANES;
            score[i] = -INFINITY;
            if (sees(query, key + j, t.end, g.window)) {
                score[i] = dot(queries + row * stride, keys_or_values + j * stride, g.dim) * g.scale;
            }
            tile_most = fmaxf(tile_most, score[i]);
        }
        float new_most = fmaxf(most, lanes_max(tile_most));
        // Until a finite score is seen the maximum is −Inf, and −Inf − −Inf would be NaN.
        float base = new_most == -INFINITY ? 0.0f : new_most;
        float shrink = expf(most - base), tile_total = 0.0f;
        most = new_most;
#pragma unroll
        for (int i = 0; i < TILE / LANES; i++) {
            u32 j = lane + i * LANES;
            float p = expf(score[i] - base);
            tile_total += p;
            probabilities[row * (TILE + 1) + j] = rounded(p, g.compute);
        }
        total = total * shrink + lanes_sum(tile_total);
        __syncthreads();  // K has been read, P is written
        fetch<TILE>(keys_or_values, v, v_tag, g, g.kv_heads, kv_head, key, t.end);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WIDTH / LANES; i++) sum[i] *= shrink;
#pragma unroll 1
        for (u32 j = 0; j < TILE && key + j < last; j++) {
            // A masked key must not bring in a NaN or Inf of its v.
            if (!sees(query, key + j, t.end, g.window)) continue;
            float p = probabilities[row * (TILE + 1) + j];
#pragma unroll
            for (int i = 0; i < WIDTH / LANES; i++) {
                u32 c = lane + i * LANES;
                if (c < g.dim) sum[i] = fmaf(p, keys_or_values[j * stride + c], sum[i]);
            }
        }
    }
    if (query >= t.end) return;
    if (lane == 0) lse[(u64)query * g.heads + head] = most + logf(total);
#pragma unroll
    for (int i = 0; i < WIDTH / LANES; i++) {
        u32 c = lane + i * LANES;
        if (c < g.dim) put(o, ((u64)query * g.heads + head) * g.dim + c, sum[i] / total, o_tag);
    }
}

#define FORWARD(NAME, TILE, WIDTH)                                                                                      \
    extern "C" __global__ void __launch_bounds__(TILE* LANES)                                                           \
        NAME(void* o, int o_tag, float* lse, const void* q, int q_tag, const void* k, int k_tag, const void* v,          \
             int v_tag, const Tile* tiles, Geometry g) {                                                                 \
        forward<TILE, WIDTH>(o, o_tag, lse, q, q_tag, k, k_tag, v, v_tag, tiles, g);                                     \
    }
FORWARD(attention_narrow, 32, 128)
FORWARD(attention_wide, 16, 256)

// delta[n, heads] = Σ d_o · o. One warp a (row, head); blocks of 256 threads. Bytes: n·heads·dim·(size d_o + size o).
extern "C" __global__ void attention_delta(float* delta, const void* d_o, int d_tag, const void* o, int o_tag, u64 rows,
                                           u32 dim, int compute) {
    u64 row = global_thread() / 32;
    if (row >= rows) return;  // whole warps leave together
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 32; c < dim; c += 32) {
        sum = fmaf(rounded(load(d_o, row * dim + c, d_tag), compute), load(o, row * dim + c, o_tag), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[row] = sum;
}

template <int TILE, int WIDTH>
__device__ __forceinline__ void query_grad(void* dq, int q_tag, const void* d_o, int d_tag, const void* q, const void* k,
                                           int k_tag, const void* v, int v_tag, const float* lse, const float* delta,
                                           const Tile* tiles, const Geometry& g) {
    Tile t = tiles[blockIdx.x];
    u32 head = blockIdx.y, kv_head = head / (g.heads / g.kv_heads);
    u32 row = threadIdx.x / LANES, lane = threadIdx.x % LANES, query = t.first + row, stride = g.dim + 1;
    u32 last = t.first + TILE < t.end ? t.first + TILE : t.end;
    bool inside = query < t.end;
    float row_lse = inside ? lse[(u64)query * g.heads + head] : 0.0f;
    float row_delta = inside ? delta[(u64)query * g.heads + head] : 0.0f;
    float sum[WIDTH / LANES];
#pragma unroll
    for (int i = 0; i < WIDTH / LANES; i++) sum[i] = 0.0f;
    fetch<TILE>(own_a, q, q_tag, g, g.heads, head, t.first, t.end);
    fetch<TILE>(own_b, d_o, d_tag, g, g.heads, head, t.first, t.end);
    for (u32 key = first_key<TILE>(t, g.window); key < last; key += TILE) {
        __syncthreads();
        fetch<TILE>(passing_a, k, k_tag, g, g.kv_heads, kv_head, key, t.end);
        fetch<TILE>(passing_b, v, v_tag, g, g.kv_heads, kv_head, key, t.end);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / LANES; i++) {
            u32 j = lane + i * LANES;
            float ds = 0.0f;
            if (sees(query, key + j, t.end, g.window)) {
                float p = expf(dot(own_a + row * stride, passing_a + j * stride, g.dim) * g.scale - row_lse);
                ds = rounded(p * (dot(own_b + row * stride, passing_b + j * stride, g.dim) - row_delta), g.compute);
            }
            weights_ds[row * (TILE + 1) + j] = ds;
        }
        __syncthreads();
#pragma unroll 1
        for (u32 j = 0; j < TILE && key + j < last; j++) {
            if (!sees(query, key + j, t.end, g.window)) continue;
            float ds = weights_ds[row * (TILE + 1) + j];
#pragma unroll
            for (int i = 0; i < WIDTH / LANES; i++) {
                u32 c = lane + i * LANES;
                if (c < g.dim) sum[i] = fmaf(ds, passing_a[j * stride + c], sum[i]);
            }
        }
    }
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < WIDTH / LANES; i++) {
        u32 c = lane + i * LANES;
        if (c < g.dim) {
            put(dq, ((u64)query * g.heads + head) * g.dim + c, rounded(sum[i] * g.scale, g.result), q_tag);
        }
    }
}

#define QUERY_GRAD(NAME, TILE, WIDTH)                                                                                   \
    extern "C" __global__ void __launch_bounds__(TILE* LANES)                                                           \
        NAME(void* dq, int q_tag, const void* d_o, int d_tag, const void* q, const void* k, int k_tag, const void* v,    \
             int v_tag, const float* lse, const float* delta, const Tile* tiles, Geometry g) {                           \
        query_grad<TILE, WIDTH>(dq, q_tag, d_o, d_tag, q, k, k_tag, v, v_tag, lse, delta, tiles, g);                     \
    }
QUERY_GRAD(attention_query_grad_narrow, 16, 128)
QUERY_GRAD(attention_query_grad_wide, 8, 256)

// The owner is a key tile; every query head of its group and every query tile from its own on passes by, in order.
template <int TILE, int WIDTH>
__device__ __forceinline__ void key_grad(void* dk, int k_tag, void* dv, int v_tag, const void* d_o, int d_tag,
                                         const void* q, int q_tag, const void* k, const void* v, const float* lse,
                                         const float* delta, const Tile* tiles, const Geometry& g) {
    Tile t = tiles[blockIdx.x];
    u32 kv_head = blockIdx.y, group = g.heads / g.kv_heads;
    u32 row = threadIdx.x / LANES, lane = threadIdx.x % LANES, key = t.first + row, stride = g.dim + 1;
    // Queries from first + TILE − 1 + window on are too young for every key of the tile.
    u32 last = t.end - t.first < TILE || t.end - t.first - TILE < g.window - 1 ? t.end : t.first + TILE - 1 + g.window;
    float total_k[WIDTH / LANES], total_v[WIDTH / LANES];
#pragma unroll
    for (int i = 0; i < WIDTH / LANES; i++) total_k[i] = total_v[i] = 0.0f;
    fetch<TILE>(own_a, k, k_tag, g, g.kv_heads, kv_head, t.first, t.end);
    fetch<TILE>(own_b, v, v_tag, g, g.kv_heads, kv_head, t.first, t.end);
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        float sum_k[WIDTH / LANES], sum_v[WIDTH / LANES];
#pragma unroll
        for (int i = 0; i < WIDTH / LANES; i++) sum_k[i] = sum_v[i] = 0.0f;
        for (u32 query = t.first; query < last; query += TILE) {
            __syncthreads();
            fetch<TILE>(passing_a, q, q_tag, g, g.heads, head, query, t.end);
            fetch<TILE>(passing_b, d_o, d_tag, g, g.heads, head, query, t.end);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < TILE / LANES; i++) {
                u32 j = lane + i * LANES;
                float p = 0.0f, ds = 0.0f;
                if (sees(query + j, key, t.end, g.window)) {
                    u64 at = (u64)(query + j) * g.heads + head;
                    p = expf(dot(passing_a + j * stride, own_a + row * stride, g.dim) * g.scale - lse[at]);
                    ds = rounded(p * (dot(passing_b + j * stride, own_b + row * stride, g.dim) - delta[at]), g.compute);
                }
                weights_p[row * (TILE + 1) + j] = rounded(p, g.compute);
                weights_ds[row * (TILE + 1) + j] = ds;
            }
            __syncthreads();
#pragma unroll 1
            for (u32 j = 0; j < TILE && query + j < t.end; j++) {
                if (!sees(query + j, key, t.end, g.window)) continue;
                float p = weights_p[row * (TILE + 1) + j], ds = weights_ds[row * (TILE + 1) + j];
#pragma unroll
                for (int i = 0; i < WIDTH / LANES; i++) {
                    u32 c = lane + i * LANES;
                    if (c >= g.dim) continue;
                    sum_k[i] = fmaf(ds, passing_a[j * stride + c], sum_k[i]);
                    sum_v[i] = fmaf(p, passing_b[j * stride + c], sum_v[i]);
                }
            }
        }
        // PyTorch's kernel gives one gradient a query head, rounded; the backward of repeating keys adds them up.
#pragma unroll
        for (int i = 0; i < WIDTH / LANES; i++) {
            total_k[i] += rounded(sum_k[i] * g.scale, g.result);
            total_v[i] += rounded(sum_v[i], g.result);
        }
    }
    if (key >= t.end) return;
#pragma unroll
    for (int i = 0; i < WIDTH / LANES; i++) {
        u32 c = lane + i * LANES;
        if (c >= g.dim) continue;
        u64 at = ((u64)key * g.kv_heads + kv_head) * g.dim + c;
        put(dk, at, total_k[i], k_tag);
        put(dv, at, total_v[i], v_tag);
    }
}

#define KEY_GRAD(NAME, TILE, WIDTH)                                                                                     \
    extern "C" __global__ void __launch_bounds__(TILE* LANES)                                                           \
        NAME(void* dk, int k_tag, void* dv, int v_tag, const void* d_o, int d_tag, const void* q, int q_tag,             \
             const void* k, const void* v, const float* lse, const float* delta, const Tile* tiles, Geometry g) {        \
        key_grad<TILE, WIDTH>(dk, k_tag, dv, v_tag, d_o, d_tag, q, q_tag, k, v, lse, delta, tiles, g);                   \
    }
KEY_GRAD(attention_key_grad_narrow, 16, 128)
KEY_GRAD(attention_key_grad_wide, 8, 256)
