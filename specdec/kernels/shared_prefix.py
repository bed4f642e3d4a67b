"""Attention of several rows' trees where all rows begin alike: the common prefix is read once for all of them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.kernels.dispatch import launching, runs_triton
from specdec.kernels.tree_attention import Impl, tree_attention, visible


def shared_prefix_attention(
    q: Float[Tensor, "rows heads nodes dim"],
    k: Float[Tensor, "rows kv_heads slots dim"],
    v: Float[Tensor, "rows kv_heads slots dim"],
    shared_k: Float[Tensor, "1 kv_heads prefix dim"],
    shared_v: Float[Tensor, "1 kv_heads prefix dim"],
    ancestors: Int[Tensor, "rows nodes words"],
    lengths: Int[Tensor, " rows"],
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "rows heads nodes dim"]:
    """``tree_attention`` with the shared slots before each row's own; every node sees all of those.

    The queries of all rows go over the shared part together, as if they were nodes of one row; what they read there and
    in their own slots is merged by log-sum-exp. Hydragen (Juravsky et al. 2024, arXiv 2402.05099).

    Args:
        ancestors, softcap, sinks: see ``tree_attention``.
        lengths: of each row's own slots, those that hold its text; its nodes are behind them.
        impl: "reference" copies the shared slots to every row; "torch" reads what it masks, which must hold numbers;
            "triton" is for GPUs, or for Triton's interpreter; "auto" as in ``tree_attention``.

    Raises:
        ValueError: shapes do not fit together, or an explicit ``impl`` cannot run on these tensors.
    """
    fits = shared_k.shape == (1, k.shape[1], shared_k.shape[2], k.shape[3])
    if not fits or shared_v.shape != (1, v.shape[1], shared_k.shape[2], v.shape[3]):
        shapes = [[*x.shape] for x in (k, v, shared_k, shared_v)]
        raise ValueError(f"shared_k and shared_v must be one row of heads as k's and v's, got {shapes}")
    able = runs_triton(q) and q.shape[-1] == v.shape[-1] <= 256 and q.element_size() in (2, 4)
    if impl == "auto":
        impl = "triton" if q.is_cuda and able else "torch"
    if impl == "triton" and able:
        from specdec.kernels import shared_prefix_triton

        with launching(q):
            return shared_prefix_triton.attend(q, k, v, shared_k, shared_v, ancestors, lengths, scale, softcap, sinks)
    if impl == "torch":
        from specdec.kernels import shared_prefix_torch

        mask = visible(ancestors, lengths, lengths.new_zeros(ancestors.shape[:2]), k.shape[2])
        return shared_prefix_torch.attend(q, k, v, shared_k, shared_v, mask, scale, softcap, sinks)
    keys, values = (torch.cat([s.expand(len(q), -1, -1, -1), x], 2) for s, x in ((shared_k, k), (shared_v, v)))
    behind = lengths + shared_k.shape[2]
    return tree_attention(q, keys, values, ancestors, behind, scale, softcap=softcap, sinks=sinks, impl=impl)
