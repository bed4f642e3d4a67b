"""One trained layer as the drafter: constant memory of its own, and the target's rows, read where they are."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdec import cpu, trees
from specdec.cache import SlotCache, SlotLayer
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import levels
from specdec.drafters.lent import Lent
from specdec.drafters.longspec_layer import LongSpecLayer, Shape, attend, unlike
from specdec.kernels.tree_attention import pack_bits, tree_attention
from specdec.model import Model
from specdec.trees.sampling import Level

Tree = Literal["chain", "beam", "best-first"]


class LongSpecDrafter:
    """Guesses with one small layer, which sees a window of the text and all that the target's last layer holds of it.

    Its own rows are those of the newest tokens, as many as its window; the target's are read in the target's own cache.
    So it holds equally much for a text of any length. All rows of a batch go through its weights together. Trees are
    not sampled: where the target samples, its default verifier accepts what it would have drawn.

    It needs the target, which ``bind`` hands it; where nobody does, as in a ``SessionPool``, it guesses nothing.

    LongSpec (Yang et al. 2025, arXiv 2502.17421); its sampling paths, which are not exact, are left out.

    Args:
        layer: trained for this very target.
        tree: "chain"; "beam", the ``width`` likeliest paths of each level; "best-first", the likeliest paths that the
            budget has room for.
        width: paths of "beam" trees, and nodes expanded on each level of "best-first" ones; at most the budget's.
        name: what ``stats`` calls it.
        cpu_kernels: whether to make the layer on the CPU quicker for short passes, as ``wrap`` does.

    Raises:
        ValueError: an unknown kind of tree, or a width below 1.
    """

    topk = 0
    hidden = False

    def __init__(
        self,
        layer: LongSpecLayer,
        tree: Tree = "chain",
        width: int = 4,
        name: str = "longspec",
        cpu_kernels: bool = True,
    ) -> None:
        if tree not in get_args(Tree) or width < 1:
            raise ValueError(f"tree={tree!r}, width={width}: give one of {', '.join(get_args(Tree))}, from 1 on")
        self.layer, self.tree, self.width, self.name = layer.eval(), tree, width, name
        self.cpu_kernels = cpu_kernels
        self._lender: weakref.ref[nn.Module] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None, **arguments: Any) -> LongSpecDrafter:
        """The drafter of a trained layer in a file; ``arguments`` as above.

        Args:
            model: the target, to know at once whether the layer is made for it; ``bind`` will tell later.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no layer's, or not made for this model.
        """
        layer = LongSpecLayer.load(path)
        reason = "" if model is None else unlike(layer.shape, model)
        if reason:
            raise ValueError(f"{path} cannot draft for this {type(model).__name__}: {reason}")
        return cls(layer, **arguments)

    def bind(self, target: Model, contexts: Sequence[Context]) -> str:
        """Draft for these contexts, one for each row of the target, with what the target lends.

        Returns:
            Why that cannot be; empty where it can.
        """
        reason = unlike(self.layer.shape, target.module) or _unfit(target)
        if not reason:
            self._borrow(target)
            for row, context in enumerate(contexts):
                context.scratch[self] = Window(self.layer, self.lent, target, row)
        return reason

    def _borrow(self, target: Model) -> None:
        if self._lender is not None and self._lender() is target.module:
            return
        if self.cpu_kernels:
            cpu.remove(self.layer)
        self.layer.to(target.module.device, target.module.dtype)
        self.lent = Lent(target.module, self.layer.kept, self.cpu_kernels)
        if self.cpu_kernels:
            cpu.install(self.layer)
        self._lender = weakref.ref(target.module)

    @torch.no_grad()
    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget."""
        going = [
            (context, budget)
            for context, budget in zip(contexts, budgets, strict=True)
            if budget.nodes > 0 and self in context.scratch and not context.finished
        ]
        for context in contexts:
            if context.finished:
                context.scratch.pop(self, None)
        windows = [context.scratch[self].follow(context.tokens) for context, _ in going]
        drafts = self._grow(windows, [self._growth(int(context.tokens[-1]), budget) for context, budget in going])
        drafted = {id(context): self._tree(draft) for (context, _), draft in zip(going, drafts, strict=True)}
        return [drafted.get(id(context)) or DraftTree.root(int(context.tokens[-1])) for context in contexts]

    def _growth(self, root: int, budget: Budget) -> levels.Drafting:
        """How a tree of this budget grows."""
        width = 1 if self.tree == "chain" else min(self.width, budget.width, budget.nodes)
        if self.tree == "best-first":
            return levels.best_first(root, budget.nodes, width, budget.depth, budget.least)
        return levels.likeliest(root, [width] * min(budget.depth, budget.nodes // width), width, budget.least)

    def _tree(self, draft: levels.Draft) -> DraftTree:
        source = ("", *[self.name] * (len(draft.tokens) - 1))
        return DraftTree(draft.tokens, draft.parents, draft.probability, source)

    def _grow(self, windows: Sequence[Window], growths: Sequence[levels.Drafting]) -> list[levels.Draft]:
        """Feed all growths' levels together, until the last of them has ended."""
        asked = [levels.advance(growth) for growth in growths]
        while going := [(i, level) for i, level in enumerate(asked) if isinstance(level, Level)]:
            after = self._after([windows[i] for i, _ in going], [level for _, level in going])
            for (i, _), logits in zip(going, after, strict=True):
                asked[i] = levels.advance(growths[i], logits)
        return [each for each in asked if isinstance(each, levels.Draft)]

    def _after(self, windows: Sequence[Window], grown: Sequence[Level]) -> list[Float[Tensor, "level vocab"]]:
        """What the layer says after each tree's newest nodes, in one pass over the nodes of all trees.

        Older nodes come along to be read by the newest: their own rows are cheaper made anew than kept.
        """
        layer, lent, device = self.layer, self.lent, self.lent.head.weight.device
        tokens = torch.from_numpy(np.concatenate([level.tokens for level in grown])).to(device)
        positions = [window.root + trees.depths(level.parents) for window, level in zip(windows, grown, strict=True)]
        x, rotation = lent.embed(tokens), lent.rotation(torch.from_numpy(np.concatenate(positions)).to(device))
        sizes = [len(level.tokens) for level in grown]
        parts = (layer.own_query(x, rotation), *layer.own_rows(x, rotation))
        split = zip(windows, grown, *(torch.split(part, sizes, 1) for part in parts), strict=True)
        x = layer.after_own(x, torch.cat([window.read(level, *own) for window, level, *own in split], 1))
        new = torch.from_numpy(np.concatenate([np.arange(len(level.tokens)) >= level.start for level in grown]))
        x, rotation = x[new], (rotation[0][new], rotation[1][new])
        sizes = [len(level.tokens) - level.start for level in grown]
        asked = torch.split(layer.cross_query(x, rotation), sizes, 1)
        read = [attend(q, *window.targets) for window, q in zip(windows, asked, strict=True)]
        return list(torch.split(lent.logits(layer.after_cross(x, torch.cat(read, 1))), sizes))


class Window:
    """One text's rows in the layer: those of its newest tokens but the last, at most as many as the window lets see.

    Only committed tokens' rows are held, so a rejected draft leaves nothing.

    Args:
        layer, lent: what makes rows of tokens.
        target: the model that holds the text among others.
        row: which of its rows.
    """

    def __init__(self, layer: LongSpecLayer, lent: Lent, target: Model, row: int) -> None:
        self.layer, self.lent, self.target, self.row = layer, lent, target, row
        shift, visible = target.shift, target.visible
        self.shift = 0 if shift is None else int(shift[min(row, len(shift) - 1), -1])
        self.padding = 0 if visible is None else int((visible[row].long().cumsum(-1) == 0).sum())
        self.keys = self.values = self._nothing()
        self.end = 0  # tokens of the text before the first that has no row yet

    def _nothing(self) -> Tensor:
        shape = self.layer.shape
        return self.lent.head.weight.new_empty(shape.kv_heads, 0, shape.head_dim)

    @property
    def root(self) -> int:
        """The position of the text's last token."""
        return self.target.lengths[self.row] + self.shift

    @property
    def targets(self) -> tuple[Float[Tensor, "kv_heads slots dim"], Float[Tensor, "kv_heads slots dim"]]:
        """Keys and values of the target's last layer, where it keeps them."""
        layer = self.target.cache.layers[-1]
        keys, values = layer.buffers
        seen = slice(self.padding, layer.lengths[self.row])
        return keys[self.row, :, seen], values[self.row, :, seen]

    @property
    def bytes(self) -> int:
        """What is held, whatever the text's length."""
        return int(self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes())

    def follow(self, tokens: Int[np.ndarray, " length"]) -> Window:
        """Hold the rows of the last tokens of a text but the very last, which is a tree's root."""
        last, most = len(tokens) - 1, self.layer.window - 1
        start = max(self.end, last - most)
        if start < last:
            device = self.keys.device
            new = torch.from_numpy(tokens[start:last].copy()).to(device)
            positions = torch.arange(start - last, 0, device=device) + self.root
            rows = self.layer.own_rows(self.lent.embed(new), self.lent.rotation(positions))
            kept = (self.keys, self.values) if start == self.end else (self._nothing(), self._nothing())
            self.keys, self.values = (torch.cat(pair, 1)[:, -most:].clone() for pair in zip(kept, rows, strict=True))
            self.end = last
        return self

    def read(
        self,
        level: Level,
        q: Float[Tensor, "heads nodes dim"],
        k: Float[Tensor, "kv_heads nodes dim"],
        v: Float[Tensor, "kv_heads nodes dim"],
    ) -> Float[Tensor, "heads nodes dim"]:
        """What a tree's nodes read in the window and in their ancestors."""
        bits = pack_bits(torch.from_numpy(trees.ancestor_matrix(level.parents))).to(q.device)
        lengths = torch.tensor([self.keys.shape[1]], device=q.device)
        k, v = torch.cat([self.keys, k], 1)[None], torch.cat([self.values, v], 1)[None]
        scale = self.layer.shape.head_dim**-0.5
        return tree_attention(q[None], k, v, bits[None], lengths, scale, window=self.layer.window)[0]


def _unfit(target: Model) -> str:
    """Why a target's rows cannot serve; empty if they can."""
    config, visible = target.config, target.visible
    last = target.cache.layers[-1] if isinstance(target.cache, SlotCache) else None
    if not isinstance(last, SlotLayer) or last.window is not None:
        return "the target's last layer has no rows of its own that hold trees"
    if last.buffers[0].device != target.device:
        return "the target's rows live in the host's memory"
    shape, rows = Shape.of(config), last.buffers
    if any(part.shape[1::2] != (shape.kv_heads, shape.head_dim) for part in rows):
        return f"the target's rows are of shapes {[list(part.shape) for part in rows]}"
    if visible is not None and not bool((visible.long().cummax(-1).values == visible).all()):
        return "the prompt has holes"
    if target.shift is not None and target.shift.ndim != 2:
        return "the target counts positions along several axes"
    return ""
