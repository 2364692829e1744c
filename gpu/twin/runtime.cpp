// Runs launches: blocks, warps and lanes, one lane at a time, switching where lanes access memory or meet.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <new>

namespace twin {

#ifdef EKKO_TWIN_MODEL
static thread_local WeakMemory kept_memory;
#endif

class Scheduler {
  public:
    Scheduler(const Allocations& allocations, const Launch* launches, u32 count, const Options& options, Stacks& stacks)
        : allocations_(allocations), options_(options), random_(options.seed), stacks_(stacks) {
        lanes_.resize(options.lanes_max);
        for (u32 slot = options.lanes_max; slot-- > 0;) {
            lanes_[slot].slot = slot;
            free_.push_back(slot);
        }
        // How often a lane that could go on is left for another.
        const u32 lengths[] = {1, 4, 32};
        stay_ = options.policy == RANDOM ? lengths[random_.below(3)] : options.policy == ADVERSARIAL ? 256 : 1;
#ifdef EKKO_TWIN_MODEL
        memory.begin(allocations, options.lanes_max, options.reads, options.stores, options.report_races != 0, random_);
#endif
        for (u32 i = 0; i < count; i++) {
            auto running = std::make_unique<Running>();
            running->launch = &launches[i];
            if (options.policy != FIXED && launches[i].grid > 1) {
                running->first = random_.below(launches[i].grid);
                running->stride = random_.chance(1, 2) ? 1 : launches[i].grid - 1;  // upwards or downwards
            }
            launches_.push_back(std::move(running));
        }
    }
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;
    ~Scheduler() {
        for (auto& block : blocks_) free_shared(*block);
#ifdef EKKO_TWIN_MODEL
        memory.end();
#endif
    }

    void run() {
        while (!failed_) {
            admit();
            Lane* next = choose();
            if (next == nullptr) break;
            run_from(thread_, next, false);
            current = nullptr;
        }
    }

    Lane* current = nullptr;
    Counts counts{};
    char* report = nullptr;
    u32 report_bytes = 0;
#ifdef EKKO_TWIN_MODEL
    WeakMemory& memory = kept_memory;  // what it has grown to, it keeps for the next run
#endif

    // An access of the current lane: others may run first.
    void point() {
        if (++counts.accesses > options_.accesses_max)
            fail("no end after %llu accesses: a lane waits for what no other lane will do", options_.accesses_max);
#ifdef EKKO_TWIN_MODEL
        memory.drain_some();
#endif
        switch (options_.policy) {
            case FIXED:
                if (counts.accesses % 1024 != 0) return;
                break;
            case ADVERSARIAL:
                if (random_.chance(1, 256)) hold(random_.below(12));
                [[fallthrough]];
            case RANDOM:
                if (current->state == READY && !random_.chance(1, stay_)) return;
                break;
            default: break;
        }
        leave();
    }
    // The current lane does nothing for 2**exponent accesses, unless nobody else can.
    void hold(u32 exponent) {
        if (ready_.size() <= 1 || current->state != READY) return;
        set_unready(*current, HELD);
        current->held_until = counts.accesses + (1ull << exponent);
        held_.push_back(current);
    }
    void changed_by_cas() {
        if (options_.policy != ADVERSARIAL || !random_.chance(1, 2)) return;
        hold(4 + random_.below(9));
        if (current->state == HELD) leave();
    }

    u64 meet(Collective kind, u32 mask, u64 value, u32 source) {
        Lane& lane = *current;
        lane.kind = kind;
        lane.mask = mask;
        lane.value = value;
        lane.source = source;
#ifdef EKKO_TWIN_MODEL
        if (kind == SYNC || kind == BLOCK) memory.flush(lane.slot);
#endif
        if (kind == BLOCK) {
            lane.block->in_barrier++;
        } else {
            check_mask(lane);
            lane.block->waiting[lane.here.thread / WARP] |= bit_of(lane);
        }
        set_unready(lane, WAITING);
        if (kind == BLOCK) open_barrier(*lane.block);
        else complete(lane);
        if (lane.state != READY || options_.policy != FIXED) leave();
        return lane.result;
    }

