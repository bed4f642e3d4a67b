"""The innermost loop of a matrix product for few rows, written for the machine's own vector registers.

Compilers vectorise such a loop well for one sum, but not for sixteen at once: those must stay in registers, and the
weights that come next must be on their way from memory while these are multiplied. So it is spelt out here, and in such
an order that beside the sums only one side's factors are held, and the other's loaded one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

_features = binding.get_host_cpu_features()
LANES = 16 if _features.get("avx512f") else 8 if _features.get("avx2") else 4
ROWS = {16: 6, 8: 3, 4: 4}[LANES]  # of x in one tile: 4 x ROWS sums, with ROWS + 1 factors, fill the vector registers
OUTPUTS = 4
LINE = 64  # bytes the memory delivers at a time
SINGLE = 6  # rows that one output's weights may be multiplied by alone
LINES = 1 if LANES == 8 else 2  # lines to fetch at each turn where there are many, as measured on Zen 3 and Zen 4
# Outputs and rows of a tile, and the lines of memory it fetches ahead at each turn.
SIZES = [(1, rows, 1) for rows in range(1, SINGLE + 1)]
SIZES += [(OUTPUTS, rows, lines) for rows in range(1, ROWS + 1) for lines in (LINES, 4)]
MIXES = [(vectors, rows) for vectors in (1, 4) for rows in range(1, ROWS + 1)]  # vectors of columns, and rows

_FLOAT, _INT, _BYTES = ir.FloatType(), ir.IntType(64), ir.IntType(8).as_pointer()
_BIT = ir.IntType(1)
_LANE = ir.IntType(32)  # what counts lanes
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)


@intrinsic  # type: ignore[untyped-decorator]
def tile(
    typing: Any,
    outputs: Any,
    rows: Any,
    lines: Any,
    w: Any,
    w_stride: Any,
    x: Any,
    x_stride: Any,
    y: Any,
    y_stride: Any,
    inputs: Any,
    more: Any,
    ahead: Any,
    tiles: Any,
) -> Any:
    """``y[r, o] = sum over i of w[o, i] * x[r, i]`` for the outputs and rows of one tile, and of as many ``tiles`` of
    further outputs; a size that is not among ``SIZES`` does nothing.

    Args:
        w, x, y: addresses of the first numbers, float32; strides are counted in numbers.
        inputs: length of the sums, any.
        more: 1 where what ``y`` holds is added to the sums, 0 where it is not.
        lines: as many lines of memory are fetched for each that is read of one output, from the address ``ahead`` on,
            which moves on from tile to tile as ``w`` does.
    """
    signature = types.void(*[types.int64] * 13)

    def codegen(context: Any, builder: Any, _: Any, arguments: Sequence[Any]) -> Any:
        _choose(builder, arguments, [(size, _tile(builder.module, *size)) for size in SIZES])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def mix(
    typing: Any,
    vectors: Any,
    rows: Any,
    p: Any,
    p_stride: Any,
    v: Any,
    v_stride: Any,
    y: Any,
    y_stride: Any,
    terms: Any,
) -> Any:
    """``y[r, :] = sum over s of p[r, s] * v[s, :]`` for 1 to ``ROWS`` rows and 1 or 4 ``vectors`` of ``LANES`` columns.

    Args:
        p, v, y: addresses of the first numbers, float32; strides are counted in numbers.
        terms: length of the sums.
    """
    signature = types.void(*[types.int64] * 9)

    def codegen(context: Any, builder: Any, _: Any, arguments: Sequence[Any]) -> Any:
        _choose(builder, arguments, [(size, _mix(builder.module, *size)) for size in MIXES])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def turn(typing: Any, w: Any, w_stride: Any, y: Any, y_stride: Any, ahead: Any) -> Any:
    """``y[i, o] = w[o, i]`` for ``LANES`` rows and columns: addresses of float32, strides counted in numbers.

    As many rows, a line of memory of each, are fetched from the address ``ahead`` on.
    """
    signature = types.void(*[types.int64] * 5)

    def codegen(context: Any, builder: Any, _: Any, arguments: Sequence[Any]) -> Any:
        builder.call(_turn(builder.module), arguments)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def floats(typing: Any, address: Any) -> Any:
    """An address as numba's pointer to float32."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


