// Memory as weak as PTX allows a kernel to meet it, for lanes that run one after the other.
//
// Where it lies: a store goes to its lane's buffer, and from there, in any order but that of one location, into the location's
// history: its values in coherence order. A load may return any value of the history but those that its lane cannot meet any
// more. Which these are is told by clocks: every store has its lane's next number, and a lane's view holds, for each lane, up to
// which number it knows of that lane's stores. A load returns the newest value that is known, or one that is newer.
//
// Views grow as PTX's causality order does. A fence, or an acquire, takes over what the values read before it (by it) were
// released with; a fence and a release make later stores (this store) carry the lane's view; the lanes of sync and block_sync
// share theirs. shfl and votes share nothing. A relaxed or acquire load never returns an older value than such a load of its
// lane did before at the same place; a plain load may, since the first-level cache is not coherent. An atomic
// reads the newest value, writes at once, and passes on what it was released with, as chains of them do.
//
// Where it is stronger than PTX: a load does not return values stored later (PTX allows it where no dependency forbids it); a
// fence empties the lane's buffer; a history is cut when it takes too much memory; a lane knows of the stores of lanes that ended
// in its slot before it; shared memory is sequentially consistent.
//
// What is undefined, or no access that the kernels' rules allow, is an error: races with plain accesses, and races of
// accesses of different sizes.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "random.h"

namespace twin {

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

constexpr u32 NOBODY = 0xffffffff;  // wrote what was there before the launch
constexpr u32 CHOICES_MAX = 8;  // a load looks back over so many values
constexpr u32 BUFFER_MAX = 64;  // stores of a lane on their way
constexpr std::size_t MESSAGES_MAX = 1 << 20;  // then histories are cut

// How loads choose among the values they may return, and how long stores stay in buffers.
enum Reads : u32 { NEWEST, OLDEST, ANYONE };
enum Stores : u32 { EAGER, LAZY, SOMETIMES };

struct Allocations {
    const u64* bases;
    const u64* sizes;
    u32 count;
};

struct View {
    u32 owners;
    std::vector<u32> clock;
};

struct Message {
    u64 value;
    View* released;  // what the store was released with, or null
    u32 older;  // message, 0: none
    u32 order;  // in coherence order of the location
    u32 writer;
    u32 sequence;
    bool plain;
};

struct Location {
    u64 address;
    u32 newest;  // message
    u32 bytes;
};

struct Pending {
    u64 address;
    u64 value;
    View* released;
    u32 shadow;  // allocation
    u32 bytes;
    u32 sequence;
    bool plain;
};

struct LaneMemory {
    std::vector<u32> view;
    std::vector<u32> read;  // what the values read so far were released with, for the next fence
    std::vector<Pending> buffer;
    std::unordered_map<u64, u32> met;  // address -> order of what a strong load returned there, where older values remain
    View* released = nullptr;  // the view at the last fence
    u32 sequence = 0;
    bool reads_pending = false;
};

struct ModelCounts {
    u64 stale = 0;  // loads that returned another value than the newest
    u64 delayed = 0;  // stores that were overtaken by a later one of their lane
};

class WeakMemory {
  public:
    void begin(const Allocations& allocations, u32 lanes, u32 reads, u32 stores, bool races, Random& random) {
        allocations_ = allocations;
        reads_ = reads;
        stores_ = stores;
        report_races_ = races;
        random_ = &random;
        lanes_.resize(lanes);
        for (LaneMemory& lane : lanes_) {
            lane.view.assign(lanes, 0);
            lane.read.assign(lanes, 0);
        }
        sequential_.assign(lanes, 0);
        shadows_.assign(allocations.count, nullptr);
        messages_.assign(1, Message{});
        locations_.assign(1, Location{});
        counts = {};
    }
    void end() {
        forget_histories();
        for (LaneMemory& lane : lanes_) {
            drop(lane.released);
            for (Pending& pending : lane.buffer) drop(pending.released);
        }
        lanes_.clear();
        for (std::size_t i = 0; i < shadows_.size(); i++)
            if (shadows_[i] != nullptr) munmap(shadows_[i], allocations_.sizes[i] * 4);
        shadows_.clear();
        for (View* view : free_views_) delete view;
        free_views_.clear();
    }

    void lane_begin(u32 slot, const std::vector<u32>& known) {
        LaneMemory& lane = lanes_[slot];
        const u32 own = lane.sequence;  // a slot's lanes come one after the other, and know of each other's stores
        lane.view = known;
        lane.view[slot] = own;
        lane.reads_pending = false;
        lane.met.clear();
        drop(lane.released);
        lane.released = nullptr;
    }
    void lane_end(u32 slot, std::vector<u32>& known) {
        flush(slot);
        join(known, lanes_[slot].view);
    }
    std::vector<u32> nothing_known() const { return std::vector<u32>(lanes_.size(), 0); }
    static void join(std::vector<u32>& into, const std::vector<u32>& other) {
        u32* a = into.data();
        const u32* b = other.data();
        for (std::size_t i = 0; i < into.size(); i++) a[i] = std::max(a[i], b[i]);
    }

