"""Guesses that go on until a rejection is likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from specdec import trees as shapes
from specdec.core import Budget, Context, DraftTree


class ThresholdPolicy:
    """Guesses on after a node while the chance that something on its path is rejected is at most ``threshold``.

    That chance is 1 minus the path's probability, as the drafter estimates it: from its own law, or by a trained
    acceptance head. With true chances the best threshold is ``(target + d) / (guess + target + d)``: the time of a pass
    of the target, of one guess, and whatever else a rejection costs. Whether a node is guessed hangs on those before it
    and never on itself, so a sampled tree stays one that rejection sampling can judge.

    SpecDec++, Huang et al. 2024, arXiv 2405.19715.

    Args:
        threshold: from 0 to 1; 0 guesses ``shortest``, 1 guesses ``longest``.
        shortest: guesses made whatever their chance. With 0, drafters are told to stop by themselves, which saves the
            time of drafting; else they draft to the end, and only verifying is saved.
        longest: guesses on one path at most.
        width, nodes: children of one node, and nodes, at most.
        lag: further guesses after the one at which to stop: 1 for a drafter with an acceptance head, which judges a
            guess once it has been read, when the next has come with the same pass; as in the authors' code.

    Raises:
        ValueError: a threshold or bounds out of order.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        shortest: int = 0,
        longest: int = 20,
        width: int = 1,
        nodes: int = 64,
        lag: int = 0,
    ) -> None:
        if not (0 <= threshold <= 1 and 0 <= shortest <= longest and min(longest, width, nodes) >= 1 and lag >= 0):
            raise ValueError(
                f"ThresholdPolicy(threshold={threshold}, shortest={shortest}, longest={longest}, width={width}, "
                f"nodes={nodes}, lag={lag}): give a threshold from 0 to 1, shortest <= longest, and at least one node"
            )
        self.threshold, self.shortest, self.lag = threshold, shortest, lag
        least = 0.0 if shortest or lag > 1 else 1 - threshold
        self.largest = Budget(nodes, longest, width, least)

    def budget(self, contexts: Sequence[Context]) -> list[Budget]:
        """The largest tree that the bounds allow, for each context."""
        return [self.largest] * len(contexts)

    def trim(self, contexts: Sequence[Context], trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Each tree down to where a rejection is likely."""
        return [self._trimmed(tree) for tree in trees]

    def _trimmed(self, tree: DraftTree) -> DraftTree:
        kept = self._kept(tree)
        # What is left was still drawn by the same law, as no node was left out for what it is itself.
        return replace(tree.take(kept), q=None if tree.q is None else tree.q[kept], law=tree.law)

    def _kept(self, tree: DraftTree) -> Int[np.ndarray, " kept"]:
        depths, kept = shapes.depths(tree.parents), np.ones(len(tree), np.bool_)
        for node in range(1, len(tree)):
            parent = int(tree.parents[node])
            judged = parent
            for _ in range(self.lag):
                judged = max(0, int(tree.parents[judged]))
            likely = 1 - float(tree.probability[judged]) <= self.threshold
            kept[node] = kept[parent] and (likely or depths[node] <= self.shortest)
        kept &= depths <= self.largest.depth
        return np.flatnonzero(kept)
