"""Loads, stores, fences, prefetches and copies at raw addresses, for the Numba kernels of the store.

Numba has no memory model of its own; these intrinsics give the kernels LLVM's. Addresses are int64, so that address arithmetic
stays in one integer type (Numba turns uint64 + int64 into float64, as NumPy does).

The caller answers for the address being mapped and aligned to the width of the access. The data inside a row is copied with
plain accesses while a writer may be storing to it; the row's sequence lock throws such a copy away (`ekko.store.kernels.rows`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from ekko.store.kernels.compile import inline_kernel, kernel

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def _intrinsic(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


def _pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    return builder.inttoptr(address, to.as_pointer())


def _load(width: ir.Type, result: types.Type, ordering: str) -> Callable[..., Any]:
    def typed(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            return builder.load_atomic(_pointer(builder, arguments[0], width), ordering, width.width // 8)

        return result(types.int64), generate

    return typed


def _store(width: ir.Type, value_type: types.Type, ordering: str) -> Callable[..., Any]:
    def typed(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            builder.store_atomic(arguments[1], _pointer(builder, arguments[0], width), ordering, width.width // 8)
            return context.get_dummy_value()

        return types.void(types.int64, value_type), generate

    return typed


# "monotonic" is LLVM's name for a relaxed atomic: no tearing, no order.
load_u32 = _intrinsic(_load(_I32, types.uint32, "monotonic"))
load_u64 = _intrinsic(_load(_I64, types.uint64, "monotonic"))
load_i64 = _intrinsic(_load(_I64, types.int64, "monotonic"))
load_acquire_u32 = _intrinsic(_load(_I32, types.uint32, "acquire"))
load_acquire_i64 = _intrinsic(_load(_I64, types.int64, "acquire"))
store_u32 = _intrinsic(_store(_I32, types.uint32, "monotonic"))
store_u64 = _intrinsic(_store(_I64, types.uint64, "monotonic"))
store_i64 = _intrinsic(_store(_I64, types.int64, "monotonic"))
store_release_u32 = _intrinsic(_store(_I32, types.uint32, "release"))
store_release_i64 = _intrinsic(_store(_I64, types.int64, "release"))


def _add(width: ir.Type, value_type: types.Type) -> Callable[..., Any]:
    def typed(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            return builder.atomic_rmw("add", _pointer(builder, arguments[0], width), arguments[1], "monotonic")

        return value_type(types.int64, value_type), generate

    return typed


# Add to a counter that other processes add to as well, and return what it was. Relaxed: no add is lost, and nothing is ordered.
add_u32 = _intrinsic(_add(_I32, types.uint32))
add_u64 = _intrinsic(_add(_I64, types.uint64))


def _fence(ordering: str, scope: str | None = None) -> Callable[..., Any]:
    def typed(typing_context: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            builder.fence(ordering, scope)
            return context.get_dummy_value()

        return types.void(), generate

    return typed


fence_acquire = _intrinsic(_fence("acquire"))
fence_release = _intrinsic(_fence("release"))
# Orders our own instructions only, at no cost: what is needed against a kill in mid-row, since whoever attaches afterwards sees
# every store of the dead process up to the instruction at which it died.
fence_program_order = _intrinsic(_fence("seq_cst", "singlethread"))


def _prefetch(for_write: int, locality: int) -> Callable[..., Any]:
    def typed(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            pointer = _pointer(builder, arguments[0], ir.IntType(8))
            signature_ir = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, signature_ir, "llvm.prefetch.p0"
            )
            # The last argument, 1: data, not instructions.
            builder.call(function, [pointer, _I32(for_write), _I32(locality), _I32(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return typed


# Into the second-level cache: rows to be copied, index entries. Measured to be 5 to 10 % better than the nearest cache, and
# than passing the second level by.
prefetch_near = _intrinsic(_prefetch(0, 2))
prefetch_write = _intrinsic(_prefetch(1, 3))
_LINE_BYTES = 64


@inline_kernel
def prefetch_bytes(address: Any, count: Any) -> None:
    """Fetch all lines that hold some of these bytes. Whatever is at the address, it does no harm."""
    for offset in range(0, count, _LINE_BYTES):
        prefetch_near(address + offset)
    # They may begin late in the first line, so that their end lies in one more: every fourth row of 64 values. Measured: 15 %.
    prefetch_near(address + count - 1)


def _copy_typed(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        target_pointer, source_pointer = (_pointer(builder, address, ir.IntType(8)) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target_pointer, source_pointer, arguments[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


# Copy so many bytes between places that do not overlap: the C library's memcpy, which knows the processor best.
copy_bytes = _intrinsic(_copy_typed)


_LINE = ir.VectorType(_I32, 16)


def _copy_line_typed(typing_context: Any, target: Any, source: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        value = builder.load(_pointer(builder, arguments[1], _LINE), align=4)
        builder.store(value, _pointer(builder, arguments[0], _LINE), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


# Copy 64 bytes between multiples of 4 that do not overlap: a few vector instructions, where `copy_bytes` would be a call.
copy_line = _intrinsic(_copy_line_typed)


_FLOATS = ir.VectorType(ir.FloatType(), 16)


def _add_line_typed(typing_context: Any, target: Any, first: Any, second: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        terms = [builder.load(_pointer(builder, address, _FLOATS), align=4) for address in arguments[1:]]
        builder.store(builder.fadd(*terms), _pointer(builder, arguments[0], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


# float32[16] at the first address: the sums of those at the two others. What a loop would be, without the compiler's question
# at each call whether the three overlap: 12 % of a pooled look-up.
add_line = _intrinsic(_add_line_typed)


_QUAD, _QUAD_BITS = ir.VectorType(ir.FloatType(), 4), ir.VectorType(_I32, 4)
_REST = 0x7FFF_FFFF  # of a float32: all but its sign


def _magnitudes_typed(typing_context: Any, one: Any, other: Any, count: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        count = arguments[2]
        sums = cgutils.alloca_once_value(builder, ir.Constant(_QUAD, [0.0] * 4))  # type: ignore[no-untyped-call]

        def magnitude(of: ir.Type, bits: ir.Type, rest: Any, place: ir.Value) -> ir.Value:
            offset = builder.mul(place, ir.Constant(_I64, 4))
            at = [_pointer(builder, builder.add(address, offset), of) for address in arguments[:2]]
            difference = builder.fsub(*[builder.load(pointer, align=4) for pointer in at])
            return builder.bitcast(builder.and_(builder.bitcast(difference, bits), ir.Constant(bits, rest)), of)

        with cgutils.for_range(builder, builder.ashr(count, ir.Constant(_I64, 2))) as loop:
            place = builder.shl(loop.index, ir.Constant(_I64, 2))
            builder.store(builder.fadd(builder.load(sums), magnitude(_QUAD, _QUAD_BITS, [_REST] * 4, place)), sums)
        lines = [builder.extract_element(builder.load(sums), ir.Constant(_I32, line)) for line in range(4)]
        first = cgutils.alloca_once_value(builder, lines[0])  # type: ignore[no-untyped-call]
        whole = builder.and_(count, ir.Constant(_I64, -4))
        with cgutils.for_range(builder, builder.sub(count, whole)) as loop:
            rest = magnitude(ir.FloatType(), _I32, _REST, builder.add(whole, loop.index))
            builder.store(builder.fadd(builder.load(first), rest), first)
        return builder.fadd(builder.fadd(builder.load(first), lines[1]), builder.fadd(lines[2], lines[3]))

    return types.float32(types.int64, types.int64, types.int64), generate


# Sum of the magnitudes of the differences of two float32[count], in four lines, number i in line i % 4, of which the first has
# what is left at the end. The compiler makes no vectors of a loop that adds in this order.
sum_of_magnitudes = _intrinsic(_magnitudes_typed)


def _zero_typed(typing_context: Any, target: Any, count: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        cgutils.memset(builder, _pointer(builder, arguments[0], ir.IntType(8)), arguments[1], 0)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


# Set so many bytes to zero.
zero_bytes = _intrinsic(_zero_typed)


def _pointer_typed(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return _pointer(builder, arguments[0], ir.IntType(8))

    return types.voidptr(types.int64), generate


_pointer_to = _intrinsic(_pointer_typed)


@inline_kernel
def floats_at(address: Any, count: Any) -> Any:
    """float32[count] at an address that is a multiple of 4, for plain loads and stores that may become vector instructions."""
    return carray(_pointer_to(address), (count,), np.float32)


@inline_kernel
def uints16_at(address: Any, count: Any) -> Any:
    """uint16[count] at an address that is a multiple of 2, likewise."""
    return carray(_pointer_to(address), (count,), np.uint16)


@inline_kernel
def uints8_at(address: Any, count: Any) -> Any:
    """uint8[count], likewise."""
    return carray(_pointer_to(address), (count,), np.uint8)


def _bitcast(to: ir.Type, result: types.Type, argument: types.Type) -> Callable[..., Any]:
    def typed(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            return builder.bitcast(arguments[0], to)

        return result(argument), generate

    return typed


# The bits of a float32 as a uint32, and back.
bits_of = _intrinsic(_bitcast(_I32, types.uint32, types.float32))
float_of = _intrinsic(_bitcast(ir.FloatType(), types.float32, types.uint32))


@kernel("int64(int64)")
def watch_word(address: int) -> int:
    """Read a shared word; what its writer wrote before it is visible afterwards."""
    return load_acquire_i64(address)  # type: ignore[no-any-return]


@kernel("void(int64, int64)")
def publish_word(address: int, value: int) -> None:
    """Write a shared word; who reads it sees everything written before it."""
    store_release_i64(address, value)
