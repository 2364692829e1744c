// A stack of its own for every lane, and the switch between two of them. A switch saves six registers and makes no system
// call: swapcontext() of the C library makes one, and takes thirty times as long.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(EKKO_TWIN_UCONTEXT)
#define EKKO_TWIN_UCONTEXT
#endif
#if defined(EKKO_TWIN_UCONTEXT)
#include <ucontext.h>
#endif

namespace twin {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t STACK_BYTES = 256 << 10;  // the sanitizer puts space around every variable
#else
constexpr std::size_t STACK_BYTES = 64 << 10;
#endif
constexpr std::size_t GUARD_BYTES = 4096;

#if !defined(EKKO_TWIN_UCONTEXT)
extern "C" void ekko_twin_switch(void** save, void* load);
asm(R"(
.text
.type ekko_twin_switch, @function
ekko_twin_switch:
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
.size ekko_twin_switch, .-ekko_twin_switch
)");
#endif

// What runs on a stack. The thread's own is one whose stack was not made here.
struct Fiber {
#if defined(EKKO_TWIN_UCONTEXT)
    ucontext_t context;
#else
    void* pointer = nullptr;  // of its stack, while it does not run
#endif
    std::byte* stack = nullptr;
    const void* bottom = nullptr;  // as the sanitizer knows it
    std::size_t bytes = 0;
    void* fake = nullptr;

    // `begin` is called when it is switched to next; it never returns.
    void prepare(std::byte* memory, void (*begin)()) {
        stack = memory + GUARD_BYTES;
        bottom = stack;
        bytes = STACK_BYTES;
#if defined(__SANITIZE_ADDRESS__)
        // The lane that had this stack did not return from all of its functions.
        __asan_unpoison_memory_region(stack, STACK_BYTES);
#endif
#if defined(EKKO_TWIN_UCONTEXT)
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, begin, 0);
#else
        void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
        *--top = nullptr;  // where `begin` would return to; it also aligns the stack as a call does
        *--top = reinterpret_cast<void*>(begin);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        pointer = top;
#endif
    }
};

// Called first on a stack that was switched to.
inline void arrived([[maybe_unused]] Fiber& here, [[maybe_unused]] Fiber* thread) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    std::size_t bytes = 0;
    __sanitizer_finish_switch_fiber(here.fake, &bottom, &bytes);
    if (thread != nullptr && thread->bottom == nullptr) {
        thread->bottom = bottom;
        thread->bytes = bytes;
    }
#endif
}

// Run `to`; return when somebody switches back to `from`. Never, when `last`.
inline void switch_fibers(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.bytes);
#endif
#if defined(EKKO_TWIN_UCONTEXT)
    swapcontext(&from.context, &to.context);
#else
    ekko_twin_switch(&from.pointer, to.pointer);
#endif
    arrived(from, nullptr);
}

// Stacks of one thread, kept between launches. Each has a page before it that cannot be touched.
class Stacks {
  public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks() { drop(); }

    // Room for `count` lanes, or false.
    bool reserve(std::size_t count) {
        if (count <= count_) return true;
        drop();
        const std::size_t stride = STACK_BYTES + GUARD_BYTES;
        void* memory = mmap(nullptr, count * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        memory_ = static_cast<std::byte*>(memory);
        count_ = count;
        for (std::size_t i = 0; i < count; i++) mprotect(memory_ + i * stride, GUARD_BYTES, PROT_NONE);
        return true;
    }
    std::byte* at(std::size_t index) const { return memory_ + index * (STACK_BYTES + GUARD_BYTES); }

  private:
    void drop() {
        if (memory_ != nullptr) munmap(memory_, count_ * (STACK_BYTES + GUARD_BYTES));
        memory_ = nullptr;
        count_ = 0;
    }
    std::byte* memory_ = nullptr;
    std::size_t count_ = 0;
};

}  // namespace twin
