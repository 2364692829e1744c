// Rows of keys: float32 out, whole or not at all, while other streams write.
//
// A warp has 32 keys. First a lane a key finds the slot: 32 bytes of digests, 32 bytes of header. Then a tile of as many lanes
// as a row has chunks reads one row after the other, several ahead. At last each lane looks at its key's lock again; rows that
// changed meanwhile are read again, READ_ATTEMPTS_MAX times in all, and then count as missed. One fence serves 32 rows.
#include "rows.cuh"

struct LookUp {
    Table table;
    Global<u64> keys;
    Output out;              // zeros for keys that were missed
    Global<u64> stamps;      // of each key's row; 0: missed
    Global<i64> missed;      // indices of keys, in no order
    Global<u64> missed_count;
    i64 count;
    u32 use;                 // see touch()
    u32 now;
};
static_assert(sizeof(LookUp) == 120, "as in launchers.py");

template <u32 CODEC> DEVICE void look_up(const LookUp& ask, i64 first) {
    const Table& table = ask.table;
    const Tile tile(table.tile);
    const i64 mine = first + lane(), first_of_tile = first + tile.first();
    const bool asked = mine < ask.count;
    const u64 key = asked ? ask.keys.read(mine) : 0;
    u64 stamp = 0;
    bool pending = asked;
    for (u32 attempt = 0; attempt < EKKO_READ_ATTEMPTS_MAX && any(ALL_LANES, pending); ++attempt) {
        Place place = {NO_SLOT, 0, 0, false};
        if (pending) place = find(table, key);
        if (!PLANTED(READER_SYNC)) sync(ALL_LANES);
        copy_out<CODEC>(table, tile, place.slot, ask.out, first_of_tile);
        if (!PLANTED(READER_FENCE)) fence();
        sync(ALL_LANES);
        if (place.found() && table.unchanged(place.slot, place.lock)) {
            stamp = place.stamp;
            pending = false;
            touch(table, place.slot, ask.use, ask.now);
        } else if (!place.found()) {
            pending = place.busy;
        }
    }
    if (asked) ask.stamps.write(mine, stamp);
    const bool missing = asked && !stamp;
    blank_out<CODEC>(table, tile, missing, ask.out, first_of_tile);
    const u32 missing_mask = ballot(ALL_LANES, missing), crossed = ballot(ALL_LANES, pending);
    u64 ticket = 0;
    if (lane() == 0 && missing_mask) {
        ticket = ask.missed_count.add(0, bit_count(missing_mask));
        table.count(EKKO_MISSED, bit_count(missing_mask));
        table.count(EKKO_CROSSED, bit_count(crossed));
    }
    ticket = shfl(ALL_LANES, ticket, 0);
    if (missing) ask.missed.write(static_cast<i64>(ticket) + bit_count(missing_mask & ((1u << lane()) - 1)), mine);
}

KERNEL(256, lookup, LookUp ask) {
    const i64 first = thread_in_grid() & ~static_cast<i64>(WARP - 1);
    if (first >= ask.count) return;
    if (thread_in_grid() == 0) ask.table.count(EKKO_LOOKED_UP, ask.count);
    switch (ask.table.codec) {
        case EKKO_CODEC_FLOAT32: return look_up<EKKO_CODEC_FLOAT32>(ask, first);
        case EKKO_CODEC_FLOAT16: return look_up<EKKO_CODEC_FLOAT16>(ask, first);
        case EKKO_CODEC_BFLOAT16: return look_up<EKKO_CODEC_BFLOAT16>(ask, first);
        default: return look_up<EKKO_CODEC_INT8>(ask, first);
    }
}
