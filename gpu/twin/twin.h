// The host's side of memory.cuh and warp.cuh: the same names for kernels that run on the host, lane by lane.
//
// Every access and every collective goes to the runtime (runtime.cpp), which may run other lanes first. A Global<T> holds an
// address whose upper 16 bits say which allocation it is of, so that every access is checked against that allocation's bounds.
// Built with EKKO_TWIN_MODEL, memory is the weak one of model.h; without, it is this machine's, by atomics, and other processes
// may have it mapped.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#define DEVICE inline

namespace twin {

enum Order : u32 { PLAIN, RELAXED, ACQUIRE, RELEASE };
enum Operation : u32 { CAS, EXCHANGE, ADD, MAX };
enum Collective : u32 { SYNC, BALLOT, ANY, ALL, SHFL, MATCH, BLOCK };

struct Here {
    u32 thread, block, block_size, grid_size;
};

#pragma GCC visibility push(default)
const Here& here();
void* access(u64 address, u32 bytes, u32 alignment);  // checks bounds, may run other lanes
void load(u64 address, void* value, u32 bytes, u32 cell, Order order);
void store(u64 address, const void* value, u32 bytes, u32 cell, Order order);
u64 update(u64 address, u32 bytes, Operation operation, u64 first, u64 second);
void fence(bool sequential);
u64 collective(Collective kind, u32 mask, u64 value, u32 source);
void* shared(const void* site, u32 bytes);  // the block's memory of this SHARED
void shared_access(u32 index, u32 count);
void changed_by_cas();  // the lane may hold a lock now
#pragma GCC visibility pop

// What a kernel is to who launches it: how to run one lane, and what it takes.
struct Entry {
    void (*lane)(void** arguments);
    const char* name;
    u32 threads_max;
    u32 count;
    u32 sizes[32];  // bytes of each parameter
    u32 global[32];  // whether it is a Global
};

// Words of this size are read and written whole. A vector arrives in words: PTX orders the parts of a vector in no way.
template <typename T> constexpr u32 cell_of() { return alignof(T) >= 16 ? 4 : alignof(T); }

}  // namespace twin

