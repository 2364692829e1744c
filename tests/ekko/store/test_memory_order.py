"""The order of memory accesses, looked up in what the compiler made: its code for this machine, and for aarch64 too.

The loop of a reader that lost its fence would pass every other test here, since an x86-64 keeps loads in order by itself.
"""

import re
import types
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import pytest

from ekko.store.kernels import atomics, batches, gather, index, rows, whole_row

READERS = {
    "copy_float32": gather._copy_float32,
    "copy_float16": gather._copy_float16,
    "copy_bfloat16": gather._copy_bfloat16,
    "copy_int8": gather._copy_int8,
    "read_by_key": whole_row.read_by_key,
}


def compiled(function: Callable[..., Any], signature: Any) -> str:
    """Optimised LLVM code; without reference counts of arrays, which are spelled with instructions of this processor."""
    made = numba.njit(nogil=True, error_model="numpy", _nrt=False)(function)
    made.compile(signature)
    (text,) = made.inspect_llvm().values()
    return str(text)


def of_kernel(kernel: Any) -> str:
    return compiled(kernel.py_func, kernel.signatures[0])


def for_aarch64(text: str) -> list[str]:
    """Instructions of the same code on an aarch64, as its LLVM back end writes them."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(re.sub(r'"target-(cpu|features)"="[^"]*"', "", text))
    machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(opt=2)
    module.triple, module.data_layout = "aarch64-unknown-linux-gnu", str(machine.target_data)
    functions = re.findall(r"^(_ZN\S+):(.*?)^\.Lfunc_end", machine.emit_assembly(module), flags=re.S | re.M)
    own = "\n".join(code for name, code in functions if not name.startswith("_ZN7cpython"))
    lines = (line.strip() for line in own.splitlines())
    return [line for line in lines if re.match(r"[a-z][a-z0-9.]*\s", line + " ") and not line.startswith(("//", "."))]


def body(text: str) -> str:
    """Of the code of a whole module the kernel itself: not the way in from Python, nor the counting of references."""
    functions = re.findall(r"^define [^\n]*@(\S+?)\(.*?\n(.*?)^}", text, flags=re.S | re.M)
    return "\n".join(code for name, code in functions if name.startswith("_ZN") and not name.startswith("_ZN7cpython"))


def after(lines: list[str], pattern: str, of: str) -> list[str]:
    """Of each line that matches, the next one that matches `of`."""
    found = []
    for number, line in enumerate(lines):
        if re.match(pattern, line):
            found.append(next((other for other in lines[number + 1 :] if re.match(of, other)), ""))
    return found


MEMORY = r"(%\S+ = (tail )?(load|call)|store|tail call|call|fence)"


SECOND_LOOK = r"%\S+ = load atomic i32, .* monotonic"


def looks_after_fences(text: str) -> list[list[str]]:
    """Of each acquire fence, the accesses that may come next: in its block, or in those that it branches to."""
    blocks: dict[str, list[str]] = {"": []}
    label = ""
    for line in body(text).splitlines():
        if found := re.match(r"([\w.]+):", line):
            label = found[1]
            blocks[label] = []
        elif line.strip():
            blocks[label].append(line.strip())

    def following(lines: list[str], depth: int) -> list[str]:
        for line in lines:
            if re.match(MEMORY, line):
                return [line]
        targets = re.findall(r"label %([\w.]+)", lines[-1]) if lines and depth else []
        return [look for target in targets for look in following(blocks[target], depth - 1)]

    fences = [(lines, n) for lines in blocks.values() for n, line in enumerate(lines) if line.startswith("fence acquire")]
    return [following(lines[n + 1 :], 2) for lines, n in fences]


def fault_of_reader(text: str) -> str:
    """What is wrong with a reader's code; empty: nothing."""
    if not re.search(r"load atomic i32, .* acquire", body(text)):
        return "no first look at the lock acquires"
    looks = looks_after_fences(text)
    if not looks:
        return "no acquire fence is left"
    # A lock that was odd needs no second look.
    if not all(any(re.match(SECOND_LOOK, look) for look in some) for some in looks):
        return f"something comes between an acquire fence and the second look: {looks}"
    if "@llvm.x86" in text:  # of arrays the references are counted by instructions of this processor; `read_by_key` has none
        return ""
    machine = for_aarch64(text)
    if not any(re.match(r"ldap?r\s+w", line) for line in machine):
        return "aarch64: no first look at the lock acquires"
    fences = after(machine, r"dmb\s+ishld", r"(ld|st|bl\b|tbn?z|cbn?z)")
    if not fences or not all(re.match(r"(ldr\s+w|tbn?z|cbn?z)", look) for look in fences):
        return f"aarch64: the second look does not follow a fence: {fences}"
    return ""


