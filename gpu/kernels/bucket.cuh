// A cache in device memory: where a key belongs, who may touch a slot, and how.
//
// Readers never wait and writers never wait for readers. A slot's lock is even while its row can be read:
//
//   reader   acquire the lock, even | read key, stamp, row (relaxed) | fence | the lock again: the same? then it was one row
//   writer   cas the lock to odd | fence | write row, key, stamp (relaxed) | release the lock, even, 2 more than before
//
// If a reader saw any word of a newer row, then by the two fences its second look at the lock sees the odd value or a later
// one. If its first look acquired an even value, then it sees no word older than the write that released this value. The other
// lanes of a tile read for the one that looks at the lock: sync() orders both looks with what they read.
//
// No lane waits while it holds a lock: all lanes of a warp try once, write what they got, give it back, and only then
// those that got nothing try again. So neither a warp in lockstep nor a lane that is slow can stop another for good.
#pragma once
#include "layout.cuh"
#include "plants.cuh"
#include "warp.cuh"

using u16 = unsigned short;

#ifdef EKKO_TWIN
#define UNROLL
#else
#define UNROLL _Pragma("unroll")
#endif

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;
constexpr u32 HEADER_WORDS = EKKO_HEADER_BYTES / 8;
constexpr u32 DIGEST_WORDS = EKKO_BUCKET_SLOTS / 4;
static_assert(EKKO_BUCKET_SLOTS == WARP, "a lane a slot");

// One cache; gpu/kernels/launchers.py has the same structure for NumPy.
struct Table {
    Global<u32> digests;    // [buckets, DIGEST_WORDS], four slots a word
    Global<u64> headers;    // [slots, HEADER_WORDS]
    Global<Chunk> rows;     // [slots, chunks]
    Global<u64> counters;
    u64 buckets;
    u32 chunks;
    u32 dim;
    u32 codec;
    u32 tile;               // lanes that read one row together: the power of two from `chunks` on, 32 at most

    DEVICE u64 key(i64 slot) const { return headers.relaxed(slot * HEADER_WORDS + EKKO_HEADER_KEY / 8); }
    DEVICE u64 stamp(i64 slot) const { return headers.relaxed(slot * HEADER_WORDS + EKKO_HEADER_STAMP / 8); }
    DEVICE u64 score(i64 slot) const { return headers.relaxed(score_at(slot)); }
    DEVICE void set_key(i64 slot, u64 key) const { headers.relax(slot * HEADER_WORDS + EKKO_HEADER_KEY / 8, key); }
    DEVICE void set_stamp(i64 slot, u64 stamp) const { headers.relax(slot * HEADER_WORDS + EKKO_HEADER_STAMP / 8, stamp); }
    DEVICE i64 score_at(i64 slot) const { return slot * HEADER_WORDS + EKKO_HEADER_SCORE / 8; }

    // The lock as a reader first looks at it: what was written before it was given back is visible after it.
    DEVICE u32 lock(i64 slot) const {
        return PLANTED(READER_ACQUIRE) ? locks().relaxed(lock_at(slot)) : locks().acquire(lock_at(slot));
    }
    // What was read before the fence() that stands before this call is of one row if the lock is still the same.
    DEVICE bool unchanged(i64 slot, u32 lock) const {
        return PLANTED(NO_SECOND_LOOK) || locks().relaxed(lock_at(slot)) == lock;
    }
    // Take a slot that nobody wrote to since its lock was `lock`, which is even. Fence before the slot is written to.
    DEVICE bool take(i64 slot, u32 lock) const { return locks().cas(lock_at(slot), lock, lock + 1) == lock; }
    DEVICE void give_back(i64 slot, u32 lock) const {
        if (PLANTED(WRITER_RELEASE)) locks().relax(lock_at(slot), lock + 2);
        else locks().release(lock_at(slot), lock + 2);
    }

    // Under the slot's lock. An addition, since the word's other bytes are other slots', and others change them meanwhile.
    DEVICE void set_digest(i64 slot, u32 digest) const { change_digest(slot, this->digest(slot), digest); }
    DEVICE void change_digest(i64 slot, u32 before, u32 digest) const {
        digests.add(slot / 4, (digest - before) << (8 * (slot % 4)));
    }
    DEVICE u32 digest(i64 slot) const { return digests.relaxed(slot / 4) >> (8 * (slot % 4)) & 0xff; }

    DEVICE void count(u32 counter, u64 number) const {
        if (number) counters.add(counter, number);
    }

  private:
    DEVICE Global<u32> locks() const { return headers.as<u32>(); }
    DEVICE i64 lock_at(i64 slot) const { return slot * (2 * HEADER_WORDS) + EKKO_HEADER_LOCK / 4; }
};
static_assert(sizeof(Table) == 56, "as in launchers.py");

DEVICE u64 mix64(u64 key) {
    u64 mixed = key + EKKO_MIX_GOLDEN;
    mixed = (mixed ^ (mixed >> 30)) * EKKO_MIX_1;
    mixed = (mixed ^ (mixed >> 27)) * EKKO_MIX_2;
    return mixed ^ (mixed >> 31);
}

DEVICE i64 bucket_of(const Table& table, u64 hash) {
    const u64 bucket = multiply_high(hash, table.buckets);
    if (PLANTED(WRONG_BUCKET) && lane() == WARP - 1) return static_cast<i64>((bucket + 1) % table.buckets);
    return static_cast<i64>(bucket);
}

DEVICE u32 digest_of(u64 hash) { return 1 + ((static_cast<u32>(hash) & 0xff) * 255 >> 8); }

// The bytes of `word` that equal `byte`, as 4 bits. Exact, unlike the usual test for "some byte is zero".
DEVICE u32 equal_bytes(u32 word, u32 byte) {
    const u32 zero = word ^ (byte * 0x01010101u);
    const u32 high_bits = ~(((zero & 0x7f7f7f7fu) + 0x7f7f7f7fu) | zero | 0x7f7f7f7fu);
    return (high_bits >> 7) * 0x00204081u >> 21 & 0xf;
}

// The slots of a bucket that have this digest, as 32 bits.
DEVICE u32 matches(const Table& table, i64 bucket, u32 digest) {
    u32 found = 0;
    UNROLL for (u32 half = 0; half < 2; ++half) {
        const Chunk digests = table.digests.as<Chunk>().relaxed(2 * bucket + half);
        UNROLL for (u32 i = 0; i < 4; ++i) found |= equal_bytes(digests.word[i], digest) << (16 * half + 4 * i);
    }
    return found;
}

// What one lane found out about a key. `slot` is negative if there is none; `busy`: it may be there, but is being written.
struct Place {
    i64 slot;
    u64 stamp;
    u32 lock;
    bool busy;

    DEVICE bool found() const { return slot >= 0; }
};

constexpr i64 NO_SLOT = -1;

DEVICE Place find(const Table& table, u64 key) {
    Place place = {NO_SLOT, 0, 0, false};
    const u64 hash = mix64(key);
    const i64 bucket = bucket_of(table, hash);
    for (u32 candidates = matches(table, bucket, digest_of(hash)); candidates; candidates &= candidates - 1) {
        const i64 slot = bucket * EKKO_BUCKET_SLOTS + lowest_bit(candidates);
        const u32 lock = table.lock(slot);
        if ((lock & 1) && !PLANTED(ODD_LOCK)) {
            place.busy = true;  // perhaps with this very key
            continue;
        }
        const u64 held = table.key(slot), stamp = table.stamp(slot);
        if (held == key && stamp) return {slot, stamp, lock, false};
        if (PLANTED(FIRST_MATCH_ONLY)) break;
    }
    return place;
}
