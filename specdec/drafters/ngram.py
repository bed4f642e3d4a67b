"""Prompt lookup done right: copy what followed the longest recent match."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakSet

import numpy as np
from jaxtyping import Float, Int

from specdec.calibration import Acceptance
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import ngram_numba as kernels
from specdec.drafters.likeliest_numba import NO_GUESS


class NgramDrafter:
    """Guesses that a text goes on as it went on before, after the longest and most recent match of its last tokens.

    Prompt and output are indexed as they are committed, once per token, so a call costs the same in a long text as in
    a short one. The continuations of several occurrences are merged into one tree, better matches first; how likely
    each token is, given the length of the match and how many occurrences agree, is learnt on line.

    It needs nothing of the target and its guesses are chosen, not sampled. Memory is linear in the text (48 to 96 bytes
    per token at ``max_match=4``) and goes with its context.

    Based on Saxena, "Prompt Lookup Decoding" (2023), and Yang et al., "LLMA" (arXiv 2304.04487).

    Args:
        max_match: longest n-gram that is looked up. Longer matches are still told apart among its recent occurrences.
        min_match: shortest match that is believed.
        branches: earlier occurrences copied at most; 1 drafts a chain.

    Raises:
        ValueError: unless 1 <= min_match <= max_match and branches >= 1.
    """

    name = "ngram"
    topk = 0
    hidden = False
    ahead = True

    def __init__(self, max_match: int = 4, min_match: int = 1, branches: int = 8):
        if not 1 <= min_match <= max_match:
            raise ValueError(f"need 1 <= min_match <= max_match, got min_match={min_match}, max_match={max_match}")
        if branches < 1:
            raise ValueError(f"branches must be at least 1, got {branches}")
        self.max_match, self.min_match, self.branches = max_match, min_match, branches
        self._acceptance = Acceptance(prior(), weight=4.0)
        self._texts: WeakSet[Text] = WeakSet()
        self._lock = threading.Lock()

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where nothing matches."""
        return [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    @property
    def bytes_used(self) -> int:
        """Bytes held for all living contexts and for what was learnt."""
        with self._lock:
            return self._acceptance.bytes_used + sum(text.bytes_used for text in self._texts)

    @property
    def max_bytes(self) -> int:
        """Bytes held at most between texts: what was learnt, which does not grow."""
        return self._acceptance.bytes_used

    def _draft(self, context: Context, budget: Budget) -> DraftTree:
        tokens, text = context.tokens, self._text(context)
        if context.finished:
            text.learn(tokens, self._acceptance)
            del context.scratch[self]
            return DraftTree.root(int(tokens[-1]))
        tree = text.advance(tokens, self._acceptance, self.min_match, self.branches, budget)
        return DraftTree(*tree, (self.name,) * len(tree[0])) if tree else DraftTree.root(int(tokens[-1]))

    def _text(self, context: Context) -> Text:
        text: Text | None = context.scratch.get(self)
        if text is None:
            text = context.scratch[self] = Text(self.max_match)
            with self._lock:
                self._texts.add(text)
        return text


class Text:
    """One sequence's n-grams, and what was guessed last after how many of its tokens."""

    def __init__(self, max_match: int):
        self._table = np.full((max_match, 128), kernels.EMPTY, np.int32)
        self._previous = np.empty((max_match, 64), np.int32)
        self._indexed = 0
        self._guessed_at = 0
        self._guess = NO_GUESS

    def learn(self, tokens: Int[np.ndarray, " length"], acceptance: Acceptance) -> None:
        """Count what became of the last guess."""
        acceptance.learn(*self._guess, tokens[self._guessed_at :])

    def advance(
        self, tokens: Int[np.ndarray, " length"], acceptance: Acceptance, min_match: int, branches: int, budget: Budget
    ) -> kernels.Arrays | None:
        """``learn``, once, index what was committed since, and guess what follows; None if that is nothing.

        The last token is not indexed: what follows it is not known yet.
        """
        stop = len(tokens) - 1
        if stop > self._previous.shape[1]:
            self._grow(tokens, 1 << (stop - 1).bit_length())
        self._guess, tree = kernels.advance(
            tokens,
            self._indexed,
            self._table,
            self._previous,
            self._guess,
            self._guessed_at,
            acceptance.accepted,
            acceptance.offered,
            min_match,
            branches,
            (budget.nodes, budget.depth, budget.width, float(budget.least)),
        )
        self._indexed, self._guessed_at = stop, len(tokens)
        return tree if len(self._guess[0]) > 1 else None

    @property
    def bytes_used(self) -> int:
        return self._table.nbytes + self._previous.nbytes

    def _grow(self, tokens: np.ndarray, positions: int) -> None:
        rows = len(self._table)
        table = np.full((rows, 2 * positions), kernels.EMPTY, np.int32)
        kernels.rehash(tokens, self._table, table)
        previous = np.empty((rows, positions), np.int32)
        previous[:, : self._indexed] = self._previous[:, : self._indexed]
        self._table, self._previous = table, previous


def prior() -> Float[np.ndarray, " kinds"]:
    """How likely a copied token of each kind, as the kernels number them, is before anything is learnt.

    An escape rule in the manner of PPM, votes / (votes + against + escape), where each doubling of the match divides
    the escape by 2.5, and a token that a better occurrence contradicts counts half. Fitted by eye to agent traces.
    """
    match, votes, against, older = np.indices((8, 4, 4, 2)).reshape(4, -1)
    typical = np.array([0.0, 1.0, 2.5, 5.0])
    escape = 2.3 / 2.5 ** (match - 1)
    share: np.ndarray = typical[votes] / (typical[votes] + typical[against] + escape)
    return share * np.where(older, 0.5, 1.0)
