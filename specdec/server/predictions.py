"""Predicted outputs for some of the requests of a pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from specdec.adapters import INSIDE
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import PredictedOutput

Key = tuple[str, bytes]


class Predictions:
    """Guesses what each prompt's own prediction says, if it has one; a drafter for all requests together.

    A prediction is known by its prompt and namespace, so it is never guessed from for anybody else. Of two at once for
    the same prompt in the same namespace, the later serves.
    """

    name = "predicted"
    topk = 0
    hidden = False

    def __init__(self) -> None:
        self._expected: dict[Key, PredictedOutput] = {}

    @contextmanager
    def expecting(self, namespace: str, prompt: Sequence[int], prediction: Sequence[int] | None) -> Iterator[None]:
        """Inside, answers to this prompt are expected to resemble the prediction; None expects nothing."""
        key = namespace, np.array(prompt, np.int64).tobytes()
        mine = None if prediction is None else PredictedOutput(prediction)
        if mine is not None:
            self._expected[key] = mine
        try:
            yield
        finally:
            if mine is not None and self._expected.get(key) is mine:
                del self._expected[key]

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone for those without a prediction."""
        return [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def _draft(self, context: Context, budget: Budget) -> DraftTree:
        if self not in context.scratch:
            context.scratch[self] = self._expected.get(_key(context))
        prediction: PredictedOutput | None = context.scratch[self]
        if prediction is None:
            return DraftTree.root(int(context.tokens[-1]))
        return prediction.draft([context], [budget])[0]


def _key(context: Context) -> Key:
    prompt = context.tokens[: context.prompt_length]
    return context.namespace.partition(INSIDE)[0], prompt.tobytes()
