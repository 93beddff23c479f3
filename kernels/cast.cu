// Moves that change dtype or place, never a value more than by one rounding.
//
// cast          out[i] = round(x[i]); n elements. Bytes: n · (size in + size out).
// gather_rows   out[r, c] = round(x[index[r], c]); x [*, columns] → out [rows, columns]. Also the embedding.
//               Bytes: rows · columns · (size in + size out) + 4 · rows. Indices are checked by the host.
// scatter_rows  out[index[r], c] = x[r, c]; out [*, columns] is zeroed by the host first; indices are distinct.
// fill_rows     out[r, c] = round(row[c]): the bias laid under an addmm (cuBLAS then adds with beta = 1).
//               Bytes: rows · columns · size out.
// Launch: 256 threads, any number of blocks (grid-stride loops), no shared memory.
#include "common.cuh"

extern "C" __global__ void cast(void* out, int out_tag, const void* x, int x_tag, u64 n) {
    for (u64 i = global_thread(); i < n; i += all_threads()) store(out, i, load(x, i, x_tag), out_tag);
}

extern "C" __global__ void gather_rows(void* out, int out_tag, const void* x, int x_tag, const u32* index, u64 rows,
                                       u64 columns) {
    for (u64 i = global_thread(); i < rows * columns; i += all_threads()) {
        u64 from = (u64)index[i / columns] * columns + i % columns;
        store(out, i, load(x, from, x_tag), out_tag);
    }
}

extern "C" __global__ void scatter_rows(void* out, const void* x, int tag, const u32* index, u64 rows, u64 columns) {
    for (u64 i = global_thread(); i < rows * columns; i += all_threads()) {
        u64 to = (u64)index[i / columns] * columns + i % columns;
        store(out, to, load(x, i, tag), tag);
    }
}

extern "C" __global__ void fill_rows(void* out, int out_tag, const void* row, int row_tag, u64 rows, u64 columns) {
    for (u64 i = global_thread(); i < rows * columns; i += all_threads()) {
        store(out, i, load(row, i % columns, row_tag), out_tag);
    }
}
