// What CUDA C++ means to g++: included before an unchanged .cu file (see README.md). Owns the language; the order in
// which threads run is blocks.cpp's business.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __device__
#define __global__
#define __forceinline__ static inline
#define __noinline__ static __attribute__((noinline))
#define __launch_bounds__(...)
// One section a file, so that it can be poisoned before every block. g++ ignores section attributes on variables in
// templates: the kernels declare shared arrays outside.
#define __shared__ __attribute__((section(SHARED_SECTION), used))
extern char SHARED_START[], SHARED_STOP[];  // the linker's names for the section's ends

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim

#define __syncthreads() emulator::wait_for_block(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulator::shuffle_xor(mask, value, lanes, __FILE__, __LINE__)

inline float __uint_as_float(unsigned int x) { return emulator::bits<float>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline unsigned int __float_as_uint(float x) { return emulator::bits<unsigned int>(x); }

namespace emulator {
// The value of lane ^ lanes of the same warp: every lane leaves its own, waits for the others, reads.
template <typename T>
T shuffle_xor(unsigned int mask, T value, int lanes, const char* file, int line) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    word = shuffle_word(mask, word, lanes, file, line);
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

// Calls a kernel with the argument table of cuLaunchKernel: one pointer a parameter.
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

// Enters a kernel into the table that cuModuleGetFunction reads.
#define REGISTER_KERNEL(NAME) static emulator::Registration registration_of_##NAME(#NAME, NAME, SHARED_START, SHARED_STOP);
struct Registration {
    template <typename... A>
    Registration(const char* name, void (*kernel)(A...), char* shared, char* shared_end) {
        Kernel entry;
        entry.name = name;
        entry.sizes = {sizeof(A)...};
        entry.shared = shared;
        entry.shared_bytes = shared_end - shared;
        entry.run = [kernel](void** arguments) { call(kernel, arguments, std::index_sequence_for<A...>()); };
        register_kernel(entry);
    }
};
}  // namespace emulator
