// The parts of the emulator that know each other: kernels' table, blocks and threads, device memory, streams.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

struct Index {
    unsigned int x, y, z;
};

// Of the thread that runs now. Kernels run on one host thread at a time.
extern Index thread_index, block_index, block_dim, grid_dim;

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

// ---- kernels (registry in blocks.cpp)
struct Kernel {
    const char* name;
    std::vector<size_t> sizes;  // of its parameters
    char* shared;               // static shared memory of its file
    size_t shared_bytes;
    std::function<void(void**)> run;
};
void register_kernel(const Kernel&);
const Kernel* find_kernel(const std::string& name);

// ---- blocks and threads (blocks.cpp)
void wait_for_block(const char* file, int line);
uint64_t shuffle_word(unsigned int mask, uint64_t word, int lanes, const char* file, int line);
// Runs all blocks; returns an empty string or what went wrong (divergent barrier, deadlock).
std::string run_grid(const Kernel&, Index grid, Index block, void** arguments);
// "kernel k, block (x,y,z), thread t" of what runs now, for messages.
std::string whereabouts();

// ---- fibers (fiber.cpp)
struct Fiber;
Fiber* make_fiber(void (*body)(void*), void* argument);
void restart_fiber(Fiber*, void (*body)(void*), void* argument);
void resume(Fiber*);   // from the scheduler: runs the fiber until it yields or ends
void yield();          // from a fiber: back to the scheduler

// ---- device memory (memory.cpp)
void* allocate(size_t bytes);          // nullptr: out of memory
bool release(void* address);           // false: not an allocation
bool covers(const void* address, size_t bytes);  // inside one live allocation
void check_guards();                   // aborts with a message if a guard zone was written
size_t total_memory();
size_t used_memory();
size_t live_allocations();
void report_leaks();

[[noreturn]] void fail(const std::string& what);
}  // namespace emulator
