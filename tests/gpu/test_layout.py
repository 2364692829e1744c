"""The cache's memory: strides, hashes, and that the numbers agree with the store's."""

import numpy as np
import pytest

from ekko import codec as store_codec
from ekko.model import CODECS
from gpu import layout

MASK = 0xFFFF_FFFF_FFFF_FFFF
KEYS = np.concatenate([np.array([0, 1, 2**63, MASK], np.uint64), np.random.default_rng(3).integers(0, 2**64, 2_000, np.uint64)])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 15, 16, 64, 100, 128, 16_384])
def test_codecs_are_the_stores(codec: str, dim: int) -> None:
    assert layout.CODECS[codec] == CODECS[codec].number
    shape = layout.Shape(7, dim, codec)
    assert shape.row_bytes == CODECS[codec].row_bytes(dim) == store_codec.encode(codec, np.zeros((1, dim), np.float32)).shape[1]
    assert shape.row_bytes <= shape.stride < shape.row_bytes + 16
    assert shape.stride % 16 == 0


def test_hash_bucket_and_digest_are_what_whole_numbers_say() -> None:
    for buckets in [1, 2, 3, 1_000, 2**31 - 1, 2**31]:
        hashed = layout.mix64(KEYS)
        columns = hashed, layout.bucket_of(hashed, buckets), layout.digest_of(hashed)
        for key, value, bucket, digest in zip(KEYS.tolist(), *(column.tolist() for column in columns), strict=True):
            x = (key + 0x9E3779B97F4A7C15) & MASK
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
            x ^= x >> 31
            assert (value, bucket, digest) == (x, x * buckets >> 64, 1 + (x % 256) * 255 // 256)


def test_digests_are_never_that_of_an_empty_slot_and_use_all_others() -> None:
    digests = layout.digest_of(np.arange(256, dtype=np.uint64))
    assert sorted(set(digests.tolist())) == list(range(1, 256))


def test_keys_in_a_row_spread_over_buckets_and_digests() -> None:
    hashed = layout.mix64(np.arange(100_000, dtype=np.uint64))
    in_bucket = np.bincount(layout.bucket_of(hashed, 1_000), minlength=1_000)
    assert 50 < in_bucket.min() < in_bucket.max() < 160  # 100 on average, deviation 10
    assert np.bincount(layout.digest_of(hashed), minlength=256)[1:].max() < 900  # 392 on average, one of them twice


def test_define_lines_are_the_defines() -> None:
    lines = layout.define_lines().splitlines()
    assert len(lines) == len(layout.defines())
    assert "#define EKKO_HEADER_LOCK 24" in lines
    assert "#define EKKO_RANK_ONE 4294967296ULL" in lines
    assert layout.HEADER.itemsize == layout.HEADER_BYTES == layout.HEADER["spare"].itemsize + layout.HEADER_SPARE
