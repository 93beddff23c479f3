// libcublas.so.12, as far as spikeprobe calls it: GemmEx with f32 accumulation in ascending k, one rounding of C.
// Column-major like the original. Unknown types, modes or algorithms are refused, not guessed.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

API int emulator_enqueue(void* stream, void (*work)(void*), void* argument, void (*drop)(void*));
API bool emulator_covers(const void* address, size_t bytes);

enum Status { success = 0, not_initialized = 1, invalid_value = 7, mapping_error = 11, not_supported = 15 };
enum Type { r_32f = 0, r_16f = 2, r_16bf = 14 };
enum Compute { compute_32f = 68, compute_32f_pedantic = 69, compute_32f_fast_tf32 = 77 };

struct Handle {
    void* stream = nullptr;
    unsigned mode = 0;
};

static float bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
static float round_tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7F800000u) != 0x7F800000u) bits = (bits + 0x1000u) & 0xFFFFE000u;
    memcpy(&x, &bits, 4);
    return x;
}
static float get(const void* p, size_t i, int type) {
    if (type == r_32f) return static_cast<const float*>(p)[i];
    uint16_t h = static_cast<const uint16_t*>(p)[i];
    return type == r_16f ? _cvtsh_ss(h) : bf16_to_f32(h);
}
static void set(void* p, size_t i, float x, int type) {
    if (type == r_32f) static_cast<float*>(p)[i] = x;
    else static_cast<uint16_t*>(p)[i] = type == r_16f ? (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT) : f32_to_bf16(x);
}
static size_t size_of(int type) { return type == r_32f ? 4 : 2; }
static bool known(int type) { return type == r_32f || type == r_16f || type == r_16bf; }

struct Product {
    bool transpose_a, transpose_b, tf32;
    size_t m, n, k, lda, ldb, ldc;
    float alpha, beta;
    const void *a, *b;
    void* c;
    int a_type, b_type, c_type;
};

// op(A) as [k][m] and op(B) as [n][k]; then column j of C is the sum over k of A's rows times one number each.
static void run(void* argument) {
    const Product& p = *static_cast<Product*>(argument);
    auto operand = [&](const void* x, int type, size_t at) {
        float value = get(x, at, type);
        return p.tf32 && type == r_32f ? round_tf32(value) : value;
    };
    std::vector<float> a(p.k * p.m), b(p.n * p.k), sum(p.m);
    for (size_t l = 0; l < p.k; l++)
        for (size_t i = 0; i < p.m; i++) a[l * p.m + i] = operand(p.a, p.a_type, p.transpose_a ? i * p.lda + l : l * p.lda + i);
    for (size_t j = 0; j < p.n; j++)
        for (size_t l = 0; l < p.k; l++) b[j * p.k + l] = operand(p.b, p.b_type, p.transpose_b ? l * p.ldb + j : j * p.ldb + l);
    for (size_t j = 0; j < p.n; j++) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (size_t l = 0; l < p.k; l++) {
            const float* row = &a[l * p.m];
            float factor = b[j * p.k + l];
            for (size_t i = 0; i < p.m; i++) sum[i] = __builtin_fmaf(row[i], factor, sum[i]);
        }
        for (size_t i = 0; i < p.m; i++) {
            size_t at = j * p.ldc + i;
            float before = p.beta == 0.0f ? 0.0f : p.beta * get(p.c, at, p.c_type);
            set(p.c, at, p.alpha * sum[i] + before, p.c_type);
        }
    }
}

API int cublasCreate_v2(void** handle) {
    *handle = new Handle;
    return success;
}
API int cublasDestroy_v2(void* handle) {
    delete static_cast<Handle*>(handle);
    return success;
}
API int cublasSetStream_v2(void* handle, void* stream) {
    static_cast<Handle*>(handle)->stream = stream;
    return success;
}
API int cublasSetMathMode(void* handle, unsigned mode) {
    static_cast<Handle*>(handle)->mode = mode;
    return success;
}
API int cublasSetWorkspace_v2(void*, void* workspace, size_t bytes) {
    return emulator_covers(workspace, bytes) ? success : invalid_value;
}
API int cublasGetVersion_v2(void*, int* version) {
    *version = 120000;
    return success;
}
API int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                     int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                     int compute, int algorithm) {
    auto h = static_cast<Handle*>(handle);
    if (!h) return not_initialized;
    bool plain = m > 0 && n > 0 && k >= 0 && (op_a == 0 || op_a == 1) && (op_b == 0 || op_b == 1) && a_type == b_type &&
                 known(a_type) && (c_type == r_32f || c_type == a_type) && (algorithm == -1 || algorithm == 99) &&
                 (compute == compute_32f || compute == compute_32f_pedantic || compute == compute_32f_fast_tf32);
    if (!plain) return not_supported;
    auto extent = [](size_t rows, size_t columns, size_t leading) { return (columns - 1) * leading + rows; };
    size_t rows_a = op_a ? k : m, columns_a = op_a ? m : k, rows_b = op_b ? n : k, columns_b = op_b ? k : n;
    if ((size_t)lda < rows_a || (size_t)ldb < rows_b || ldc < m) return invalid_value;
    bool inside = emulator_covers(c, extent(m, n, ldc) * size_of(c_type));
    if (k > 0) {
        inside = inside && emulator_covers(a, extent(rows_a, columns_a, lda) * size_of(a_type)) &&
                 emulator_covers(b, extent(rows_b, columns_b, ldb) * size_of(b_type));
    }
    if (!inside) return mapping_error;
    bool tf32 = compute == compute_32f_fast_tf32 || (h->mode & 0xF) == 3;
    auto product = new Product{op_a == 1, op_b == 1, tf32, (size_t)m, (size_t)n, (size_t)k, (size_t)lda, (size_t)ldb,
                               (size_t)ldc, *static_cast<const float*>(alpha), *static_cast<const float*>(beta), a, b, c,
                               a_type, b_type, c_type};
    return emulator_enqueue(h->stream, run, product, [](void* p) { delete static_cast<Product*>(p); }) == 0 ? success : 13;
}
