// Bugs that a test plants, to see that it would find them. Not in what runs: there each PLANTED is false as it is compiled.
// With -D EKKO_PLANTS, on the host twin, the variable ekko_plant says which one there is, so that one binary has all.
#pragma once
#include "memory.cuh"

#ifdef EKKO_PLANTS
extern "C" __attribute__((visibility("default"))) u32 ekko_plant;
u32 ekko_plant = 0;
#define PLANTED(bug) (ekko_plant == Plant::bug)
#else
#define PLANTED(bug) false
#endif

enum Plant {
    NONE,
    READER_FENCE,       // a reader looks at the lock again without a fence after the row
    READER_ACQUIRE,     // a reader's first look at the lock orders nothing
    READER_SYNC,        // other lanes read the row without waiting for the lane that looked at the lock
    NO_SECOND_LOOK,     // a row that changed while it was read is taken for whole
    ODD_LOCK,           // a reader takes a slot that is being written
    WRITER_FENCE,       // a row is written without a fence after the lock was taken
    WRITER_RELEASE,     // the lock is given back without waiting for the row
    LATE_CHECK,         // the stamp is compared after the row was written
    WRONG_BUCKET,       // the last key of a warp goes one bucket further
    LOST_ON_FULL,       // an insert gives up when another one took its slot
    STALE_SCORE,        // a row that takes another one's slot keeps that one's score
    LANE_MASK,          // a ballot leaves out the tile's last lane
    STALE_DIGEST,       // a digest is changed by what it was before the lock was taken
    LATE_LOCK,          // an insert chooses a slot by what was there before it looked at the lock
    ERASE_NEWER,        // a tombstone takes newer rows with it
    FIRST_MATCH_ONLY,   // a look-up ends at the first slot with the key's digest
    HOLD_AND_WAIT,      // a warp gives no slot back before it had all
    EXPORT_UNPROVEN,    // an export takes rows that changed while it read them
    CLEAR_FENCE,        // a slot is emptied without a fence after its lock was taken: it has another key before it is seen locked
    POOL_SYNC,          // the lane that looks at a lock again does not wait for the others of its tile, which still read the row
};
