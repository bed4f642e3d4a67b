"""Attention of a tree's nodes to their row's prefix and to their own ancestors."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec.kernels.dispatch import launching, runs_triton

Impl = Literal["auto", "reference", "torch", "triton"]
WORD = 64  # bits


def tree_attention(
    q: Float[Tensor, "rows heads nodes dim"],
    k: Float[Tensor, "rows kv_heads slots dim"],
    v: Float[Tensor, "rows kv_heads slots dim"],
    ancestors: Int[Tensor, "rows nodes words"],
    lengths: Int[Tensor, " rows"],
    scale: float,
    *,
    starts: Int[Tensor, "rows nodes"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "rows heads nodes dim"]:
    """What each node reads: all of its row's prefix, and of the tree itself and its ancestors alone.

    Row b's slots hold its prefix in ``[0, lengths[b])``, then its nodes. What lies behind them is never read. Query
    head h reads key head ``h // (heads // kv_heads)``. Sums are kept in float32.

    Args:
        ancestors: bit ``j % 64`` of word ``j // 64`` says that node i sees node j <= i; each node sees itself.
        starts: the first slot of the prefix that each node sees; None for all of it. Those before must hold numbers.
        window: a node sees itself and the ``window - 1`` tokens before it on its own path; None for all. For bits
            that name all ancestors.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: per head, the score of a token that is attended to and holds nothing.
        impl: "reference" is the definition in float32; "torch" hands the heads of a group to one call as if they
            were nodes, so that grouped keys are not copied; "triton" is for GPUs, or for Triton's interpreter;
            "auto" takes "triton" on GPUs up to a head dimension of 256, else "torch".

    Raises:
        ValueError: shapes do not fit together, or an explicit ``impl`` cannot run on these tensors.
    """
    _check(q, k, v, ancestors, lengths)
    if starts is None:
        starts = lengths.new_zeros(ancestors.shape[:2])
    if window is not None:
        ancestors, starts = _within(window, ancestors, lengths, starts)
    able = runs_triton(q) and q.shape[-1] == v.shape[-1] <= 256 and q.element_size() in (2, 4)
    if impl == "auto":
        impl = "triton" if q.is_cuda and able else "torch"
    match impl:
        case "reference":
            mask = visible(ancestors, lengths, starts, k.shape[2])
            return _reference(q, k, v, mask, scale, softcap, sinks)
        case "torch":
            return _torch(q, k, v, ancestors, lengths, starts, scale, softcap, sinks)
        case "triton" if able:
            from specdec.kernels import tree_attention_triton

            with launching(q):
                return tree_attention_triton.tree_attention(q, k, v, ancestors, lengths, starts, scale, softcap, sinks)
        case "triton":
            raise ValueError(
                f"impl='triton' runs on GPUs, on float32 and halves, heads up to 256 wide; "
                f"not on {q.device}, {q.dtype}, {q.shape[-1]}"
            )
    raise ValueError(f"impl is {impl!r}; use 'auto', 'reference', 'torch' or 'triton'")


def _check(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, lengths: Tensor) -> None:
    rows, heads, nodes, dim = q.shape
    fits = k.shape[0] == v.shape[0] == rows and k.shape[1:3] == v.shape[1:3] and k.shape[3] == dim
    if not fits or heads % k.shape[1] or k.shape[2] < nodes:
        raise ValueError(f"q, k and v of shapes {[*q.shape]}, {[*k.shape]} and {[*v.shape]} do not fit together")
    words = (rows, nodes, -(-nodes // WORD))
    if ancestors.dtype != torch.int64 or ancestors.shape != words:
        raise ValueError(f"ancestors must be int64 {[*words]}, got {ancestors.dtype} {[*ancestors.shape]}")
    if lengths.shape != (rows,):
        raise ValueError(f"lengths must be [{rows}], one per row, got {[*lengths.shape]}")


def pack_bits(seen: Bool[Tensor, "*rows nodes"]) -> Int[Tensor, "*rows words"]:
    """Booleans as bits: number j is bit ``j % 64`` of word ``j // 64``."""
    words = -(-seen.shape[-1] // WORD)
    padded = torch.nn.functional.pad(seen, (0, words * WORD - seen.shape[-1]))
    places = torch.arange(WORD, device=seen.device)
    return (padded.view(*padded.shape[:-1], words, WORD).long() << places).sum(-1)


def unpack_bits(words: Int[Tensor, "*rows words"], nodes: int) -> Bool[Tensor, "*rows nodes"]:
    """Bits as booleans, the first ``nodes`` of them."""
    places = torch.arange(WORD, device=words.device)
    return (words[..., None] >> places & 1).flatten(-2)[..., :nodes].bool()


def visible(ancestors: Tensor, lengths: Tensor, starts: Tensor, slots: int) -> Bool[Tensor, "rows 1 nodes slots"]:
    """Bits, lengths and starts as one dense mask: True where a node sees a slot."""
    nodes = ancestors.shape[1]
    slot = torch.arange(slots, device=ancestors.device)
    node = slot - lengths[:, None]
    seen = unpack_bits(ancestors, nodes).gather(2, node.clamp(0, nodes - 1)[:, None].expand(-1, nodes, -1))
    prefix = (slot >= starts[:, :, None]) & (node < 0)[:, None]
    return (prefix | seen & ((node >= 0) & (node < nodes))[:, None])[:, None]


def _within(window: int, ancestors: Tensor, lengths: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """What a window leaves of bits and prefix."""
    seen = unpack_bits(ancestors, ancestors.shape[1])
    depth = seen.sum(-1) - 1
    near = depth[:, :, None] - depth[:, None, :] < window
    return pack_bits(seen & near), torch.maximum(starts, lengths[:, None] + depth - window + 1)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.float() @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    seen = mask.any(2)[..., None]  # zero times what lies in unseen slots may be no number
    return (weights @ v.masked_fill(~seen, 0)).to(q.dtype)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    from specdec.kernels.tree_attention_torch import attend

    ends = (lengths + q.shape[2]).tolist()
    if len(set(ends)) == 1:
        mask = visible(ancestors, lengths, starts, ends[0])
        return attend(q, k[:, :, : ends[0]], v[:, :, : ends[0]], mask, scale, softcap, sinks)
    rows = [slice(row, row + 1) for row in range(len(ends))]
    parts = [_torch(q[r], k[r], v[r], ancestors[r], lengths[r], starts[r], scale, softcap, sinks) for r in rows]
    return torch.cat(parts)