def _choose(b: ir.IRBuilder, arguments: Sequence[Any], functions: list[tuple[tuple[int, ...], ir.Function]]) -> None:
    """Call the function whose size the first arguments name with the others."""
    n = len(functions[0][0])
    named = _INT(0)
    for argument in arguments[:n]:
        named = b.add(b.mul(named, _INT(8)), argument)
    end = b.append_basic_block("end")
    switch = b.switch(named, end)
    for size, function in functions:
        block = b.append_basic_block("size")
        switch.add_case(_INT(functools.reduce(lambda total, each: 8 * total + each, size)), block)
        b.position_at_end(block)
        b.call(function, arguments[n:])
        b.branch(end)
    b.position_at_end(end)


def _mix(module: ir.Module, vectors: int, rows: int) -> ir.Function:
    """The mix of one size, as a function of addresses, strides and the number of terms."""
    b, (p, p_stride, v, v_stride, y, y_stride, terms) = _begun(module, f"specdec_mix_{vectors}_{rows}", 7)
    ps = [_at(b, p, b.mul(p_stride, _INT(r))) for r in range(rows)]
    columns = [_INT(LANES * i) for i in range(vectors)]

    def add(at: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        line = _at(b, v, b.mul(v_stride, at))
        weights = [_splat(b, _load(b, each, at, _FLOAT)) for each in ps]
        for i, column in enumerate(columns):
            value = _load(b, line, column, _VECTOR)
            for r, weight in enumerate(weights):
                sums[r * vectors + i] = _plus(b, sums[r * vectors + i], weight, value)
        return sums

    sums, _ = _loop(b, _INT(0), terms, 1, [_ZERO] * (vectors * rows), add)
    for i, total in enumerate(sums):
        r, column = divmod(i, vectors)
        _store(b, total, _at(b, y, b.add(b.mul(y_stride, _INT(r)), columns[column])))
    b.ret_void()
    return b.function


def _turn(module: ir.Module) -> ir.Function:
    """A square on its side: rows that are half of them apart are interleaved, as often as it takes."""
    b, (w, w_stride, y, y_stride, ahead) = _begun(module, "specdec_turn", 5)
    for o in range(LANES):
        _fetch(b, b.add(ahead, b.mul(w_stride, _INT(4 * o))), LINE)
    rows = [_load(b, _at(b, w, b.mul(w_stride, _INT(o))), _INT(0), _VECTOR) for o in range(LANES)]
    kind, half = ir.VectorType(_LANE, LANES), LANES // 2
    lanes = [[start + i // 2 + i % 2 * LANES for i in range(LANES)] for start in (0, half)]
    for _ in range(half.bit_length()):
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [b.shuffle_vector(*pair, ir.Constant(kind, each)) for pair in pairs for each in lanes]
    for i, row in enumerate(rows):
        _store(b, row, _at(b, y, b.mul(y_stride, _INT(i))))
    b.ret_void()
    return b.function


def _tile(module: ir.Module, outputs: int, rows: int, lines: int) -> ir.Function:
    """Tiles of one size, as a function of addresses, strides, the sums' length, where to fetch from, and how many."""
    name = f"specdec_tile_{outputs}_{rows}_{lines}"
    b, (w, w_stride, x, x_stride, y, y_stride, inputs, more, ahead, tiles) = _begun(module, name, 10)
    xs = [_at(b, x, b.mul(x_stride, _INT(r))) for r in range(rows)]
    whole = b.and_(inputs, _INT(-LANES))

    def one(number: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        first = b.mul(number, _INT(outputs))
        ws = [_at(b, w, b.mul(w_stride, b.add(first, _INT(o)))) for o in range(outputs)]
        ys = [_at(b, y, b.add(b.mul(y_stride, _INT(r)), first)) for r in range(rows)]
        fetched = b.add(ahead, b.mul(w_stride, b.mul(first, _INT(4))))

        def add(at: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            kind = sums[0].type
            factors = [_load(b, x, at, kind) for x in xs]
            if kind is _VECTOR:
                _fetch(b, b.add(fetched, b.mul(at, _INT(4 * lines))), 4 * LANES * lines)
            for o, w in enumerate(ws):
                weight = _load(b, w, at, kind)
                for r, factor in enumerate(factors):
                    sums[r * outputs + o] = _plus(b, sums[r * outputs + o], weight, factor)
            return sums

        sums, at = _loop(b, _INT(0), whole, LANES, [_ZERO] * (outputs * rows), add)
        totals = _reduced(b, sums)
        for r, to in enumerate(ys):
            start = r * outputs % LANES
            lanes = ir.Constant(ir.VectorType(_LANE, outputs), list(range(start, start + outputs)))
            total = totals[r * outputs // LANES]
            total = b.shuffle_vector(total, total, lanes)
            before = b.select(
                b.trunc(more, _BIT), _load(b, to, _INT(0), total.type), ir.Constant(total.type, [0.0] * outputs)
            )
            _store(b, b.fadd(total, before), to)
        with b.if_then(b.icmp_signed("<", at, inputs), likely=False):
            ones = [_load(b, ys[i // outputs], _INT(i % outputs), _FLOAT) for i in range(outputs * rows)]
            for i, total in enumerate(_loop(b, at, inputs, 1, ones, add)[0]):
                b.store(total, b.gep(ys[i // outputs], [_INT(i % outputs)]))
        return []

    _loop(b, _INT(0), tiles, 1, [], one)
    b.ret_void()
    return b.function


def _begun(module: ir.Module, name: str, arguments: int) -> tuple[ir.IRBuilder, Sequence[ir.Value]]:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_INT] * arguments), module.get_unique_name(name))
    function.linkage = "internal"
    return ir.IRBuilder(function.append_basic_block("entry")), function.args


def _loop(
    b: ir.IRBuilder,
    begin: ir.Value,
    end: ir.Value,
    step: int,
    start: list[ir.Value],
    add: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> tuple[list[ir.Value], ir.Value]:
    """Let ``add`` make new sums of the old ones at every ``step`` from ``begin`` to ``end``; also where it stopped."""
    before, head, body, after = b.block, *(b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    at, sums = b.phi(_INT), [b.phi(value.type) for value in start]
    b.cbranch(b.icmp_signed("<", at, end), body, after)
    b.position_at_end(body)
    added = [b.add(at, _INT(step)), *add(at, list(sums))]
    for phi, first, later in zip([at, *sums], [begin, *start], added, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.branch(head)
    b.position_at_end(after)
    return sums, at


def _plus(b: ir.IRBuilder, total: ir.Value, factor: ir.Value, other: ir.Value) -> ir.Value:
    return b.fadd(total, b.fmul(factor, other, flags=("contract",)), flags=("contract",))


def _splat(b: ir.IRBuilder, number: ir.Value) -> ir.Value:
    one = b.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _INT(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(_LANE, LANES), [0] * LANES))


def _reduced(b: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """The sum over the lanes of each of ``vectors``: neighbours are added until each lane is a sum of its own."""
    while len(vectors) & (len(vectors) - 1):
        vectors = [*vectors, vectors[-1]]
    for _ in range(LANES.bit_length() - 1):
        firsts, seconds = (vectors[::2], vectors[1::2]) if len(vectors) > 1 else (vectors, vectors)
        vectors = [_pairwise(b, *pair) for pair in zip(firsts, seconds, strict=True)]
    return vectors


def _pairwise(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Sums of neighbouring lanes: those of ``first``, then those of ``second``."""
    even, odd = (
        b.shuffle_vector(first, second, ir.Constant(ir.VectorType(_LANE, LANES), list(range(i, 2 * LANES, 2))))
        for i in (0, 1)
    )
    return b.fadd(even, odd)


def _at(b: ir.IRBuilder, address: ir.Value, offset: ir.Value) -> ir.Value:
    return b.gep(b.inttoptr(address, _FLOAT.as_pointer()), [offset])


def _load(b: ir.IRBuilder, start: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
    value = b.load(b.bitcast(b.gep(start, [at]), kind.as_pointer()))
    value.align = 4
    return value


def _store(b: ir.IRBuilder, vector: ir.Value, place: ir.Value) -> None:
    b.store(vector, b.bitcast(place, vector.type.as_pointer())).align = 4


def _fetch(b: ir.IRBuilder, address: ir.Value, size: int) -> None:
    """Have ``size`` bytes brought from memory to the second cache, without waiting for them.

    Not to the first: few lines at a time can be on their way there, and reading then waits for multiplying.
    """
    name, small = "llvm.prefetch.p0", ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, small, small, small])
    prefetch = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    for byte in range(0, size, LINE):
        b.call(prefetch, [b.inttoptr(b.add(address, _INT(byte)), _BYTES), small(0), small(2), small(1)])
