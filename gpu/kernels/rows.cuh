// Rows on their way: out of the cache for readers, into it for writers.
#pragma once
#include "codec.cuh"

// Rows whose loads a lane has under way at once: an access that leaves the first-level cache takes hundreds of cycles.
constexpr u32 AHEAD = 4;

// float32[n, dim] of the caller.
struct Output {
    Global<u32> values;
    u32 dim;
    u32 wide;  // every row begins at a multiple of 16 bytes

    // Write those of a quad's values that the row has.
    DEVICE void put(i64 row, i64 first, const Quad& quad) const {
        const i64 at = row * dim + first;
        if (first < 0 || first >= dim) return;
        if (wide) {
            Chunk bits;
            UNROLL for (u32 i = 0; i < 4; ++i) bits.word[i] = bits_of(quad.value[i]);
            values.as<Chunk>().write(at / 4, bits);
        } else {
            UNROLL for (u32 i = 0; i < 4; ++i) {
                if (first + i < dim) values.write(at + i, bits_of(quad.value[i]));
            }
        }
    }
};

// A lane's chunk of up to AHEAD rows that a tile reads at once. Row u is in the slot that the tile's lane `from + u` names.
struct Ahead {
    Chunk chunks[AHEAD];
    u32 wanted;  // bit u: there is a row u

    DEVICE void load(const Table& table, const Tile& tile, u32 from, i64 slot, u32 chunk) {
        wanted = 0;
        UNROLL for (u32 u = 0; u < AHEAD; ++u) {
            if (from + u >= tile.size()) continue;
            const i64 of = tile.shfl(slot, from + u);
            if (of == NO_SLOT) continue;
            wanted |= 1u << u;
            if (chunk < table.chunks) chunks[u] = table.rows.relaxed(of * table.chunks + chunk);
        }
    }
};

// For each lane of the tile whose `slot` is one: read the row there, and write it to row `first_row` + its rank. Whether each
// was whole is for the caller to find out.
template <u32 CODEC> DEVICE void copy_out(const Table& table, const Tile& tile, i64 slot, const Output& out, i64 first_row) {
    for (u32 from = 0; from < tile.size(); from += AHEAD) {
        Ahead rows = {};
        float scales[AHEAD] = {};
        for (u32 begin = 0; begin < table.chunks; begin += tile.size()) {
            const u32 chunk = begin + tile.rank();
            rows.load(table, tile, from, slot, chunk);
            UNROLL for (u32 u = 0; u < AHEAD; ++u) {
                if (CODEC == EKKO_CODEC_INT8 && begin == 0) scales[u] = float_of(tile.shfl(rows.chunks[u].word[0], 0));
                if (!(rows.wanted >> u & 1) || chunk >= table.chunks) continue;
                UNROLL for (u32 quad = 0; quad < QUADS<CODEC>; ++quad) {
                    const Quad values = decode<CODEC>(rows.chunks[u], quad, scales[u]);
                    out.put(first_row + from + u, first_value<CODEC>(chunk, quad), values);
                }
            }
        }
    }
}

// For each lane of the tile whose `blank` is set: zeros to row `first_row` + its rank. Each lane writes where copy_out wrote
// as this lane, so that the zeros come after whatever it left there.
template <u32 CODEC> DEVICE void blank_out(const Table& table, const Tile& tile, bool blank, const Output& out, i64 first_row) {
    for (u32 left = tile.ballot(blank); left; left &= left - 1) {
        for (u32 chunk = tile.rank(); chunk < table.chunks; chunk += tile.size()) {
            UNROLL for (u32 quad = 0; quad < QUADS<CODEC>; ++quad) {
                out.put(first_row + lowest_bit(left), first_value<CODEC>(chunk, quad), Quad{});
            }
        }
    }
}

// A reader used the row in this slot; `use` is the policy, or NO_USE. The slot may have another row by now, of which only the
// score may then be a little too high: never its rank where ranks are the caller's.
constexpr u32 NO_USE = 0xffffffff;

DEVICE void touch(const Table& table, i64 slot, u32 use, u32 now) {
    if (use == NO_USE) return;
    const i64 at = table.score_at(slot);
    const u64 before = table.headers.relaxed(at);
    if (use == EKKO_POLICY_LFU) {
        if (before >> EKKO_RANK_SHIFT < EKKO_USES_MAX) table.headers.add(at, EKKO_RANK_ONE);
        return;
    }
    const u64 after = (before & ~static_cast<u64>(EKKO_TICK_MASK)) | now;
    if (after > before) table.headers.cas(at, before, after);  // who was faster used it, too
}

// uint8[n, row_bytes] of the caller: encoded rows, without padding.
struct Input {
    Global<u8> bytes;
    u32 row_bytes;
    u32 unit;  // 16, 4 or 2: the widest load that every row may be read with

    // A chunk of a row as the cache has it, with zeros behind the row's end.
    DEVICE Chunk chunk(i64 row, u32 number) const {
        const u32 begin = 16 * number;
        const i64 at = row * row_bytes + begin;
        if (unit == 16) return bytes.as<Chunk>().read(at / 16);
        Chunk made = {};
        if (unit == 4) {
            UNROLL for (u32 i = 0; i < 4; ++i) {
                if (begin + 4 * i < row_bytes) made.word[i] = bytes.as<u32>().read(at / 4 + i);
            }
        } else {
            UNROLL for (u32 i = 0; i < 8; ++i) {
                if (begin + 2 * i >= row_bytes) continue;
                made.word[i / 2] |= static_cast<u32>(bytes.as<u16>().read(at / 2 + i)) << (16 * (i % 2));
            }
        }
        return made;
    }
};

// For each lane of the tile whose `slot` is one, which it has taken: write row `first_row` + its rank there.
DEVICE void copy_in(const Table& table, const Tile& tile, i64 slot, const Input& rows, i64 first_row) {
    for (u32 other = 0; other < tile.size(); ++other) {
        const i64 of = tile.shfl(slot, other);
        if (of == NO_SLOT) continue;
        for (u32 chunk = tile.rank(); chunk < table.chunks; chunk += tile.size()) {
            table.rows.relax(of * table.chunks + chunk, rows.chunk(first_row + other, chunk));
        }
    }
}
