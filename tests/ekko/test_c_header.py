"""ekko.h, compiled, against `ekko.Reader`: the same rows of every codec, while the store grows, changes and is written to."""

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

import ekko
from ekko.codec import encode
from ekko.errors import ModelError
from ekko.generations import SWITCH_AHEAD_MS, Generation
from ekko.health.traffic import Traffic, arms_of
from ekko.model import CODECS, ModelSpec, TableSpec, model_id
from ekko.serve.reader import Reader
from ekko.store import Store, layout, patience
from ekko.store.manifest import header_name, rows_name
from ekko.store.memory import TmpfsMemory
from ekko.store.model_store import ModelStore
from p2p.replica import RowColumns

COMPILER = shutil.which("cc")
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-gcc")
HEADER = Path(ekko.get_include()) / "ekko.h"
PROGRAM = Path(__file__).with_name("c_reader.c")
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


def compiled(target: Path, *flags: str, header: Path = HEADER, compiler: str | None = COMPILER) -> Path:
    assert compiler is not None
    command = [compiler, *WARNINGS, "-O2", "-g", *flags, "-I", str(header.parent), str(PROGRAM), "-o", str(target), "-lm"]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checked by the sanitizers, where they are installed."""
    target = tmp_path_factory.mktemp("c") / "reader"
    try:
        return compiled(target, *SANITIZERS)
    except subprocess.CalledProcessError:
        return compiled(target)


@pytest.fixture(scope="module")
def fast_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("c") / "reader")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


class CReader:
    """`c_reader serve` as an object."""

    def __init__(self, program: Path, run_dir: Path, table: str, model: str = "ctr", what: str = "serve") -> None:
        command = [str(program), what, str(run_dir), model, table]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "CReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()
        assert self.process.returncode == 0

    def ask(self, keys: NDArray[np.uint64]) -> tuple[int, NDArray[np.float32], NDArray[np.uint64]]:
        """Error, rows and stamps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(struct.pack("<Q", keys.size) + keys.tobytes())
        self.process.stdin.flush()
        error, dim = struct.unpack("<QQ", self.process.stdout.read(16))
        count = 0 if error else keys.size
        rows = np.frombuffer(self.process.stdout.read(4 * count * dim), np.float32).reshape(count, dim)
        return error, rows, np.frombuffer(self.process.stdout.read(8 * count), np.uint64)

    def arms(self, ids: NDArray[np.uint64]) -> tuple[int, list[int]]:
        """Error, and who answers which request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(struct.pack("<Q", ids.size) + ids.tobytes())
        self.process.stdin.flush()
        (error,) = struct.unpack("<Q", self.process.stdout.read(8))
        return error, list(self.process.stdout.read(0 if error else ids.size))

    def same_as(self, reader: Reader, table: str, keys: NDArray[np.uint64]) -> None:
        rows, stamps = reader.lookup(table, keys, stamps=True)
        error, seen, found = self.ask(keys)
        assert error == 0
        assert seen.tobytes() == rows.tobytes()
        assert found.tolist() == stamps.tolist()


def put(model: ModelStore, table: str, keys: NDArray[np.uint64], stamp: int, rows: NDArray[np.float32] | None = None) -> None:
    spec = model.spec.tables[table]
    rows = np.full((keys.size, spec.dim), stamp, np.float32) if rows is None else rows
    model.apply([RowColumns(spec.id, keys, encode(spec.codec, rows))], stamp)


def delete(model: ModelStore, table: str, keys: NDArray[np.uint64], stamp: int) -> None:
    spec = model.spec.tables[table]
    model.apply([RowColumns(spec.id, keys, np.empty((0, spec.row_bytes), np.uint8))], stamp)


def mix64(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift = np.uint64(33)
    keys = (keys ^ keys >> shift) * np.uint64(0xFF51AFD7ED558CCD)
    keys = (keys ^ keys >> shift) * np.uint64(0xC4CEB9FE1A85EC53)
    return np.asarray(keys ^ keys >> shift)


def keys_of(*keys: int) -> NDArray[np.uint64]:
    return np.array(keys, np.uint64)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 5, 64, 67])
def test_rows_of_every_codec_are_the_readers(program: Path, run_dir: Path, codec: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    # From what is below the smallest normal float16 up to large numbers, of both signs, and zeros.
    rows = rng.standard_normal((3_000, dim)) * 10.0 ** rng.integers(-9, 5, (3_000, dim))
    rows[::7, 0] = 0.0
    rows[1::7, 0] = -0.0
    keys = rng.integers(0, 2**64 - 1, 3_000, np.uint64, endpoint=True)
    keys[:2] = 0, 2**64 - 1
    model = Store.open(run_dir).add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", dim, codec)}, codec=codec))
    put(model, "item", keys, 10, rows.astype(np.float32))
    delete(model, "item", keys[5:9], 11)
    asked = np.append(keys, rng.integers(0, 2**63, 100, np.uint64))
    with Reader("ctr", run_dir) as reader, CReader(program, run_dir, "item") as c_reader:
        c_reader.same_as(reader, "item", asked)
        put(model, "item", keys[6:7], 12, rows[:1].astype(np.float32))
        c_reader.same_as(reader, "item", asked)


def test_it_follows_the_index_while_it_grows(program: Path, run_dir: Path) -> None:
    model = Store.open(run_dir).add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    put(model, "item", keys_of(0), 1)
    generations = set()
    with Reader("ctr", run_dir) as reader, CReader(program, run_dir, "item") as c_reader:
        for begin in range(0, 40_000, 2_000):
            put(model, "item", np.arange(begin, begin + 2_000, dtype=np.uint64), begin + 2)
            generations.add(reader._table("item")._header[layout.TABLE.offset("index_generation") // 8])
            c_reader.same_as(reader, "item", np.arange(0, begin + 2_100, 7, dtype=np.uint64))
    assert len(generations) > 1


def test_it_follows_a_new_table_and_a_replaced_store(program: Path, run_dir: Path) -> None:
    store = Store.open(run_dir)
    spec = ModelSpec("ctr", 8, {"item": TableSpec("item", 3)})
    put(store.add_model(spec), "item", keys_of(1), 10)
    with Reader("ctr", run_dir) as reader, CReader(program, run_dir, "item") as c_reader:
        c_reader.same_as(reader, "item", keys_of(1, 2))
        store.add_table("ctr", TableSpec("user", 5))
        c_reader.same_as(reader, "item", keys_of(1, 2))
        store.destroy()
        assert c_reader.ask(keys_of(1))[0] == 1  # EKKO_NO_STORE
        wider = Store.open(run_dir).add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 4)}))
        put(wider, "item", keys_of(1), 20)
        c_reader.same_as(reader, "item", keys_of(1, 2))


def free_row(run_dir: Path, model: ModelStore, store: Store, key: int, *, become: int | None) -> None:
    """Do to a row what its slot goes through: free, its entry still in the index, or already another key's."""
    memory = store._memory
    assert isinstance(memory, TmpfsMemory)
    table = model.spec.tables["item"]
    mapping = memory.open(rows_name(model_id("ctr"), table.id))
    (slot,) = model._tables[table.id].resolve(keys_of(key))
    words = mapping.words(layout.TABLE.offset("rows") + int(slot) * layout.row_stride(table.row_bytes), 3)
    if become is None:
        words[0] |= np.uint64(layout.FLAG_FREE << 32)
    else:
        words[2] = become


