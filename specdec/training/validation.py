"""How well a draft drafts, told from samples alone: tokens per step of greedy chains along what the target wrote."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool

DEPTH = 4  # of the chains


def tokens_per_step(texts: Iterable[Bool[np.ndarray, "depth places"]]) -> float:
    """Committed tokens of a pass of the target, where each step drafts a chain.

    A chain is accepted as far as it is right, so a draft's guess matters only where those before it were right: then it
    has read the target's own text. No text need be generated to know how far chains get.

    Args:
        texts: of each, whether the guess at its place, made as the so-many-th of a chain, is the target's token there.
    """
    steps = places = 0
    for right in texts:
        depth, length = right.shape
        at = 0
        while at < length:
            ahead = min(depth, length - at)
            hits = right[np.arange(ahead), at + np.arange(ahead)]
            at += 1 + (ahead if hits.all() else int(hits.argmin()))
            steps += 1
        places += length
    return places / max(1, steps)
