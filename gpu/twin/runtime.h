// What Python passes to the runtime and gets back (twin.py has the same structures), and the runtime's own.
#pragma once

#include <vector>

// The header a kernel sees first; the runtime needs its number types and twin.h.
#include "memory.cuh"

#include "fiber.h"
#include "model.h"

namespace twin {

constexpr u32 WARP = 32;

// Who runs next, after every access. FIXED: on to the next collective, lane after lane. ADVERSARIAL: one lane as far as it gets,
// others held back for long wherever they are, most of all after a successful compare-and-swap.
enum Policy : u32 { FIXED, ROUND_ROBIN, RANDOM, ADVERSARIAL };

struct Launch {
    const Entry* entry;
    void** arguments;
    u32 grid, block;
    const u32* after;  // launches that end before this one begins
    u32 after_count;
};
struct Options {
    u64 seed;
    u64 accesses_max;
    u32 lanes_max;  // that run at once
    u32 policy, reads, stores;
    u32 report_races;
};
struct Counts {
    u64 accesses, switches, stale, delayed;
};

enum State : u32 { READY, HELD, WAITING, DONE };

struct Block;

struct Lane {
    Fiber fiber;
    Here here;
    Block* block;
    u32 slot;
    State state;
    u32 ready_at;  // in Scheduler::ready_
    u64 held_until;
    Collective kind;  // what it waits in
    u32 mask, source;
    u64 value, result;
};

struct SharedArray {
    const void* site;
    void* memory;
};

struct Running {  // a launch
    const Launch* launch;
    u32 started = 0, ended = 0;  // blocks
    u32 first = 0, stride = 1;  // the order in which blocks start
    std::vector<u32> known;  // by its lanes when they begin
    std::vector<u32> left;  // by its lanes when they ended
    bool open = false;
};

struct Block {
    Running* running;
    u32 index;
    u32 alive, in_barrier;
    std::vector<Lane*> lanes;
    std::vector<u32> waiting, ended;  // by warp: lanes, as bits, that are in a warp's collective; that have ended
    std::vector<SharedArray> shared;
};

}  // namespace twin
