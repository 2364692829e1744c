// New rows for keys that are in the cache, if they are newer than what is there. Others are left out: an update is no use of
// a row, and a cache filled by updates would hold what is written and not what is read.
//
// A warp has 32 keys, a lane each to find and take its slot; then the tiles write the rows that were taken, and each lane gives
// its slot back. Keys differ within a launch and launches that write follow each other, so hardly anything is tried twice.
#include "batch.cuh"

DEVICE u32 apply_one_warp(const Table& table, const Batch& batch, i64 first) {
    const Tile tile(table.tile);
    const i64 mine = first + lane();
    const u64 stamp = mine < batch.count ? batch.stamps.read(mine) : 0;
    const u64 key = stamp ? batch.keys.read(mine) : 0;
    u32 outcome = EKKO_ABSENT;
    bool pending = stamp != 0;
    Place held = {NO_SLOT, 0, 0, false};  // by who plants a bug
    while (any(ALL_LANES, pending)) {
        Place place = {NO_SLOT, 0, 0, false};
        bool taken = false;
        if (pending) {
            place = find(table, key);
            pending = place.found() || place.busy;
            if (place.found() && place.stamp >= stamp && !PLANTED(LATE_CHECK)) {
                fence();
                pending = !table.unchanged(place.slot, place.lock);
                outcome = EKKO_KEPT;
            } else if (place.found()) {
                taken = table.take(place.slot, place.lock);
            }
        }
        sync(ALL_LANES);
        if (!PLANTED(WRITER_FENCE)) fence();
        copy_in(table, tile, taken ? place.slot : NO_SLOT, batch.rows, first + tile.first());
        if (taken && (!PLANTED(LATE_CHECK) || place.stamp < stamp)) table.set_stamp(place.slot, stamp);
        sync(ALL_LANES);
        if (taken) {
            if (PLANTED(HOLD_AND_WAIT)) held = place;
            else table.give_back(place.slot, place.lock);
            outcome = EKKO_ASSIGNED;
            pending = false;
        }
    }
    if (held.found()) table.give_back(held.slot, held.lock);
    if (mine < batch.count) batch.outcomes.write(mine, static_cast<u8>(outcome));
    tell(table, stamp != 0, outcome);
    return outcome;
}

KERNEL(256, apply, Table table, Batch batch) {
    const i64 first = thread_in_grid() & ~static_cast<i64>(WARP - 1);
    if (first < batch.count) apply_one_warp(table, batch, first);
}
