"""The common prefix of several rows on GPUs: tree attention's kernels, over it as if all nodes were one row's."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.tree_attention_triton import merged, prefix_parts, tree_parts


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """As ``kernels.shared_prefix_attention``; the result lies in memory as [rows, nodes, heads, dim].

    Args:
        splits: of the shared prefix, and of the rows' own; None for as many as fill the device twice.
    """
    rows, _, nodes, _ = q.shape
    starts = lengths.new_zeros(rows, nodes)
    own = tree_parts(q, k, v, ancestors, lengths, starts, scale, softcap, splits)
    prefix = shared_k.shape[2]
    together, length = q.transpose(0, 1).flatten(1, 2)[None], lengths.new_full((1,), prefix)
    shared = prefix_parts(together, shared_k, shared_v, length, starts.view(1, -1), prefix, scale, softcap, splits)
    apart = (x.view(len(x), -1, rows, nodes, *x.shape[4:]).transpose(1, 2) for x in shared)
    parts, logs = (torch.cat(pair) for pair in zip(apart, own, strict=True))
    return merged(parts, logs, sinks, q.dtype)
