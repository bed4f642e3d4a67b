"""A decoder layer of the Llama shape for few rows on the CPU, in two calls: up to the cache, and from it.

Between the matrix products of a short pass an eager layer spends half its time starting some forty small operations.
Here norm, projections and rotary embedding are one parallel loop; attention, output projection, norm and gated MLP
are four. Each thread normalises all rows for itself, which costs less than waiting for another to do it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from specdec.kernels.linear_numba import outputs_of, product, room
from specdec.kernels.tile_numba import LANES, ROWS, mix, turn

FEWEST = 64  # slots of a part
BLOCK = 1024  # slots whose keys and values stay in the second cache, for more queries than one tile of ``mix`` takes
TURNED = 6  # queries for which it pays to turn keys on their side
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; but NaN and infinity keep their meaning


@njit(cache=True, nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def before_cache(
    x: Any, norm: Any, eps: float, wq: Any, wk: Any, wv: Any, bq: Any, bk: Any, bv: Any, q_norm: Any, k_norm: Any,
    cos: Any, sin: Any, q: Any, k: Any, v: Any, dim: int, threads: int,
) -> None:  # fmt: skip
    """Queries, keys and values of ``x`` [rows, width], written to q, k, v [rows, heads * dim].

    ``cos`` and ``sin`` [rows, rotated] turn the first ``rotated`` numbers of each head; biases b* and the norms of
    heads have length 0 where there are none.
    """
    heads, groups = q.shape[1] // dim, k.shape[1] // dim
    for t in prange(threads):
        rows = normed(x, norm, eps)
        for head in range((heads + groups) * t // threads, (heads + groups) * (t + 1) // threads):
            if head < heads:
                _project(rows, wq, bq, q, head * dim, (head + 1) * dim)
                _turned(q, head * dim, dim, q_norm, eps, cos, sin)
            else:
                _project(rows, wk, bk, k, (head - heads) * dim, (head - heads + 1) * dim)
                _turned(k, (head - heads) * dim, dim, k_norm, eps, cos, sin)
        # Values are not turned, so that they may be cut anywhere, and all threads have as much to do.
        _project(rows, wv, bv, v, len(wv) * t // threads, len(wv) * (t + 1) // threads)


@njit(cache=True, nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def after_cache(
    x: Any, q: Any, keys: Any, key_strides: Any, values: Any, value_strides: Any, shape: Any, mask: Any, scale: float,
    wo: Any, bo: Any, norm: Any, eps: float, wg: Any, wu: Any, wd: Any, bg: Any, bu: Any, bd: Any, y: Any, threads: int,
) -> None:  # fmt: skip
    """The rest of the layer: ``y`` [rows, width] from ``x``, its queries and the cache's rows.

    Args:
        keys, values: flat memory, of which batch row b, head h, slot s starts at ``b * strides[0] + h * strides[1]
            + s * strides[2]``.
        shape: batch rows, heads of keys, slots, and numbers in a head.
        mask: [batch, nodes, slots], True where a node may look; of no batch rows where all may look at all.
    """
    batch, groups, slots, dim = shape
    heads, nodes = q.shape[1] // dim, len(x) // batch
    plain = _plain_columns(mask, slots)
    parts = _parts(batch * groups, slots, threads)
    seen = room(parts * len(x), heads * dim).reshape(parts, len(x), heads * dim)
    logs = np.empty((parts, len(x), heads), np.float32)
    for task in prange(batch * groups * parts):
        b, group, part = task // (groups * parts), task // parts % groups, task % parts
        first, last = slots * part // parts, slots * (part + 1) // parts
        k = keys.ctypes.data + 4 * (b * key_strides[0] + group * key_strides[1] + first * key_strides[2])
        v = values.ctypes.data + 4 * (b * value_strides[0] + group * value_strides[1] + first * value_strides[2])
        _attend(
            q, b, nodes, group * (heads // groups), heads // groups, dim, k, key_strides[2], v, value_strides[2], first,
            last, mask, plain, scale, seen[part], logs[part],
        )  # fmt: skip
    _join(seen, logs, dim)
    after_attention(x, seen[0], wo, bo, norm, eps, wg, wu, wd, bg, bu, bd, y, threads)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _parts(tasks: int, slots: int, threads: int) -> int:
    """Into how many parts slots are divided, so that all threads have as much to do."""
    parts = 1
    while tasks * parts % threads:
        parts += 1
    return max(1, min(parts, slots // FEWEST))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _attend(
    q: Any, b: int, nodes: int, head: int, heads: int, dim: int, keys: int, key_stride: int, values: int,
    value_stride: int, first: int, last: int, mask: Any, plain: int, scale: float, seen: Any, logs: Any,
) -> None:  # fmt: skip
    """What batch row b's nodes read with ``heads`` heads, from ``head`` on, of slots ``first`` to ``last``.

    Heads that share keys go over them together, so that these are read once: in blocks that stay in the cache while all
    queries pass by, as FlashAttention does (arXiv 2205.14135). Logs of sums of weights go to ``logs`` [rows, heads].
    """
    rows = nodes * heads
    queries, read = room(rows, dim), room(rows, dim)
    for n in range(nodes):
        for h in range(heads):
            queries[n * heads + h] = q[b * nodes + n, (head + h) * dim : (head + h + 1) * dim]
    block = min(BLOCK, last - first) if rows > ROWS else last - first
    scratch, sums = np.empty(rows * block, np.float32), np.empty(rows, np.float32)
    for start in range(first, last, block):
        past, slots = 4 * (start - first), min(block, last - start)
        scores = scratch[: rows * slots].reshape(rows, slots)
        _scored(queries, keys + past * key_stride, key_stride, scores)
        for row in range(rows):
            sums[row] = _softmax(scores[row], mask, b, row // heads, start, plain, scale)
        _weighted(scores, values + past * value_stride, value_stride, read.ctypes.data, dim, dim)
        for row in range(rows):
            n, h = b * nodes + row // heads, head + row % heads
            _add_read(seen[n], logs[n], h, read[row], sums[row], start == first)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_read(seen: Any, logs: Any, head: int, read: Any, log: Any, alone: bool) -> None:
    """Merge what a ``head`` of one node has ``read`` of other slots into what it has ``seen``, or, ``alone``, be it."""
    own = seen[head * len(read) : (head + 1) * len(read)]
    if alone:
        own[:], logs[head] = read, log
    elif log > -np.inf:
        _merge(own, read, logs[head] - log)
        top = max(logs[head], log)
        logs[head] = top + np.log(np.exp(logs[head] - top) + np.exp(log - top))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _scored(queries: Any, keys: int, stride: int, scores: Any) -> None:
    """Products of each query with each key, written to ``scores`` [rows, slots].

    Sums as short as a head's take as long to add up over the lanes of a register as to make. So keys are turned on
    their side, as many as four registers hold, and each lane makes the sum of one of them.
    """
    (rows, dim), slots, done = queries.shape, scores.shape[1], 0
    q, s = queries.ctypes.data, scores.ctypes.data
    if rows >= TURNED:
        turned = room(dim, 4 * LANES)
        while done + 4 * LANES <= slots:
            for slot in range(0, 4 * LANES, LANES):
                for d in range(0, dim, LANES):
                    key, to = keys + 4 * ((done + slot) * stride + d), turned.ctypes.data + 4 * (4 * LANES * d + slot)
                    turn(key, stride, to, 4 * LANES, key + 4 * 4 * LANES * stride)
            for n in range(0, rows, ROWS):
                at = q + 4 * n * dim, s + 4 * (n * slots + done)
                mix(4, min(ROWS, rows - n), at[0], dim, turned.ctypes.data, 4 * LANES, at[1], slots, dim)
            done += 4 * LANES
    if done < slots:
        product(keys + 4 * done * stride, stride, q, dim, s + 4 * done, slots, rows, dim, slots - done)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _join(seen: Any, logs: Any, dim: int) -> None:
    """Put what was read of all parts of the slots together, in place of the first part's; ``logs`` are used up."""
    parts, rows, heads = logs.shape
    for n in range(rows if parts > 1 else 0):
        for head in range(heads):
            top, total = logs[0, n, head], np.float32(0)
            for part in range(1, parts):
                top = max(top, logs[part, n, head])
            if top == -np.inf:  # padding, which sees nothing
                continue
            for part in range(parts):
                weight = exp(logs[part, n, head] - top)
                logs[part, n, head] = weight
                total += weight
            own, share = seen[0, n][head * dim : (head + 1) * dim], logs[0, n, head] / total
            for i in range(dim):
                own[i] *= share
            for part in range(1, parts):
                other, share = seen[part, n][head * dim : (head + 1) * dim], logs[part, n, head] / total
                for i in range(dim):
                    own[i] += other[i] * share


