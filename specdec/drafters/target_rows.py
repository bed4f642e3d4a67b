"""The target's own KV rows as those of a drafter of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.cache import SlotCache
from specdec.core import Context
from specdec.drafters.model_rows import NO_TREE, Rows, Text
from specdec.drafters.row_keeper import RowKeeper, Tokens
from specdec.masks import Reach
from specdec.model import Form, Model, reaches


class TargetRows(Rows):
    """Rows in the slots of some of the target's layers: what has been committed is there, and never fed.

    A draft's nodes are written behind it, where the target's next pass writes its own; ``release`` forgets them.

    Args:
        module: of those layers.
        form: what its self-test found; at level "tree".
        target: between two of its passes.
        layers: their numbers in the target.
    """

    def __init__(self, module: Any, form: Form, target: Model, layers: Sequence[int]) -> None:
        super().__init__(module, form, len(target.lengths))
        self.target = target
        self.cache = SlotCache(layers=[target.cache.layers[layer] for layer in layers])

    def settle(self, texts: Sequence[Tokens]) -> None:
        """Hold these texts but for their last tokens, as the target does."""
        self.target.settle()
        assert self.target.lengths == [len(tokens) - 1 for tokens in texts], "the target holds all but the last token"
        for row, tokens in zip(self.texts, texts, strict=True):
            row.tokens, row.tree, row.chance = tokens[:-1], NO_TREE, 1.0

    def release(self) -> None:
        """Leave the slots as the target left them."""
        self.cache.keep(self.target.lengths, [()] * len(self.texts))


class TargetKeeper(RowKeeper):
    """The rows of one generation's contexts, all of them at once, those that have ended too.

    Args:
        contexts: one for each of the rows.
    """

    def __init__(self, rows: TargetRows, contexts: Sequence[Context]) -> None:
        super().__init__(rows.module, rows.form)
        self.rows, self.contexts = rows, contexts
        self._texts = {id(context): text for context, text in zip(contexts, rows.texts, strict=True)}

    @property
    def current(self) -> bool:
        """Whether the target's rows hold what has been committed."""
        return self.rows.target.lengths == [len(context.tokens) - 1 for context in self.contexts]

    def text(self, context: Context) -> Text:
        """What the context's row holds."""
        return self._texts[id(context)]

    def gather(self, contexts: Sequence[Context], texts: Mapping[int, Tokens]) -> TargetRows:
        """All rows."""
        return self.rows


def unfit(target: Model) -> str:
    """Why a target's rows cannot serve a drafter; empty if they can."""
    known = reaches(target.config)
    if target.form.level != "tree" or not isinstance(target.cache, SlotCache):
        return "the target's rows hold no trees"
    if known is None or set(known.values()) != {Reach()} or len(target.cache.slots) != len(target.cache.layers):
        return "the target has layers that do not look back without limit"
    if target.visible is not None and not bool(target.visible.all()):
        return "the target's rows begin with padding"
    return ""
