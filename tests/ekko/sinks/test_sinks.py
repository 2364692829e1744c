"""Our sinks do what every sink must do: the conformance suite, on real embeddings, FBGEMM tables and a Redis server."""

import warnings
from collections.abc import Iterator
from types import MappingProxyType

import fbgemm_gpu  # noqa: F401 - registers the operators
import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.tbe.utils import quantize_embs

from benchmarks.baselines import servers
from ekko.serve import sink_conformance
from ekko.serve.sink import Sink
from ekko.serve.sink_conformance import Case, Subject
from ekko.serve.sink_conformance.subject import F32, U64
from ekko.sinks import EmbeddingSink, FbgemmSink, RedisRows, RedisSink

CASES = pytest.mark.parametrize("case", sink_conformance.CASES, ids=lambda case: case.__name__)


class EmbeddingSubject(Subject):
    keys = np.arange(128, dtype=np.uint64)
    durable = False  # its rows end with their process

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._modules = {table: torch.nn.Embedding(128, dim, dtype=dtype) for table, dim in self.tables.items()}
        for module in self._modules.values():
            torch.nn.init.zeros_(module.weight)
        self._sink = EmbeddingSink(self._modules)

    def sink(self) -> Sink:
        return self._sink

    def rows(self, table: str, keys: U64) -> F32:
        found = self._modules[table](torch.from_numpy(keys.astype(np.int64)))
        return np.asarray(found.detach().float().numpy())


@CASES
def test_embeddings(case: Case) -> None:
    case(EmbeddingSubject())


class FbgemmSubject(Subject):
    tables = MappingProxyType({"item": 8, "user": 16})
    keys = np.arange(128, dtype=np.uint64)
    durable = False

    def __init__(self, kind: SparseType) -> None:
        self._kind = kind
        self._bags = self._operator(128)
        self._sink = FbgemmSink(self._bags, {"item": 1, "user": 0})

    def _operator(self, rows: int) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        specs = [("", rows, self.tables[table], self._kind, EmbeddingLocation.HOST) for table in ("user", "item")]
        operator = IntNBitTableBatchedEmbeddingBagsCodegen(specs, device="cpu", output_dtype=SparseType.FP32)
        operator.fill_random_weights()
        return operator

    def sink(self) -> Sink:
        return self._sink

    def rows(self, table: str, keys: U64) -> F32:
        return self._read(self._bags, table, keys)

    def _read(self, operator: IntNBitTableBatchedEmbeddingBagsCodegen, table: str, keys: U64) -> F32:
        """Bags of one key each, of one table, all bags of the other being empty."""
        count, is_item = keys.size, table == "item"
        ends = (np.zeros(count), np.arange(count + 1)) if is_item else (np.arange(count), np.full(count + 1, count))
        offsets = torch.from_numpy(np.concatenate(ends).astype(np.int32))
        pooled = operator(torch.from_numpy(keys.astype(np.int32)), offsets)
        return np.asarray(pooled[:, 16:] if is_item else pooled[:, :16])

    def stored(self, rows: F32) -> F32:
        """By FBGEMM's own way to fill a table, in another operator."""
        table = next(table for table, dim in self.tables.items() if dim == rows.shape[1])
        operator = self._operator(len(rows))
        both = [torch.zeros(len(rows), 16), torch.zeros(len(rows), 8)]
        both[table == "item"] = torch.from_numpy(np.ascontiguousarray(rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it copies a tensor in a way that torch does not recommend
            operator.assign_embedding_weights([quantize_embs(one, self._kind) for one in both])
        found = self._read(operator, table, np.arange(len(rows), dtype=np.uint64))
        return np.where((rows != 0).any(axis=1)[:, None], found, np.float32(0))


@CASES
@pytest.mark.parametrize("kind", ["FP32", "INT8"])
def test_fbgemm_tables(case: Case, kind: str) -> None:
    case(FbgemmSubject(SparseType[kind]))


@pytest.mark.parametrize("kind", ["FP16", "INT4", "INT2"])
def test_other_types_of_fbgemm(kind: str) -> None:
    sink_conformance.CASES[0](FbgemmSubject(SparseType[kind]))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if reason := servers.absent("redis"):
        pytest.skip(reason)
    with servers.server("redis", tmp_path_factory.mktemp("redis")) as port:
        yield f"redis://127.0.0.1:{port}/0"


class RedisSubject(Subject):
    def __init__(self, url: str, prefix: str) -> None:
        self._url, self._prefix = url, prefix
        self._reader = RedisRows(url, "ctr", prefix=prefix)

    def sink(self) -> Sink:
        return RedisSink(self._url, prefix=self._prefix)

    def rows(self, table: str, keys: U64) -> F32:
        return self._reader.lookup(table, keys)[0]


@CASES
@pytest.mark.processes
def test_redis(case: Case, redis_url: str, request: pytest.FixtureRequest) -> None:
    case(RedisSubject(redis_url, request.node.name))