@njit(cache=True, nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def shared_attention(
    q: Any, shared_keys: Any, shared_key_strides: Any, shared_values: Any, shared_value_strides: Any, prefix: int,
    keys: Any, key_strides: Any, values: Any, value_strides: Any, shape: Any, mask: Any, scale: float, seen: Any,
) -> None:  # fmt: skip
    """What all heads read of ``prefix`` slots that all batch rows share, and of their own: to ``seen``, shaped as q.

    Args:
        shared_keys, shared_values: of one batch row, otherwise as keys and values.
        keys, key_strides, values, value_strides, shape, mask: see ``after_cache``.
    """
    batch, groups, slots, dim = shape
    heads, rows, nodes = q.shape[1] // dim, len(q), len(q) // batch
    plain, none = _plain_columns(mask, slots), np.empty((0, 0, 0), np.bool_)
    for head in prange(heads):
        group, wide = head // (heads // groups), heads * dim
        at, seen_at = q.ctypes.data + 4 * head * dim, seen.ctypes.data + 4 * head * dim
        k, v = group * shared_key_strides[1], group * shared_value_strides[1]
        scores, logs = np.empty((rows, prefix), np.float32), np.empty(rows, np.float32)
        product(
            shared_keys.ctypes.data + 4 * k, shared_key_strides[2], at, wide, scores.ctypes.data, prefix, rows, dim,
            prefix,
        )  # fmt: skip
        for n in range(rows):
            logs[n] = _softmax(scores[n], none, 0, 0, 0, prefix, scale)
        _weighted(scores, shared_values.ctypes.data + 4 * v, shared_value_strides[2], seen_at, wide, dim)
        own, read = np.empty((nodes, slots), np.float32), np.empty((nodes, dim), np.float32)
        for b in range(batch):
            k, v = b * key_strides[0] + group * key_strides[1], b * value_strides[0] + group * value_strides[1]
            first = at + 4 * b * nodes * wide
            product(keys.ctypes.data + 4 * k, key_strides[2], first, wide, own.ctypes.data, slots, nodes, dim, slots)
            for n in range(nodes):
                logs[b * nodes + n] -= _softmax(own[n], mask, b, n, 0, plain, scale)
            _weighted(own, values.ctypes.data + 4 * v, value_strides[2], read.ctypes.data, dim, dim)
            for n in range(nodes):
                _merge(seen[b * nodes + n][head * dim : (head + 1) * dim], read[n], logs[b * nodes + n])


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _merge(seen: Any, read: Any, more: Any) -> None:
    """Two parts as one, in place of the first, whose logarithm of its sum of weights is larger by ``more``."""
    share = np.float32(1) / (np.float32(1) + exp(-more))
    for i in range(len(seen)):
        seen[i] = seen[i] * share + read[i] * (np.float32(1) - share)


@njit(cache=True, nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def after_attention(
    x: Any, seen: Any, wo: Any, bo: Any, norm: Any, eps: float, wg: Any, wu: Any, wd: Any, bg: Any, bu: Any, bd: Any,
    y: Any, threads: int,
) -> None:  # fmt: skip
    """The rest of the layer from what its heads have ``seen`` [rows, heads * dim]."""
    middle, gate, up = np.empty_like(x), room(len(x), len(wg)), room(len(x), len(wu))
    for t in prange(threads):
        first, last = len(wo) * t // threads, len(wo) * (t + 1) // threads
        outputs_of(seen, wo, middle, first, last)
        _add(middle, x, bo, first, last)
    for t in prange(threads):
        rows = normed(middle, norm, eps)
        first, last = len(wg) * t // threads, len(wg) * (t + 1) // threads
        outputs_of(rows, wg, gate, first, last)
        outputs_of(rows, wu, up, first, last)
        _gated(gate, up, bg, bu, first, last)
    for t in prange(threads):
        first, last = len(wd) * t // threads, len(wd) * (t + 1) // threads
        outputs_of(gate, wd, y, first, last)
        _add(y, middle, bd, first, last)


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def normed(x: Any, weight: Any, eps: float) -> Any:
    """RMSNorm of each row."""
    y = room(*x.shape)
    for n in range(len(x)):
        _norm(x[n], weight, eps, y[n])
    return y


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def turns(positions: Any, frequencies: Any, scaling: Any) -> tuple[Any, Any]:
    """cos and sin [positions, twice the frequencies] of rotary embeddings, both times ``scaling``."""
    half = len(frequencies)
    cos, sin = np.empty((len(positions), 2 * half), np.float32), np.empty((len(positions), 2 * half), np.float32)
    for n, position in enumerate(positions):
        for i in range(half):
            angle = np.float32(position) * frequencies[i]
            cos[n, i] = cos[n, half + i] = np.cos(angle) * scaling
            sin[n, i] = sin[n, half + i] = np.sin(angle) * scaling
    return cos, sin


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _norm(x: Any, weight: Any, eps: float, y: Any) -> None:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        y[i] = weight[i] * (x[i] * scale)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _project(x: Any, w: Any, bias: Any, y: Any, first: int, last: int) -> None:
    """Columns ``first`` to ``last`` of ``y = x @ w.T``, and of the bias if there is one."""
    outputs_of(x, w, y, first, last)
    _add_bias(y, bias, first, last)


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _turned(y: Any, first: int, dim: int, norm: Any, eps: float, cos: Any, sin: Any) -> None:
    """Norm and rotary embedding of one head, in place."""
    half = cos.shape[1] // 2
    for n in range(len(y)):
        row = y[n][first : first + dim]
        if len(norm):
            _norm(row, norm, eps, row)
        for i in range(half):
            a, b = row[i], row[i + half]
            row[i] = a * cos[n, i] - b * sin[n, i]
            row[i + half] = b * cos[n, i + half] + a * sin[n, i + half]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _plain_columns(mask: Any, slots: int) -> int:
    """How many of the first slots every node of every row may look at."""
    plain = slots
    for b in range(mask.shape[0]):
        for n in range(mask.shape[1]):
            at = 0
            while at < plain and mask[b, n, at]:
                at += 1
            plain = at
    return plain


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _softmax(row: Any, mask: Any, b: int, n: int, first: int, plain: int, scale: float) -> Any:
    """Scores of slots from ``first`` on to weights, in place; hidden slots weigh nothing.

    Returns the log of the sum of exponentials.
    """
    for s in range(max(0, plain - first), len(row)):
        if not mask[b, n, first + s]:
            row[s] = -np.inf
    top = _greatest(row)
    if top == -np.inf:  # padding may look at nothing, and gets nothing
        row[:] = 0
        return np.float32(-np.inf)
    total = np.float32(0)
    for s in range(len(row)):
        row[s] = exp(np.float32(scale) * (row[s] - top))
        total += row[s]
    share = np.float32(1) / total
    for s in range(len(row)):
        row[s] *= share
    return np.float32(scale) * top + np.float32(np.log(total))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _greatest(row: Any) -> Any:
    """The maximum. Compilers vectorise that of integers, as bits of floats are once negatives are turned."""
    bits, top = row.view(np.int32), np.int32(-(1 << 31))
    for s in range(len(bits)):
        ordered = np.int32(bits[s] ^ (np.int32(bits[s] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        top = ordered if ordered > top else top
    return np.int32(top ^ (np.int32(top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _weighted(weights: Any, values: int, stride: int, y: int, y_stride: int, dim: int) -> None:
    """Sums of the values by each row's weights, written to ``y``; a head's numbers are a multiple of ``LANES``."""
    nodes, slots = weights.shape
    column = 0
    while column < dim:
        vectors = 4 if column + 4 * LANES <= dim else 1
        for n in range(0, nodes, ROWS):
            at = weights.ctypes.data + 4 * n * slots, y + 4 * (n * y_stride + column)
            mix(vectors, min(ROWS, nodes - n), at[0], slots, values + 4 * column, stride, at[1], y_stride, slots)
        column += vectors * LANES


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _add(y: Any, x: Any, bias: Any, first: int, last: int) -> None:
    """Add columns ``first`` to ``last`` of ``x``, and the bias if there is one, to ``y``'s."""
    for n in range(len(y)):
        total, more = y[n][first:last], x[n][first:last]
        for i in range(len(total)):
            total[i] += more[i]
    _add_bias(y, bias, first, last)


@njit(cache=True, nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _add_bias(y: Any, bias: Any, first: int, last: int) -> None:
    """Add a bias, if there is one, to columns ``first`` to ``last``."""
    if len(bias):
        for n in range(len(y)):
            total = y[n][first:last]
            for i in range(len(total)):
                total[i] += bias[first + i]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _gated(gate: Any, up: Any, gate_bias: Any, up_bias: Any, first: int, last: int) -> None:
    """SwiGLU (Shazeer, arXiv 2002.05202) of columns ``first`` to ``last``, in place of ``gate``.

    Where Python's rule for division by zero held, numbers would be divided one by one.
    """
    _add_bias(gate, gate_bias, first, last)
    _add_bias(up, up_bias, first, last)
    for n in range(len(gate)):
        g, u = gate[n][first:last], up[n][first:last]
        for i in range(len(g)):
            g[i] = g[i] / (np.float32(1) + exp(-g[i])) * u[i]


@njit(cache=True, nogil=True, fastmath=FAST, inline="always")  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e to the x in float32, within 2 units in the last place; branch-free, so that loops over it vectorise.

    x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its series, 2^n by the exponent's bits.
    """
    low = x < np.float32(-87.3)
    x = np.float32(-87.3) if low else np.float32(88.7) if x > np.float32(88.7) else x  # NaN stays
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    e = p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if low else e
