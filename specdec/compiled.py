"""Compiled code, loaded before it is needed."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Int

from specdec.core import Context, Drafter, Policy, Verdict
from specdec.decoder import Decoder
from specdec.drafters import LookaheadDrafter, MergedDrafter, NgramDrafter, RecyclingDrafter, SuffixDrafter
from specdec.policies import ThroughputPolicy
from specdec.verifiers.recorded import RecordedVerifier

TEXTS, PROMPT, ANSWER = 2, 24, 72  # tokens of a text so poor in words that every drafter has something to say


@cache
def load_compiled() -> None:
    """Compile, or load from numba's cache, what drafting from text calls; once in a process.

    Else the first calls in a text would take up to seconds, and drafting rest until that was paid off. Drafters and
    policy of their own decode made-up texts for it, without a model.
    """
    drafter = MergedDrafter(
        [NgramDrafter(), SuffixDrafter(), LookaheadDrafter(), RecyclingDrafter()], clock=lambda: 0.0
    )
    policy = ThroughputPolicy(clock=lambda: 0.0)
    for words in np.random.default_rng(0).integers(0, 3, (TEXTS, PROMPT + ANSWER)):
        _decode(words, drafter, policy)
    policy.costs.learn(1, PROMPT, 1, 1.0)  # recorded passes take no time, and nothing was learnt from them


def _decode(words: Int[np.ndarray, " words"], drafter: Drafter, policy: Policy) -> None:
    context, verifier = Context(words[:PROMPT]), RecordedVerifier(words[PROMPT:], drafter.topk)
    context.extend(verifier.first(context))
    decoder = Decoder(drafter, verifier, policy, _Nobody(), lambda _: ANSWER)
    decoder.run([context], lambda: [len(context.tokens) >= len(words)])


class _Nobody:
    """Watches nothing."""

    def observe(self, verdict: Verdict) -> None:
        """One verdict."""
