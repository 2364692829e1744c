"""Our sinks do what every sink must do: the conformance suite, on real embeddings, FBGEMM tables and a Redis server."""

import threading
import time
import warnings
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import fbgemm_gpu  # noqa: F401 - registers the operators
import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.tbe.utils import quantize_embs

from benchmarks.baselines import servers
from ekko.errors import ConfigError, ModelError, SinkError, SinkTakenError
from ekko.serve import sink_conformance
from ekko.serve.sink import Batch, Removed, Sink
from ekko.serve.sink_conformance import Case, Subject, batches, kills
from ekko.serve.sink_conformance.subject import F32, U64, gone, opened
from ekko.sinks import EmbeddingSink, FbgemmSink, RedisRows, RedisSink
from p2p.stamps import make_stamp

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
def test_fbgemm_tables(case: Case) -> None:
    case(FbgemmSubject(SparseType.FP32))


@pytest.mark.parametrize("kind", ["FP16", "INT8", "INT4", "INT2"])
def test_other_types_of_fbgemm(kind: str) -> None:
    for case in (batches.rows_are_written_as_they_come, batches.what_is_deleted_stays_deleted, batches.any_order_ends_the_same):
        case(FbgemmSubject(SparseType[kind]))


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


class Hasty(RedisSink):
    """Keeps some batches back, and lets the cursor pass them: right, as long as nobody is killed."""

    def open(self, model: str) -> bytes | None:
        self._kept: list[Batch] = []
        return super().open(model)

    def apply(self, batch: Batch) -> None:
        self._kept.append(Batch(batch.table, batch.keys, batch.rows.copy(), batch.stamps, batch.deleted, batch.forgotten))
        while len(self._kept) > 2:
            super().apply(self._kept.pop(0))

    def close(self) -> None:
        for batch in self._kept:
            super().apply(batch)
        super().close()


@pytest.mark.processes
def test_a_cursor_that_is_ahead_of_rows_is_noticed_by_kills(redis_url: str) -> None:
    class HastySubject(RedisSubject):
        def sink(self) -> Sink:
            return Hasty(redis_url, prefix=self._prefix)

    with pytest.raises(AssertionError, match="killed after a commit"):
        kills.what_was_committed_outlives_a_kill(HastySubject(redis_url, "hasty"))


@pytest.mark.processes
def test_what_redis_says_is_one_line(redis_url: str) -> None:
    with pytest.raises(ConfigError, match="no address of a redis"):
        RedisSink("http://somewhere")
    with pytest.raises(SinkError, match="redis: "):
        RedisSink("redis://127.0.0.1:1/0").open("ctr")
    sink = RedisSink(redis_url, prefix="words")
    sink.open("ctr")
    sink.add_table("item", 4)
    with pytest.raises(ModelError, match="table 'item' has dim 5, and 4 in redis"):
        sink.add_table("item", 5)
    with pytest.raises(ModelError, match="no table 'user'"):
        RedisRows(redis_url, "ctr", prefix="words").lookup("user", np.arange(3, dtype=np.uint64))
    again = RedisSink(redis_url, prefix="words")
    again.open("ctr")
    with pytest.raises(SinkTakenError, match="another feed of this name writes into redis by now"):
        sink.commit(b"late")
    again._redis.flushall()
    with pytest.raises(SinkError, match="lost what was in it"):
        again.commit(b"")


@pytest.mark.processes
def test_old_deletions_are_forgotten_by_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ekko.sinks.redis.DELETED_LOOKED_AT", 1)
    subject = RedisSubject(redis_url, "old")
    sink = opened(subject)
    keys = subject.keys
    sink.apply(gone(subject, keys, 1))  # years ago
    now = np.full(keys.size, make_stamp(int(time.time() * 1000), 0, 1), np.uint64)
    sink.apply(Batch("user", keys[:0], np.empty((0, 3), np.float32), keys[:0], deleted=Removed(keys, now)))
    server = sink._redis  # type: ignore[attr-defined]
    assert server.hlen("old:ctr:deleted:item") == keys.size
    for _ in range(2_000):
        sink.commit(b"cursor")
        if not server.hlen("old:ctr:deleted:item"):
            break
    assert server.hlen("old:ctr:deleted:item") == 0
    assert server.hlen("old:ctr:deleted:user") == keys.size


