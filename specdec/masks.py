"""From trees to the tensors of one target pass: tokens, depths, and who may attend to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from specdec import trees
from specdec.core import DraftTree
from specdec.kernels.tree_attention import pack_bits


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The trees of a batch side by side, the smaller ones filled up with nodes that only see themselves.

    Attributes:
        tokens: token of each node, [rows, nodes].
        depth: guesses between the root and each node, [rows, nodes].
        ancestors: whether node i sees node j, [rows, nodes, nodes].
    """

    tokens: Int[torch.Tensor, "rows nodes"]
    depth: Int[torch.Tensor, "rows nodes"]
    ancestors: Bool[torch.Tensor, "rows nodes nodes"]

    @classmethod
    def of(cls, batch: Sequence[DraftTree], width: int) -> Layout:
        """Lay out trees of at most ``width`` nodes."""
        rows = len(batch)
        tokens = np.zeros((rows, width), np.int64)
        depth = np.zeros((rows, width), np.int64)
        ancestors = np.empty((rows, width, width), np.bool_)
        for row, tree in enumerate(batch):
            tokens[row, : len(tree)] = tree.tokens
            trees.lay_out(tree.parents, depth[row], ancestors[row])
        return cls(torch.from_numpy(tokens), torch.from_numpy(depth), torch.from_numpy(ancestors))

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        return Layout(self.tokens.to(device), self.depth.to(device), self.ancestors.to(device))


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a layer looks, in tokens.

    Attributes:
        window: a token sees itself and the ``window - 1`` before it; None for all.
        chunk: a token sees only tokens of its own chunk of that length; None for all.
    """

    window: int | None = None
    chunk: int | None = None


def tree_mask(
    layout: Layout,
    lengths: Sequence[int],
    reach: Reach,
    columns: int,
    offset: int = 0,
    visible: Bool[torch.Tensor, "rows prompt"] | None = None,
) -> Bool[torch.Tensor, "rows 1 nodes columns"]:
    """True where a node may attend to a cache slot.

    A row's slots hold, from token ``offset`` on, its committed tokens and then its nodes. A node sees the committed
    tokens and its own ancestors, as far back as ``reach`` goes; distance is counted in depth, not in slots.

    Args:
        lengths: committed tokens in the cache, per row.
        visible: which of the prompt's columns hold tokens and not padding; None where all do.
    """
    rows, nodes = layout.tokens.shape
    if rows == 1 and visible is None and reach == Reach():
        mask = torch.ones(1, 1, nodes, columns, dtype=torch.bool, device=layout.tokens.device)
        mask[0, 0, :, columns - nodes :] = layout.ancestors[0]
        return mask
    slot = torch.arange(offset, offset + columns, device=layout.tokens.device)
    length = torch.tensor(lengths, device=slot.device)[:, None, None]
    # The index of each slot's token on its node's own path: committed tokens, then nodes by depth.
    index = slot.expand(rows, -1).clone()
    mask = (slot < length).expand(rows, nodes, -1).clone()
    if visible is not None:
        prompt = visible[:, None, offset : offset + columns]  # none of it, once a window has passed it
        mask[:, :, : prompt.shape[2]] &= prompt
    for row, committed in enumerate(lengths):
        at = slice(committed - offset, committed - offset + nodes)
        mask[row, :, at] = layout.ancestors[row]
        index[row, at] = committed + layout.depth[row]
    own = (length[:, :, 0] + layout.depth)[:, :, None]
    mask &= _within(own, index[:, None, :], reach, _padding(visible, rows, slot.device))
    return mask[:, None]


def hides(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether a mask hides any token. Transformers 5.17 makes masks that hide none; later releases go without them."""
    return mask is not None and not bool(mask.all())


def _padding(visible: torch.Tensor | None, rows: int, device: torch.device) -> Int[torch.Tensor, "rows 1 1"]:
    """Left padding per row: chunks are counted from the first real token."""
    if visible is None:
        return torch.zeros(rows, 1, 1, dtype=torch.long, device=device)
    return (visible.long().cumsum(-1) == 0).sum(-1)[:, None, None]


def _within(own: torch.Tensor, other: torch.Tensor, reach: Reach, padding: torch.Tensor) -> torch.Tensor:
    if reach.window is not None:
        return own - other < reach.window
    if reach.chunk is not None:
        return (own - padding) // reach.chunk == (other - padding) // reach.chunk
    return torch.ones((), dtype=torch.bool, device=own.device)


def tree_bits(
    layout: Layout,
    lengths: Sequence[int],
    reach: Reach,
    offset: int = 0,
    visible: Bool[torch.Tensor, "rows prompt"] | None = None,
) -> Int[torch.Tensor, "rows 1 nodes words_and_two"]:
    """What ``tree_mask`` says, as our attention takes it: in a few words per node, however long the prefix.

    Per node: the bits of those it sees among its ancestors and itself, how many slots hold its row's prefix, and the
    first of them that it sees. ``visible`` must be padding on the left alone.
    """
    rows, nodes = layout.tokens.shape
    length = torch.tensor(lengths, device=layout.tokens.device)[:, None]
    padding = _padding(visible, rows, length.device)
    own = length + layout.depth
    seen = layout.ancestors & _within(own[:, :, None], own[:, None], reach, padding)
    first = padding[:, :, 0].expand(-1, nodes)
    if reach.window is not None:
        first = torch.maximum(first, own - reach.window + 1)
    if reach.chunk is not None:
        first = own - (own - first) % reach.chunk
    ends = torch.stack([length.expand(-1, nodes), first], -1) - offset
    return torch.cat([pack_bits(seen), ends.clamp(min=0)], -1)[:, None]


def additive(mask: Bool[torch.Tensor, "..."], dtype: torch.dtype) -> Float[torch.Tensor, "..."]:
    """The mask as eager attention adds it to its scores: 0 where allowed, the least number where not."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, torch.finfo(dtype).min))
