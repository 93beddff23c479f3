// The four names of cuda_fp16.h that the kernels use, for g++ on x86-64 with F16C.
#pragma once
#include <immintrin.h>

struct __half {
    unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) { return _cvtsh_ss(h.bits); }
// cvt.rn.f16.f32 gives one canonical NaN; F16C would keep the payload.
inline __half __float2half_rn(float x) {
    return {x != x ? (unsigned short)0x7FFF : (unsigned short)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)};
}
