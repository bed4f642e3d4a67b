"""Tree attention on GPUs: the prefix in splits, the tree by its bits, merged by log-sum-exp.

The heads that share keys are packed into one tile: its row r is head ``r % group`` of node ``r // group``, so keys
and values are read once for all of them. Parts are normalised, in float32, each with the logarithm (to base 2) of its
sum of exponentials: [parts, rows, heads, nodes]. Addresses are 64-bit.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_SPLIT = 256  # slots: a shorter part costs more to merge than it saves
TUNING = Path(__file__).with_name("tree_attention_tuning.json")


@triton.jit  # type: ignore[untyped-decorator]
def _load(at, stride, dim, left, ROWS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next rows of a matrix as a tile [ROWS, DIM]: zero where not ``left`` or beyond ``dim``."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None, :]
    return tl.load(at + (row * stride + column), mask=(row < left) & (column < dim), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(sums, top, total, queries, keys, values, seen, scale, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One more tile of slots in a running softmax to base 2; ``seen`` says which row sees which slot."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if SOFTCAP > 0:
        scores = SOFTCAP * (2 * tl.sigmoid(2 / SOFTCAP * scores) - 1)  # tanh
    scores = tl.where(seen, scores * LOG2E, -float("inf"))
    best = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(best == -float("inf"), 0.0, best)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
    return sums, best, total * fade + tl.sum(weights, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _write(parts, logs, at, sums, top, total, real, dim, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's normalised part and its logarithm: -inf where it saw nothing."""
    some = tl.where(total == 0, 1.0, total)
    tl.store(logs + at, top + tl.log2(some), mask=real)
    dims = tl.arange(0, DIM)[None, :]
    tl.store(parts + at[:, None] * dim + dims, sums / some[:, None], mask=real[:, None] & (dims < dim))


