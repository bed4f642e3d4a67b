"""The tree size that gives the most tokens per second, from measured pass times and calibrated estimates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from specdec.allowance import FIRST, Allowance, Typical
from specdec.calibration import DEPTHS, KINDS, Acceptance, believed
from specdec.core import Budget, Context, DraftTree
from specdec.costs import LARGEST, Costs
from specdec.policies import throughput_numba as kernels

# Before anything is learnt in a text: how far estimates are believed, and for how many guesses that counts. Whether to
# verify anything is asked with caution at every depth. But what is deep is rarely reached, and doubted there by its
# whole path: how much to verify is asked with less of it the deeper a guess is.
CAUTION, WEIGHT = 0.9, 8.0
HOPE = np.tile((0.9, 0.95, 1.0, 1.0), KINDS // DEPTHS)
REMEMBERED = 64.0  # guesses of a kind: texts differ
WORTH = 1.02  # a tree that promises less than this times the speed without it is not worth the trouble
ASKS = 16  # drafts that may have to be asked for until one is worth verifying
# How much less a row counts that is ahead: with a tenth more tokens than the last row, a sixth as much. The first few
# tokens say little.
LAG, START = 20.0, 16
SCARCE = 0.15  # how much more a tree must promise when nothing may be lost any more
# Of what our steps save beside plain generate's, as a share of a step: so much is in doubt; half of the rest may be
# lost, but no more than this.
DOUBTED, SPARED, MOST_SPARED = 0.05, 0.5, 0.05
LEAST = 0.4  # plain steps that a text may lose besides a try, whatever was lost on the one before
NOTHING, ROOT, UNTIMED, ALONE = Budget(0, 0, 0), np.zeros(1, np.int64), np.empty(0), np.ones(1)
USUAL = 3e-4  # seconds of a call that drafts, until one has been timed


class Text:
    """What is learnt about the text of one generation, and what may still be lost on it.

    Attributes:
        rows: rows of the batch, those that have ended included, as they are fed too.
        acceptance: how good guesses are in this text, to the cautious; other texts say how good they are at first.
        hope: the same with less caution the deeper a guess is.
        resting: whether the allowance is being saved up.
    """

    def __init__(self, rows: int, usual: Acceptance, left: float = FIRST) -> None:
        self.rows, self.resting = rows, False
        self.acceptance = Acceptance(CAUTION * usual.rate, WEIGHT, REMEMBERED)
        self.hope = Acceptance(HOPE * usual.rate, WEIGHT, REMEMBERED)
        self.allowance = Allowance(left)


@dataclass(slots=True)
class Step:
    """One step of a batch, from its budget until its verdicts are in.

    Attributes:
        text: what it is a step of.
        context: tokens of the longest row.
        plain: seconds of a pass over the roots alone.
        times: seconds of its pass by nodes per row, the root included; none where nothing was asked for.
        started: when drafting began; None where nothing was asked for.
        drafting: seconds that drafting is taken to have cost.
        nodes: nodes per row of the pass, the root included; 0 until they are chosen.
    """

    text: Text
    context: int
    plain: float
    times: Float[np.ndarray, " sizes"] = field(default_factory=lambda: UNTIMED)
    started: float | None = None
    drafting: float = 0.0
    nodes: int = 0


class ThroughputPolicy:
    """Verifies the ``n`` likeliest nodes of each row for which tokens per second are most::

        (rows + sum of path probabilities) / (time of drafting + T(1 + n, context, rows))

    A batch is done when its last row is, so rows that are ahead of the others count for less.

    T is measured and kept fresh. Probabilities are calibrated on line against what was committed, verified or not, and
    in each new text believed but in part at first; where n is chosen, deep ones more. n = 0 costs what a plain step
    costs. Nothing is risked beyond an ``Allowance`` for each text, in plain steps: at worst 1.4 of them and 0.6% of the
    time are lost on it, and less where the text before it lost all. Where our steps are clearly quicker than those of
    plain ``generate``, part of what that saves may be lost too, up to 5% of a step. The less may still be lost, and the
    less sure it is what passes cost, the more must a tree promise. Where none can be afforded, drafters are only told
    to catch up until one can, which is what pays for trying again. A call that takes longer than all this is not made
    again before it has been paid off, by later texts if need be.

    The rule is the one behind SpecDec++'s threshold (arXiv 2405.19715) and Sequoia's hardware-aware tree
    (arXiv 2402.12374), with estimates made on line. Threads may share one: what is lost to a race does no harm.

    Args:
        costs: pass times; None for a guess until passes have been seen.
        nodes, depth, width: the largest tree to draft.
        clock: seconds, as ``time.perf_counter``.
    """

    def __init__(
        self,
        costs: Costs | None = None,
        nodes: int = 64,
        depth: int = 16,
        width: int = 4,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.costs = costs or Costs({1: 1.0, 33: 1.5})
        self.largest, self.clock = Budget(nodes, depth, width), clock
        self.acceptance = Acceptance(believed(), WEIGHT)
        self.drafting = Typical(USUAL)
        self.left = FIRST

    def budget(self, contexts: Sequence[Context]) -> list[Budget]:
        """The largest tree worth drafting, or nothing; the last verdicts are learnt from first."""
        if not contexts:
            return []
        text, longest = self._learn(contexts), max(len(context.tokens) for context in contexts)
        rows = len(contexts) if text is None else text.rows
        plain = self.costs.time(1, longest, rows)
        if text is None:
            text = self._begun(rows, longest, plain)
        step = Step(text, longest, plain)
        for context in contexts:
            context.scratch[self] = step, None
        if self._rests(step):
            return [NOTHING] * len(contexts)
        step.times = self.costs.times(1 + self.largest.nodes, longest, rows)
        step.started = self.clock()
        return [self._worthwhile(step.times)] * len(contexts)

    def _begun(self, rows: int, context: int, plain: float) -> Text:
        """A new text: it may lose what the one before has left, and at least a try unless a call takes long."""
        dear = self.drafting.value > FIRST * plain
        least = self.left if dear else max(self.left, LEAST + self._wider(rows, context) / plain - 1)
        return Text(rows, self.acceptance, min(FIRST, least))

    def _rests(self, step: Step) -> bool:
        """Whether to save up: from when no tree can be afforded until one can, and the asking for it."""
        text = step.text
        asks = ASKS if text.resting else 1
        risk = (asks * self.drafting.due(step.plain) + self._wider(text.rows, step.context)) / step.plain - 1
        text.resting = not text.allowance.covers(risk)
        return text.resting

    def _wider(self, rows: int, context: int) -> float:
        """Seconds of the least pass that verifies anything."""
        return self.costs.time(2, context, rows) if 2 * rows <= LARGEST else math.inf

    def _worthwhile(self, times: Float[np.ndarray, " sizes"]) -> Budget:
        """The largest tree, without nodes that would not pay even if they came at their cheapest."""
        largest, least = self.largest, kernels.least_rise(times)
        return Budget(len(times) - 1, largest.depth, largest.width, max(0.0, 0.5 * least))

    def trim(self, contexts: Sequence[Context], trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Each tree's likeliest nodes, the same number for all rows of the batch; of sampled trees, all.

        What is kept of a sampled tree must not depend on what was sampled, or its law would be another.
        """
        if not contexts:
            return []
        step: Step = contexts[0].scratch[self][0]
        if step.started is None:
            step.nodes = 1
            return [tree.take(ROOT) for tree in trees]
        step.drafting = self.drafting.charge(self.clock() - step.started, step.plain)
        n, kinds, rank = self._best(step, trees, self._weights(contexts))
        kept, start = list[DraftTree](), 0
        for context, tree in zip(contexts, trees, strict=True):
            row = slice(start, start + len(tree))
            context.scratch[self] = step, (len(context.tokens), tree, kinds[row])
            kept.append(tree if tree.law is not None else tree.take(np.flatnonzero(rank[row] <= n)))
            start = row.stop
        step.nodes = max(map(len, kept))
        return kept

    def _weights(self, contexts: Sequence[Context]) -> Float[np.ndarray, " rows"]:
        """How much each row's tokens count; 1 together."""
        if len(contexts) == 1:
            return ALONE
        written = np.array([len(context.tokens) - context.prompt_length for context in contexts]) + START
        behind = (written.min() / written) ** LAG
        weights: Float[np.ndarray, " rows"] = behind / behind.sum()
        return weights

    def _best(
        self, step: Step, trees: Sequence[DraftTree], weights: Float[np.ndarray, " rows"]
    ) -> tuple[int, Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]]:
        """How many nodes of each row to verify; of all rows' nodes, one row behind another, the kinds and the ranks."""
        sizes = np.array([len(tree) for tree in trees])
        parents, probability = _joined([tree.parents for tree in trees]), _joined([tree.probability for tree in trees])
        known, hope, left = step.text.acceptance, step.text.hope, step.text.allowance.left
        rates = known.accepted, known.offered, hope.accepted, hope.offered
        margin = WORTH + SCARCE * max(0.0, 1 - left / FIRST)
        seconds = step.times, step.drafting, step.plain
        kinds, rank, n, speed, plain = kernels.choose(
            parents, probability, sizes, weights, *rates, *seconds, left, margin
        )
        return n if speed > (margin + self.costs.doubt(1 + n, step.text.rows)) * plain else 0, kinds, rank

    def _learn(self, contexts: Sequence[Context]) -> Text | None:
        """See what became of the last step, once."""
        known = [(context, *context.scratch.pop(self)) for context in contexts if self in context.scratch]
        verdicts = [context.verdict for context, *_ in known if context.verdict is not None]
        if not known or len(verdicts) < len(known):
            return None
        step: Step = known[0][1]
        if step.nodes:
            self.costs.learn(step.nodes, step.context, step.text.rows, verdicts[0].seconds)
            self._settle(step, [context for context, *_ in known], [len(verdict.tokens) for verdict in verdicts])
        for context, _, guess in known:
            if guess is not None:
                length, tree, kinds = guess
                for acceptance in (self.acceptance, step.text.acceptance, step.text.hope):
                    acceptance.learn(tree.tokens, tree.parents, kinds, context.tokens[length:])
        return step.text

    def _settle(self, step: Step, contexts: Sequence[Context], committed: Sequence[int]) -> None:
        """Charge a text for a step, as much as that may well have cost, and credit it with the tokens committed."""
        spent, tokens, rows = 1 + step.drafting / step.plain, 1.0, step.text.rows
        if step.nodes > 1:
            spent += self.costs.time(step.nodes, step.context, rows) / step.plain - 1
            spent += self.costs.doubt(step.nodes, rows)
            tokens = sum(weight * n for weight, n in zip(self._weights(contexts).tolist(), committed, strict=True))
        spared = min(SPARED * max(0.0, self.costs.spare - DOUBTED), MOST_SPARED)
        step.text.allowance.settle(spent, tokens * (1 + spared) - spent)
        self.left = step.text.allowance.left


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
