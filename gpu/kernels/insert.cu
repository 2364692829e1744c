// Rows that the cache should have: a new row for a key that is there with an older one, a slot for a key that is not, another
// key's slot if the bucket is full: the one with the lowest score, unless the new row scores lower still.
//
// A warp has a bucket, and takes its keys in the order of the batch, which is sorted by bucket: so the outcome does not depend
// on who is fast. A lane has a slot. Should a batch not be sorted, or a second writer be there, warps may want one slot: who
// has its lock has it, and the others look at the whole bucket again, since what they decided by is no longer so. As long as
// any of them tries, one of them gets what it wants, and no insert is lost.
#include "batch.cuh"

// Places of the batch that a warp looks at for the beginning of a bucket's keys. Few, so that a small batch has many warps.
constexpr u32 PLACES_A_WARP = 4;

struct Row {
    i64 number;  // in the batch
    u64 key;
    u64 stamp;
    u64 score;
};

// All lanes: lane `winner` has taken its `slot` when the lock was `lock`. Write the row, give the slot back. `fresh`: the key
// was not there. `digest_seen`: before the lock was taken, for who plants a bug.
DEVICE void fill(const Table& table, const Batch& batch, const Row& row, u32 winner, i64 slot, u32 lock, u32 digest_seen,
                 bool fresh) {
    const bool mine = lane() == winner;
    const i64 target = shfl(ALL_LANES, slot, winner);
    sync(ALL_LANES);
    if (!PLANTED(WRITER_FENCE)) fence();
    for (u32 chunk = lane(); chunk < table.chunks; chunk += WARP) {
        table.rows.relax(target * table.chunks + chunk, batch.rows.chunk(row.number, chunk));
    }
    if (mine) {
        if (fresh) {
            table.set_key(slot, row.key);
            const u32 digest = digest_of(mix64(row.key));
            if (PLANTED(STALE_DIGEST)) table.change_digest(slot, digest_seen, digest);
            else table.set_digest(slot, digest);
        }
        table.set_stamp(slot, row.stamp);
        if ((fresh && !PLANTED(STALE_SCORE)) || batch.scored) table.headers.relax(table.score_at(slot), row.score);
    }
    sync(ALL_LANES);
    if (mine) table.give_back(slot, lock);
}

// The lane with the lowest score of those that may lose their row; 32 if there is none. All lanes get the same answer.
DEVICE u32 lowest(bool candidate, u64 score) {
    u32 best = candidate ? lane() : WARP;
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 other = shfl(ALL_LANES, best, lane() ^ step);
        const u64 other_score = shfl(ALL_LANES, score, lane() ^ step);
        if (other < WARP && (best == WARP || other_score < score || (other_score == score && other < best))) {
            best = other;
            score = other_score;
        }
    }
    return best;
}

constexpr u32 AGAIN = 0xff;  // another warp changed the bucket: look at it again

// One attempt for a key whose bucket may have it.
DEVICE u32 insert_where_it_is(const Table& table, const Batch& batch, const Row& row, i64 slot, u32 digest) {
    const bool candidate = digest == digest_of(mix64(row.key));
    const u32 lock = candidate ? table.lock(slot) : 0;
    const u64 stamp = candidate && table.key(slot) == row.key ? table.stamp(slot) : 0;
    if (any(ALL_LANES, candidate && (lock & 1))) return AGAIN;
    const u32 found = ballot(ALL_LANES, stamp != 0);
    if (!found) return EKKO_ABSENT;
    const u32 winner = lowest_bit(found);
    if (shfl(ALL_LANES, stamp, winner) >= row.stamp) {
        fence();
        const bool same = lane() != winner || table.unchanged(slot, lock);
        if (!all(ALL_LANES, same)) return AGAIN;
        if (lane() == winner && batch.scored) table.headers.relax(table.score_at(slot), row.score);
        return EKKO_KEPT;
    }
    if (!any(ALL_LANES, lane() == winner && table.take(slot, lock))) return AGAIN;
    fill(table, batch, row, winner, slot, lock, digest, false);
    return EKKO_ASSIGNED;
}

// One attempt for a key whose bucket does not have it. Only this warp inserts it, so that stays so.
DEVICE u32 insert_where_room_is(const Table& table, const Batch& batch, const Row& row, i64 slot, u32 digest) {
    u32 lock = digest ? 1 : table.lock(slot);
    const bool empty = !digest && !(lock & 1) && !table.stamp(slot);
    const u32 room = ballot(PLANTED(LANE_MASK) ? ALL_LANES >> 1 : ALL_LANES, empty);
    u32 winner;
    if (room) {
        winner = lowest_bit(room);
    } else {
        lock = table.lock(slot);
        const u64 score = table.score(slot);
        winner = lowest(!(lock & 1), score);
        if (winner == WARP) return AGAIN;
        if (shfl(ALL_LANES, score, winner) > row.score && !batch.admit) return EKKO_REFUSED;
    }
    const bool replaces = lane() == winner && table.stamp(slot);
    if (PLANTED(LATE_LOCK) && lane() == winner) lock = table.lock(slot) & ~1u;
    const bool taken = lane() == winner && table.take(slot, lock);
    if (!any(ALL_LANES, taken)) return PLANTED(LOST_ON_FULL) ? EKKO_REFUSED : AGAIN;
    fill(table, batch, row, winner, slot, lock, digest, true);
    return any(ALL_LANES, replaces) ? EKKO_REPLACED : EKKO_INSERTED;
}

DEVICE u32 insert_one(const Table& table, const Batch& batch, i64 number, i64 bucket) {
    const u64 stamp = batch.stamps.read(number);
    const Row row = {number, batch.keys.read(number), stamp, batch.scored ? batch.scores.read(number) : batch.score};
    const i64 slot = bucket * EKKO_BUCKET_SLOTS + lane();
    u32 outcome = stamp ? AGAIN : EKKO_REFUSED;
    while (outcome == AGAIN) {
        const u32 digest = table.digest(slot);
        outcome = insert_where_it_is(table, batch, row, slot, digest);
        if (outcome == EKKO_ABSENT) outcome = insert_where_room_is(table, batch, row, slot, digest);
    }
    if (lane() == 0) batch.outcomes.write(number, static_cast<u8>(outcome));
    return stamp ? outcome : AGAIN;
}

DEVICE i64 bucket_of_place(const Table& table, const Batch& batch, i64 place) {
    return place >= 0 && place < batch.count ? bucket_of(table, mix64(batch.keys.read(place))) : -1;
}

KERNEL(256, insert, Table table, Batch batch) {
    const i64 begin = thread_in_grid() / WARP * PLACES_A_WARP;
    u64 of_mine = 0;  // how many keys had the outcome that is this lane's number
    for (i64 head = begin; head < begin + PLACES_A_WARP && head < batch.count; ++head) {
        const i64 bucket = bucket_of_place(table, batch, head);
        if (bucket_of_place(table, batch, head - 1) == bucket) continue;  // the warp that has the first of them has all
        i64 number = head;
        do {
            of_mine += insert_one(table, batch, number, bucket) == lane();
        } while (bucket_of_place(table, batch, ++number) == bucket);
    }
    if (lane() <= EKKO_ERASED) table.count(EKKO_OUTCOME_FIRST + lane(), of_mine);
    if (lane() == EKKO_INSERTED) table.count(EKKO_SIZE, of_mine);
}