@triton.jit  # type: ignore[untyped-decorator]
def prefix_kernel(  # type: ignore[no-untyped-def]
    q, k, v, lengths, starts, parts, logs, scale, heads, group, nodes, dim, share,
    length_row, start_row, start_node,
    q_row, q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot,
    SOFTCAP: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of queries over one split of its row's prefix: ``share`` slots from ``share * split`` on."""
    split, pair = tl.program_id(0), tl.program_id(2)
    row, kv_head = (pair // (heads // group)).to(tl.int64), (pair % (heads // group)).to(tl.int64)
    r = tl.program_id(1) * TILE + tl.arange(0, TILE)
    node, head = r // group, kv_head * group + r % group
    real = node < nodes
    at = q + row * q_row + head * q_head + node.to(tl.int64) * q_node
    dims = tl.arange(0, DIM)[None, :]
    queries = tl.load(at[:, None] + dims, mask=real[:, None] & (dims < dim), other=0.0)
    length = tl.load(lengths + row * length_row).to(tl.int32)
    start = tl.load(starts + row * start_row + node * start_node, mask=real, other=length).to(tl.int32)
    first = tl.maximum(split * share, tl.min(start, 0))
    last = tl.minimum(split * share + share, length)
    k += row * k_row + kv_head * k_head + first.to(tl.int64) * k_slot
    v += row * v_row + kv_head * v_head + first.to(tl.int64) * v_slot
    sums = tl.zeros([TILE, DIM], tl.float32)
    top = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for slot in range(first, last, SLOTS):
        keys = _load(k, k_slot, dim, last - slot, SLOTS, DIM)
        values = _load(v, v_slot, dim, last - slot, SLOTS, DIM)
        slots = slot + tl.arange(0, SLOTS)[None, :]
        seen = (slots >= start[:, None]) & (slots < last)
        sums, top, total = _absorb(sums, top, total, queries, keys, values, seen, scale, SOFTCAP)
        k += SLOTS * k_slot
        v += SLOTS * v_slot
    rows = tl.num_programs(2) // (heads // group)
    out = ((split * rows + row) * heads + head) * nodes + node
    _write(parts, logs, out, sums, top, total, real, dim, DIM)


@triton.jit  # type: ignore[untyped-decorator]
def tree_kernel(  # type: ignore[no-untyped-def]
    q, k, v, ancestors, lengths, parts, logs, scale, heads, group, nodes, dim, part,
    length_row, bits_row, bits_node,
    q_row, q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot,
    SOFTCAP: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the nodes up to its own last, by ancestor bits; written as the last part."""
    first, pair = tl.program_id(0) * TILE, tl.program_id(1)
    row, kv_head = (pair // (heads // group)).to(tl.int64), (pair % (heads // group)).to(tl.int64)
    r = first + tl.arange(0, TILE)
    node, head = r // group, kv_head * group + r % group
    real = node < nodes
    at = q + row * q_row + head * q_head + node.to(tl.int64) * q_node
    dims = tl.arange(0, DIM)[None, :]
    queries = tl.load(at[:, None] + dims, mask=real[:, None] & (dims < dim), other=0.0)
    length = tl.load(lengths + row * length_row)
    k += row * k_row + kv_head * k_head + length * k_slot
    v += row * v_row + kv_head * v_head + length * v_slot
    bits = ancestors + row * bits_row + node * bits_node
    sums = tl.zeros([TILE, DIM], tl.float32)
    top = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for other in range(0, tl.minimum((first + TILE - 1) // group + 1, nodes), SLOTS):
        keys = _load(k, k_slot, dim, nodes - other, SLOTS, DIM)
        values = _load(v, v_slot, dim, nodes - other, SLOTS, DIM)
        word = tl.load(bits + other // 64, mask=real, other=0)  # SLOTS divides 64
        seen = (word[:, None] >> (other % 64 + tl.arange(0, SLOTS))[None, :].to(tl.int64)) & 1
        sums, top, total = _absorb(sums, top, total, queries, keys, values, seen != 0, scale, SOFTCAP)
        k += SLOTS * k_slot
        v += SLOTS * v_slot
    rows = tl.num_programs(1) // (heads // group)
    out = ((part * rows + row) * heads + head) * nodes + node
    _write(parts, logs, out, sums, top, total, real, dim, DIM)


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(  # type: ignore[no-untyped-def]
    parts, logs, sinks, out, heads, nodes, dim, count, PARTS: tl.constexpr, FEW: tl.constexpr, DIM: tl.constexpr
):
    """One node of one head: its parts, weighted by their sums, and the sink's weight with nothing in it.

    Programs go over [rows, heads, nodes]; ``out`` is [rows, nodes, heads, dim].
    """
    at = tl.program_id(0).to(tl.int64)
    node, head, row = at % nodes, at // nodes % heads, at // (nodes * heads)
    total = tl.num_programs(0).to(tl.int64)
    every = tl.arange(0, PARTS)
    log = tl.load(logs + every * total + at, mask=every < count, other=-float("inf"))
    top = tl.max(log, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    whole = tl.sum(tl.exp2(log - top), 0)
    if sinks is not None:
        whole += tl.exp2(sink - top)
    dims = tl.arange(0, DIM)
    value = tl.zeros([DIM], tl.float32)
    for some in range(0, count, FEW):
        part = some + tl.arange(0, FEW)
        places = part * total + at
        weights = tl.exp2(tl.load(logs + places, mask=part < count, other=-float("inf")) - top)
        mask = (part < count)[:, None] & (dims < dim)[None, :]
        values = tl.load(parts + places[:, None] * dim + dims[None, :], mask=mask, other=0.0)
        value += tl.sum(values * weights[:, None], 0)
    place = ((row * nodes + node) * heads + head) * dim
    tl.store(out + place + dims, (value / whole).to(out.dtype.element_ty), mask=dims < dim)


class Tiles(NamedTuple):
    """What a kernel works on at a time: query rows at most, slots, warps, loads in flight."""

    rows: int
    slots: int
    warps: int
    stages: int


@cache
def tiles(architecture: str, size: int, dim: int) -> Tiles:
    """Those for an architecture ("sm_90", "gfx942"), bytes per number, and head dimension."""
    table = json.loads(TUNING.read_text())["tiles"]
    by_dim = table.get(architecture, table["default"])[str(size)]
    return Tiles(*next(by_dim[width] for width in sorted(by_dim, key=int) if dim <= int(width)))


@cache
def _machine(device: torch.device) -> tuple[str, int]:
    """A device's architecture and how many programs it runs side by side."""
    if device.type == "cpu":
        return "interpreter", 1
    properties: Any = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return amd.split(":")[0] or f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """As ``kernels.tree_attention``; the result lies in memory as [rows, nodes, heads, dim].

    Args:
        splits: of the prefix; None for as many as fill the device twice.
    """
    parts, logs = tree_parts(q, k, v, ancestors, lengths, starts, scale, softcap, splits)
    return merged(parts, logs, sinks, q.dtype)


def tree_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    softcap: float | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What each node reads of its row's prefix and, as the last part, of the tree."""
    longest = k.shape[2] - q.shape[2]
    parts, logs = prefix_parts(q, k, v, lengths, starts, longest, scale, softcap, splits, spare=1)
    _write_tree(q, k, v, ancestors, lengths, parts, logs, scale, softcap)
    return parts, logs


def prefix_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    softcap: float | None,
    splits: int | None = None,
    spare: int = 0,
) -> tuple[Tensor, Tensor]:
    """What each node reads of its row's prefix, of at most ``longest`` slots, in parts, and ``spare`` ones to fill."""
    rows, heads, nodes, dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    kv_heads, group = k.shape[1], heads // k.shape[1]
    how = _how(q, group, softcap)
    count = triton.cdiv(group * nodes, how["TILE"])
    if splits is None:
        _, processors = _machine(q.device)
        splits = max(1, min(2 * processors // (count * rows * kv_heads), triton.cdiv(longest, LEAST_SPLIT)))
    parts = q.new_empty(splits + spare, rows, heads, nodes, dim, dtype=torch.float32)
    logs = q.new_empty(splits + spare, rows, heads, nodes, dtype=torch.float32)
    prefix_kernel[(splits, count, rows * kv_heads)](
        q, k, v, lengths, starts, parts, logs, scale, heads, group, nodes, dim, triton.cdiv(longest, splits),
        *lengths.stride(), *starts.stride(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **how,
    )  # fmt: skip
    return parts, logs


def _write_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    parts: Tensor,
    logs: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """What each node reads of the tree, as the last of ``parts``."""
    rows, heads, nodes, dim = q.shape
    q, k, v, ancestors = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, ancestors))
    kv_heads, group = k.shape[1], heads // k.shape[1]
    how = _how(q, group, softcap)
    tree_kernel[(triton.cdiv(group * nodes, how["TILE"]), rows * kv_heads)](
        q, k, v, ancestors, lengths, parts, logs, scale, heads, group, nodes, dim, len(parts) - 1,
        *lengths.stride(), *ancestors.stride()[:2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **how,
    )  # fmt: skip


def _how(q: Tensor, group: int, softcap: float | None) -> dict[str, Any]:
    """Constants and options of both kernels."""
    nodes, dim = q.shape[2:]
    architecture, _ = _machine(q.device)
    size = tiles(architecture, q.element_size(), dim)
    tile = min(size.rows, max(16, triton.next_power_of_2(group * nodes)))
    wide = max(16, triton.next_power_of_2(dim))
    how = {"SOFTCAP": softcap or 0.0, "TILE": tile, "SLOTS": size.slots, "DIM": wide}
    return how | {"num_warps": size.warps, "num_stages": size.stages}


def merged(parts: Tensor, logs: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Parts as one result [rows, heads, nodes, dim], which lies in memory as [rows, nodes, heads, dim]."""
    count, rows, heads, nodes, dim = parts.shape
    out = parts.new_empty(rows, nodes, heads, dim, dtype=dtype)
    merge_kernel[(rows * heads * nodes,)](
        parts, logs, sinks, out, heads, nodes, dim, count,
        PARTS=triton.next_power_of_2(count), FEW=8, DIM=max(16, triton.next_power_of_2(dim)), num_warps=1,
    )  # fmt: skip
    return out.transpose(1, 2)