template <typename T> class Global {
  public:
    Global operator+(i64 count) const { return Global(at(count)); }
    template <typename U> Global<U> as() const { return Global<U>(address_); }

    T read(i64 index = 0) const { return load(index, twin::PLAIN); }
    void write(i64 index, T value) const { store(index, value, twin::PLAIN); }
    T relaxed(i64 index = 0) const { return load(index, twin::RELAXED); }
    void relax(i64 index, T value) const { store(index, value, twin::RELAXED); }
    T acquire(i64 index = 0) const { return load(index, twin::ACQUIRE); }
    void release(i64 index, T value) const { store(index, value, twin::RELEASE); }
    T cas(i64 index, T expected, T desired) const {
        T old = update(index, twin::CAS, expected, desired);
        if (old == expected) twin::changed_by_cas();
        return old;
    }
    T exchange(i64 index, T value) const { return update(index, twin::EXCHANGE, value, 0); }
    T add(i64 index, T value) const { return update(index, twin::ADD, value, 0); }
    T max(i64 index, T value) const { return update(index, twin::MAX, value, 0); }

    Global() = default;

  private:
    template <typename U> friend class Global;
    explicit Global(u64 address) : address_(address) {}
    u64 at(i64 index) const { return address_ + static_cast<u64>(index) * sizeof(T); }

#ifdef EKKO_TWIN_MODEL
    T load(i64 index, twin::Order order) const {
        T value;
        twin::load(at(index), &value, sizeof(T), twin::cell_of<T>(), order);
        return value;
    }
    void store(i64 index, const T& value, twin::Order order) const {
        twin::store(at(index), &value, sizeof(T), twin::cell_of<T>(), order);
    }
    T update(i64 index, twin::Operation operation, T first, T second) const {
        return static_cast<T>(twin::update(at(index), sizeof(T), operation, first, second));
    }
#else
    T load(i64 index, twin::Order order) const {
        const void* from = twin::access(at(index), sizeof(T), alignof(T));
        T value;
        if constexpr (std::is_integral_v<T>) {
            const T* word = static_cast<const T*>(from);
            value = order == twin::ACQUIRE ? __atomic_load_n(word, __ATOMIC_ACQUIRE) : __atomic_load_n(word, __ATOMIC_RELAXED);
        } else if constexpr (std::is_same_v<T, Chunk>) {
            for (u32 i = 0; i < 4; i++) value.word[i] = __atomic_load_n(static_cast<const u32*>(from) + i, __ATOMIC_RELAXED);
        } else {
            std::memcpy(&value, from, sizeof(T));
        }
        return value;
    }
    void store(i64 index, const T& value, twin::Order order) const {
        void* to = twin::access(at(index), sizeof(T), alignof(T));
        if constexpr (std::is_integral_v<T>) {
            T* word = static_cast<T*>(to);
            if (order == twin::RELEASE) __atomic_store_n(word, value, __ATOMIC_RELEASE);
            else __atomic_store_n(word, value, __ATOMIC_RELAXED);
        } else if constexpr (std::is_same_v<T, Chunk>) {
            for (u32 i = 0; i < 4; i++) __atomic_store_n(static_cast<u32*>(to) + i, value.word[i], __ATOMIC_RELAXED);
        } else {
            std::memcpy(to, &value, sizeof(T));
        }
    }
    T update(i64 index, twin::Operation operation, T first, T second) const {
        T* word = static_cast<T*>(twin::access(at(index), sizeof(T), alignof(T)));
        switch (operation) {
            case twin::EXCHANGE: return __atomic_exchange_n(word, first, __ATOMIC_RELAXED);
            case twin::ADD: return __atomic_fetch_add(word, first, __ATOMIC_RELAXED);
            case twin::CAS: __atomic_compare_exchange_n(word, &first, second, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); return first;
            case twin::MAX: break;
        }
        T old = __atomic_load_n(word, __ATOMIC_RELAXED);
        while (old < first && !__atomic_compare_exchange_n(word, &old, first, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
        return old;
    }
#endif
    u64 address_;
};

namespace twin {

template <typename T> struct is_global : std::false_type {};
template <typename T> struct is_global<Global<T>> : std::true_type {};

template <auto FUNCTION, typename... T, std::size_t... I>
void call(void (*)(T...), void** arguments, std::index_sequence<I...>) {
    FUNCTION(*static_cast<std::remove_reference_t<T>*>(arguments[I])...);
}
template <auto FUNCTION, typename... T> constexpr Entry entry_of(void (*)(T...), const char* name, u32 threads_max) {
    static_assert(sizeof...(T) <= 32, "a kernel has at most 32 parameters");
    static_assert((std::is_trivially_copyable_v<T> && ...), "parameters are copied to the device byte by byte");
    return {[](void** arguments) { call<FUNCTION>(FUNCTION, arguments, std::index_sequence_for<T...>()); },
            name, threads_max, sizeof...(T), {sizeof(T)...}, {is_global<T>::value...}};
}

template <typename T> u64 to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 4 or 8 bytes");
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <typename T> T from_bits(u64 bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace twin

#define KERNEL(threads_max, name, ...)                                                                          \
    static void name##_lane(__VA_ARGS__);                                                                       \
    extern "C" __attribute__((visibility("default"))) const twin::Entry ekko_kernel_##name;                     \
    const twin::Entry ekko_kernel_##name = twin::entry_of<name##_lane>(name##_lane, #name, threads_max);        \
    static void name##_lane(__VA_ARGS__)

inline u32 bits_of(float value) { return static_cast<u32>(twin::to_bits(value)); }
inline float float_of(u32 bits) { return twin::from_bits<float>(bits); }
inline u64 multiply_high(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
inline u32 bit_count(u32 bits) { return static_cast<u32>(__builtin_popcount(bits)); }
inline u32 lowest_bit(u32 bits) { return static_cast<u32>(__builtin_ctz(bits)); }

inline void fence() { twin::fence(false); }
inline void fence_sc() { twin::fence(true); }

inline u32 thread_index() { return twin::here().thread; }
inline u32 block_index() { return twin::here().block; }
inline u32 block_size() { return twin::here().block_size; }
inline u32 grid_size() { return twin::here().grid_size; }
inline u32 lane() { return twin::here().thread & 31; }

inline void sync(u32 mask) { twin::collective(twin::SYNC, mask, 0, 0); }
inline void block_sync() { twin::collective(twin::BLOCK, 0, 0, 0); }
inline u32 ballot(u32 mask, bool vote) { return static_cast<u32>(twin::collective(twin::BALLOT, mask, vote, 0)); }
inline bool any(u32 mask, bool vote) { return twin::collective(twin::ANY, mask, vote, 0) != 0; }
inline bool all(u32 mask, bool vote) { return twin::collective(twin::ALL, mask, vote, 0) != 0; }
template <typename T> T shfl(u32 mask, T value, u32 source) {
    return twin::from_bits<T>(twin::collective(twin::SHFL, mask, twin::to_bits(value), source));
}
template <typename T> u32 match_any(u32 mask, T value) {
    return static_cast<u32>(twin::collective(twin::MATCH, mask, twin::to_bits(value), 0));
}

template <typename T> class Shared {
  public:
    Shared(void* pointer, u32 count) : pointer_(static_cast<T*>(pointer)), count_(count) {}
    T read(u32 index) const {
        twin::shared_access(index, count_);
        return pointer_[index];
    }
    void write(u32 index, T value) const {
        twin::shared_access(index, count_);
        pointer_[index] = value;
    }

  private:
    T* pointer_;
    u32 count_;
};
#define SHARED(type, name, count)     \
    static const char name##_site_ = 0; \
    const Shared<type> name(twin::shared(&name##_site_, sizeof(type) * (count)), count)