    void* shared(const void* site, u32 bytes) {
        for (SharedArray& array : current->block->shared)
            if (array.site == site) return array.memory;
        void* memory = std::calloc(1, bytes);
        if (memory == nullptr) fail("the host has no %u bytes left for shared memory", bytes);
        std::memset(memory, 0xa5, bytes);  // shared memory begins undefined
        current->block->shared.push_back({site, memory});
        return memory;
    }

    [[noreturn]] void fail_with(const char* format, va_list values) {
        failed_ = true;
        int used = 0;
        if (current != nullptr)
            used = std::snprintf(report, report_bytes, "kernel %s, block %u, thread %u: ", current->block->running->launch->entry->name,
                                 current->here.block, current->here.thread);
        std::vsnprintf(report + used, report_bytes - static_cast<u32>(used), format, values);
        if (current == nullptr) throw Failed{};
        switch_fibers(current->fiber, thread_, true);
        __builtin_unreachable();
    }
    struct Failed {};

    const Allocations& allocations() const { return allocations_; }

  private:
    static void lane_main();

    void run_from(Fiber& from, Lane* next, bool last) {
        current = next;
        counts.switches++;
        switch_fibers(from, next->fiber, last);
    }
    // The current lane stops here until it is chosen again.
    void leave() {
        Lane* here = current;
        Lane* next = choose();
        if (next != here) run_from(here->fiber, next, false);
        current = here;
    }
    void finish() {
        Lane& lane = *current;
        Block& block = *lane.block;
#ifdef EKKO_TWIN_MODEL
        memory.lane_end(lane.slot, block.running->left);
#endif
        set_unready(lane, DONE);
        block.alive--;
        block.ended[lane.here.thread / WARP] |= bit_of(lane);
        // Who waits for this lane waits in vain: complete() says so.
        for (u32 bits = block.waiting[lane.here.thread / WARP]; bits != 0; bits &= bits - 1) {
            Lane& other = *block.lanes[warp_of(lane) + lowest_bit(bits)];
            if ((other.mask & bit_of(lane)) != 0) complete(other);
        }
        if (block.alive != 0) open_barrier(block);
        // A block's memory and slots are reused from the thread's own stack, not from the one that ends here.
        if (block.alive == 0 || ready_.empty()) switch_fibers(lane.fiber, thread_, true);
        run_from(lane.fiber, choose(), true);
    }

    void set_ready(Lane& lane) {
        lane.state = READY;
        lane.ready_at = static_cast<u32>(ready_.size());
        ready_.push_back(&lane);
    }
    void set_unready(Lane& lane, State state) {
        lane.state = state;
        ready_[lane.ready_at] = ready_.back();
        ready_[lane.ready_at]->ready_at = lane.ready_at;
        ready_.pop_back();
    }
    void release_held() {
        for (std::size_t i = 0; i < held_.size();) {
            if (held_[i]->held_until > counts.accesses && !ready_.empty()) {
                i++;
                continue;
            }
            set_ready(*held_[i]);
            held_[i] = held_.back();
            held_.pop_back();
        }
    }

    Lane* choose() {
        if (!held_.empty()) release_held();
        if (ready_.empty()) {
            if (!blocks_.empty()) deadlock();
            return nullptr;
        }
        if (options_.policy == RANDOM || options_.policy == ADVERSARIAL) return ready_[random_.below(static_cast<u32>(ready_.size()))];
        for (u32 step = 0; step < lanes_.size(); step++) {
            if (++turn_ >= lanes_.size()) turn_ = 0;
            if (lanes_[turn_].state == READY && lanes_[turn_].block != nullptr) return &lanes_[turn_];
        }
        return ready_[0];
    }

