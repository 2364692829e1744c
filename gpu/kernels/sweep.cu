// Passes over all slots: how often which score occurs, rows out by score, ranks halved. Look-ups may run beside them.
#include "batch.cuh"

DEVICE bool inside(const Table& table, i64 slot) { return slot < static_cast<i64>(table.buckets * EKKO_BUCKET_SLOTS); }

constexpr u32 DIGITS = 256;

// One step of the search for the n-th lowest row. Of rows whose word begins with the bits of `prefix`, those from shift + 8 on,
// count how often each value of the next 8 bits occurs. The word is the score, or, if `hashes`, the key's hash of rows that
// score exactly `score`. counts: u64[256], added to.
KERNEL(256, histogram, Table table, Global<u64> counts, u32 hashes, u32 shift, u64 prefix, u64 score) {
    const i64 slot = thread_in_grid();
    u32 digit = DIGITS;
    if (inside(table, slot) && table.stamp(slot)) {
        const u64 scored = table.score(slot);
        const u64 word = hashes ? mix64(table.key(slot)) : scored;
        if ((shift + 8 >= 64 || word >> (shift + 8) == prefix) && (!hashes || scored == score)) {
            digit = static_cast<u32>(word >> shift) & (DIGITS - 1);
        }
    }
    const u32 same = match_any(ALL_LANES, digit);
    if (digit < DIGITS && lowest_bit(same) == lane()) counts.add(digit, bit_count(same));
}

// Rows leave whose score is below `score`, and those with that very score whose key's hash is `hash` at most.
KERNEL(256, sweep, Table table, u64 score, u64 hash) {
    const i64 slot = thread_in_grid();
    bool left = false;
    while (inside(table, slot) && !left) {
        const u32 lock = table.lock(slot);
        if (lock & 1) continue;
        if (!table.stamp(slot)) break;
        const u64 scored = table.score(slot);
        if (scored > score || (scored == score && mix64(table.key(slot)) > hash)) break;
        left = table.take(slot, lock);
        if (left) clear_slot(table, slot, lock);
    }
    const u32 leaving = ballot(ALL_LANES, left);
    if (lane() == 0) {
        table.count(EKKO_EVICTED, bit_count(leaving));
        table.count(EKKO_SIZE, -static_cast<u64>(bit_count(leaving)));
    }
}

// Halve every rank. What readers add meanwhile is kept: it is an addition too.
KERNEL(256, decay, Table table) {
    const i64 slot = thread_in_grid();
    if (!inside(table, slot)) return;
    const u64 rank = table.score(slot) >> EKKO_RANK_SHIFT;
    if (rank) table.headers.add(table.score_at(slot), -((rank - rank / 2) << EKKO_RANK_SHIFT));
}
