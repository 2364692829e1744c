"""Rows in device memory, in front of the rows in shared memory: the daemon's side and the readers'.

The store in shared memory stays what it is, and has every row. On a device lies a cache of each table (`gpu.cache`), which one
thread of the daemon writes and inference processes read. Whatever a reader does not find there it reads in shared memory.

What holds, and what it rests on:

- *A row on the device is a copy of the store's, as it was at some moment.* `writer` is the only one who writes, and it never
  carries rows in a queue: it carries keys, and reads the row of a key when it is about to write it. So what it writes is never
  older than what it was told of, and an insert that was asked for long ago brings the row of now.
- *What changed in the store reaches the cache.* `feed` notes each key after its row was written and before the batch counts as
  applied (`batch_epoch`, an even number). Where too many wait, a table is marked, and all of it that is cached is compared
  anew.
- *What one reader sees of a row never goes back*, whichever of the two it was read from: `control` says up to which epoch the
  device has everything, and a reader remembers at which epoch it has read a key in shared memory (`needed`).
- *A cache that nobody writes any more is not read*: the same file says when it was up to date last.
"""