    void load(u32 slot, u64 tagged, u8* value, u32 bytes, u32 cell, u32 order) {
        const u64 address = tagged & ADDRESS;
        const u32 shadow = static_cast<u32>(tagged >> 48);
        if (lanes_[slot].buffer.empty() && untouched(shadow, address, bytes)) {
            std::memcpy(value, reinterpret_cast<void*>(address), bytes);
            return;
        }
        // Parts of a vector come in any order; that they are asked for in this one makes no difference to views.
        for (u32 at = 0; at < bytes; at += cell) {
            const u64 word = load_word(slot, shadow, address + at, cell, order);
            std::memcpy(value + at, &word, cell);
        }
    }
    void store(u32 slot, u64 tagged, const u8* value, u32 bytes, u32 cell, u32 order) {
        LaneMemory& lane = lanes_[slot];
        if (order == 3) flush(slot);
        for (u32 at = 0; at < bytes; at += cell) {
            Pending pending{(tagged & ADDRESS) + at, 0, nullptr, static_cast<u32>(tagged >> 48), cell, ++lane.sequence, order == 0};
            lane.view[slot] = lane.sequence;
            std::memcpy(&pending.value, value + at, cell);
            pending.released = order == 3 ? snapshot(lane.view) : share(lane.released);
            if (pending.plain) check_race(slot, pending.shadow, pending.address, cell, true);
            lane.buffer.push_back(pending);
        }
        if (stores_ == EAGER) {
            if (random_->chance(7, 8)) flush(slot);
        } else if (stores_ == SOMETIMES) {
            while (!lane.buffer.empty() && random_->chance(1, 2)) drain_any(slot);
        }
        while (lane.buffer.size() > BUFFER_MAX) drain_any(slot);
    }
    u64 update(u32 slot, u64 tagged, u32 bytes, u32 operation, u64 first, u64 second) {
        const u64 address = tagged & ADDRESS;
        const u32 shadow = static_cast<u32>(tagged >> 48);
        LaneMemory& lane = lanes_[slot];
        drain_overlapping(slot, address, bytes);
        const u32 found = find(slot, shadow, address, bytes);
        u64 old = 0;
        std::memcpy(&old, reinterpret_cast<void*>(address), bytes);
        View* released = nullptr;
        if (found != 0) {
            const Message& newest = messages_[locations_[found].newest];
            if (newest.plain && !known(lane, newest)) race("an atomic", "a plain write", shadow, address);
            released = newest.released;
            note_read(lane, newest);
            meet(lane, address, newest);
        }
        u64 next = first;
        switch (operation) {
            case 0: next = second; if (old != first) return old; break;
            case 1: break;
            case 2: next = old + first; break;
            default: next = std::max(old, first); break;
        }
        lane.view[slot] = ++lane.sequence;
        Pending write{address, next, nullptr, shadow, bytes, lane.sequence, false};
        write.released = both(lane.released, released);
        append(slot, write);
        return old;
    }
    void fence(u32 slot, bool sequential) {
        LaneMemory& lane = lanes_[slot];
        flush(slot);
        take_reads(lane);
        if (sequential) {
            join(lane.view, sequential_);
            join(sequential_, lane.view);
        }
        drop(lane.released);
        lane.released = snapshot(lane.view);
    }
    // The lanes of a barrier: each flushes when it comes, all share when the last has come.
    void share_views(const u32* slots, u32 count) {
        scratch_ = lanes_[slots[0]].view;
        for (u32 i = 1; i < count; i++) join(scratch_, lanes_[slots[i]].view);
        for (u32 i = 0; i < count; i++) lanes_[slots[i]].view = scratch_;
    }
    void flush(u32 slot) {
        LaneMemory& lane = lanes_[slot];
        if (lane.buffer.empty()) return;
        // In any order too: what the lane's own order was, nobody who did not synchronise with it may rely on.
        while (lane.buffer.size() > 1) drain_any(slot);
        while (!lane.buffer.empty()) drain(slot, 0);
    }
    // Stores reach memory some day, whatever their lane does meanwhile.
    void drain_some() {
        if (!random_->chance(1, stores_ == LAZY ? 256 : 16)) return;
        const u32 slot = random_->below(static_cast<u32>(lanes_.size()));
        if (!lanes_[slot].buffer.empty()) drain_any(slot);
    }

    ModelCounts counts;

  private:
    static constexpr u64 ADDRESS = (1ull << 48) - 1;

