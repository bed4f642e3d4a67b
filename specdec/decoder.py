"""One generation: the parts, the contexts, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from specdec.core import Budget, Context, Drafter, DraftTree, Policy, Verdict, Verifier

NOTHING = Budget(0, 0, 0)


class Observer(Protocol):
    """What a decoder tells about its steps; ``Stats`` is one."""

    def observe(self, verdict: Verdict) -> None:
        """See one row's verdict."""
        ...


class Decoder:
    """Runs draft, verify and extend until every context is finished.

    Args:
        drafter, verifier, policy: the parts.
        observer: is shown every verdict.
        room: how many tokens may be guessed on one path of a context, so that no draft passes a hard limit.
    """

    def __init__(
        self,
        drafter: Drafter,
        verifier: Verifier,
        policy: Policy,
        observer: Observer,
        room: Callable[[Context], int],
    ) -> None:
        self.drafter, self.verifier, self.policy = drafter, verifier, policy
        self.observer, self.room = observer, room

    def run(self, contexts: Sequence[Context], finished: Callable[[], Sequence[bool]]) -> None:
        """Step until ``finished`` says so of every row; contexts are extended in place."""
        while not all(over := finished()):
            for context, done in zip(contexts, over, strict=True):
                context.finished = done
            self.step(contexts, [context for context, done in zip(contexts, over, strict=True) if not done])
        for context in contexts:
            context.finished = True
        self.drafter.draft(contexts, [NOTHING] * len(contexts))  # the last chance to learn from the end

    def step(self, contexts: Sequence[Context], live: Sequence[Context]) -> None:
        """Draft for the ``live`` ones among the contexts of a batch, verify, extend."""
        budgets = [
            self._fitted(context, budget) for context, budget in zip(live, self.policy.budget(live), strict=True)
        ]
        drafted = self.policy.trim(live, self.drafter.draft(live, budgets))
        trees = {id(context): tree for context, tree in zip(live, drafted, strict=True)}
        roots = [trees.get(id(context)) or DraftTree.root(int(context.tokens[-1])) for context in contexts]
        for context, verdict in zip(contexts, self.verifier.verify(contexts, roots), strict=True):
            context.extend(verdict)
            if id(context) in trees:
                self.observer.observe(verdict)

    def _fitted(self, context: Context, budget: Budget) -> Budget:
        if budget.nodes <= 0:
            return NOTHING
        depth = max(0, min(budget.depth, self.room(context)))
        if depth == budget.depth and depth and budget.width:
            return budget
        return Budget(budget.nodes if depth and budget.width else 0, depth, budget.width, budget.least)
