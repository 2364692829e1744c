// Kernels that do what no kernel may, and some that do it right. For the host only.
#include "warp.cuh"

KERNEL(64, copy, Global<u32> from, Global<u32> to, i64 count) {
    for (i64 i = thread_in_grid(); i < count; i += threads_in_grid()) to.write(i, from.read(i) + 1);
}
KERNEL(64, plain_race, Global<u32> memory) { memory.write(0, memory.read(0) + 1); }
KERNEL(64, sizes_race, Global<u32> memory) {
    if (lane() == 0) memory.as<u8>().relax(1, 1);
    else if (lane() == 1) memory.relaxed(0);
}
KERNEL(64, sum, Global<u32> values, Global<u32> sums) {
    u32 value = values.read(thread_in_grid());
    for (u32 step = 16; step > 0; step /= 2) value += shfl(~0u, value, lane() ^ step);
    SHARED(u32, of_warps, 2);
    if (lane() == 0) of_warps.write(thread_index() / 32, value);
    block_sync();
    u32 total = 0;
    for (u32 warp = 0; warp < block_size() / 32; warp++) total += of_warps.read(warp);
    if (thread_index() == 0) sums.write(block_index(), total);
}
KERNEL(64, votes, Global<u32> out) {
    const Tile tile(8);
    out.write(0 * 64 + thread_index(), tile.ballot(lane() % 3 == 0));
    out.write(1 * 64 + thread_index(), match_any(~0u, static_cast<u64>(lane() % 5) << 40));
    out.write(2 * 64 + thread_index(), tile.any(lane() == 9));
    out.write(3 * 64 + thread_index(), tile.all(lane() != 9));
    out.write(4 * 64 + thread_index(), bits_of(tile.shfl(static_cast<float>(lane()), 3)));
}
KERNEL(64, lane_missing, Global<u32> out) {
    if (lane() < 16) ballot(~0u, true);
    else sync(0xffff0000);
    out.write(thread_index(), 1);
}
KERNEL(64, never_comes, Global<u32> out) {
    if (lane() == 0) block_sync();
    else sync(~0u);
}
KERNEL(64, foreign_mask, Global<u32> out) { out.write(thread_index(), ballot(0xff, true)); }
KERNEL(64, two_masks, Global<u32> out) { out.write(thread_index(), ballot(lane() < 8 ? 0xffffffff : 0xffffff01, true)); }
KERNEL(64, shfl_from_outside, Global<u32> out) { if (lane() < 8) out.write(lane(), shfl(0xff, lane(), 9)); }
KERNEL(64, never_ends, Global<u32> memory) { while (memory.relaxed() == 0) {} }
KERNEL(64, shared_overrun, Global<u32> out) {
    SHARED(u32, few, 4);
    few.write(lane() / 4, 1);
}
KERNEL(64, misaligned, Global<u8> memory) { memory.as<u32>().as<u8>().as<u32>().relax(0, 1); (memory + 2).as<u32>().relax(0, 1); }
__attribute__((noinline)) static void fill(u32* few, u32 count) {
    for (u32 i = 0; i < count; i++) few[i] = i;
    fence();  // other lanes run
}
KERNEL(64, stack_overrun, Global<u32> out) {
    u32 few[4] = {};
    fill(few, 4 + block_size() / 64);
    out.write(thread_index(), few[lane() & 3]);
}
KERNEL(64, undefined, Global<i32> out) { out.write(thread_index(), out.read(thread_index()) + 0x7fffffff); }

struct Table {
    Global<u32> memory;
    u64 count;
};
KERNEL(64, tables, Global<Table> tables, Table by_value, float scale) {
    const Table table = block_index() == 0 ? by_value : tables.read(block_index());
    if (thread_index() < table.count) table.memory.write(thread_index(), static_cast<u32>(scale * 2));
}
