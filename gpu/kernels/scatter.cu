// Rows that the node's memory had where the cache had none: from buffers that the host filled to where a look-up left zeros.
#include "rows.cuh"

// rows: float32[n, dim], stamps: u64[n], indices: i64[n], without repeats; written to out and found_stamps at `indices`.
KERNEL(256, scatter, Global<u32> rows, Global<u64> stamps, Global<i64> indices, i64 count, Global<u32> out,
       Global<u64> out_stamps, u32 dim) {
    for (i64 i = thread_in_grid(); i < count * dim; i += threads_in_grid()) {
        const i64 row = i / dim, index = indices.read(row);
        out.write(index * dim + (i - row * dim), rows.read(i));
        if (i == row * dim) out_stamps.write(index, stamps.read(row));
    }
}
