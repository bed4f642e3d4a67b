"""One generation: the parts, the contexts, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from specdec.core import Budget, Context, Drafter, DraftTree, Policy, Verdict, Verifier


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
        while not all(context.finished for context in contexts):
            self.step(contexts)
            for context, over in zip(contexts, finished(), strict=True):
                context.finished = over
        self.drafter.draft(contexts, [Budget(0, 0, 0)] * len(contexts))  # the last chance to learn from the end

    def step(self, contexts: Sequence[Context]) -> None:
        """Draft, verify, extend."""
        live = [context for context in contexts if not context.finished]
        budgets = [
            self._fitted(context, budget) for context, budget in zip(live, self.policy.budget(live), strict=True)
        ]
        drafted = iter(self.policy.trim(live, self.drafter.draft(live, budgets)))
        trees = [DraftTree.root(int(context.tokens[-1])) if context.finished else next(drafted) for context in contexts]
        verdicts = self.verifier.verify(contexts, trees)
        for context, verdict in zip(contexts, verdicts, strict=True):
            context.extend(verdict)
            if not context.finished:
                self.observer.observe(verdict)

    def _fitted(self, context: Context, budget: Budget) -> Budget:
        depth = max(0, min(budget.depth, self.room(context)))
        return Budget(budget.nodes if depth and budget.width else 0, depth, budget.width, budget.least)
