"""Several drafters as one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specdec import trees
from specdec.allowance import Allowance, Typical
from specdec.calibration import KINDS, Acceptance, believed
from specdec.core import Budget, Context, Drafter, DraftTree, learns
from specdec.drafters import merged_file
from specdec.drafters import merged_numba as kernels

FAULTS_KEPT = 32
USUAL = 3e-4  # seconds of a part's call, until some have been timed
PACE = 0.02  # seconds per token, until some have been timed
QUICKEST = 1e-3  # seconds per token below which there is no model at work, but a replay of recorded text
NOTHING = Budget(0, 0, 0)
_ANY_TOKEN = 2**63 - 1  # how many tokens there are is the target's business


class MergedDrafter:
    """The union of several drafters' trees, cut to one budget.

    Drafters estimate probabilities each in its own way. So that they compare, each one's are calibrated on line: once
    its parent was accepted, how often was a node accepted to which this drafter gave such odds, at such a depth? A path
    that several drafters guess takes the best of their estimates, and in ``source`` the first one's name. Then the
    union is calibrated once more, because what several agree on is likelier than the best of them says, and what they
    dispute is less likely.

    A part is asked as long as it pays: what it guesses rightly and no cheaper part does, at the time a token takes,
    against the time of its calls. Beyond an ``Allowance``, in tokens, it is only told to catch up, until that has grown
    enough for another try: a part that never pays costs 1.4 tokens at first and then 0.6% of the time.

    Guesses are made without sight of the target's choice, so the union's law is None even where a part sampled its
    own; ``q`` is dropped. A part that raises, or returns no sound tree, is left out of that call.

    Args:
        drafters: the parts. A ``MergedDrafter`` among them stands for its own parts.
        clock: seconds, as ``time.perf_counter``.

    Attributes:
        drafters: the parts.
        faults: what parts did wrong and nobody has taken note of yet, the last 32: pairs of a part's name and a text.

    Raises:
        ValueError: no drafters.
    """

    def __init__(self, drafters: Sequence[Drafter], clock: Callable[[], float] = time.perf_counter):
        parts = [part.drafters if isinstance(part, MergedDrafter) else (part,) for part in drafters]
        self.drafters: tuple[Drafter, ...] = sum(parts, ())
        if not self.drafters:
            raise ValueError("MergedDrafter needs at least one drafter, got none")
        self.name = "+".join(part.name for part in self.drafters)
        self.topk = max(part.topk for part in self.drafters)
        self.hidden = any(part.hidden for part in self.drafters)
        self.ahead = all(getattr(part, "ahead", False) for part in self.drafters)
        self.faults: list[tuple[str, str]] = []
        self.clock = clock
        self._parts = [Part(drafter) for drafter in self.drafters]
        self._acceptance = Acceptance(np.tile(believed(), len(self._parts) + 2), weight=8.0)
        self._pace = Typical(PACE)

    @property
    def bind(self) -> Callable[[Any, Sequence[Context]], str] | None:
        """Hands the target to the parts that work with it; None where none does."""
        return self._bind if any(getattr(part, "bind", None) for part in self.drafters) else None

    def _bind(self, target: Any, contexts: Sequence[Context]) -> str:
        binds = {part.name: getattr(part, "bind", None) for part in self.drafters}
        reasons = {name: bind(target, contexts) for name, bind in binds.items() if bind is not None}
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where no part had a guess."""
        self._settle(contexts)
        wanted = any(budget.nodes > 0 for budget in budgets)
        pace = self._pace.value
        asked = [part for part in self._parts if wanted and part.affordable(pace)]
        due = wanted or any(context.finished for context in contexts)
        drafted = [
            self._trees(part, contexts, budgets if part in asked else [NOTHING] * len(budgets))
            if due or learns(part.drafter)
            else [None] * len(contexts)
            for part in self._parts
        ]
        for context in contexts:
            if wanted:
                context.scratch[self] = Last(len(context.tokens), self.clock(), asked)
        return [self._union(*each) for each in zip(contexts, budgets, zip(*drafted, strict=True), strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what the parts have learnt, and how far to believe each, to one file.

        It changes at once or, on OSError, not at all.
        """
        merged_file.write(path, self.drafters, self._rates())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace what the parts have learnt by what ``save`` wrote; on an error nothing changes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of other drafters, or does not suit one of them.
        """
        rates = self._rates()
        merged_file.read(path, self.drafters, rates)
        self._acceptance.offered = np.concatenate([each.offered for each in rates])
        self._acceptance.accepted = np.concatenate([each.accepted for each in rates])

    def _rates(self) -> list[Acceptance]:
        """Copies of how far each of the parts is believed, and last their union."""
        rates = [Acceptance(believed(), weight=8.0) for _ in self._parts]
        rates.append(Acceptance(np.tile(believed(), 2), weight=8.0))
        counts, ends = self._acceptance.counts(), KINDS * np.arange(1, len(rates))
        for name, array in counts.items():
            for each, part in zip(rates, np.split(array, ends), strict=True):
                setattr(each, name, part)
        return rates

    def reset(self, namespace: str | None = None) -> None:
        """Have the parts forget one namespace, or everything."""
        parts: tuple[Any, ...] = self.drafters
        for part in parts:
            if namespace is None and hasattr(part, "reset"):
                part.reset()
            elif hasattr(part, "save"):  # what cannot be saved keeps nothing by namespace
                part.reset(namespace)

    @property
    def bytes_used(self) -> int:
        """Bytes held by all parts that say what they hold."""
        return sum(getattr(part, "bytes_used", 0) for part in self.drafters)

    @property
    def max_bytes(self) -> int | None:
        """Bytes held at most by all parts; None where one does not say. Each namespace may have as much again."""
        most = [getattr(part, "max_bytes", None) for part in self.drafters]
        known = [each for each in most if each is not None]
        return sum(known) if len(known) == len(most) else None

    def take_faults(self) -> list[tuple[str, str]]:
        """Hand over ``faults``, so that each is counted once."""
        faults, self.faults = self.faults, []
        return faults

    def _trees(self, part: Part, contexts: Sequence[Context], budgets: Sequence[Budget]) -> Sequence[DraftTree | None]:
        """One part's trees, or as many None."""
        start = self.clock()
        try:
            drafted = part.drafter.draft(contexts, budgets)
            _check(drafted, contexts)
        except Exception as error:  # a part may be anybody's code: its failure must not cost the others
            fault = part.drafter.name, f"{type(error).__name__}: {error}"
            self.faults = [*self.faults, fault][-FAULTS_KEPT:]
            return [None] * len(contexts)
        finally:
            if any(budget.nodes > 0 for budget in budgets):
                part.due = part.seconds.charge(self.clock() - start, self._pace.value)
        return drafted

    def _settle(self, contexts: Sequence[Context]) -> None:
        """See what became of the last trees, once: which kinds of guesses came true, and which parts have paid."""
        drafted = [(context, context.scratch.pop(self, None)) for context in contexts]
        last = [(each, context.tokens[each.length :]) for context, each in drafted if each is not None]
        tokens = sum(len(committed) for _, committed in last) / max(1, len(last))
        if not tokens:
            return
        first, _ = last[0]
        self._pace.see(max(QUICKEST, (self.clock() - first.time) / tokens))
        pace = self._pace.value
        won = [each.won(self._right(each, committed)) for each, committed in last]
        for part in self._parts:
            gain = sum(row.get(part, 0.0) for row in won) / len(last)
            part.settle(tokens, gain, pace, part in first.asked)

    def _right(self, last: Last, committed: np.ndarray) -> dict[Part, int]:
        """How many of the ``committed`` tokens each part guessed on one path; what came true is counted."""
        if last.guess is None:
            return {}
        accepted, offered = self._acceptance.accepted, self._acceptance.offered
        *right, _ = kernels.settle(last.guess, committed, accepted, offered).tolist()
        return dict(zip(self._parts, right, strict=True))

    def _union(self, context: Context, budget: Budget, drafted: Sequence[DraftTree | None]) -> DraftTree:
        if all(tree is None or len(tree) == 1 for tree in drafted):
            return DraftTree.root(int(context.tokens[-1]))
        guessed = [tree or DraftTree.root(int(context.tokens[-1])) for tree in drafted]
        guess, tokens, parents, probability, origin = kernels.unite(
            np.concatenate([*(tree.tokens for tree in guessed), *(tree.parents for tree in guessed)]),
            np.concatenate([tree.probability for tree in guessed]),
            self._acceptance.accepted,
            self._acceptance.offered,
            (budget.nodes, budget.depth, budget.width, float(budget.least)),
        )
        if self in context.scratch:
            context.scratch[self].guess = guess
        names = [drafter.name for drafter in self.drafters]
        return DraftTree(tokens, parents, probability, tuple([names[part] for part in origin.tolist()]))


class Part:
    """One drafter among others: how good its estimates are, what its calls take, and what it may still lose.

    Attributes:
        due: seconds that the last call is charged for.
    """

    due = 0.0

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.allowance = Allowance()
        self.seconds = Typical(USUAL)

    def affordable(self, pace: float) -> bool:
        """Whether it may be asked, where a token takes ``pace`` seconds."""
        return self.allowance.covers(self.seconds.due(pace) / pace)

    def settle(self, tokens: float, gain: float, pace: float, asked: bool) -> None:
        """Of so many ``tokens`` per row it alone has won ``gain``, for the time of a call if it was ``asked``.

        Its calls are counted in tokens at the pace that there would be without it.
        """
        alone = max(tokens - gain, 1e-9) / tokens / pace  # tokens per second
        self.allowance.settle(tokens, gain - self.due * alone if asked else 0.0)


class Last:
    """What one sequence's last trees were, and when and by whom, until it is known what became of them.

    Attributes:
        guess: the parts' trees and their union, as ``unite`` gives them; None where nobody had a guess.
    """

    guess: np.ndarray | None = None

    def __init__(self, length: int, time: float, asked: Sequence[Part]) -> None:
        self.length, self.time, self.asked = length, time, asked

    def won(self, right: dict[Part, int]) -> dict[Part, float]:
        """For each part, how many tokens it guessed that no cheaper part did, if so many were ``right`` of each."""
        won, most = dict[Part, float](), 0
        for part in sorted(self.asked, key=lambda part: part.seconds.value):
            own = right.get(part, 0)
            won[part], most = max(0, own - most), max(most, own)
        return won


def _check(drafted: Sequence[DraftTree], contexts: Sequence[Context]) -> None:
    if len(drafted) != len(contexts):
        raise ValueError(f"{len(drafted)} trees for {len(contexts)} contexts")
    for tree, context in zip(drafted, contexts, strict=True):
        n, last = len(tree), int(context.tokens[-1])
        fault = trees.fault(tree.tokens, tree.parents, tree.probability, last, _ANY_TOKEN, n, n, n)
        if fault:
            raise ValueError(fault)