    u32* shadow_of(u32 allocation, u64 address) {
        u32*& shadow = shadows_[allocation];
        if (shadow == nullptr) {
            void* memory = mmap(nullptr, allocations_.sizes[allocation] * 4, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) fail("the host has no memory left to follow an array of %llu bytes", allocations_.sizes[allocation]);
            shadow = static_cast<u32*>(memory);
        }
        return shadow + (address - allocations_.bases[allocation]);
    }
    bool untouched(u32 allocation, u64 address, u32 bytes) {
        if (shadows_[allocation] == nullptr) return true;
        const u32* shadow = shadow_of(allocation, address);
        u32 any = 0;
        for (u32 i = 0; i < bytes; i++) any |= shadow[i];
        return any == 0;
    }
    bool known(const LaneMemory& lane, const Message& message) const {
        return message.writer == NOBODY || lane.view[message.writer] >= message.sequence;
    }
    [[noreturn]] void race(const char* first, const char* second, u32 allocation, u64 address) {
        fail("race: %s meets %s of another lane, not ordered, at byte %llu of an array of %llu", first, second,
             address - allocations_.bases[allocation], allocations_.sizes[allocation]);
    }

    // The location of exactly these bytes, 0 if none of them has a history. Histories of other sizes end here.
    u32 find(u32 slot, u32 allocation, u64 address, u32 bytes) {
        if (shadows_[allocation] == nullptr) return 0;
        u32* shadow = shadow_of(allocation, address);
        const u32 found = shadow[0];
        if (found != 0 && locations_[found].address == address && locations_[found].bytes == bytes) return found;
        for (u32 i = 0; i < bytes; i++) {
            if (shadow[i] == 0) continue;
            const Location location = locations_[shadow[i]];
            if (slot != NOBODY && report_races_ && !known(lanes_[slot], messages_[location.newest]))
                fail("race: an access of %u bytes meets another lane's write of %u bytes, not ordered, at byte %llu of an array of %llu: "
                     "racing accesses need one size",
                     bytes, location.bytes, address - allocations_.bases[allocation], allocations_.sizes[allocation]);
            forget(location, allocation);
        }
        return 0;
    }
    void forget(const Location& location, u32 allocation) {
        for (u32 at = location.newest; at != 0; at = messages_[at].older) {
            drop(messages_[at].released);
            messages_[at].released = nullptr;
        }
        std::memset(shadow_of(allocation, location.address), 0, location.bytes * 4);
    }
    void forget_histories() {
        for (Message& message : messages_) drop(message.released);
        messages_.resize(1);
        locations_.resize(1);
        for (std::size_t i = 0; i < shadows_.size(); i++)
            if (shadows_[i] != nullptr) madvise(shadows_[i], allocations_.sizes[i] * 4, MADV_DONTNEED);
        for (LaneMemory& lane : lanes_) lane.met.clear();
    }

    void check_race(u32 slot, u32 allocation, u64 address, u32 bytes, bool write) {
        if (!report_races_) return;
        const u32 found = find(slot, allocation, address, bytes);
        if (found != 0 && !known(lanes_[slot], messages_[locations_[found].newest]))
            race(write ? "a plain write" : "a plain read", "a write", allocation, address);
    }

    u64 load_word(u32 slot, u32 allocation, u64 address, u32 bytes, u32 order) {
        LaneMemory& lane = lanes_[slot];
        for (std::size_t i = lane.buffer.size(); i-- > 0;) {
            const Pending& pending = lane.buffer[i];
            if (pending.address + pending.bytes <= address || address + bytes <= pending.address) continue;
            if (pending.address == address && pending.bytes == bytes) return pending.value;
            drain_overlapping(slot, address, bytes);
            break;
        }
        const u32 found = find(slot, allocation, address, bytes);
        if (found == 0) {
            u64 value = 0;
            std::memcpy(&value, reinterpret_cast<void*>(address), bytes);
            return value;
        }
        const u32 newest = locations_[found].newest;
        const u32 chosen = choose(lane, newest, address, order, allocation);
        const Message& message = messages_[chosen];
        if (chosen != newest) counts.stale++;
        if (order != 0) {
            if (!known(lane, message)) meet(lane, address, message);
            if (order == 2) {
                if (message.released != nullptr) join(lane.view, message.released->clock);
            } else {
                note_read(lane, message);
            }
        }
        return message.value;
    }
    // Among the values from the oldest that the lane may meet to the newest.
    u32 choose(const LaneMemory& lane, u32 newest, u64 address, u32 order, u32 allocation) {
        if (known(lane, messages_[newest])) return newest;
        if (order == 0 && report_races_) race("a plain read", "a write", allocation, address);
        u32 floor = 0;
        if (order != 0) {
            const auto met = lane.met.find(address);
            if (met != lane.met.end()) floor = met->second;
        }
        u32 choices[CHOICES_MAX];
        u32 count = 0;
        for (u32 at = newest; at != 0 && count < CHOICES_MAX; at = messages_[at].older) {
            const Message& message = messages_[at];
            if (report_races_ && message.plain && !known(lane, message)) race("a read", "a plain write", allocation, address);
            choices[count++] = at;
            if (known(lane, message) || message.order <= floor) break;
        }
        // Now and then any of them, so that who waits for a value meets it some day.
        const u32 reads = random_->chance(7, 8) ? reads_ : static_cast<u32>(ANYONE);
        return reads == NEWEST ? choices[0] : reads == OLDEST ? choices[count - 1] : choices[random_->below(count)];
    }
    void meet(LaneMemory& lane, u64 address, const Message& message) { lane.met[address] = message.order; }
    void note_read(LaneMemory& lane, const Message& message) {
        if (message.released == nullptr) return;
        if (!lane.reads_pending) lane.read = message.released->clock;
        else join(lane.read, message.released->clock);
        lane.reads_pending = true;
    }
    void take_reads(LaneMemory& lane) {
        if (lane.reads_pending) join(lane.view, lane.read);
        lane.reads_pending = false;
    }

