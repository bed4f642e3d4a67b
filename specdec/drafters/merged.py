"""Several drafters as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree
from specdec.drafters import merged_numba as kernels
from specdec.drafters.calibration import Acceptance

FAULTS_KEPT = 32
KINDS = (2 * kernels.ODDS + 1) * kernels.DEPTHS
_ANY_TOKEN = 2**63 - 1  # how many tokens there are is the target's business


class MergedDrafter:
    """The union of several drafters' trees, cut to one budget.

    Drafters estimate probabilities each in its own way. So that they compare, each one's are calibrated on line: once
    its parent was accepted, how often was a node accepted to which this drafter gave such odds, at such a depth? A path
    that several drafters guess takes the best of their estimates, and in ``source`` the first one's name. Then the
    union is calibrated once more, because what several agree on is likelier than the best of them says, and what they
    dispute is less likely.

    Guesses are made without sight of the target's choice, so the union's law is None even where a part sampled its
    own; ``q`` is dropped. A part that raises, or returns no sound tree, is left out of that call.

    Args:
        drafters: the parts. A ``MergedDrafter`` among them stands for its own parts.

    Attributes:
        drafters: the parts.
        faults: what parts did wrong and nobody has taken note of yet, the last 32: pairs of a part's name and a text.

    Raises:
        ValueError: no drafters.
    """

    def __init__(self, drafters: Sequence[Drafter]):
        parts = [part.drafters if isinstance(part, MergedDrafter) else (part,) for part in drafters]
        self.drafters: tuple[Drafter, ...] = sum(parts, ())
        if not self.drafters:
            raise ValueError("MergedDrafter needs at least one drafter, got none")
        self.name = "+".join(part.name for part in self.drafters)
        self.topk = max(part.topk for part in self.drafters)
        self.hidden = any(part.hidden for part in self.drafters)
        self.faults: list[tuple[str, str]] = []
        self._parts = [Acceptance(prior(), weight=8.0) for _ in self.drafters]
        self._together = Acceptance(np.tile(prior(), 2), weight=8.0)

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where no part had a guess."""
        for context in contexts:
            self._learn(context)
        drafted = [self._part(i, contexts, budgets) for i in range(len(self.drafters))]
        return [self._union(*each) for each in zip(contexts, budgets, zip(*drafted, strict=True), strict=True)]

    def _part(self, i: int, contexts: Sequence[Context], budgets: Sequence[Budget]) -> Sequence[DraftTree | None]:
        """One part's trees, or as many None."""
        part = self.drafters[i]
        try:
            drafted = part.draft(contexts, budgets)
            _check(drafted, contexts)
        except Exception as error:  # a part may be anybody's code: its failure must not cost the others
            fault = part.name, f"{type(error).__name__}: {error}"
            self.faults = [*self.faults, fault][-FAULTS_KEPT:]
            return [None] * len(contexts)
        return drafted

    def take_faults(self) -> list[tuple[str, str]]:
        """Hand over ``faults``, so that each is counted once."""
        faults, self.faults = self.faults, []
        return faults

    def _learn(self, context: Context) -> None:
        """Count what became of the last trees, each part's and their union, once."""
        length, guesses = context.scratch.pop(self, (0, ()))
        for acceptance, *guess in guesses:
            acceptance.learn(*guess, context.tokens[length:])

    def _union(self, context: Context, budget: Budget, drafted: Sequence[DraftTree | None]) -> DraftTree:
        guessed = [(i, tree) for i, tree in enumerate(drafted) if tree is not None and len(tree) > 1]
        if not guessed:
            return DraftTree.root(int(context.tokens[-1]))
        guesses = [
            (self._parts[i], tree.tokens, tree.parents, kernels.estimate_kinds(tree.parents, tree.probability))
            for i, tree in guessed
        ]
        tokens, parents, best, origin = trees.merge([(t, p, part.paths(p, kinds)) for part, t, p, kinds in guesses])
        kinds = kernels.estimate_kinds(parents, best) + KINDS * _shared(tokens, parents, origin, guesses)
        probability = self._together.paths(parents, kinds)
        context.scratch[self] = len(context.tokens), [*guesses, (self._together, tokens, parents, kinds)]
        names = [self.drafters[i].name for i, _ in guessed]
        source = tuple(names[guess] for guess in origin.tolist())
        kept = trees.prune(parents, probability, budget.nodes, budget.depth, budget.width, budget.least)
        return DraftTree(tokens, parents, probability, source).take(kept)


Guess = tuple[Acceptance, np.ndarray, np.ndarray, np.ndarray]  # who counts, and the tree's tokens, parents and kinds


def _shared(tokens: np.ndarray, parents: np.ndarray, origin: np.ndarray, guesses: Sequence[Guess]) -> np.ndarray:
    """Which of the union's nodes more than one part guesses."""
    shared = np.zeros(len(tokens), np.bool_)
    for part, (_, part_tokens, part_parents, _) in enumerate(guesses[1:], 1):
        kernels.mark_shared(tokens, parents, origin, part, part_tokens, part_parents, shared)
    return shared


def prior() -> Float[np.ndarray, " kinds"]:
    """Before anything is learnt, estimates are believed."""
    odds = np.exp2(np.arange(-kernels.ODDS, kernels.ODDS + 1))
    return np.repeat(odds / (1 + odds), kernels.DEPTHS)


def _check(drafted: Sequence[DraftTree], contexts: Sequence[Context]) -> None:
    if len(drafted) != len(contexts):
        raise ValueError(f"{len(drafted)} trees for {len(contexts)} contexts")
    for tree, context in zip(drafted, contexts, strict=True):
        n, last = len(tree), int(context.tokens[-1])
        fault = trees.fault(tree.tokens, tree.parents, tree.probability, last, _ANY_TOKEN, n, n, n)
        if fault:
            raise ValueError(fault)
