// Runs a grid: blocks one after the other, the threads of a block as fibers that give way at barriers and shuffles.
//
// The order of threads and blocks is the schedule, SPIKEPROBE_EMULATOR_SCHEDULE = forward | reverse | shuffle:SEED
// (default forward): a kernel whose result depends on it is wrong. Forward and reverse let one warp run as far ahead
// of the others as barriers allow; shuffle advances all threads from wait to wait, in a new order each time.
// Shared memory is NaN at the start of every block.
// A barrier that some threads miss, or two different barriers at once, are errors, as are shuffles without all lanes.
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "emulator.h"

namespace emulator {

Index thread_index, block_index, block_dim, grid_dim;

static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}
void register_kernel(const Kernel& kernel) { kernels()[kernel.name] = kernel; }
const Kernel* find_kernel(const std::string& name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

enum class State { ready, at_barrier, at_shuffle, done };

struct Thread {
    Fiber* fiber = nullptr;
    State state = State::ready;
    Index index;
    const char* file = "";
    int line = 0;
    uint64_t word = 0;    // what it brings to a shuffle
    uint64_t result = 0;  // what it takes away
    unsigned int mask = 0;
    int lanes = 0;
};

static std::vector<Thread> threads;
static size_t current_thread, thread_count;
static const Kernel* current_kernel;
static void** current_arguments;

static std::string name_of(const Index& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string whereabouts() {
    if (!current_kernel) return "no kernel";
    return std::string("kernel ") + current_kernel->name + ", block " + name_of(block_index) + ", thread " +
           std::to_string(current_thread);
}

static void thread_body(void*) {
    current_kernel->run(current_arguments);
    threads[current_thread].state = State::done;
}

static void give_way(State state, const char* file, int line) {
    Thread& t = threads[current_thread];
    t.state = state;
    t.file = file;
    t.line = line;
    yield();
}

void wait_for_block(const char* file, int line) { give_way(State::at_barrier, file, line); }

uint64_t shuffle_word(unsigned int mask, uint64_t word, int lanes, const char* file, int line) {
    Thread& t = threads[current_thread];
    t.word = word;
    t.mask = mask;
    t.lanes = lanes;
    give_way(State::at_shuffle, file, line);
    return threads[current_thread].result;
}

// The schedule: a permutation of 0..n, drawn anew each time.
static std::vector<size_t> order(size_t n) {
    static const char* schedule = std::getenv("SPIKEPROBE_EMULATOR_SCHEDULE");
    static std::mt19937_64 random(schedule && !std::strncmp(schedule, "shuffle:", 8) ? std::atoll(schedule + 8) : 0);
    std::vector<size_t> result(n);
    for (size_t i = 0; i < n; i++) result[i] = i;
    if (schedule && !std::strcmp(schedule, "reverse")) {
        for (size_t i = 0; i < n; i++) result[i] = n - 1 - i;
    } else if (schedule && !std::strncmp(schedule, "shuffle:", 8)) {
        for (size_t i = n; i > 1; i--) std::swap(result[i - 1], result[random() % i]);
    }
    return result;
}

// Whether all warps advance from wait to wait together (shuffle), or one runs ahead of the others (forward, reverse).
static bool in_step() {
    static const char* schedule = std::getenv("SPIKEPROBE_EMULATOR_SCHEDULE");
    return schedule && !std::strncmp(schedule, "shuffle:", 8);
}

static bool same_place(const Thread& a, const Thread& b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

static std::string place(size_t t) {
    const Thread& thread = threads[t];
    std::string at = std::string(thread.file) + ":" + std::to_string(thread.line);
    switch (thread.state) {
        case State::done: return "thread " + std::to_string(t) + " has ended";
        case State::at_barrier: return "thread " + std::to_string(t) + " waits for the block at " + at;
        case State::at_shuffle: return "thread " + std::to_string(t) + " waits for its warp at " + at;
        default: return "thread " + std::to_string(t) + " runs";
    }
}

// Lets the warp of threads first..first+31 go if all its lanes have reached the same shuffle.
static bool release_warp(size_t first, std::string& error) {
    size_t last = first + 32 < thread_count ? first + 32 : thread_count, waiting = 0;
    for (size_t t = first; t < last; t++) waiting += threads[t].state == State::at_shuffle;
    if (waiting < 32) return false;
    for (size_t t = first; t < last; t++) {
        if (!same_place(threads[t], threads[first]) || threads[t].mask != 0xFFFFFFFFu) {
            error = "lanes of a warp meet in different shuffles, or with a partial mask: " + place(first) + ", " + place(t);
            return false;
        }
        threads[t].result = threads[first + ((t - first) ^ threads[t].lanes)].word;
    }
    for (size_t t = first; t < last; t++) threads[t].state = State::ready;
    return true;
}

// Lets the block go when all its threads have reached the same barrier.
static bool release_block(std::string& error) {
    for (size_t t = 0; t < thread_count; t++) {
        if (threads[t].state != State::at_barrier || !same_place(threads[t], threads[0])) {
            error = "divergent barrier: " + place(0) + ", " + place(t);
            return false;
        }
    }
    for (size_t t = 0; t < thread_count; t++) threads[t].state = State::ready;
    return true;
}

// Byte by byte: under AddressSanitizer the section holds red zones, which memset would stumble over.
__attribute__((no_sanitize_address)) static void poison(char* at, size_t bytes) {
    for (volatile char* p = at; p < at + bytes; p++) *p = (char)0xFF;
}

static void run_thread(size_t t) {
    if (threads[t].state != State::ready) return;
    current_thread = t;
    thread_index = threads[t].index;
    resume(threads[t].fiber);
}

static std::string run_block() {
    poison(current_kernel->shared, current_kernel->shared_bytes);
    for (size_t t = 0; t < thread_count; t++) {
        Thread& thread = threads[t];
        if (thread.fiber) {
            restart_fiber(thread.fiber, thread_body, nullptr);
        } else {
            thread.fiber = make_fiber(thread_body, nullptr);
        }
        thread.state = State::ready;
        thread.index = {(unsigned)(t % block_dim.x), (unsigned)(t / block_dim.x % block_dim.y),
                        (unsigned)(t / block_dim.x / block_dim.y)};
    }
    std::string error;
    for (;;) {
        if (in_step()) {
            for (size_t t : order(thread_count)) run_thread(t);
        } else {
            // A warp runs on alone until it waits for the block: what it may not read or overwrite yet, it does.
            for (size_t w : order((thread_count + 31) / 32)) {
                do {
                    for (size_t t = w * 32; t < w * 32 + 32 && t < thread_count; t++) run_thread(t);
                } while (release_warp(w * 32, error));
            }
        }
        bool released = false;
        size_t done = 0;
        for (size_t first = 0; first < thread_count; first += 32) released |= release_warp(first, error);
        if (!error.empty()) return error;
        for (size_t t = 0; t < thread_count; t++) done += threads[t].state == State::done;
        if (done == thread_count) return "";
        if (!released && !release_block(error)) return error;
    }
}

std::string run_grid(const Kernel& kernel, Index grid, Index block, void** arguments) {
    current_kernel = &kernel;
    current_arguments = arguments;
    grid_dim = grid;
    block_dim = block;
    thread_count = (size_t)block.x * block.y * block.z;
    if (threads.size() < thread_count) threads.resize(thread_count);
    std::string error;
    for (size_t b : order((size_t)grid.x * grid.y * grid.z)) {
        block_index = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        error = run_block();
        if (!error.empty()) {
            error = whereabouts() + ": " + error;
            break;
        }
    }
    current_kernel = nullptr;
    return error;
}

}  // namespace emulator
