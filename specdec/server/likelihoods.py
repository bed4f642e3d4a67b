"""What the model thought of each token, and of those it might have written instead."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessor

LEAST = -9999.0  # stands for minus infinity, which JSON has no word for


class Likelihood(NamedTuple):
    """Log probabilities, before temperature and top_p: the token's, and the likeliest tokens' with their ids."""

    token: float
    best: list[tuple[int, float]]


class Likelihoods(LogitsProcessor):  # type: ignore[misc]
    """A processor that changes nothing, and notes what it sees until the token is known.

    Args:
        best: how many of the likeliest tokens to note.
    """

    def __init__(self, best: int) -> None:
        self._best, self._seen = best, deque[torch.Tensor]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [1, vocab], untouched."""
        self._seen.append(scores[0].float().log_softmax(-1).cpu())
        return scores

    def take(self, token: int) -> Likelihood:
        """Of the token that was chosen first of those not asked for yet."""
        seen = self._seen.popleft()
        best = seen.topk(min(self._best, len(seen)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Likelihood(_finite(seen[token]), [(id, _finite(value)) for id, value in pairs])


def _finite(value: Any) -> float:
    return max(float(value), LEAST)
