// Bugs that a test plants to see that it would find them: -D EKKO_PLANT=n compiles the n-th in. Without it each test of
// PLANTED is 0 at compile time, and nothing of them is in the binary.
#pragma once

#ifndef EKKO_PLANT
#define EKKO_PLANT 0
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
    KEY_UNDER_LOCK,     // a victim is not looked at again when its lock was had
    ERASE_NEWER,        // a tombstone takes newer rows with it
    FIRST_MATCH_ONLY,   // a look-up ends at the first slot with the key's digest
    EXPORT_UNPROVEN,    // an export takes rows that changed while it read them
};
#define PLANTED(bug) (EKKO_PLANT == Plant::bug)
