"""Predicted output: the caller says what the answer will resemble."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from specdec import trees
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import predicted_numba as kernels


class Course(NamedTuple):
    """How far a context follows the prediction.

    Attributes:
        cursor: position in the prediction of the token that should come next, or did not.
        gap: tokens committed since the texts parted at the cursor, 0 while they agree.
        read: tokens of the context looked at so far.
        guess: tokens, parents and kinds of the last tree, until it is learnt from.
    """

    cursor: int = 0
    gap: int = 0
    read: int = 0
    guess: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class PredictedOutput:
    """Copies from a text that the answer is expected to resemble: a file to be edited, an earlier draft.

    Each context has a cursor in the prediction. Where the answer departs from it, the drafter guesses that some tokens
    were replaced, inserted or left out, and takes up the prediction again where the last tokens occur in it, after the
    cursor rather than before; of the likeliest places several are offered as branches. Nothing is guessed while too
    little agrees. How likely each guess is, given how the place was found and how many tokens agree, is learnt on line.

    It needs nothing of the target and its guesses are chosen, not sampled. The prediction serves every context that is
    drafted for: use one drafter per request.

    Args:
        prediction: a text, or its token ids.
        tokenizer: turns a text into tokens: anything with ``encode(text, add_special_tokens=False)``.
        branches: places copied from at most; 1 drafts a chain.

    Raises:
        ValueError: a text without a tokenizer, ids that are no row of non-negative integers, or branches below 1.
    """

    name = "predicted"
    topk = 0
    hidden = False
    ahead = True

    def __init__(
        self, prediction: str | Sequence[int] | Int[np.ndarray, " length"], tokenizer: Any = None, branches: int = 2
    ):
        if branches < 1:
            raise ValueError(f"branches must be at least 1, got {branches}")
        if isinstance(prediction, str):
            if tokenizer is None:
                raise ValueError("a prediction that is text needs a tokenizer: PredictedOutput(text, tokenizer)")
            prediction = tokenizer.encode(prediction, add_special_tokens=False)
        self.branches, self._prediction = branches, np.array(prediction, np.int64)
        if self._prediction.ndim != 1 or np.any(self._prediction < 0):
            raise ValueError(f"a prediction is a row of token ids, got {prediction!r}")
        self.reset()

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where the prediction is lost or at its end."""
        return [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write how far predictions can be trusted to a file, which changes at once or, on OSError, not at all."""
        self._acceptance.save(path, self.name)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace that by what ``save`` wrote; on FileNotFoundError or ValueError (see ``Acceptance``) it stays."""
        self._acceptance.load(path, self.name)

    def reset(self, namespace: str | None = None) -> None:
        """Forget how far the prediction can be trusted; of one namespace alone nothing is kept."""
        if namespace is None:
            self._acceptance = Acceptance(prior(), weight=4.0)

    @property
    def bytes_used(self) -> int:
        """Bytes held for the prediction and for what was learnt."""
        return self._prediction.nbytes + self._acceptance.bytes_used

    @property
    def max_bytes(self) -> int:
        """Bytes held at most: neither the prediction nor what it learns grows."""
        return self.bytes_used

    def _draft(self, context: Context, budget: Budget) -> DraftTree:
        tokens, root = context.tokens, int(context.tokens[-1])
        course = self._catch_up(context)
        if context.finished:
            return DraftTree.root(root)
        rate = self._acceptance.accepted / self._acceptance.offered
        position, match, place = kernels.find_places(
            self._prediction, tokens, course.cursor, course.gap, self.branches, rate
        )
        if len(position) and match[0] >= kernels.RESUME:
            course = course._replace(cursor=int(position[0]), gap=0)
        depth = min(budget.depth, budget.nodes)
        if len(position) == 0 or min(depth, budget.width) <= 0:
            context.scratch[self] = course
            return DraftTree.root(root)
        guesses, parents, kinds = kernels.copy_places(self._prediction, root, position, match, place, depth)
        context.scratch[self] = course._replace(guess=(guesses, parents, kinds))
        probability = self._acceptance.paths(parents, kinds)
        kept = trees.prune(parents, probability, budget.nodes, budget.depth, budget.width, budget.least)
        return DraftTree(*trees.select(guesses, parents, probability, kept), (self.name,) * len(kept))

    def _catch_up(self, context: Context) -> Course:
        """Learn from what was committed since the last call, and follow it."""
        tokens = context.tokens
        course: Course = context.scratch.pop(self, Course(read=context.prompt_length))
        if course.guess:
            self._acceptance.learn(*course.guess, tokens[course.read :])
        cursor, gap = kernels.advance(self._prediction, tokens[course.read :], course.cursor, course.gap)
        return Course(cursor, gap, len(tokens))


def prior() -> Float[np.ndarray, " kinds"]:
    """How likely each kind is before anything is learnt, rounded from edits of code.

    Each doubling of the match halves the chance of a wrong place; a guess that a better one contradicts is worth a
    third.
    """
    bits, place, disputed = np.indices((kernels.MATCHES, kernels.PLACES, 2)).reshape(3, -1)
    wrong = np.array([0.1, 1.4, 2.0, 0.85, 0.9])[place] * 0.5**bits
    likely: np.ndarray = np.maximum(0.97 * (1 - wrong), 0.02)
    likely[disputed == 1] /= 3
    return likely
