// Device memory: each allocation in pages of its own between two that cannot be touched, filled with 0xFF (NaN in
// every dtype), unmapped when freed. Starts are multiples of 8 and no more, so that whoever needs a wider alignment is
// caught by UBSan. The at most 7 bytes before the guard page are checked when the allocation is freed. A kernel that
// leaves its buffers is stopped and named by the SIGSEGV handler.
// Under AddressSanitizer plain malloc is used instead, whose red zones are exact.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "emulator.h"

namespace emulator {

static const size_t page = 4096;
static const unsigned char canary = 0xA5;

struct Allocation {
    char* mapping;
    size_t mapped;
    size_t bytes;
};
static std::map<char*, Allocation>& live() {
    static std::map<char*, Allocation> table;
    return table;
}
static size_t used = 0;

void fail(const std::string& what) {
    fprintf(stderr, "cuda emulator: %s (%s)\n", what.c_str(), whereabouts().c_str());
    fflush(stderr);
    abort();
}

static void on_fault(int, siginfo_t* info, void*) {
    char* at = static_cast<char*>(info->si_addr);
    for (auto& [start, a] : live()) {
        if (at < a.mapping || at >= a.mapping + a.mapped) continue;
        fail("access " + std::to_string(at - start) + " bytes from the start of an allocation of " + std::to_string(a.bytes));
    }
    fail("access to memory that is not the device's, or was freed");
}

size_t total_memory() {
    static const char* limit = std::getenv("SPIKEPROBE_EMULATOR_MEMORY");
    return limit ? std::strtoull(limit, nullptr, 10) : (size_t)8 << 30;
}
size_t used_memory() { return used; }
size_t live_allocations() { return live().size(); }

void* allocate(size_t bytes) {
    static bool watching = false;
    if (!watching) {
        watching = true;
#if !defined(__SANITIZE_ADDRESS__)
        // On the alternative stack that Rust gives each thread: the fault may be an overflow of a fiber's.
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, nullptr);
#endif
    }
    if (used + bytes > total_memory()) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
    char* start = static_cast<char*>(malloc(bytes + 8)) + 8;
    __asan_poison_memory_region(start - 8, 8);
    live()[start] = {start, bytes, bytes};
#else
    size_t room = (bytes + 7) / 8 * 8, mapped = (room + page - 1) / page * page + 2 * page;
    char* mapping =
        static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping == MAP_FAILED) return nullptr;
    mprotect(mapping, page, PROT_NONE);
    mprotect(mapping + mapped - page, page, PROT_NONE);
    char* start = mapping + mapped - page - room;
    memset(mapping + page, canary, start - mapping - page);
    memset(start + bytes, canary, room - bytes);
    live()[start] = {mapping, mapped, bytes};
#endif
    memset(start, 0xFF, bytes);
    used += bytes;
    return start;
}

static void check(char* start, const Allocation& a) {
#if !defined(__SANITIZE_ADDRESS__)
    for (char* p = a.mapping + page; p < a.mapping + a.mapped - page; p++) {
        if (p == start) p += a.bytes;
        if (p < a.mapping + a.mapped - page && (unsigned char)*p != canary) {
            fail("guard byte " + std::to_string(p - start) + " of an allocation of " + std::to_string(a.bytes) + " was written");
        }
    }
#endif
}

void check_guards() {
    for (auto& [start, a] : live()) check(start, a);
}

bool release(void* address) {
    auto found = live().find(static_cast<char*>(address));
    if (found == live().end()) return false;
    check(found->first, found->second);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(found->first - 8, 8);
    free(found->first - 8);
#else
    munmap(found->second.mapping, found->second.mapped);
#endif
    used -= found->second.bytes;
    live().erase(found);
    return true;
}

bool covers(const void* address, size_t bytes) {
    auto at = static_cast<const char*>(address);
    auto next = live().upper_bound(const_cast<char*>(at));
    if (next == live().begin()) return false;
    --next;
    return at + bytes <= next->first + next->second.bytes;
}

void report_leaks() {
    // Tests share a device that lives as long as the process: only who asks is told.
    if (live().empty() || !std::getenv("SPIKEPROBE_EMULATOR_STRICT")) return;
    fprintf(stderr, "cuda emulator: %zu allocations (%zu bytes) of device memory were never freed\n", live().size(), used);
    fflush(stderr);
    _exit(86);
}

}  // namespace emulator