    // Start blocks of launches whose predecessors ended, as long as there is room.
    void admit() {
        for (std::size_t i = 0; i < blocks_.size();) {
            if (blocks_[i]->alive != 0) {
                i++;
                continue;
            }
            retire(*blocks_[i]);
            std::swap(blocks_[i], blocks_.back());
            blocks_.pop_back();
        }
        for (;;) {
            startable_.clear();
            for (auto& running : launches_)
                if (running->started < running->launch->grid && running->launch->block <= free_.size() && open(*running))
                    startable_.push_back(running.get());
            if (startable_.empty()) return;
            start(*startable_[options_.policy == FIXED ? 0 : random_.below(static_cast<u32>(startable_.size()))]);
        }
    }
    bool open(Running& running) {
        if (running.open) return true;
        const Launch& launch = *running.launch;
        for (u32 i = 0; i < launch.after_count; i++)
            if (launches_[launch.after[i]]->ended < launches_[launch.after[i]]->launch->grid) return false;
        running.open = true;
#ifdef EKKO_TWIN_MODEL
        running.known = memory.nothing_known();
        for (u32 i = 0; i < launch.after_count; i++) WeakMemory::join(running.known, launches_[launch.after[i]]->left);
        running.left = running.known;
#endif
        return true;
    }
    void start(Running& running) {
        const Launch& launch = *running.launch;
        auto block = std::make_unique<Block>();
        block->running = &running;
        block->index = static_cast<u32>((running.first + static_cast<u64>(running.started++) * running.stride) % launch.grid);
        block->alive = launch.block;
        block->in_barrier = 0;
        block->waiting.assign(launch.block / WARP, 0);
        block->ended.assign(launch.block / WARP, 0);
        for (u32 thread = 0; thread < launch.block; thread++) {
            // Any slot: a lane knows what the one before it in its slot did, and that should be no neighbour in particular.
            if (options_.policy != FIXED) std::swap(free_[random_.below(static_cast<u32>(free_.size()))], free_.back());
            Lane& lane = lanes_[free_.back()];
            free_.pop_back();
            lane.here = {thread, block->index, launch.block, launch.grid};
            lane.block = block.get();
            lane.fiber = Fiber{};
            lane.fiber.prepare(stacks_.at(lane.slot), lane_main);
            block->lanes.push_back(&lane);
            set_ready(lane);
#ifdef EKKO_TWIN_MODEL
            memory.lane_begin(lane.slot, running.known);
#endif
        }
        blocks_.push_back(std::move(block));
    }
    void retire(Block& block) {
        block.running->ended++;
        for (std::size_t i = block.lanes.size(); i-- > 0;) {
            block.lanes[i]->block = nullptr;
            free_.push_back(block.lanes[i]->slot);
        }
        free_shared(block);
    }
    static void free_shared(Block& block) {
        for (SharedArray& array : block.shared) std::free(array.memory);
        block.shared.clear();
    }

