// How kernels touch memory, and the only way they do.
//
// Global<T> points to device memory and hides its pointer, so that every access says which order it needs:
//   read, write        memory that no other lane writes (read) or touches (write) while the kernel runs: arguments, own outputs
//   relaxed, relax     memory that others use meanwhile; coherent, but orders nothing else
//   acquire, release   what the releasing lane did before is seen by who acquires the released value
//   cas, add, ...      atomic read-modify-writes, relaxed: take a fence() for order
// Scope is the device: two launches on two streams, of one process or two, are in it. Indices are in elements of T.
// PTX's axioms hold only if racing accesses of one address have one size, so bytes that some lane reads as words are
// written as words. A Chunk is four words, not one: it may arrive half old, half new.
//
// EKKO_TWIN is set by gpu/twin/build.py; there, twin.h provides the same names on the host.
#pragma once

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

struct alignas(16) Chunk {
    u32 word[4];
};

#ifdef EKKO_TWIN
#include "twin.h"
#else

#define DEVICE __device__ __forceinline__

// KERNEL(threads a block at most, name, parameters...) { body }; parameters are Global<T>, numbers, structures of these.
#define KERNEL(threads_max, name, ...) extern "C" __global__ void __launch_bounds__(threads_max, 2) name(__VA_ARGS__)

DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }
DEVICE u32 bit_count(u32 bits) { return __popc(bits); }
DEVICE u32 lowest_bit(u32 bits) { return __ffs(bits) - 1; }  // of a number that is not 0

namespace memory {

// "memory" on all of them: the compiler must not move a plain access of the same address across. ptxas may, as PTX says.
template <int SIZE> struct Word;

template <> struct Word<1> {
    using Bits = u32;
    static DEVICE u8 relaxed(u64 at) {
        u32 value;
        asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
        return static_cast<u8>(value);
    }
    static DEVICE void relax(u64 at, u8 value) {
        asm volatile("st.relaxed.gpu.global.u8 [%0], %1;" ::"l"(at), "r"(static_cast<u32>(value)) : "memory");
    }
};

#define EKKO_WORD(SIZE, BITS, WIDTH, REGISTER)                                                                              \
    template <> struct Word<SIZE> {                                                                                        \
        using Bits = BITS;                                                                                                 \
        static DEVICE BITS relaxed(u64 at) {                                                                               \
            BITS value;                                                                                                    \
            asm volatile("ld.relaxed.gpu.global.b" WIDTH " %0, [%1];" : "=" REGISTER(value) : "l"(at) : "memory");         \
            return value;                                                                                                  \
        }                                                                                                                  \
        static DEVICE void relax(u64 at, BITS value) {                                                                     \
            asm volatile("st.relaxed.gpu.global.b" WIDTH " [%0], %1;" ::"l"(at), REGISTER(value) : "memory");              \
        }                                                                                                                  \
        static DEVICE BITS acquire(u64 at) {                                                                               \
            BITS value;                                                                                                    \
            asm volatile("ld.acquire.gpu.global.b" WIDTH " %0, [%1];" : "=" REGISTER(value) : "l"(at) : "memory");         \
            return value;                                                                                                  \
        }                                                                                                                  \
        static DEVICE void release(u64 at, BITS value) {                                                                   \
            asm volatile("st.release.gpu.global.b" WIDTH " [%0], %1;" ::"l"(at), REGISTER(value) : "memory");              \
        }                                                                                                                  \
        static DEVICE BITS cas(u64 at, BITS expected, BITS desired) {                                                      \
            BITS old;                                                                                                      \
            asm volatile("atom.relaxed.gpu.global.cas.b" WIDTH " %0, [%1], %2, %3;"                                        \
                         : "=" REGISTER(old)                                                                               \
                         : "l"(at), REGISTER(expected), REGISTER(desired)                                                  \
                         : "memory");                                                                                      \
            return old;                                                                                                    \
        }                                                                                                                  \
        static DEVICE BITS exchange(u64 at, BITS value) { return rmw_exchange(at, value); }                                \
        static DEVICE BITS add(u64 at, BITS value) { return rmw_add(at, value); }                                          \
        static DEVICE BITS max(u64 at, BITS value) { return rmw_max(at, value); }                                          \
                                                                                                                           \
      private:                                                                                                             \
        EKKO_RMW(rmw_exchange, "exch.b" WIDTH, BITS, REGISTER)                                                             \
        EKKO_RMW(rmw_add, "add.u" WIDTH, BITS, REGISTER)                                                                   \
        EKKO_RMW(rmw_max, "max.u" WIDTH, BITS, REGISTER)                                                                   \
    };
#define EKKO_RMW(name, operation, BITS, REGISTER)                                                                          \
    static DEVICE BITS name(u64 at, BITS value) {                                                                          \
        BITS old;                                                                                                          \
        asm volatile("atom.relaxed.gpu.global." operation " %0, [%1], %2;"                                                 \
                     : "=" REGISTER(old)                                                                                   \
                     : "l"(at), REGISTER(value)                                                                            \
                     : "memory");                                                                                          \
        return old;                                                                                                        \
    }
EKKO_WORD(4, u32, "32", "r")
EKKO_WORD(8, u64, "64", "l")
#undef EKKO_RMW
#undef EKKO_WORD

template <> struct Word<16> {
    using Bits = Chunk;
    static DEVICE Chunk relaxed(u64 at) {
        Chunk value;
        asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                     : "l"(at)
                     : "memory");
        return value;
    }
    static DEVICE void relax(u64 at, Chunk value) {
        asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.word[0]), "r"(value.word[1]),
                     "r"(value.word[2]), "r"(value.word[3])
                     : "memory");
    }
};

}  // namespace memory

// T is an unsigned integer or a Chunk, for all but read and write, which take any structure.
template <typename T> class Global {
  public:
    DEVICE Global operator+(i64 count) const { return Global(pointer_ + count); }
    template <typename U> DEVICE Global<U> as() const { return Global<U>(reinterpret_cast<U*>(pointer_)); }

    DEVICE T read(i64 index = 0) const { return pointer_[index]; }
    DEVICE void write(i64 index, T value) const { pointer_[index] = value; }
    DEVICE T relaxed(i64 index = 0) const { return Word::relaxed(at(index)); }
    DEVICE void relax(i64 index, T value) const { Word::relax(at(index), value); }
    DEVICE T acquire(i64 index = 0) const { return Word::acquire(at(index)); }
    DEVICE void release(i64 index, T value) const { Word::release(at(index), value); }
    // Each returns what was there before.
    DEVICE T cas(i64 index, T expected, T desired) const { return Word::cas(at(index), expected, desired); }
    DEVICE T exchange(i64 index, T value) const { return Word::exchange(at(index), value); }
    DEVICE T add(i64 index, T value) const { return Word::add(at(index), value); }
    DEVICE T max(i64 index, T value) const { return Word::max(at(index), value); }

    Global() = default;

  private:
    using Word = memory::Word<sizeof(T)>;
    template <typename U> friend class Global;
    explicit DEVICE Global(T* pointer) : pointer_(pointer) {}
    DEVICE u64 at(i64 index) const { return __cvta_generic_to_global(pointer_ + index); }
    T* pointer_;
};

// Orders all accesses of this lane before it with all after it, for who synchronises with it by what it reads or writes.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Also keeps a store before from being overtaken by a load after, which fence() does not.
DEVICE void fence_sc() { asm volatile("fence.sc.gpu;" ::: "memory"); }

#endif
