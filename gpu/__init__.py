"""Embedding caches in device memory: one row a key, versioned, read while it is written.

Knows no network and no store: who fills a cache hands it keys, stamps and encoded rows. The kernels (`gpu/kernels/*.cu`) have
one source and run on a device (CuPy), or as the host twin: the same source, compiled by the C++ compiler.
"""
