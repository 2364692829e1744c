// Bags of keys: the sum or the mean of their rows, for several tables in one launch, without a copy of the rows in between.
//
// A tile has one bag: its lanes find a key each, then read the rows in turn, several ahead, and add those that are proven
// whole, in the order of the keys. So no half a row gets into a sum, and a sum has the bits of the same loop on the host.
// Rows of more chunks than a warp has lanes go one by one through a buffer of the bag's size.
#include "rows.cuh"

struct Pool {
    Table table;
    Global<u64> keys;
    Global<i64> offsets;     // [bags + 1]
    Global<u32> weights;     // float32, a key each, if `weighted`
    Output out;              // [bags, dim]
    Global<u32> buffer;      // as `out`; only where a row has more than 32 chunks
    Global<i64> missed;      // indices of keys, in no order
    Global<u64> missed_count;
    i64 bags;
    i64 first_warp;          // of the launch, that has this table
    u32 mode;
    u32 weighted;
    u32 use;
    u32 now;

    DEVICE float weight(i64 key) const { return weighted ? float_of(weights.read(key)) : 1.0f; }
    // What a sum of so many keys is divided by.
    DEVICE float divisor(i64 keys) const { return mode == EKKO_MODE_MEAN && keys ? static_cast<float>(keys) : 1.0f; }

    // Call `change` with the index of each value of a row that this lane of a warp decodes.
    template <u32 CODEC, typename Change> DEVICE void for_own_values(Change change) const {
        for (u32 chunk = lane(); chunk < table.chunks; chunk += WARP) {
            for (u32 quad = 0; quad < QUADS<CODEC>; ++quad) {
                const i64 first = first_value<CODEC>(chunk, quad);
                for (i64 value = first; value < first + 4; ++value) {
                    if (value >= 0 && value < table.dim) change(value);
                }
            }
        }
    }
};

struct Bag {
    i64 number;
    i64 begin;
    i64 end;
};

DEVICE void tell_missed(const Pool& pool, const Tile& tile, bool missing, bool crossed, i64 key) {
    const u32 missing_bits = tile.ballot(missing), crossed_bits = tile.ballot(crossed);
    if (!missing_bits) return;
    u64 ticket = 0;
    if (tile.rank() == 0) {
        ticket = pool.missed_count.add(0, bit_count(missing_bits));
        pool.table.count(EKKO_MISSED, bit_count(missing_bits));
        pool.table.count(EKKO_CROSSED, bit_count(crossed_bits));
    }
    ticket = tile.shfl(ticket, 0);
    if (missing) pool.missed.write(static_cast<i64>(ticket) + bit_count(missing_bits & ((1u << tile.rank()) - 1)), key);
}

// Read rows from..from + AHEAD - 1 of the tile's keys until they are proven whole, or known to be missing. `place` is each
// lane's key's; it is looked for again when its row changed. Returns the ranks whose rows are in `rows`.
DEVICE u32 read_whole(const Pool& pool, const Tile& tile, u32 from, u64 key, bool& pending, Place& place, Ahead& rows) {
    const Table& table = pool.table;
    const bool turn = tile.rank() >= from && tile.rank() < from + AHEAD;
    bool whole = false;
    for (u32 attempt = 0; attempt < EKKO_READ_ATTEMPTS_MAX; ++attempt) {
        if (attempt && turn && pending) place = find(table, key);
        const bool reading = turn && pending && place.found();
        if (!PLANTED(READER_SYNC)) tile.sync();
        rows.load(table, tile, from, reading ? place.slot : NO_SLOT, tile.rank());
        if (!PLANTED(READER_FENCE)) fence();
        if (!PLANTED(POOL_SYNC)) tile.sync();
        if (reading && table.unchanged(place.slot, place.lock)) {
            whole = true;
            pending = false;
            touch(table, place.slot, pool.use, pool.now);
        } else if (turn && pending && !place.found()) {
            pending = place.busy;
        }
        if (!tile.any(turn && pending)) break;
    }
    return tile.ballot(whole);
}

