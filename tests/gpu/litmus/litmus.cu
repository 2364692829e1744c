// Small programs whose outcomes PTX's memory model allows or forbids. Each is run by two lanes or two blocks; FENCE is a fence or
// nothing. Block 0 and block 1 take the two sides; `out` gets what each side saw.
#include "warp.cuh"

#ifndef FENCE
#define FENCE
#endif

// `rounds` pairs of locations, 16 words apart.
#define PAIR(i) const Global<u32> x = memory + 32 * (i), y = memory + 32 * (i) + 16

KERNEL(32, message_passing, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        if (block_index() == 0) {
            x.relax(0, 1);
            FENCE;
            y.relax(0, 1);
        } else {
            const u32 flag = y.relaxed();
            FENCE;
            out.write(2 * i, flag);
            out.write(2 * i + 1, x.relaxed());
        }
    }
}

KERNEL(32, release_acquire, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        if (block_index() == 0) {
            x.relax(0, 1);
            y.release(0, 1);
        } else {
            out.write(2 * i, y.acquire());
            out.write(2 * i + 1, x.relaxed());
        }
    }
}

// The flag is passed on by a third block: release, acquire and release, acquire.
KERNEL(32, passed_on, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        const Global<u32> z = memory + 32 * i + 8;
        if (block_index() == 0) {
            x.relax(0, 1);
            FENCE;
            y.relax(0, 1);
        } else if (block_index() == 1) {
            if (y.acquire() != 0) z.release(0, 1);
        } else {
            out.write(2 * i, z.acquire());
            out.write(2 * i + 1, x.relaxed());
        }
    }
}

KERNEL(32, store_buffering, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        const Global<u32> mine = block_index() == 0 ? x : y, theirs = block_index() == 0 ? y : x;
        mine.relax(0, 1);
        FENCE;
        out.write(2 * i + block_index(), theirs.relaxed());
    }
}

// Both write both locations; which value stays in each.
KERNEL(32, two_writers, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        const Global<u32> first = block_index() == 0 ? x : y, second = block_index() == 0 ? y : x;
        first.relax(0, 1);
        FENCE;
        second.relax(0, 2);
    }
}

// One location: values that a lane meets never go back.
KERNEL(32, coherence, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    if (block_index() == 0) {
        for (i64 i = 1; i <= rounds; i++) memory.relax(0, static_cast<u32>(i));
    } else {
        u32 before = 0;
        for (i64 i = 0; i < rounds; i++) {
            const u32 now = memory.relaxed();
            if (now < before) out.write(block_index(), 1);
            before = now;
        }
    }
}

// The same through the first-level cache, which promises nothing.
KERNEL(32, plain_coherence, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    if (block_index() == 0) {
        for (i64 i = 1; i <= rounds; i++) memory.relax(0, static_cast<u32>(i));
    } else {
        u32 before = 0;
        for (i64 i = 0; i < rounds; i++) {
            const u32 now = memory.read();
            if (now < before) out.write(block_index(), 1);
            before = now;
        }
    }
}

// A seqlock over two chunks. The writer writes i everywhere; `out`: a reader accepted two different words.
#ifndef WRITER_FENCE
#define WRITER_FENCE fence()
#endif
#ifndef READER_FENCE
#define READER_FENCE fence()
#endif
#ifndef UNLOCK
#define UNLOCK(value) lock.release(0, value)
#endif
KERNEL(32, seqlock, Global<u32> lock, Global<Chunk> row, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    if (block_index() == 0) {
        for (u32 i = 1; i <= rounds; i++) {
            lock.relax(0, 2 * i - 1);
            WRITER_FENCE;
            row.relax(0, Chunk{{i, i, i, i}});
            row.relax(1, Chunk{{i, i, i, i}});
            UNLOCK(2 * i);
        }
    } else {
        for (i64 i = 0; i < rounds; i++) {
            const u32 before = lock.acquire();
            if (before % 2 != 0) continue;
            const Chunk first = row.relaxed(0), second = row.relaxed(1);
            READER_FENCE;
            if (lock.relaxed() != before) continue;
            bool torn = false;
            for (u32 word = 0; word < 4; word++) torn |= first.word[word] != before / 2 || second.word[word] != before / 2;
            out.write(2 * block_index() + torn, 1);
        }
    }
}

// A counter behind a lock of compare-and-swap; each of many lanes adds one `rounds` times.
KERNEL(64, locked, Global<u32> lock, Global<u32> counter, i64 rounds) {
    for (i64 i = 0; i < rounds; i++) {
        while (lock.cas(0, 0, 1) != 0) {}
        FENCE;
        counter.relax(0, counter.relaxed() + 1);
        UNLOCK(0);
    }
}

// What a group's first lane acquired is ordered for its other lanes by sync, and not by shfl.
#ifndef MEET
#define MEET sync(~0u)
#endif
KERNEL(32, group, Global<u32> memory, Global<u32> out, i64 rounds) {
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        if (block_index() == 0) {
            if (lane() != 0) continue;
            x.relax(0, 1);
            y.release(0, 1);
        } else {
            u32 flag = lane() == 0 ? y.acquire() : 0;
            flag = shfl(~0u, flag, 0);
            MEET;
            if (lane() != 5) continue;
            out.write(2 * i, flag);
            out.write(2 * i + 1, x.relaxed());
        }
    }
}

// Two blocks that wait for each other's word in turn, without a fence.
KERNEL(32, turns, Global<u32> memory, i64 rounds) {
    if (lane() != 0) return;
    const Global<u32> mine = memory + 16 * block_index(), theirs = memory + 16 * (1 - block_index());
    for (u32 i = 1; i <= rounds; i++) {
        if (block_index() == 0) mine.relax(0, i);
        while (theirs.relaxed() != i) {}
        if (block_index() == 1) mine.relax(0, i);
    }
}

// A lane meets what it stored itself, whatever its neighbours do elsewhere; `out` counts where not.
KERNEL(32, own_stores, Global<u32> memory, Global<u32> out, i64 rounds) {
    const Global<u32> mine = memory + 32 * block_index() + lane();
    for (u32 i = 1; i <= rounds; i++) {
        mine.relax(0, i);
        if (mine.relaxed() != i || mine.read() != i) out.add(0, 1);
        if (mine.add(0, 0) != i) out.add(0, 1);
    }
}

// A plain read after a relaxed one: the first-level cache may have an older value.
KERNEL(32, plain_after_relaxed, Global<u32> memory, Global<u32> out, i64 rounds) {
    if (lane() != 0) return;
    for (i64 i = 0; i < rounds; i++) {
        PAIR(i);
        if (block_index() == 0) {
            x.relax(0, 1);
        } else {
            out.write(2 * i, x.relaxed());
            out.write(2 * i + 1, x.read());
        }
    }
}
