// What writers are given: keys without repeats and sorted by bucket, their stamps, perhaps rows and scores; and what they tell
// of each.
#pragma once
#include "rows.cuh"

struct Batch {
    Global<u64> keys;
    Global<u64> stamps;    // 0: leave this key out
    Global<u64> scores;    // of an insert, if `scored`
    Input rows;
    Global<u8> outcomes;
    i64 count;
    u64 score;             // of every new row of an insert, unless `scored`
    u32 scored;
    u32 admit;             // an insert takes the place of a row that scores higher
};
static_assert(sizeof(Batch) == 72, "as in launchers.py");

// Add the outcomes of a warp's keys to the counters; lanes without a key have `counted` false. All lanes call it.
DEVICE void tell(const Table& table, bool counted, u32 outcome) {
    constexpr u32 NO_OUTCOME = 0xff;
    const u32 same = match_any(ALL_LANES, counted ? outcome : NO_OUTCOME);
    if (counted && lowest_bit(same) == lane()) table.count(EKKO_OUTCOME_FIRST + outcome, bit_count(same));
}

// Empty a slot that was taken when its lock was `lock`, and give it back.
DEVICE void clear_slot(const Table& table, i64 slot, u32 lock) {
    if (!PLANTED(CLEAR_FENCE)) fence();  // key 0, which this makes it, is one that readers may ask for
    table.set_key(slot, 0);
    table.set_stamp(slot, 0);
    table.headers.relax(table.score_at(slot), 0);
    table.set_digest(slot, 0);
    table.give_back(slot, lock);
}
