// Lanes that work together: positions, collectives, tiles.
//
// Collectives name their lanes by a mask; each lane named calls the same collective with the same mask. Only sync and
// block_sync order memory: shfl, ballot, any, all and match_any exchange registers, and promise nothing about memory.
#pragma once
#include "memory.cuh"

#ifndef EKKO_TWIN

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 block_index() { return blockIdx.x; }
DEVICE u32 block_size() { return blockDim.x; }
DEVICE u32 grid_size() { return gridDim.x; }
DEVICE u32 lane() { return threadIdx.x & 31; }  // blocks have one dimension, in multiples of 32

// The compiler's own functions, not assembly: it must know that control flow around them may not be changed.
DEVICE void sync(u32 mask) { __syncwarp(mask); }
DEVICE void block_sync() { __syncthreads(); }
DEVICE u32 ballot(u32 mask, bool vote) { return __ballot_sync(mask, vote); }
DEVICE bool any(u32 mask, bool vote) { return __any_sync(mask, vote); }
DEVICE bool all(u32 mask, bool vote) { return __all_sync(mask, vote); }
// T: 4 or 8 bytes.
template <typename T> DEVICE T shfl(u32 mask, T value, u32 source) { return __shfl_sync(mask, value, source); }
// The lanes of the mask that gave the same value.
template <typename T> DEVICE u32 match_any(u32 mask, T value) { return __match_any_sync(mask, value); }

// SHARED(float, sums, 32); then sums.read(i), sums.write(i, value): memory of the block, ordered by block_sync or sync.
template <typename T> class Shared {
  public:
    explicit DEVICE Shared(T* pointer) : pointer_(pointer) {}
    DEVICE T read(u32 index) const { return pointer_[index]; }
    DEVICE void write(u32 index, T value) const { pointer_[index] = value; }

  private:
    T* pointer_;
};
#define SHARED(type, name, count)           \
    __shared__ type name##_storage_[count]; \
    const Shared<type> name(name##_storage_)

#endif

DEVICE i64 thread_in_grid() { return static_cast<i64>(block_index()) * block_size() + thread_index(); }
DEVICE i64 threads_in_grid() { return static_cast<i64>(grid_size()) * block_size(); }

// `size` neighbouring lanes of a warp, a power of two from 1 to 32. All of a tile's lanes call its collectives together;
// tiles of one warp need not.
class Tile {
  public:
    explicit DEVICE Tile(u32 size) : size_(size) {}
    DEVICE u32 size() const { return size_; }
    DEVICE u32 rank() const { return lane() & (size_ - 1); }
    DEVICE u32 first() const { return lane() & ~(size_ - 1); }
    DEVICE u32 mask() const { return (size_ == 32 ? 0xffffffffu : (1u << size_) - 1) << first(); }
    DEVICE void sync() const { ::sync(mask()); }
    DEVICE u32 ballot(bool vote) const { return ::ballot(mask(), vote) >> first(); }  // bit = rank
    DEVICE bool any(bool vote) const { return ::any(mask(), vote); }
    DEVICE bool all(bool vote) const { return ::all(mask(), vote); }
    template <typename T> DEVICE T shfl(T value, u32 rank) const { return ::shfl(mask(), value, first() + rank); }

  private:
    u32 size_;
};
