"""Which row of a drafting model holds which context's text, as texts come, go, and begin alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from specdec.core import Context
from specdec.drafters.acceptance_head import AcceptanceHead
from specdec.drafters.model_rows import Rows, Text
from specdec.model import Form

IDLE = 4  # texts whose rows are kept after their end

Tokens = Int[np.ndarray, " length"]


class RowKeeper:
    """Brings the rows of contexts that draft together into one batch, and keeps those of the last texts that ended.

    A context's row is found through its scratch. Threads may share one keeper, each with contexts of its own.

    Args:
        model: a transformers causal LM, in evaluation mode.
        form: what its self-test found; at level "tree".
        head: judges the nodes that rows are fed; None for nobody.
        window: newest tokens that a row holds; None for all. Then contexts are to be gathered one by one.
    """

    def __init__(self, model: Any, form: Form, head: AcceptanceHead | None = None, window: int | None = None) -> None:
        self.model, self.form, self.head, self.window = model, form, head, window
        self._idle: list[tuple[str, Rows]] = []
        self._lock = threading.Lock()

    def text(self, context: Context) -> Text | None:
        """What the context's row holds; None where it has none."""
        text: Text | None = context.scratch.get(self)
        return None if text is None or text.rows is None else text

    def gather(self, contexts: Sequence[Context], texts: Mapping[int, Tokens]) -> Rows:
        """The rows of just these contexts, in some order; ``texts`` has by its id what each is to read.

        New texts that join others are read, but for their last token.
        """
        held = [self.text(context) for context in contexts]
        rows = next((text.rows for text in held if text is not None), None)
        if rows is None:
            return self._begin(contexts, texts)
        for left in [text for text in rows.texts if text not in held]:
            rows.leave(left)
        for context, text in zip(contexts, held, strict=True):
            if text is None or text.rows is not rows:
                tokens = texts[id(context)]
                joining = self._fresh(context.namespace, tokens)
                joining.read([tokens[: max(1, len(tokens) - 1)]])  # only a row that has been read can join others
                context.scratch[self] = joining.texts[0]
                rows.join(joining)
        return rows

    def _begin(self, contexts: Sequence[Context], texts: Mapping[int, Tokens]) -> Rows:
        """A new batch."""
        alone = len(contexts) == 1
        rows = self._fresh(contexts[0].namespace, texts[id(contexts[0])]) if alone else self._empty(len(contexts))
        for context, text in zip(contexts, rows.texts, strict=True):
            context.scratch[self] = text
        return rows

    def _empty(self, n: int) -> Rows:
        return Rows(self.model, self.form, n, self.head, self.window)

    def _fresh(self, namespace: str, tokens: Tokens) -> Rows:
        """A new text's row: that of an ended one, if the text begins with half of what that holds, or an empty one."""
        with self._lock:
            for i, (owner, rows) in reversed(list(enumerate(self._idle))):
                (text,) = rows.texts
                if owner == namespace and 0 < len(text.tokens) <= 2 * text.common(tokens):
                    del self._idle[i]
                    return rows
        return self._empty(1)

    def end(self, context: Context, tokens: Callable[[Context], Tokens]) -> None:
        """Let a context's row go; one that stands alone is kept for the next text, and holds its ``tokens``."""
        text = self.text(context)
        context.scratch.pop(self, None)
        rows = None if text is None else text.rows
        if text is None or rows is None:
            return
        if len(rows.texts) > 1:
            rows.leave(text)
            return
        rows.settle([tokens(context)])
        with self._lock:
            self._idle = [*self._idle, (context.namespace, rows)][-IDLE:]

    def forget(self, contexts: Iterable[Context]) -> None:
        """Lose the rows of some contexts, which are read anew when they are needed."""
        for context in contexts:
            context.scratch.pop(self, None)

    def reset(self) -> None:
        """Lose the rows of texts that have ended."""
        with self._lock:
            self._idle = []
