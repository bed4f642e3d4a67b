"""A drafter that goes on from the target's own features: one layer that knows what the target made of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.attention import TURN
from specdec.core import Budget, Context, DraftTree
from specdec.drafters.model_rows import NO_TREE, Nodes, Rows, Text
from specdec.drafters.row_keeper import RowKeeper, Tokens
from specdec.drafters.small_model import SmallModelDrafter, Tree
from specdec.model import Form, Pass
from specdec.trees.sampling import Level


class FeatureDrafter(SmallModelDrafter):
    """Guesses the target's next feature from its last one and the token that followed, and reads it with its own head.

    Where a guess follows a guess, the drafter's feature stands in for the target's. Its rows are of committed tokens
    alone, each made of the target's feature; features come with the verdicts, so it reads a text from the second token
    on that the target wrote, and drafts from the third step. Steps that it is not shown make it begin anew.

    EAGLE: Li et al. 2024, arXiv 2401.15077; "best-first" trees: arXiv 2406.16858.

    Args:
        draft: what ``specdec train draft --kind feature`` made, loaded for its target; see ``distilled.load``.
        tree, temperature, branching, width, name, seed, cpu_kernels: as for ``SmallModelDrafter``.

    Raises:
        ValueError: for a model that reads no features, or as ``SmallModelDrafter``.
    """

    hidden = True

    def __init__(
        self,
        draft: Any,
        tree: Tree = "chain",
        temperature: float | None = None,
        branching: Sequence[int] = (3, 2, 1, 1),
        width: int = 4,
        name: str = "feature",
        seed: int = 0,
        cpu_kernels: bool = True,
    ) -> None:
        if not hasattr(draft, "fuse"):
            raise ValueError(f"this {type(draft).__name__} reads no features: give a draft of kind 'feature'")
        super().__init__(draft, tree, temperature, None, None, branching, width, name, seed, cpu_kernels)
        self._keeper: FeatureKeeper = FeatureKeeper(self.model, self._keeper.form)

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where the target's features are not known."""
        for context in contexts:
            self._keeper.learn(context)
        return super().draft(contexts, budgets)

    def _text(self, context: Context) -> Int[np.ndarray, " length"]:
        return context.tokens[self._keeper.known(context).start :]


@dataclass(slots=True, eq=False)
class Known:
    """The target's features before the tokens of a text, from the token at ``start`` on."""

    start: int
    features: list[Float[Tensor, " width"]]

    @property
    def end(self) -> int:
        """The token before which none is known."""
        return self.start + len(self.features)


@dataclass(slots=True, eq=False)
class FeatureText(Text):
    """What one row holds, and features: the target's before each token, the drafter's after each node of the tree."""

    features: Sequence[Float[Tensor, " width"]] = ()
    said: Float[Tensor, "nodes width"] | None = None


class FeatureKeeper(RowKeeper):
    """Finds the rows of contexts that draft together, and their features; contexts that join begin new rows for all.

    Rows are cheap to make again: of one layer, and of the target's own tokens only. So none outlives its text.
    """

    def learn(self, context: Context) -> None:
        """Take the features that the last verdict brought; what follows a gap begins anew."""
        verdict, known, length = context.verdict, self.known(context), len(context.tokens)
        if known.end == length:
            return
        if verdict is None or verdict.hidden is None:
            context.scratch[self, "features"] = Known(length, [])
            return
        new = verdict.hidden[torch.from_numpy(verdict.path).to(verdict.hidden.device)]
        if known.end != length - len(new):
            known = context.scratch[self, "features"] = Known(length - len(new), [])
        known.features.extend(new)

    def known(self, context: Context) -> Known:
        """The features of a context that are known."""
        known: Known = context.scratch.get((self, "features")) or Known(0, [])
        return known

    def gather(self, contexts: Sequence[Context], texts: Mapping[int, Tokens]) -> Rows:
        """The rows of just these contexts, in some order."""
        held = [self.text(context) for context in contexts]
        first = held[0]
        if first is not None and first.rows is not None and all(text and text.rows is first.rows for text in held):
            rows = first.rows
            for left in [text for text in rows.texts if text not in held]:
                rows.leave(left)
        else:
            rows = FeatureRows(self.model, self.form, len(contexts))
            for context, text in zip(contexts, rows.texts, strict=True):
                context.scratch[self] = text
        for context in contexts:
            context.scratch[self].features = self.known(context).features
        return rows

    def end(self, context: Context, tokens: Callable[[Context], Tokens]) -> None:
        """Let a context's row go."""
        text = context.scratch.pop(self, None)
        if text is not None and text.rows is not None and len(text.rows.texts) > 1:
            text.rows.leave(text)


class FeatureRows(Rows):
    """Texts that a draft reads together, of each token the target's feature before it too."""

    def __init__(self, module: Any, form: Form, n: int = 1) -> None:
        super().__init__(module, form, n)
        self.texts: list[Any] = [FeatureText(self) for _ in range(n)]
        self._levels: Sequence[Level | None] = ()

    def settle(self, texts: Sequence[Int[np.ndarray, " length"]]) -> None:
        """Forget what these texts do not begin with, and all guesses: their rows were made of guessed features."""
        for text in self.texts:
            text.tree = NO_TREE
        super().settle(texts)

    def grow(self, levels: Sequence[Level | None]) -> list[Float[Tensor, "level vocab"]]:
        """Feed the newest nodes of each row's tree; returns what follows them."""
        self._levels = levels
        try:
            return super().grow(levels)
        finally:
            self._levels = ()

    @torch.no_grad()
    def _pass(self, new: Sequence[Nodes], last: int, hidden: bool = False) -> Pass:
        levels = self._levels or [None] * len(new)
        width = max(len(nodes.tokens) for nodes in new)
        read = torch.zeros(len(new), width, self.config.hidden_size, dtype=self.module.dtype, device=self.module.device)
        for row, (text, nodes, level) in enumerate(zip(self.texts, new, levels, strict=True)):
            if level is not None and text.said is not None:
                read[row, : len(nodes.tokens)] = text.said[level.parents[level.start :]]
            elif len(nodes.tokens):
                read[row, : len(nodes.tokens)] = torch.stack([text.features[place] for place in nodes.positions])
        with _fused(self.module, read):
            after = super()._pass(new, last, hidden=True)
        assert after.hidden is not None, "asked for"
        for row, (text, nodes, level) in enumerate(zip(self.texts, new, levels, strict=True)):
            n = len(nodes.tokens)
            if level is not None and text.said is not None:
                text.said = torch.cat([text.said, after.hidden[row, :n]])
            elif n:
                text.said = after.hidden[row, n - 1 - width][None]
        return after


@contextmanager
def _fused(draft: Any, features: Float[Tensor, "rows nodes width"]) -> Iterator[None]:
    """Have the draft read these features beside its tokens. Threads take turns."""

    def fuse(_: Any, tokens: Any, embedded: Tensor) -> Tensor:
        fused: Tensor = draft.fuse(embedded, features)
        return fused

    with TURN:
        hook = draft.get_input_embeddings().register_forward_hook(fuse)
        try:
            yield
        finally:
            hook.remove()
