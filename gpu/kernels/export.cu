// What is in the cache: the rows of some buckets that are newer than a stamp, one behind the other, in no order. Beside a
// writer a row is told as it was before or after a write; one that changed at every attempt, or left, leaves a place with a
// stamp of 0.
#include "batch.cuh"

struct Export {
    Table table;
    Global<u64> keys;      // [room]
    Global<u64> stamps;    // [room]; 0: nothing here
    Global<u64> scores;    // [room]
    Global<u8> rows;       // [room, row_bytes]
    Global<u64> count;     // rows that there are, also where they are more than `room`
    u64 newer_than;
    i64 room;
    i64 first_bucket;
    i64 buckets;           // so many, from the first on
    u32 row_bytes;
    u32 unit;              // as of Input
};
static_assert(sizeof(Export) == 136, "as in launchers.py");

// Write a row's chunk without the padding of the cache.
DEVICE void put_encoded(const Export& ask, i64 row, u32 number, const Chunk& chunk) {
    const u32 begin = 16 * number;
    const i64 at = row * ask.row_bytes + begin;
    if (ask.unit == 16) return ask.rows.as<Chunk>().write(at / 16, chunk);
    if (ask.unit == 4) {
        UNROLL for (u32 i = 0; i < 4; ++i) {
            if (begin + 4 * i < ask.row_bytes) ask.rows.as<u32>().write(at / 4 + i, chunk.word[i]);
        }
    } else {
        UNROLL for (u32 i = 0; i < 8; ++i) {
            if (begin + 2 * i < ask.row_bytes) {
                ask.rows.as<u16>().write(at / 2 + i, static_cast<u16>(chunk.word[i / 2] >> (16 * (i % 2))));
            }
        }
    }
}

KERNEL(256, export_rows, Export ask) {
    const Table& table = ask.table;
    const Tile tile(table.tile);
    const i64 slot = ask.first_bucket * EKKO_BUCKET_SLOTS + thread_in_grid();  // a warp has a bucket
    if (thread_in_grid() >= ask.buckets * EKKO_BUCKET_SLOTS) return;
    i64 target = -1;
    bool pending = true;
    u32 attempts_left = EKKO_READ_ATTEMPTS_MAX;
    do {
        const u32 lock = table.lock(slot);
        const u64 key = table.key(slot), stamp = table.stamp(slot), score = table.score(slot);
        const bool wanted = pending && !(lock & 1) && stamp > ask.newer_than;
        if (pending && !(lock & 1) && !wanted) pending = false;
        const u32 placeless = ballot(ALL_LANES, wanted && target < 0);
        u64 ticket = 0;
        if (lane() == 0 && placeless) ticket = ask.count.add(0, bit_count(placeless));
        ticket = shfl(ALL_LANES, ticket, 0);
        if (placeless >> lane() & 1) target = static_cast<i64>(ticket) + bit_count(placeless & ((1u << lane()) - 1));
        const bool fits = wanted && target < ask.room;
        sync(ALL_LANES);
        for (u32 other = 0; other < tile.size(); ++other) {
            const i64 from = tile.shfl(fits ? slot : NO_SLOT, other), to = tile.shfl(target, other);
            if (from == NO_SLOT) continue;
            for (u32 chunk = tile.rank(); chunk < table.chunks; chunk += tile.size()) {
                put_encoded(ask, to, chunk, table.rows.relaxed(from * table.chunks + chunk));
            }
        }
        fence();
        sync(ALL_LANES);
        const bool whole = wanted && (PLANTED(EXPORT_UNPROVEN) || table.unchanged(slot, lock));
        if (fits) {
            ask.keys.write(target, key);
            ask.stamps.write(target, whole ? stamp : 0);  // so a place taken for a row that left meanwhile is told to be empty
            ask.scores.write(target, score);
        }
        if (whole) pending = false;
    } while (any(ALL_LANES, pending) && --attempts_left);
}