# --- sinks of this process ------------------------------------------------------------------------------------------------


def test_keys_find_their_places_and_others_are_refused_or_left_out() -> None:
    module = torch.nn.Embedding(4, 2)
    torch.nn.init.zeros_(module.weight)
    places = {"item": lambda keys: np.where(keys < 1_000, -1, (keys - np.uint64(1_000)).astype(np.int64))}
    sink = EmbeddingSink({"item": module}, places=places)
    sink.open("ctr")
    sink.add_table("item", 2)
    keys, stamps = np.array([7, 1_002], np.uint64), np.array([5, 5], np.uint64)
    sink.apply(Batch("item", keys, np.ones((2, 2), np.float32), stamps))
    assert module.weight.detach().sum(dim=1).tolist() == [0, 0, 2, 0]
    assert [(keys.tolist(), stamps.tolist()) for keys, stamps in sink.held("item")] == [([1_002], [5])]
    before = module.weight.detach().clone()
    with pytest.raises(ModelError, match="key 1004 of table 'item' has no place in 4 rows"):
        sink.apply(Batch("item", np.array([1_003, 1_004], np.uint64), np.ones((2, 2), np.float32), stamps))
    assert (module.weight == before).all()
    plain = EmbeddingSink({"item": module})
    with pytest.raises(ModelError, match="key 18446744073709551615 of table"):
        plain.apply(Batch("item", np.array([2**64 - 1], np.uint64), np.ones((1, 2), np.float32), stamps[:1]))


def test_dense_tensors_become_parameters_of_their_names() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 3))
    sink = EmbeddingSink({"item": module[0]}, dense=module, lock=threading.Lock())
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    sink.apply_dense("1.weight", values, 5)
    sink.apply_dense("1.weight", values * 0, 4)  # late
    sink.apply_dense("not here", values, 5)
    assert (module[1].weight.detach().numpy() == values).all()
    with pytest.raises(ModelError, match=r"tensor '1.bias' has shape \(3, 2\), and \(3,\) in the sink"):
        sink.apply_dense("1.bias", values, 5)


def test_tables_that_do_not_fit_are_refused() -> None:
    sink = EmbeddingSink({"item": torch.nn.Embedding(4, 2)})
    sink.open("ctr")
    with pytest.raises(ModelError, match="rows of model 'ctr'"):
        sink.open("cvr")
    with pytest.raises(ModelError, match="the sink has no table 'user': it has 'item'"):
        sink.add_table("user", 2)
    with pytest.raises(ModelError, match="table 'item' has dim 3, and rows of 2 in the sink"):
        sink.add_table("item", 3)
    with pytest.raises(ModelError, match="places has table 'user'"):
        EmbeddingSink({}, places={"user": lambda keys: keys.astype(np.int64)})


def test_operators_that_cannot_be_written_are_refused() -> None:
    def bags(kind: SparseType = SparseType.FP32, **more: Any) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        return IntNBitTableBatchedEmbeddingBagsCodegen([("", 8, 8, kind, EmbeddingLocation.HOST)], device="cpu", **more)

    with pytest.raises(ModelError, match="no weights yet"):
        FbgemmSink(bags(), {"item": 0})
    with pytest.raises(ModelError, match="number 1 of 1 of the operator"):
        FbgemmSink(bags(), {"item": 1})
    pruned = bags(index_remapping=[torch.arange(8, dtype=torch.int32)])
    pruned.initialize_weights()
    with pytest.raises(ModelError, match="pruned"):
        FbgemmSink(pruned, {"item": 0})
