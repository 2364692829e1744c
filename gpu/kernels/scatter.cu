// Rows that the node's memory had where the cache had none: from buffers that the host filled to where a look-up left zeros.
#include "rows.cuh"

// rows: float32[n, dim], stamps: u64[n], indices: i64[n], without repeats; written to out and found_stamps at `indices`.
KERNEL(256, scatter, Global<u32> rows, Global<u64> stamps, Global<i64> indices, i64 count, Global<u32> out, Global<u64> out_stamps,
       u32 dim) {
    for (i64 i = thread_in_grid(); i < count * dim; i += threads_in_grid()) {
        const i64 row = i / dim, index = indices.read(row);
        out.write(index * dim + (i - row * dim), rows.read(i));
        if (i == row * dim) out_stamps.write(index, stamps.read(row));
    }
}

// The same for bags: to bag bags[b] add rows[starts[b]] to rows[starts[b + 1] - 1], in this order, each times its weight.
// bags: i64[n], without repeats; starts: i64[n + 1]; weights: float32[rows].
KERNEL(256, scatter_bags, Global<u32> rows, Global<u32> weights, Global<i64> bags, Global<i64> starts, i64 count, Global<u32> out,
       u32 dim) {
    for (i64 i = thread_in_grid(); i < count * dim; i += threads_in_grid()) {
        const i64 bag = i / dim, value = i - bag * dim;
        const i64 at = bags.read(bag) * dim + value;
        float sum = float_of(out.read(at));
        for (i64 row = starts.read(bag); row < starts.read(bag + 1); ++row) {
            sum += float_of(weights.read(row)) * float_of(rows.read(row * dim + value));
        }
        out.write(at, bits_of(sum));
    }
}
