"""A drafter that cannot do harm: whatever it raises or returns costs speed, never output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree, learns
from specdec.statistics import Stats

ANY_SIZE = (1 << 30,) * 3  # nodes, depth and width: a tree that is too large is cut, not refused


class GuardedDrafter:
    """Passes on the good trees of another drafter and replaces the rest by the empty guess, counting why.

    Args:
        drafter: the drafter to guard.
        stats: where faults are counted.
        vocab: number of token ids the target knows.
        chains: whether trees must be cut to one path.
    """

    def __init__(self, drafter: Drafter, stats: Stats, vocab: int, chains: bool = False) -> None:
        self.drafter, self.stats, self.vocab, self.chains = drafter, stats, vocab, chains
        self.name = getattr(drafter, "name", type(drafter).__name__)
        self.topk = max(0, min(int(getattr(drafter, "topk", 0)), vocab))
        self.hidden = bool(getattr(drafter, "hidden", False))

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One sound tree per context, within its budget; where none is wanted, who can catch up later is not called."""
        due = any(budget.nodes > 0 for budget in budgets) or any(context.finished for context in contexts)
        if not (due or learns(self)):
            return self._roots(contexts)
        try:
            with self.stats.clock("draft"):
                drafted = self.drafter.draft(contexts, budgets)
        except Exception as error:  # a third party's code may raise anything; it is counted and said
            self.stats.fault(self.name, f"raised {type(error).__name__}: {error}")
            return self._roots(contexts)
        if hasattr(self.drafter, "take_faults"):  # a drafter made of others, some of which may have failed
            for name, text in self.drafter.take_faults():
                self.stats.fault(name, text)
        if not isinstance(drafted, (list, tuple)) or len(drafted) != len(contexts):
            self.stats.fault(self.name, f"returned {type(drafted).__name__} instead of {len(contexts)} trees")
            return self._roots(contexts)
        lasts = [int(context.tokens[-1]) for context in contexts]
        return [self._sound(*triple) for triple in zip(drafted, lasts, budgets, strict=True)]

    def _roots(self, contexts: Sequence[Context]) -> list[DraftTree]:
        return [DraftTree.root(int(context.tokens[-1])) for context in contexts]

    def _sound(self, tree: DraftTree, last: int, budget: Budget) -> DraftTree:
        if not isinstance(tree, DraftTree):
            self.stats.fault(self.name, f"returned a {type(tree).__name__} where a DraftTree was due")
            return DraftTree.root(last)
        size = budget.nodes, budget.depth, 1 if self.chains else budget.width
        unfit = self._fault(tree, last, size)  # mostly None, and then one look was enough
        if fault := (unfit and self._fault(tree, last, ANY_SIZE)) or _unlabelled(tree):
            self.stats.fault(self.name, fault)
            return DraftTree.root(last)
        return self._cut(tree, size, budget) if unfit else tree

    def _fault(self, tree: DraftTree, last: int, size: tuple[int, int, int]) -> str | None:
        return trees.fault(
            tree.tokens, tree.parents, tree.probability, last, self.vocab, *size, twins=tree.law == "iid"
        )

    def _cut(self, tree: DraftTree, size: tuple[int, int, int], budget: Budget) -> DraftTree:
        # What is cut off a sampled tree must not depend on what was sampled: the last draws go.
        weight = tree.probability if tree.law is None else np.ones(len(tree), np.float32)
        kept = trees.prune(tree.parents, weight, *size, 0.0)
        if not self.chains:
            self.stats.fault(self.name, f"drafted {len(tree) - 1} nodes beyond its budget of {budget}")
        return tree.take(kept)


def _unlabelled(tree: DraftTree) -> str | None:
    """What is wrong with what a tree says of itself."""
    n = len(tree)
    if not isinstance(tree.source, tuple) or len(tree.source) != n or not all(isinstance(s, str) for s in tree.source):
        return f"gives {tree.source!r:.60} as source; a tuple of {n} names was due"
    if tree.law not in (None, "iid", "swor"):
        return f"gives {tree.law!r} as law; None, 'iid' or 'swor' was due"
    if tree.q is not None and (not isinstance(tree.q, torch.Tensor) or tree.q.shape[:1] != (n,)):
        return f"gives a {type(tree.q).__name__} as q; a tensor of {n} rows was due"
    return None
