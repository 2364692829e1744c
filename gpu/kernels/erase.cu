// Keys that were deleted: each leaves the cache unless what is there is newer than its deletion. The stamp of the deletion is
// not kept: who inserts asks the node's store first, which knows it.
#include "batch.cuh"

KERNEL(256, erase, Table table, Batch batch) {
    const i64 mine = thread_in_grid();
    const u64 stamp = mine < batch.count ? batch.stamps.read(mine) : 0;
    const u64 key = stamp ? batch.keys.read(mine) : 0;
    u32 outcome = EKKO_ABSENT;
    bool pending = stamp != 0;
    while (pending) {  // without a collective: a lane takes, writes and gives back by itself, and waits for nobody in between
        const Place place = find(table, key);
        pending = place.busy;
        if (!place.found()) continue;
        if (place.stamp > stamp && !PLANTED(ERASE_NEWER)) {
            fence();
            pending = !table.unchanged(place.slot, place.lock);
            outcome = EKKO_KEPT;
        } else if (table.take(place.slot, place.lock)) {
            clear_slot(table, place.slot, place.lock);
            outcome = EKKO_ERASED;
        } else {
            pending = true;
        }
    }
    if (mine < batch.count) batch.outcomes.write(mine, static_cast<u8>(outcome));
    const u32 erased = ballot(ALL_LANES, outcome == EKKO_ERASED);
    if (lane() == 0) table.count(EKKO_SIZE, -static_cast<u64>(bit_count(erased)));
    tell(table, stamp != 0, outcome);
}