@pytest.mark.parametrize("become", [None, 99])
def test_a_slot_that_is_free_or_of_another_key_is_never_returned(program: Path, run_dir: Path, become: int | None) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    put(model, "item", keys_of(1, 2), 10)
    free_row(run_dir, model, store, 1, become=become)
    with CReader(program, run_dir, "item") as c_reader:
        error, rows, stamps = c_reader.ask(keys_of(1))
        if become is None:  # as a writer leaves it that was killed before it removed the entry
            assert (error, rows.tolist(), stamps.tolist()) == (0, [[0.0] * 3], [0])
        else:
            assert error == 10  # EKKO_UNSTABLE: the index goes on saying what the row denies
        assert c_reader.ask(keys_of(2))[0] == 0


def unmixed(hashed: int) -> int:
    """The key of which this is the hash."""
    for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
        hashed = (hashed ^ hashed >> 33) * pow(factor, -1, 1 << 64) & (1 << 64) - 1
    return hashed ^ hashed >> 33


def test_keys_of_one_tag_are_told_apart_by_their_rows(program: Path, run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    twins = keys_of(*(unmixed(number << 40 | 5) for number in range(6)))  # and all searches begin at one entry
    put(model, "item", twins[:2], 10)
    put(model, "item", twins[2:5], 11)
    delete(model, "item", twins[3:4], 12)
    with Reader("ctr", run_dir) as reader, CReader(program, run_dir, "item") as c_reader:
        c_reader.same_as(reader, "item", twins)
        assert reader.lookup("item", twins)[:, 0].tolist() == [10.0, 10.0, 11.0, 0.0, 11.0, 0.0]
        free_row(run_dir, model, store, int(twins[2]), become=None)
        c_reader.same_as(reader, "item", twins)
        assert c_reader.ask(twins)[2].tolist() == [10, 10, 0, 0, 11, 0]


def test_removed_entries_are_passed(program: Path, run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    log2 = 8  # of the smallest index
    hashed = mix64(np.arange(4_000, dtype=np.uint64)) >> np.uint64(64 - log2)
    same = np.flatnonzero(hashed == np.bincount(hashed.astype(np.int64)).argmax()).astype(np.uint64)[
        :5
    ]  # these keys come one after the other
    put(model, "item", same, 10)
    table = model.spec.tables["item"]
    held = model._tables[table.id].index
    assert held.capacity_log2 == log2
    entries = held.mapping.words(layout.INDEX.offset("entries"), 1 << log2)
    slot = model._tables[table.id].resolve(same[1:2])  # in its first life: the place is the slot
    (gone,) = np.flatnonzero((entries > layout.ENTRY_REMOVED) & (entries & np.uint64(0xFFFF_FFFF) == slot.astype(np.uint64)))
    entries[gone] = layout.ENTRY_REMOVED
    with CReader(program, run_dir, "item") as c_reader:
        error, _, stamps = c_reader.ask(same)
    assert (error, stamps.tolist()) == (0, [10, 0, 10, 10, 10])


def test_a_row_that_stays_locked_is_an_error_in_a_bounded_time(program: Path, run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    put(model, "item", keys_of(1), 10)
    words = model._tables[model.spec.tables["item"].id].mapping.words(layout.TABLE.offset("rows"), 1)
    words[0] |= np.uint64(1)
    with CReader(program, run_dir, "item") as c_reader:
        assert c_reader.ask(keys_of(1))[0] == 7  # EKKO_LOCKED
        words[0] += np.uint64(1)
        assert c_reader.ask(keys_of(1))[0] == 0


def test_texts_have_the_ids_that_they_have_in_python(program: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [rng.bytes(size) for size in (*range(100), 1_000, 4_099)]  # every way in which a hash of 32 bytes a turn can end
    asked = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    said = subprocess.run([str(program), "ids", "-", "-", "-"], input=asked, capture_output=True, check=True).stdout
    assert np.frombuffer(said, np.uint64).tolist() == [xxhash.xxh64_intdigest(text) for text in texts]


def test_requests_are_divided_as_the_reader_divides_them(program: Path, run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    ids = np.random.default_rng(2).integers(0, 2**64 - 1, 4_000, np.uint64, endpoint=True)
    ids[:2] = 0, 2**64 - 1
    with Reader("ctr", run_dir) as reader, CReader(program, run_dir, "item", what="arms") as c_reader:
        for traffic in (Traffic(), Traffic(0.25), Traffic(0.25, 0.1), Traffic(0.0, 0.0), Traffic(1.0)):
            model.set_traffic(traffic)
            assert c_reader.arms(ids) == (0, reader.arm(ids).tolist())
        model.set_traffic(Traffic(0.25))
        store.add_model(ModelSpec("cvr", 8, {"item": TableSpec("item", 3)})).set_traffic(Traffic(0.25))
        with Reader("cvr", run_dir) as other, CReader(program, run_dir, "item", "cvr", "arms") as c_other:
            assert c_other.arms(ids) == (0, other.arm(ids).tolist())
            assert c_other.arms(ids) != c_reader.arms(ids), "models divide requests independently"
        store.destroy()
        assert c_reader.arms(ids)[0] == 1  # EKKO_NO_STORE
        # A store that took its place, with wider rows: whoever asks for arms is told, too, before rows are written too far.
        wider = Store.open(run_dir).add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 4)}))
        wider.set_traffic(Traffic(0.5))
        assert c_reader.arms(ids)[0] == 8  # EKKO_CHANGED
        assert c_reader.arms(ids) == (0, reader.arm(ids).tolist())


def test_an_alias_divides_the_requests_of_the_model_it_stands_for(program: Path, run_dir: Path) -> None:
    store = Store.open(run_dir)
    store.add_model(ModelSpec("ctr-1", 8, {"item": TableSpec("item", 3)})).set_traffic(Traffic(0.25))
    store.set_alias(store.registers.switched("serving", Generation("ctr-1"), None, 1_000, 7))
    store.settle_aliases(1_000 + SWITCH_AHEAD_MS)
    ids = np.arange(2_000, dtype=np.uint64)
    with Reader("serving", run_dir) as reader, CReader(program, run_dir, "item", "serving", "arms") as c_reader:
        assert c_reader.arms(ids) == (0, reader.arm(ids).tolist())
        assert reader.arm(ids).tolist() == arms_of("ctr-1", ids, *Traffic(0.25).bounds).tolist()


def test_what_cannot_be_read_is_refused(program: Path, run_dir: Path) -> None:
    def refusal(model: str, table: str) -> str:
        command = [str(program), "serve", str(run_dir), model, table]
        return subprocess.run(command, input=b"", capture_output=True, check=False).stderr.decode().strip()

    assert refusal("ctr", "item") == "no node has a store in this run_dir"
    store = Store.open(run_dir)
    store.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}))
    store.add_model(ModelSpec("part", 8, {"item": TableSpec("item", 3)}, partitions=2), hold=[1])
    assert refusal("ctr", "item") == ""
    assert refusal("cvr", "item") == "the node does not have this model"
    assert refusal("ctr", "shop") == "the model does not have this table"
    assert refusal("part", "item") == "the node holds a part of this model only"
    manifest = run_dir / "manifest.json"
    text = manifest.read_text()
    for old, new, message in (
        ('"layout_version": 3', '"layout_version": 2', "shared memory of another version of ekko"),
        ('"boot_id": "', '"boot_id": "x', "no node has a store in this run_dir"),
        ('"prefix": "', '"prefix": "\\u0041', "shared memory is damaged"),
        ('"models": [', '"models": "[', "shared memory is damaged"),
    ):
        assert old in text
        manifest.write_text(text.replace(old, new))
        assert refusal("ctr", "item") == message
    for cut in range(0, len(text), 97):  # half a manifest is no reason to crash
        manifest.write_text(text[:cut])
        refusal("ctr", "item")
    manifest.write_text(text)
    header = store._memory.open(header_name(model_id("ctr")))  # an unrelated file stays as it is
    assert int(header.words(0)) == layout.MODEL_MAGIC