template <u32 CODEC> DEVICE void pool_bag(const Pool& pool, const Tile& tile, const Bag& bag) {
    Quad sums[QUADS<CODEC>] = {};
    for (i64 at = bag.begin; at < bag.end; at += tile.size()) {
        const i64 mine = at + tile.rank();
        const bool asked = mine < bag.end;
        const u64 key = asked ? pool.keys.read(mine) : 0;
        const float weight = asked ? pool.weight(mine) : 0.0f;
        bool pending = asked;
        Place place = {NO_SLOT, 0, 0, false};
        if (asked) place = find(pool.table, key);
        u32 whole = 0;
        for (u32 from = 0; from < tile.size(); from += AHEAD) {
            Ahead rows = {};
            const u32 read = read_whole(pool, tile, from, key, pending, place, rows);
            whole |= read;
            UNROLL for (u32 u = 0; u < AHEAD; ++u) {
                if (from + u >= tile.size()) continue;
                const float scale = CODEC == EKKO_CODEC_INT8 ? float_of(tile.shfl(rows.chunks[u].word[0], 0)) : 0.0f;
                const float times = tile.shfl(weight, from + u);
                if (!(read >> (from + u) & 1)) continue;
                UNROLL for (u32 quad = 0; quad < QUADS<CODEC>; ++quad) {
                    const Quad values = decode<CODEC>(rows.chunks[u], quad, scale);
                    UNROLL for (u32 i = 0; i < 4; ++i) sums[quad].value[i] += times * values.value[i];
                }
            }
        }
        tell_missed(pool, tile, asked && !(whole >> tile.rank() & 1), pending, mine);
    }
    const float divisor = pool.divisor(bag.end - bag.begin);
    if (tile.rank() >= pool.table.chunks) return;
    UNROLL for (u32 quad = 0; quad < QUADS<CODEC>; ++quad) {
        UNROLL for (u32 i = 0; i < 4; ++i) sums[quad].value[i] /= divisor;
        pool.out.put(bag.number, first_value<CODEC>(tile.rank(), quad), sums[quad]);
    }
}

// A bag whose rows have more chunks than a warp has lanes: the sum grows in `out`. A lane touches its own values only.
template <u32 CODEC> DEVICE void pool_wide_bag(const Pool& pool, const Bag& bag) {
    const Tile warp(WARP);
    const Table& table = pool.table;
    blank_out<CODEC>(table, warp, lane() == 0, pool.out, bag.number);
    for (i64 at = bag.begin; at < bag.end; ++at) {
        bool pending = lane() == 0, whole = false;  // lane 0 finds the row, and finds out whether it was whole
        for (u32 attempt = 0; attempt < EKKO_READ_ATTEMPTS_MAX && any(ALL_LANES, pending); ++attempt) {
            Place place = {NO_SLOT, 0, 0, false};
            if (pending) place = find(table, pool.keys.read(at));
            sync(ALL_LANES);
            copy_out<CODEC>(table, warp, place.slot, {pool.buffer, pool.out.dim, 0}, bag.number);
            fence();
            sync(ALL_LANES);
            whole = place.found() && table.unchanged(place.slot, place.lock);
            if (whole) touch(table, place.slot, pool.use, pool.now);
            pending = pending && !whole && (place.found() || place.busy);
        }
        tell_missed(pool, warp, lane() == 0 && !whole, pending, at);
        if (!any(ALL_LANES, whole)) continue;
        const float times = pool.weight(at);
        pool.for_own_values<CODEC>([&](i64 value) {
            const float sum = float_of(pool.out.values.read(bag.number * table.dim + value));
            const float more = times * float_of(pool.buffer.read(bag.number * table.dim + value));
            pool.out.values.write(bag.number * table.dim + value, bits_of(sum + more));
        });
    }
    const float divisor = pool.divisor(bag.end - bag.begin);
    pool.for_own_values<CODEC>([&](i64 value) {
        const i64 of = bag.number * table.dim + value;
        pool.out.values.write(of, bits_of(float_of(pool.out.values.read(of)) / divisor));
    });
}

template <u32 CODEC> DEVICE void pool_warp(const Pool& pool, i64 warp) {
    const Tile tile(pool.table.tile);
    const i64 number = (warp * WARP + lane()) / tile.size();
    if (number >= pool.bags) return;  // tiles are alone from here on
    const Bag bag = {number, pool.offsets.read(number), pool.offsets.read(number + 1)};
    if (pool.table.chunks > WARP) pool_wide_bag<CODEC>(pool, bag);
    else pool_bag<CODEC>(pool, tile, bag);
}

// As many as fit into 4 KiB of arguments, which every driver passes.
constexpr u32 POOLS_MAX = 26;

struct Pools {
    Pool pool[POOLS_MAX];
};
static_assert(sizeof(Pool) == 152, "as in launchers.py");
static_assert(sizeof(Pools) + sizeof(u32) <= 4096, "arguments of a launch");

KERNEL(256, pooled, Pools pools, u32 count) {
    const i64 warp = thread_in_grid() / WARP;
    u32 table = 0;
    while (table + 1 < count && pools.pool[table + 1].first_warp <= warp) ++table;
    const Pool& pool = pools.pool[table];
    const i64 of_table = warp - pool.first_warp;
    if (of_table == 0 && lane() == 0) pool.table.count(EKKO_LOOKED_UP, pool.offsets.read(pool.bags) - pool.offsets.read(0));
    switch (pool.table.codec) {
        case EKKO_CODEC_FLOAT32: return pool_warp<EKKO_CODEC_FLOAT32>(pool, of_table);
        case EKKO_CODEC_FLOAT16: return pool_warp<EKKO_CODEC_FLOAT16>(pool, of_table);
        case EKKO_CODEC_BFLOAT16: return pool_warp<EKKO_CODEC_BFLOAT16>(pool, of_table);
        default: return pool_warp<EKKO_CODEC_INT8>(pool, of_table);
    }
}