    static u32 warp_of(const Lane& lane) { return lane.here.thread / WARP * WARP; }
    static u32 bit_of(const Lane& lane) { return 1u << (lane.here.thread % WARP); }
    static const char* name_of(Collective kind) {
        const char* names[] = {"sync", "ballot", "any", "all", "shfl", "match_any", "block_sync"};
        return names[kind];
    }
    void check_mask(const Lane& lane) {
        if ((lane.mask & bit_of(lane)) == 0) fail("%s with mask 0x%08x, which has not the calling lane's bit", name_of(lane.kind), lane.mask);
        const Block& block = *lane.block;
        for (u32 bits = block.waiting[lane.here.thread / WARP] & lane.mask; bits != 0; bits &= bits - 1) {
            const Lane& other = *block.lanes[warp_of(lane) + lowest_bit(bits)];
            if ((other.mask & bit_of(lane)) == 0) continue;  // it does something else first
            if (other.kind == lane.kind && other.mask == lane.mask) return;  // and was checked itself
            fail("%s with mask 0x%08x, while thread %u waits for it in %s with mask 0x%08x", name_of(lane.kind), lane.mask,
                 other.here.thread, name_of(other.kind), other.mask);
        }
    }
    // If all lanes of this one's mask have come: give each its result, and let them go on.
    void complete(Lane& lane) {
        Block& block = *lane.block;
        const u32 warp = lane.here.thread / WARP;
        const u32 mask = lane.mask;
        // PTX excuses lanes that ended. A mask that names them is a mistake of this project's kernels all the same.
        if ((block.ended[warp] & mask) != 0)
            fail("%s of thread %u with mask 0x%08x, which has the bit of thread %u, which has ended", name_of(lane.kind), lane.here.thread,
                 mask, warp * WARP + lowest_bit(block.ended[warp] & mask));
        if ((block.waiting[warp] & mask) != mask) return;
        Lane* lanes[WARP];
        for (u32 bits = mask; bits != 0; bits &= bits - 1) {
            Lane& other = *block.lanes[warp * WARP + lowest_bit(bits)];
            if (other.kind != lane.kind || other.mask != mask) return;
            lanes[lowest_bit(bits)] = &other;
        }
        block.waiting[warp] &= ~mask;
        const u32 came = mask;
        u32 votes = 0;
        for (u32 bits = came; bits != 0; bits &= bits - 1)
            if (lanes[lowest_bit(bits)]->value != 0) votes |= bits & -bits;
        for (u32 bits = came; bits != 0; bits &= bits - 1) {
            Lane& one = *lanes[lowest_bit(bits)];
            switch (lane.kind) {
                case BALLOT: one.result = votes; break;
                case ANY: one.result = votes != 0; break;
                case ALL: one.result = votes == came; break;
                case SHFL:
                    if (one.source >= WARP || (came >> one.source & 1) == 0)
                        fail("shfl with mask 0x%08x: thread %u reads from lane %u, which takes no part", mask, one.here.thread, one.source);
                    one.result = lanes[one.source]->value;
                    break;
                case MATCH:
                    one.result = 0;
                    for (u32 rest = came; rest != 0; rest &= rest - 1)
                        if (lanes[lowest_bit(rest)]->value == one.value) one.result |= rest & -rest;
                    break;
                default: break;
            }
        }
        u32 slots[WARP] = {};
        u32 count = 0;
        for (u32 bits = came; bits != 0; bits &= bits - 1) {
            Lane& one = *lanes[lowest_bit(bits)];
            set_ready(one);
            slots[count++] = one.slot;
        }
        share_memory(lane.kind, slots, count);
    }
    void open_barrier(Block& block) {
        if (block.in_barrier == 0 || block.in_barrier != block.alive) return;
        block.in_barrier = 0;
        slots_.clear();
        for (Lane* lane : block.lanes) {
            if (lane->state != WAITING) continue;
            set_ready(*lane);
            slots_.push_back(lane->slot);
        }
        share_memory(BLOCK, slots_.data(), static_cast<u32>(slots_.size()));
    }
    void share_memory([[maybe_unused]] Collective kind, [[maybe_unused]] const u32* slots, [[maybe_unused]] u32 count) {
#ifdef EKKO_TWIN_MODEL
        if (kind == SYNC || kind == BLOCK) memory.share_views(slots, count);
#endif
    }
    void deadlock() {
        char text[256];
        int used = 0;
        u32 told = 0, waiting = 0;
        for (auto& block : blocks_) {
            for (Lane* lane : block->lanes) {
                if (lane->state != WAITING) continue;
                waiting++;
                if (told >= 3) continue;
                told++;
                used += std::snprintf(text + used, sizeof text - static_cast<u32>(used), "%s block %u thread %u in %s(0x%08x)",
                                      told > 1 ? "," : "", block->index, lane->here.thread, name_of(lane->kind),
                                      lane->kind == BLOCK ? 0 : lane->mask);
            }
        }
        fail("deadlock: %u lanes wait for lanes that do not come:%s%s", waiting, text, waiting > told ? ", ..." : "");
    }

    Allocations allocations_;
    Options options_;
    Random random_;
    Stacks& stacks_;
    Fiber thread_;
    std::vector<Lane> lanes_;
    std::vector<u32> free_;  // slots
    std::vector<Lane*> ready_, held_;
    std::vector<u32> slots_;
    std::vector<std::unique_ptr<Running>> launches_;
    std::vector<Running*> startable_;
    std::vector<std::unique_ptr<Block>> blocks_;
    u32 turn_ = 0;
    u32 stay_ = 1;
    bool failed_ = false;
};

namespace {

thread_local Scheduler* scheduler = nullptr;
thread_local Stacks stacks;

}  // namespace

void Scheduler::lane_main() {
    Scheduler& self = *scheduler;
    arrived(self.current->fiber, &self.thread_);
    const Launch& launch = *self.current->block->running->launch;
    launch.entry->lane(launch.arguments);
    self.finish();
}

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    scheduler->fail_with(format, values);
}

