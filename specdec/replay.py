"""Drafters played against recorded responses, without a model: as if the target chose what was recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree
from specdec.decoder import Decoder
from specdec.policies.fixed import FixedPolicy
from specdec.tally import Session, Tally
from specdec.traces import Response
from specdec.verifiers.recorded import RecordedVerifier

UNLIMITED = 1 << 30  # a drafter is not told where the response ends
ANY_TOKEN = 2**63 - 1


def replay(
    responses: Iterable[Response], drafter: Drafter, budget: Budget, tick: Callable[[], None] = lambda: None
) -> dict[Session, Tally]:
    """Decode every response greedily with drafts of ``drafter``, which goes on learning from one to the next.

    A response ends like a text that a stopping rule ends: unforeseen. The first call of a drafter's kind loads or
    compiles code; throw its figures away.

    Args:
        drafter: is changed, as in decoding.
        budget: of every step.
        tick: is called after each response.

    Returns:
        What was counted, by namespace and session, in the order of their first responses.

    Raises:
        ValueError: the drafter needs the target's hidden states, failed, or drafted an unsound tree or one beyond its
            budget; or a response was not reconstructed. The message names file, line and session.
    """
    if drafter.hidden:
        raise ValueError(f"{drafter.name} learns from the target's hidden states, which are not recorded")
    sessions: dict[Session, Tally] = {}
    replayed = 0
    for response in responses:
        tally = _play(response, drafter, budget)
        replayed += tally.tokens
        tally.replayed = replayed
        sessions.setdefault((response.namespace, response.session), Tally()).add(tally)
        tick()
    return sessions


def _play(response: Response, drafter: Drafter, budget: Budget) -> Tally:
    tally, context = Tally(), Context(response.prompt, response.namespace)
    verifier, timed = RecordedVerifier(response.tokens, drafter.topk), TimedDrafter(drafter, tally)
    policy = FixedPolicy(budget.nodes, budget.depth, budget.width, budget.least)
    first = verifier.first(context)
    context.extend(first)
    tally.observe(first)
    decoder = Decoder(timed, verifier, policy, tally, lambda _: UNLIMITED)
    try:
        decoder.run([context], lambda: [len(context.tokens) >= len(response.prompt) + len(response.tokens)])
    except ValueError as error:
        raise ValueError(f"{response.where}, session {response.session}: {error}") from error
    _check(response, context)
    return tally


def _check(response: Response, context: Context) -> None:
    spelt, due = context.tokens[context.prompt_length :], response.tokens
    if not np.array_equal(spelt, due):
        shared = min(len(spelt), len(due))
        unlike = np.flatnonzero(spelt[:shared] != due[:shared])
        at = int(unlike[0]) if len(unlike) else shared
        raise ValueError(f"{response.where}, session {response.session}: another token at position {at} of the answer")


class TimedDrafter:
    """A drafter that is first asked with an empty budget, so that catching up and drafting are timed apart.

    What it drafts is checked, and its faults are not forgiven: a decoder would go on without the guess.
    """

    def __init__(self, drafter: Drafter, tally: Tally) -> None:
        self.drafter, self.tally = drafter, tally
        self.name, self.topk, self.hidden = drafter.name, drafter.topk, drafter.hidden

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """The drafter's trees; one call where nothing is wanted, which is all that a finished context may see."""
        if contexts[0].finished:
            self._weigh()  # before the drafter lets go of what belongs to the context
        start = time.perf_counter()
        drafted = self.drafter.draft(contexts, [Budget(0, 0, 0)] * len(contexts))
        caught_up = time.perf_counter()
        self.tally.update_seconds += caught_up - start
        if budgets[0].nodes:
            drafted = self.drafter.draft(contexts, budgets)
            self.tally.draft_seconds += time.perf_counter() - caught_up
        self._check(drafted[0], int(contexts[0].tokens[-1]), budgets[0])
        if contexts[0].finished:
            self._weigh()
        return drafted

    def _check(self, tree: DraftTree, last: int, budget: Budget) -> None:
        sizes = (ANY_TOKEN, budget.nodes, budget.depth, budget.width)
        fault = trees.fault(tree.tokens, tree.parents, tree.probability, last, *sizes)
        faults = [(self.name, fault)] if fault else []
        if hasattr(self.drafter, "take_faults"):  # made of others, which may have failed
            faults += self.drafter.take_faults()
        for name, text in faults:
            raise ValueError(f"drafter {name}: {text}")

    def _weigh(self) -> None:
        held = getattr(self.drafter, "bytes_used", None)
        if held is not None:
            self.tally.most_bytes = max(self.tally.most_bytes or 0, held)
