// Fibers: one stack a CUDA thread, switched by hand (swapcontext would make a system call each time).
#include "emulator.h"

#include <sys/mman.h>

#ifndef __x86_64__
#error "the emulator switches stacks by hand on x86-64 only"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    size_t stack_bytes = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    void* fake_stack = nullptr;
};

static Fiber scheduler;
static Fiber* current = nullptr;

// Saves the callee-saved registers and the stack pointer in *from, and takes up those of `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

static void switch_to(Fiber* from, Fiber* to, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
    emulator_switch(&from->stack_pointer, to->stack_pointer);
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#else
    (void)ends;
    emulator_switch(&from->stack_pointer, to->stack_pointer);
#endif
}

static void entry() {
#if defined(__SANITIZE_ADDRESS__)
    // Also learns where the scheduler's own stack lies.
    __sanitizer_finish_switch_fiber(nullptr, (const void**)&scheduler.stack, &scheduler.stack_bytes);
#endif
    current->body(current->argument);
    switch_to(current, &scheduler, true);
    __builtin_unreachable();
}

void restart_fiber(Fiber* fiber, void (*body)(void*), void* argument) {
    fiber->body = body;
    fiber->argument = argument;
    // Six registers and the return address; the callee expects the stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(fiber->stack + fiber->stack_bytes) - 8;
    for (int i = 0; i < 6; i++) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    top[7] = nullptr;
    fiber->stack_pointer = top;
}

Fiber* make_fiber(void (*body)(void*), void* argument) {
    const size_t page = 4096, bytes = 128 * 1024;
    auto fiber = new Fiber;
    char* base = static_cast<char*>(
        mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) fail("no memory for the stack of an emulated thread");
    mprotect(base, page, PROT_NONE);
    fiber->stack = base + page;
    fiber->stack_bytes = bytes;
    restart_fiber(fiber, body, argument);
    return fiber;
}

void resume(Fiber* fiber) {
    current = fiber;
    switch_to(&scheduler, fiber, false);
    current = nullptr;
}

void yield() { switch_to(current, &scheduler, false); }

}  // namespace emulator