    // A store that may leave the buffer: any, if none before it goes to the same bytes.
    void drain_any(u32 slot) {
        std::vector<Pending>& buffer = lanes_[slot].buffer;
        std::size_t chosen = random_->below(static_cast<u32>(buffer.size()));
        for (std::size_t i = 0; i < chosen; i++) {
            if (buffer[i].address + buffer[i].bytes > buffer[chosen].address && buffer[i].address < buffer[chosen].address + buffer[chosen].bytes) {
                chosen = i;
                break;
            }
        }
        if (chosen != 0) counts.delayed++;
        drain(slot, chosen);
    }
    void drain_overlapping(u32 slot, u64 address, u32 bytes) {
        std::vector<Pending>& buffer = lanes_[slot].buffer;
        for (std::size_t i = 0; i < buffer.size();) {
            if (buffer[i].address + buffer[i].bytes > address && buffer[i].address < address + bytes) drain(slot, i);
            else i++;
        }
    }
    void drain(u32 slot, std::size_t index) {
        std::vector<Pending>& buffer = lanes_[slot].buffer;
        const Pending pending = buffer[index];
        buffer.erase(buffer.begin() + static_cast<std::ptrdiff_t>(index));
        append(slot, pending);
    }
    // The store is now the newest of its location. Takes over its share of the view.
    void append(u32 slot, const Pending& pending) {
        if (messages_.size() >= MESSAGES_MAX) forget_histories();
        u32 found = find(NOBODY, pending.shadow, pending.address, pending.bytes);
        if (found == 0) {
            found = static_cast<u32>(locations_.size());
            u64 before = 0;
            std::memcpy(&before, reinterpret_cast<void*>(pending.address), pending.bytes);
            messages_.push_back({before, nullptr, 0, 0, NOBODY, 0, false});
            locations_.push_back({pending.address, static_cast<u32>(messages_.size() - 1), pending.bytes});
            std::fill_n(shadow_of(pending.shadow, pending.address), pending.bytes, found);
        }
        Location& location = locations_[found];
        const u32 order = messages_[location.newest].order + 1;
        messages_.push_back({pending.value, pending.released, location.newest, order, slot, pending.sequence, pending.plain});
        location.newest = static_cast<u32>(messages_.size() - 1);
        std::memcpy(reinterpret_cast<void*>(pending.address), &pending.value, pending.bytes);
    }

    View* snapshot(const std::vector<u32>& clock) {
        View* view;
        if (free_views_.empty()) {
            view = new View{1, clock};
        } else {
            view = free_views_.back();
            free_views_.pop_back();
            view->owners = 1;
            view->clock = clock;
        }
        return view;
    }
    static View* share(View* view) {
        if (view != nullptr) view->owners++;
        return view;
    }
    View* both(View* first, View* second) {
        if (first == nullptr || second == nullptr) return share(first != nullptr ? first : second);
        View* view = snapshot(first->clock);
        join(view->clock, second->clock);
        return view;
    }
    void drop(View* view) {
        if (view != nullptr && --view->owners == 0) free_views_.push_back(view);
    }

    Allocations allocations_{};
    u32 reads_ = 0;
    u32 stores_ = 0;
    bool report_races_ = true;
    Random* random_ = nullptr;
    std::vector<LaneMemory> lanes_;
    std::vector<u32> sequential_;  // what fences that are in one order for all have seen
    std::vector<u32*> shadows_;  // by allocation: for each byte, its location
    std::vector<Message> messages_;
    std::vector<Location> locations_;
    std::vector<View*> free_views_;
    std::vector<u32> scratch_;
};

}  // namespace twin
