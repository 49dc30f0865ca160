"""Eight float32 or int32 side by side, one per user, as values that numba keeps in vector registers.

Left to itself the compiler puts eight running sums into memory and takes twice the time. On machines without
registers of that width LLVM splits the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

ir: Any = cgutils.ir  # type: ignore[attr-defined]  # numba's own llvmlite
WIDTH = 8
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def compiled(function: Kernel, **options: Any) -> Kernel:
    """`function` compiled, to run without the interpreter's lock; kept on disk where that can be written."""
    try:
        return numba.njit(function, nogil=True, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError:  # installed read-only and no home: each process compiles for itself, some seconds
        return numba.njit(function, nogil=True, **options)  # type: ignore[no-any-return]


class Floats8(types.Type):
    """Eight float32."""

    def __init__(self) -> None:
        super().__init__(name="Floats8")


class Ints8(types.Type):
    """Eight int32."""

    def __init__(self) -> None:
        super().__init__(name="Ints8")


FLOATS, INTS = Floats8(), Ints8()
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)


@register_model(Floats8)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)  # type: ignore[no-untyped-call]


@register_model(Ints8)
class _IntsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _INTS)  # type: ignore[no-untyped-call]


def operation(build: Callable[..., Any]) -> Any:
    """An operation for compiled functions, from the function that writes its instructions."""
    return intrinsic(build)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _mask(builder: Any, flags: Any) -> Any:
    return builder.zext(builder.bitcast(flags, ir.IntType(WIDTH)), ir.IntType(64))


@operation
def load(typing: Any, array: Any, index: Any) -> Any:
    """`array[index : index + 8]` of a float32 array; the index is int64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, signature.args[0], args[0], args[1], _FLOATS)
        return builder.load(place, align=4)

    return FLOATS(array, types.int64), build


@operation
def store(typing: Any, array: Any, index: Any, values: Any) -> Any:
    """`array[index : index + 8] = values`, of float32 or int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _FLOATS if signature.args[2] == FLOATS else _INTS
        place = _address(context, builder, signature.args[0], args[0], args[1], vector)
        builder.store(args[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, values), build


@operation
def add(typing: Any, a: Any, b: Any) -> Any:
    """`a + b`."""
    return FLOATS(FLOATS, FLOATS), lambda context, builder, signature, args: builder.fadd(*args)


@operation
def at_least(typing: Any, a: Any, b: Any) -> Any:
    """Lanes in which a >= b, as bits of an int64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _mask(builder, builder.fcmp_ordered(">=", *args))

    return types.int64(FLOATS, FLOATS), build


@operation
def equal(typing: Any, a: Any, b: Any) -> Any:
    """Lanes in which a == b, as bits of an int64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _mask(builder, builder.fcmp_ordered("==", *args))

    return types.int64(FLOATS, FLOATS), build


@operation
def no_counts(typing: Any) -> Any:
    """Eight zeros."""
    return INTS(), lambda context, builder, signature, args: ir.Constant(_INTS, [0] * WIDTH)


@operation
def count_above(typing: Any, counts: Any, a: Any, b: Any, step: Any) -> Any:
    """`counts + step` in the lanes in which a > b, `counts` in the others; the step is int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        above = builder.sext(builder.fcmp_ordered(">", args[1], args[2]), _INTS)
        empty = ir.Constant(_INTS, ir.Undefined)
        first = builder.insert_element(empty, args[3], ir.Constant(ir.IntType(32), 0))
        steps = builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * WIDTH))
        return builder.add(args[0], builder.and_(above, steps))

    return INTS(INTS, FLOATS, FLOATS, types.int32), build
