"""What makes tokens likelier or less likely: OpenAI's ``logit_bias`` and its two penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from transformers.generation.logits_process import LogitsProcessor


class Penalties(LogitsProcessor):  # type: ignore[misc]
    """Adds to the scores of one row what its own answer calls for; tokens of the prompt count for nothing.

    Args:
        prompt: how many tokens of a row are the prompt.
        frequency: taken off a token's score for each time it was written; ``presence``: once it was written at all.
        bias: added to the score, by token.
    """

    def __init__(self, prompt: int, frequency: float, presence: float, bias: Mapping[int, float]) -> None:
        self._prompt, self._frequency, self._presence, self._bias = prompt, frequency, presence, bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """New scores [1, vocab] behind a row [1, length]."""
        change = dict(self._bias)
        if self._frequency or self._presence:
            for token, times in Counter(input_ids[0, self._prompt :].tolist()).items():
                change[token] = change.get(token, 0.0) - self._frequency * times - self._presence
        if not change:
            return scores
        ids = torch.tensor(list(change), device=scores.device)
        added = torch.tensor(list(change.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(1, ids, added[None])
