"""Retrieval: a text goes on as a corpus went on after the same words."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from specdec import trees
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import retrieval_numba as kernels
from specdec.drafters import votes
from specdec.drafters.corpus import Corpus

Guess = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, parents and kinds


class RetrievalDrafter:
    """Looks up the longest end of the text that a corpus has, and guesses what followed it there.

    The continuations are counted in a trie, which is grown best first within the budget; how likely a token is, given
    the length of the match and how many of the occurrences agree, is learnt on line. Neither matches nor continuations
    cross from one document into the next.

    It needs nothing of the target and its guesses are chosen, not sampled. The corpus is only read, by any number of
    threads and processes; the same one serves all namespaces.

    He et al., "REST: Retrieval-Based Speculative Decoding" (arXiv 2311.08252).

    Args:
        index: an opened corpus, or the directory of one (see ``specdec.drafters.corpus.build``).
        max_match: longest match that is looked for, in tokens.
        min_match: shortest match that is believed.
        samples: occurrences looked at, at most; those of a more frequent match are sampled evenly.

    Attributes:
        corpus: the opened corpus.

    Raises:
        ValueError: unless 1 <= min_match <= max_match and samples >= 1; or the index is damaged.
        FileNotFoundError: there is no index.
    """

    name = "retrieval"
    topk = 0
    hidden = False
    ahead = True

    def __init__(
        self, index: Corpus | str | os.PathLike[str], max_match: int = 16, min_match: int = 1, samples: int = 256
    ):
        if not 1 <= min_match <= max_match:
            raise ValueError(f"need 1 <= min_match <= max_match, got min_match={min_match}, max_match={max_match}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.corpus = index if isinstance(index, Corpus) else Corpus.open(index)
        self.max_match, self.min_match, self.samples = max_match, min_match, samples
        self.reset()

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where nothing matches."""
        return [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write how far matches can be trusted to a file, which changes at once or, on OSError, not at all."""
        self._acceptance.save(path, self.name)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace that by what ``save`` wrote; on FileNotFoundError or ValueError (see ``Acceptance``) it stays."""
        self._acceptance.load(path, self.name)

    def reset(self, namespace: str | None = None) -> None:
        """Forget how far matches can be trusted; of one namespace alone nothing is kept."""
        if namespace is None:
            self._acceptance = Acceptance(votes.prior(), weight=4.0)

    @property
    def bytes_used(self) -> int:
        """Bytes held beside the corpus, which is mapped and not held."""
        return self._acceptance.bytes_used

    @property
    def max_bytes(self) -> int:
        """Bytes held at most: what it learns does not grow."""
        return self.bytes_used

    def _draft(self, context: Context, budget: Budget) -> DraftTree:
        tokens, acceptance = context.tokens, self._acceptance
        last: tuple[int, Guess] | None = context.scratch.pop(self, None)
        if last:
            acceptance.learn(*last[1], tokens[last[0] :])
        root, limits = int(tokens[-1]), (budget.nodes, budget.depth, budget.width)
        if context.finished or min(limits) <= 0:
            return DraftTree.root(root)
        store = self.corpus.tokens, self.corpus.suffixes
        found = kernels.find_longest(*store, tokens[-self.max_match :], self.min_match, self.max_match)
        if not found[2]:
            return DraftTree.root(root)
        counts = acceptance.accepted, acceptance.offered
        guesses, parents, probability, kinds = kernels.grow_continuations(
            *store, found, self.samples, *counts, root, limits
        )
        context.scratch[self] = len(tokens), (guesses, parents, kinds)
        kept = trees.prune(parents, probability, *limits, budget.least)
        return DraftTree(*trees.select(guesses, parents, probability, kept), (self.name,) * len(kept))