const Here& here() { return scheduler->current->here; }
u64 collective(Collective kind, u32 mask, u64 value, u32 source) { return scheduler->meet(kind, mask, value, source); }
void* shared(const void* site, u32 bytes) { return scheduler->shared(site, bytes); }
void shared_access(u32 index, u32 count) {
    if (index >= count) fail("out of bounds: element %u of a shared array of %u", index, count);
    scheduler->point();
}
void changed_by_cas() { scheduler->changed_by_cas(); }

void* access(u64 address, u32 bytes, u32 alignment) {
    scheduler->point();
    const Allocations& allocations = scheduler->allocations();
    const u64 at = address & ((1ull << 48) - 1);
    const u32 allocation = static_cast<u32>(address >> 48);
    const u64 size = allocation < allocations.count ? allocations.sizes[allocation] : 0;
    if (size == 0) fail("an access of %u bytes at 0x%llx, which is no array of this device", bytes, at);
    const u64 offset = at - allocations.bases[allocation];
    if (offset > size || bytes > size - offset)
        fail("out of bounds: %u bytes at byte %lld of an array of %llu", bytes, static_cast<i64>(offset), size);
    if (at % alignment != 0) fail("misaligned: %u bytes at byte %llu of an array need a multiple of %u", bytes, offset, alignment);
    return reinterpret_cast<void*>(at);
}

#ifdef EKKO_TWIN_MODEL
void load(u64 address, void* value, u32 bytes, u32 cell, Order order) {
    access(address, bytes, cell);
    scheduler->memory.load(scheduler->current->slot, address, static_cast<u8*>(value), bytes, cell, order);
}
void store(u64 address, const void* value, u32 bytes, u32 cell, Order order) {
    access(address, bytes, cell);
    scheduler->memory.store(scheduler->current->slot, address, static_cast<const u8*>(value), bytes, cell, order);
}
u64 update(u64 address, u32 bytes, Operation operation, u64 first, u64 second) {
    access(address, bytes, bytes);
    return scheduler->memory.update(scheduler->current->slot, address, bytes, operation, first, second);
}
void fence(bool sequential) {
    scheduler->point();
    scheduler->memory.fence(scheduler->current->slot, sequential);
}
#else
void fence(bool sequential) {
    if (sequential) __atomic_thread_fence(__ATOMIC_SEQ_CST);
    else __atomic_thread_fence(__ATOMIC_ACQ_REL);
}
#endif

}  // namespace twin

// Run all launches to their ends, those that nothing orders at once. Returns 0, or 1 with one line in `report`.
extern "C" __attribute__((visibility("default"))) int ekko_twin_run(const twin::Allocations* allocations, const twin::Launch* launches,
                                                                    u32 count, const twin::Options* options, twin::Counts* counts,
                                                                    char* report, u32 report_bytes) {
    report[0] = 0;
    if (!twin::stacks.reserve(options->lanes_max)) {
        std::snprintf(report, report_bytes, "the host has no memory for %u stacks", options->lanes_max);
        return 1;
    }
    twin::Scheduler scheduler(*allocations, launches, count, *options, twin::stacks);
    scheduler.report = report;
    scheduler.report_bytes = report_bytes;
    twin::scheduler = &scheduler;
    try {
        scheduler.run();
    } catch (const twin::Scheduler::Failed&) {
    }
    twin::scheduler = nullptr;
    *counts = scheduler.counts;
#ifdef EKKO_TWIN_MODEL
    counts->stale = scheduler.memory.counts.stale;
    counts->delayed = scheduler.memory.counts.delayed;
#endif
    return report[0] != 0;
}
