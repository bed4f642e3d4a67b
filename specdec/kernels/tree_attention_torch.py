"""Attention under a mask, without copying the keys and values that several query heads share.

A prefix part and a tree part merged by log-sum-exp, as on GPUs, was slower on the CPU at every size tried (N 1 to 64,
contexts 256 to 8192): one call with a mask reads keys and values once too, and the merge costs six calls more.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(
    q: Float[Tensor, "rows heads nodes dim"],
    k: Float[Tensor, "rows kv_heads slots dim"],
    v: Float[Tensor, "rows kv_heads slots dim"],
    mask: Bool[Tensor, "#rows 1 nodes slots"],
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows heads nodes dim"]:
    """What each node reads from the slots where ``mask`` is True; ``softcap`` and ``sinks`` as in tree_attention.

    The heads of a group count as more nodes of their shared key head. Masked slots must hold numbers.
    """
    rows, heads, nodes, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.reshape(rows, kv_heads, group * nodes, dim)
    mask = mask.expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        sink = None if sinks is None else sinks.view(1, kv_heads, group, 1).expand(rows, -1, -1, nodes)
        out = _explicit(q, k, v, mask, scale, softcap, sink)
    return out.view(rows, heads, nodes, v.shape[-1])


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    scores = (q * scale) @ k.mT
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # not -inf: what sees nothing stays a number
    if sink is None:
        return (scores.softmax(-1) @ v).to(dtype)
    total = scores.logsumexp(-1).logaddexp(sink.flatten(2).to(scores))
    return (scores.sub_(total[..., None]).exp_() @ v).to(dtype)
