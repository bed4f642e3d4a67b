"""A drafter that cannot do harm: whatever it raises or returns costs speed, never output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree, learns
from specdec.statistics import Stats

ANY_SIZE = 1 << 30  # a tree that is too large is cut, not refused


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
        roots = [DraftTree.root(int(context.tokens[-1])) for context in contexts]
        due = any(budget.nodes > 0 for budget in budgets) or any(context.finished for context in contexts)
        if not (due or learns(self)):
            return roots
        try:
            with self.stats.clock("draft"):
                drafted = self.drafter.draft(contexts, budgets)
        except Exception as error:  # a third party's code may raise anything; it is counted and said
            self.stats.fault(self.name, f"raised {type(error).__name__}: {error}")
            return roots
        if hasattr(self.drafter, "take_faults"):  # a drafter made of others, some of which may have failed
            for name, text in self.drafter.take_faults():
                self.stats.fault(name, text)
        if not isinstance(drafted, (list, tuple)) or len(drafted) != len(contexts):
            self.stats.fault(self.name, f"returned {type(drafted).__name__} instead of {len(contexts)} trees")
            return roots
        return [self._sound(*triple) for triple in zip(drafted, roots, budgets, strict=True)]

    def _sound(self, tree: DraftTree, root: DraftTree, budget: Budget) -> DraftTree:
        if not isinstance(tree, DraftTree):
            self.stats.fault(self.name, f"returned a {type(tree).__name__} where a DraftTree was due")
            return root
        last, size = int(root.tokens[0]), ANY_SIZE
        sizes, twins = (self.vocab, size, size, size), tree.law == "iid"
        fault = trees.fault(tree.tokens, tree.parents, tree.probability, last, *sizes, twins)
        if fault := fault or _unlabelled(tree):
            self.stats.fault(self.name, fault)
            return root
        return self._within(tree, budget)

    def _within(self, tree: DraftTree, budget: Budget) -> DraftTree:
        if len(tree) == 1:
            return tree
        width = 1 if self.chains else budget.width
        # What is cut off a sampled tree must not depend on what was sampled: the last draws go.
        weight = tree.probability if tree.law is None else np.ones(len(tree), np.float32)
        kept = trees.prune(tree.parents, weight, budget.nodes, budget.depth, width, 0.0)
        if len(kept) == len(tree):
            return tree
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
