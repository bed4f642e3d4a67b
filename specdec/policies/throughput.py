"""The tree size that gives the most tokens per second, from measured pass times and the drafter's own estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from specdec import trees as shapes
from specdec.core import Budget, Context, DraftTree

KEPT_FRESH = 0.1  # weight of the newest measurement in a running mean
FIRST_PROBE, LAST_PROBE = 64, 512  # steps without a guess before one is tried again


class ThroughputPolicy:
    """Verifies the ``n`` likeliest nodes for which (1 + sum of their path probabilities) / T(1 + n) is greatest.

    T, the time of a pass by nodes fed, starts from a first timing and is kept fresh from every step. The drafter's
    probabilities are scaled by how many of the nodes they promised were accepted. n = 0, a plain step, is a choice;
    a small tree is then tried now and then, ever more rarely while that does not pay.

    The rule is the one behind SpecDec++'s threshold (arXiv 2405.19715) and Sequoia's hardware-aware tree
    (arXiv 2402.12374), with estimates made on line.

    Args:
        seconds: time of a pass by number of nodes fed, root included; None for a flat guess until measured.
        nodes, depth, width: the largest tree to draft.
    """

    def __init__(
        self, seconds: Mapping[int, float] | None = None, nodes: int = 32, depth: int = 12, width: int = 4
    ) -> None:
        measured = dict(seconds or {1: 1.0, 1 + nodes: 1.5})
        fed = np.arange(1, nodes + 2)
        self.seconds = np.interp(fed, sorted(measured), [measured[n] for n in sorted(measured)])
        self.largest = Budget(nodes, depth, width)
        self.promised, self.accepted = 2.0, 2.0
        self.idle, self.patience = 0, FIRST_PROBE

    def budget(self, contexts: Sequence[Context]) -> list[Budget]:
        """The largest budget for each context, after learning from its last verdict."""
        for context in contexts:
            self._learn(context)
        return [self.largest] * len(contexts)

    def _learn(self, context: Context) -> None:
        verdict = context.verdict
        if verdict is None or verdict.prompt or context.scratch.get(self) == context.steps:
            return
        context.scratch[self] = context.steps
        self._learn_time(len(verdict.tree), verdict.seconds)
        promised, accepted = float(verdict.tree.probability[1:].sum()), len(verdict.path) - 1
        self.promised += KEPT_FRESH * (promised - self.promised) if promised else 0.0
        self.accepted += KEPT_FRESH * (accepted - self.accepted) if promised else 0.0

    def _learn_time(self, fed: int, seconds: float) -> None:
        """Move the whole curve towards what was seen, the more the nearer a size is to the one that was used."""
        if seconds <= 0 or fed > len(self.seconds):
            return
        ratio = float(np.clip(seconds / self.seconds[fed - 1], 0.5, 2.0))
        sizes = np.arange(1, len(self.seconds) + 1)
        likeness = np.minimum(sizes, fed) / np.maximum(sizes, fed)
        self.seconds *= ratio ** (KEPT_FRESH * (0.02 + 0.98 * likeness**4))

    def trim(self, contexts: Sequence[Context], trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Each tree's likeliest nodes, the same number for all rows of the batch."""
        n = self._best(trees)
        if n == 0 and any(len(tree) > 1 for tree in trees):
            n = self._probe()
        elif n:
            self.idle, self.patience = 0, FIRST_PROBE
        return [tree.take(self._likeliest(tree, n)) for tree in trees]

    @staticmethod
    def _likeliest(tree: DraftTree, n: int) -> np.ndarray:
        size = len(tree)
        return shapes.prune(tree.parents, tree.probability, n, size, size, 0.0)

    def _best(self, trees: Sequence[DraftTree]) -> int:
        trust = min(1.5, self.accepted / max(self.promised, 1e-3))
        tokens = np.full(min(len(self.seconds), max(map(len, trees))), float(len(trees)))
        for tree in trees:
            likeliest = np.sort(tree.probability[1:])[::-1][: len(tokens) - 1]
            gain = np.minimum(1.0, trust * likeliest).cumsum()
            tokens[1 : len(gain) + 1] += gain
            tokens[len(gain) + 1 :] += gain[-1] if len(gain) else 0.0
        return int((tokens / self.seconds[: len(tokens)]).argmax())

    def _probe(self) -> int:
        self.idle += 1
        if self.idle < self.patience:
            return 0
        self.idle, self.patience = 0, min(2 * self.patience, LAST_PROBE)
        return 4
