"""Drafting while the device is at work: a drafter is asked during a pass for what the step after it may need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree
from specdec.statistics import Stats

FORESEEN = 0.3  # path probability from which on what came is no news
ENOUGH = 0.8  # of the tokens that the whole tree promised


class Ahead:
    """Hands out what is left of the last tree where the text went the way it foresaw, and drafts during the pass.

    What was committed goes down a path of the last tree. If that was likely, what the tree guesses below it is about
    what its drafter would guess now: it is handed out at no cost, and the drafter is asked ``meanwhile``, for more than
    a step may verify, so that the next step finds enough below its own path. Where something unforeseen came, or too
    little is left, it is asked at once. So it is asked at most once a step and learns what it would learn without this;
    only its trees are sometimes a step old. Where nothing is wanted, it catches up during the pass as well.

    Args:
        drafter: guesses as ``useful`` says; returns sound trees within their budgets.
        stats: where drafts ahead are counted.
    """

    def __init__(self, drafter: Drafter, stats: Stats) -> None:
        self.drafter, self.stats = drafter, stats
        self.name, self.topk, self.hidden = drafter.name, drafter.topk, drafter.hidden
        self._due: tuple[Sequence[Context], Sequence[Budget]] | None = None
        self._ahead = False  # whether the last trees were drafted during a pass

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget: what is left of the last ones if that will do for all, or new."""
        self._due = None
        pairs = list(zip(contexts, budgets, strict=True))
        known = [tree for pair in pairs if (tree := self._left(*pair)) is not None]
        if len(known) < len(pairs):
            return self._ask(contexts, budgets)
        ready = [_within(tree, budget) for tree, budget in zip(known, budgets, strict=True)]
        if not all(self._enough(tree, *pair) for tree, pair in zip(ready, pairs, strict=True)):
            return self._ask(contexts, budgets, deeper=True)  # the text is easy to foresee
        self._due = contexts, budgets
        self.stats.ahead(used=self._ahead and _wanted(budgets))
        return ready

    def meanwhile(self) -> None:
        """Ask the drafter, if that is due; for when a pass is under way and nobody has begun to wait for it."""
        if self._due is not None:
            (contexts, budgets), self._due = self._due, None
            self._ask(contexts, budgets, deeper=True)
            self._ahead = True
            self.stats.ahead(drafted=_wanted(budgets))

    def _ask(self, contexts: Sequence[Context], budgets: Sequence[Budget], deeper: bool = False) -> list[DraftTree]:
        """New trees: what the budgets allow. The whole trees are kept in mind."""
        drafted = self.drafter.draft(contexts, [_deeper(budget) for budget in budgets] if deeper else budgets)
        within = [_within(tree, budget) if deeper else tree for tree, budget in zip(drafted, budgets, strict=True)]
        for context, tree, part in zip(contexts, drafted, within, strict=True):
            context.scratch[self] = Last(len(context.tokens), tree, _promise(part))
        self._ahead = False
        return within

    def _left(self, context: Context, budget: Budget) -> DraftTree | None:
        """What the last tree guesses from here on; None where the drafter must be asked for this context."""
        if context.finished:
            return None
        if budget.nodes <= 0:
            return DraftTree.root(int(context.tokens[-1]))
        last: Last | None = context.scratch.get(self)
        return None if last is None else left(last.tree, context.tokens[last.length :])

    def _enough(self, tree: DraftTree, context: Context, budget: Budget) -> bool:
        return budget.nodes <= 0 or (len(tree) > 1 and _promise(tree) >= ENOUGH * context.scratch[self].promised)


@dataclass(frozen=True, slots=True)
class Last:
    """A context's last tree.

    Attributes:
        length: tokens of the text that it goes on from.
        tree: all of it.
        promised: tokens that a step was to commit by the part of it that was within the budget.
    """

    length: int
    tree: DraftTree
    promised: float


def useful(drafter: object, device: torch.device) -> bool:
    """Whether to draft ahead for a target on a device: passes leave the host free, and the drafter needs no more.

    It says so by a true ``ahead``: it guesses from texts and verdicts alone, on the host, and draws no guess by chance.
    """
    return device.type != "cpu" and bool(getattr(drafter, "ahead", False))


def left(tree: DraftTree, committed: Int[np.ndarray, " length"]) -> DraftTree | None:
    """What a tree guesses behind the tokens ``committed`` since, its estimates given those; None if they are news.

    They are not if a path at least as likely as ``FORESEEN`` spells them; or all but the last, where the tree ends:
    then no guess is left. A sampled tree is not used again: who takes of it by what was drawn changes its law.
    """
    path = trees.follow(tree.tokens, tree.parents, committed)
    node = int(path[-1])
    if tree.law is not None or not 1 < len(path) >= len(committed) or tree.probability[node] < FORESEEN:
        return None
    if len(path) == len(committed):
        return None if node in tree.parents else DraftTree.root(int(committed[-1]))
    kept = trees.below(tree.parents, node)
    parents, given = tree.parents.copy(), np.minimum(1, tree.probability / tree.probability[node])
    parents[node] = -1
    source = ("", *(tree.source[each] for each in kept[1:].tolist()))
    return DraftTree(*trees.select(tree.tokens, parents, given, kept), source)


def _within(tree: DraftTree, budget: Budget) -> DraftTree:
    if tree.law is not None:
        return DraftTree.root(int(tree.tokens[0]))
    sizes = budget.nodes, budget.depth, budget.width, budget.least
    return tree.take(trees.prune(tree.parents, tree.probability, *sizes))


def _deeper(budget: Budget) -> Budget:
    """What a step may verify, the token after it, and as much again, where nodes are likelier than from here."""
    if budget.nodes <= 0:
        return budget
    return Budget(2 * budget.nodes + 1, 2 * budget.depth + 1, budget.width, FORESEEN * budget.least)


def _promise(tree: DraftTree) -> float:
    return 1 + float(tree.probability[1:].sum())


def _wanted(budgets: Sequence[Budget]) -> bool:
    return any(budget.nodes > 0 for budget in budgets)