@pytest.mark.parametrize("name", READERS)
def test_a_reader_acquires_the_lock_and_fences_the_second_look(name: str) -> None:
    assert fault_of_reader(of_kernel(READERS[name])) == ""


def without(function: Callable[..., Any], name: str, instead: Any = None) -> Callable[..., Any]:
    """The same function, in whose sight one of the helpers is another one, or does nothing."""

    @numba.njit(forceinline=True)
    def nothing() -> None:
        return None

    assert name in function.__globals__
    replaced = {**function.__globals__, name: nothing if instead is None else instead}
    return types.FunctionType(function.__code__, replaced, function.__name__, function.__defaults__, function.__closure__)


def test_planted_bug_a_reader_without_its_fence() -> None:
    kernel = whole_row.read_by_key
    text = compiled(without(kernel.py_func, "fence_acquire"), kernel.signatures[0])
    assert fault_of_reader(text) != ""


def _overwrite(table: Any, row: Any, stamp: Any, data: Any, row_bytes: Any) -> None:
    rows._overwrite(table, row, stamp, data, row_bytes)


def _publish(table_index: Any, entry: Any, key: Any, slot: Any) -> None:
    index.publish(table_index, entry, key, slot)


OVERWRITE = "void(int64, int64, uint64, int64, int64)"


def fault_of_writer(text: str) -> str:
    lines = [line.strip() for line in body(text).splitlines()]
    odd = next((n for n, line in enumerate(lines) if re.match(r"store atomic i32 .* monotonic", line)), -1)
    fence = next((n for n, line in enumerate(lines) if line.startswith("fence release")), -1)
    data = next((n for n, line in enumerate(lines) if "@llvm.memcpy" in line and "call" in line), -1)
    even = [n for n, line in enumerate(lines) if re.match(r"store atomic i32 .* release", line)]
    if not 0 <= odd < fence < data:
        return f"lock odd, fence, data are at lines {odd}, {fence}, {data}"
    if not even or even[-1] < data:
        return "the lock does not become even by a release store after the data"
    machine = for_aarch64(text)
    fences = [n for n, line in enumerate(machine) if re.match(r"dmb\s+ish\b", line)]
    copies = [n for n, line in enumerate(machine) if re.match(r"bl\s+memcpy", line)]
    releases = [n for n, line in enumerate(machine) if re.match(r"stlr\s+w", line)]
    if not fences or not copies or not releases or not fences[0] < copies[0]:
        return f"aarch64: dmb ish at {fences}, memcpy at {copies}, stlr at {releases}"
    return ""


def test_a_writer_fences_the_odd_lock_and_releases_the_even_one() -> None:
    assert fault_of_writer(compiled(_overwrite, numba.core.sigutils.normalize_signature(OVERWRITE)[0])) == ""


def test_planted_bug_a_writer_without_its_fence() -> None:
    signature = numba.core.sigutils.normalize_signature(OVERWRITE)[0]
    lock = numba.njit(forceinline=True)(without(rows._lock.py_func, "fence_release"))
    assert fault_of_writer(compiled(without(rows._overwrite.py_func, "_lock", lock), signature)) != ""


def test_an_entry_of_the_index_is_published_by_a_release_store() -> None:
    signature = numba.core.sigutils.normalize_signature("void(int64, int64, uint64, int64)")[0]
    text = compiled(_publish, signature)
    assert re.search(r"store atomic i64 .* release", text)
    assert any(re.match(r"stlr\s+x", line) for line in for_aarch64(text))


@pytest.mark.parametrize(
    ("kernel", "here", "there"),
    [
        (atomics.watch_word, r"load atomic i64, .* acquire", r"ldap?r\s+x"),
        (atomics.publish_word, r"store atomic i64 .* release", r"stlr\s+x"),
        (batches.begin, r"fence release", r"dmb\s+ish$"),
        (batches.end, r"store atomic i64 .* release", r"stlr\s+x"),
        (batches.unchanged, r"fence acquire\n(\s*%\S+ = inttoptr[^\n]*\n)?\s*%\S+ = load atomic i64", r"dmb\s+ishld"),
        (index.resolve, r"load atomic i64, .* acquire", r"ldap?r\s+x"),
    ],
    ids=["watch", "publish", "begin", "end", "unchanged", "resolve"],
)
def test_words_are_acquired_and_released(kernel: Any, here: str, there: str) -> None:
    text = of_kernel(kernel)
    assert re.search(here, body(text))
    assert any(re.match(there, line) for line in for_aarch64(text))