def torn_rows(program: Path, run_dir: Path, rows: int) -> tuple[int, int]:
    """Rows torn, and rows that went back, of so many read beside a writer that overwrites them."""
    script = str(Path(__file__).parent / "store" / "store_writer.py")
    # Wide rows, few of them: the reader is likely to meet the writer in one.
    command = [sys.executable, script, "overwrite", str(run_dir), "2048", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            asked = [str(program), "hammer", str(run_dir), "ctr", "item", "64", str(rows)]
            read, torn, back = map(int, subprocess.run(asked, capture_output=True, check=True).stdout.split())
            assert read >= rows
            return torn, back
        finally:
            writer.kill()


def test_no_row_is_torn_while_a_writer_writes(fast_program: Path, run_dir: Path) -> None:
    assert torn_rows(fast_program, run_dir, 400_000) == (0, 0)


def test_without_the_second_look_at_the_lock_rows_are_torn(run_dir: Path, tmp_path: Path) -> None:
    text = HEADER.read_text()
    broken = tmp_path / "ekko.h"
    broken.write_text(text.replace("if (__atomic_load_n(lock, __ATOMIC_RELAXED) == before) return EKKO_OK;", "return EKKO_OK;"))
    assert broken.read_text() != text
    program = compiled(tmp_path / "broken", header=broken)
    for _ in range(20):  # how soon the two meet is the machine's
        if torn_rows(program, run_dir, 200_000)[0]:
            return
    pytest.fail("no row was torn without the lock: this test cannot see tearing")


def test_the_header_says_what_the_layout_says(program: Path) -> None:
    text = HEADER.read_text()
    assert f"#define EKKO_LAYOUT_VERSION {layout.LAYOUT_VERSION}\n" in text
    numbers = (
        layout.CONTROL.offset("manifest_generation"),
        layout.CONTROL.offset("retired"),
        layout.CONTROL.offset("aliases_ms"),
        layout.MODEL.offset("online_from"),
        layout.MODEL.offset("online_until"),
        layout.TABLE.offset("row_bytes"),
        layout.TABLE.offset("row_stride"),
        layout.TABLE.offset("codec"),
        layout.TABLE.offset("index_generation"),
        layout.INDEX.offset("capacity_log2"),
    )
    assert numbers == (64, 72, 80, 384, 392, 24, 32, 40, 128, 24)
    assert (layout.ROW.offset("lock"), layout.ROW.offset("flags"), layout.ROW.offset("stamp")) == (0, 4, 8)
    assert (layout.ROW.offset("key"), layout.ROW.offset("data"), layout.FLAG_TOMBSTONE, layout.FLAG_FREE) == (16, 24, 1, 2)
    assert layout.TABLE.offset("rows") == layout.INDEX.offset("entries") == 4096
    assert (layout.ENTRY.offset("slot"), layout.ENTRY.offset("tag"), layout.ENTRY_BYTES) == (0, 4, 8)
    assert (layout.ENTRY_EMPTY, layout.ENTRY_REMOVED) == (0, 1)
    assert [codec.number for codec in CODECS.values()] == [0, 1, 2, 3]
    assert patience.ROW_DEADLINE_S >= 1.0


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_it_is_a_header_for_cpp_too(tmp_path: Path) -> None:
    source = tmp_path / "main.cpp"
    source.write_text(
        '#include "ekko.h"\nint main() { ekko_reader reader; return ekko_open(&reader, "", "", "") == EKKO_OK; }\n'
    )
    command = ["c++", "-Wall", "-Wextra", "-Werror", "-I", str(HEADER.parent), str(source), "-o", str(tmp_path / "main")]
    subprocess.run(command, check=True)
    subprocess.run([str(tmp_path / "main")], check=True)


def probe(tmp_path: Path, compiler: str) -> str:
    """Assembly of `ekko_copy_` alone."""
    source = tmp_path / "probe.c"
    source.write_text('#include "ekko.h"\nint probe(ekko_reader *r, int64_t s);\n')
    source.write_text(source.read_text() + "int probe(ekko_reader *r, int64_t s) { return ekko_copy_(r, s); }\n")
    target = tmp_path / "probe.s"
    command = [
        compiler,
        *WARNINGS,
        "-O2",
        "-mno-outline-atomics",
        "-S",
        "-I",
        str(HEADER.parent),
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    assembly = target.read_text()
    return assembly[assembly.index("probe:") : assembly.index(".size\tprobe")]


@pytest.mark.skipif(CROSS_COMPILER is None, reason="there is no cross compiler for aarch64")
def test_on_aarch64_the_lock_is_acquired_and_the_copy_fenced(tmp_path: Path) -> None:
    assert CROSS_COMPILER is not None
    assembly = probe(tmp_path, CROSS_COMPILER)
    acquire = re.search(r"\bldap?r\s+w", assembly)
    assert acquire is not None, "the first look at the lock is not an acquire load"
    fence = assembly.index("dmb\tishld")
    assert re.search(r"\bldr\s+[xq]", assembly[acquire.start() : fence]), "nothing is copied between lock and fence"
    assert re.match(r"dmb\tishld\n\s+ldr\tw", assembly[fence:]), "the second look at the lock does not follow the fence"


def test_a_model_made_again_under_its_name_is_found(program: Path, run_dir: Path) -> None:
    spec = ModelSpec("ctr", 8, {"item": TableSpec("item", 3)}, incarnation=7)
    put(Store.open(run_dir).add_model(spec), "item", keys_of(1), 10)
    with Reader("ctr", run_dir) as reader, CReader(program, run_dir, "item") as c_reader:
        c_reader.same_as(reader, "item", keys_of(1, 2))


def test_it_follows_an_alias_as_the_reader_does(program: Path, run_dir: Path) -> None:
    """From model to model, back, to what is left when one is dropped, and to the model of the alias's own name."""
    store = Store.open(run_dir)
    for stamp, name in enumerate(("best", "ctr-1", "ctr-2")):
        put(store.add_model(ModelSpec(name, 8, {"item": TableSpec("item", 3 + stamp)})), "item", keys_of(1), 10 + stamp)
    moment = 1_000_000
    store.settle_aliases(moment)

    def switch(model: str | None) -> None:
        target = None if model is None else store.generation(model)
        store.set_alias(store.registers.switched("best", target, store.generation("best"), moment, 7))

    with Reader("best", run_dir) as reader, CReader(program, run_dir, "item", model="best") as c_reader:

        def both_read(name: str) -> None:
            assert reader.generation == name
            c_reader.same_as(reader, "item", keys_of(1, 2))

        both_read("best")
        for model, before in (("ctr-1", "best"), ("ctr-2", "ctr-1"), ("ctr-1", "ctr-2"), (None, "ctr-1")):
            switch(model)
            both_read(before)  # it is decided, and does not count yet
            moment += SWITCH_AHEAD_MS
            store.settle_aliases(moment)
            both_read(model or "best")
        switch("ctr-2")
        store.settle_aliases(moment := moment + SWITCH_AHEAD_MS)
        switch("ctr-1")
        store.drop_model("ctr-2", moment)  # what it stands for until then
        both_read("ctr-1")
        store.settle_aliases(moment := moment + SWITCH_AHEAD_MS)
        store.drop_model("ctr-1", moment)
        assert c_reader.ask(keys_of(1))[0] == 2  # EKKO_NO_MODEL: as the reader, not the model of the alias's name
        with pytest.raises(ModelError, match="which was dropped"):
            reader.lookup("item", keys_of(1))
        again = store.add_model(store.current(ModelSpec("ctr-1", 8, {"item": TableSpec("item", 2)})))
        put(again, "item", keys_of(1), 30)
        assert c_reader.ask(keys_of(1))[0] == 2  # of the name, and another model
        switch("ctr-1")
        store.settle_aliases(moment + SWITCH_AHEAD_MS)
        both_read("ctr-1")


def test_without_the_moment_of_a_switch_an_alias_is_followed_too_early(run_dir: Path, tmp_path: Path) -> None:
    text = HEADER.read_text()
    broken = tmp_path / "ekko.h"
    broken.write_text(text.replace("ekko_acquire_(reader->control.begin + 80)", "0"))
    assert broken.read_text() != text
    program = compiled(tmp_path / "broken", header=broken)
    with pytest.raises(AssertionError):
        test_it_follows_an_alias_as_the_reader_does(program, run_dir)
