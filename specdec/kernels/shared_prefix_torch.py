"""The common prefix of several rows as one product with all their queries, and each row's own slots under a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SCORES = 1 << 22  # numbers that are held at once: a longer prefix is read piece by piece


class Part(NamedTuple):
    """What queries read of some slots: ``sums`` of values, weighted by exp(score - top), and the weights' ``total``."""

    sums: Tensor
    top: Tensor
    total: Tensor


def attend(
    q: Float[Tensor, "rows heads nodes dim"],
    k: Float[Tensor, "rows kv_heads slots dim"],
    v: Float[Tensor, "rows kv_heads slots dim"],
    shared_k: Float[Tensor, "1 kv_heads prefix dim"],
    shared_v: Float[Tensor, "1 kv_heads prefix dim"],
    mask: Bool[Tensor, "#rows 1 nodes slots"],
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows heads nodes dim"]:
    """What each node reads of all shared slots, and of its row's own where ``mask`` is True; see ``shared_prefix``."""
    rows, heads, nodes, dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    group, wide = heads // kv_heads, torch.promote_types(dtype, torch.float32)
    queries = (q.to(wide) * scale).reshape(rows, kv_heads, group * nodes, dim)
    seen = mask.expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    part = _part(_scores(queries, k.to(wide), softcap).masked_fill_(~seen, torch.finfo(wide).min), v.to(wide))
    together = queries.transpose(0, 1).reshape(kv_heads, rows * group * nodes, dim)
    piece = max(64, SCORES // together[..., 0].numel())
    for keys, values in zip(torch.split(shared_k[0], piece, 1), torch.split(shared_v[0], piece, 1), strict=True):
        read = _part(_scores(together, keys.to(wide), softcap), values.to(wide))
        part = _merged(part, Part(*(x.view(kv_heads, rows, group * nodes, -1).transpose(0, 1) for x in read)))
    total = part.total
    if sinks is not None:
        sink = sinks.to(wide).view(1, kv_heads, group, 1).expand(rows, -1, -1, nodes).reshape(part.top.shape)
        total = total + (sink - part.top).exp()
    return (part.sums / total).to(dtype).view(rows, heads, nodes, -1)


def _scores(queries: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    scores = queries @ keys.mT
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _part(scores: Tensor, values: Tensor) -> Part:
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return Part(weights @ values, top, weights.sum(-1, keepdim=True))


def _merged(a: Part, b: Part) -> Part:
    top = torch.maximum(a.top, b.top)
    left, right = (a.top - top).exp(), (b.top - top).exp()
    return Part(a.sums * left + b.sums * right, top, a.total * left + b.total * right)
