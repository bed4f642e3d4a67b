"""Where a method's tokens are not plain ``generate``'s, and by how much the target minds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)
TIE = 2.0  # of the number format's steps, as a share of the logits' spread: what rounding may turn round


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a method's tokens are not plain ``generate``'s.

    Attributes:
        method: whose tokens differ.
        workload: on which work; ``prompt`` counts from 0 among all prompts.
        position: which generated token, from 0.
        expected: plain ``generate``'s token; None where it had ended.
        got: the method's token; None where it had ended.
        margin: by how much the target's logit of ``expected`` exceeds that of ``got``; None where one had ended.
        tie: whether that is a tie in low precision: in bfloat16 or float16, no more than twice the format's relative
            step times the logits' spread (their largest distance from their mean). It is a failure all the same.
    """

    method: str
    workload: str
    prompt: int
    position: int
    expected: int | None
    got: int | None
    margin: float | None
    tie: bool = False

    def __str__(self) -> str:
        margin = "" if self.margin is None else f", logit margin {self.margin:.2g}"
        return (
            f"{self.method} on {self.workload} (prompt {self.prompt}): token {self.position} is {self.got}, "
            f"plain generate has {self.expected}{margin}{', a tie in low precision' if self.tie else ''}"
        )


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first position at which two token lists differ, the end of one included; None when they are equal."""
    for position, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


@torch.no_grad()
def logit_margin(model: Any, ids: Sequence[int], expected: int | None, got: int | None) -> tuple[float | None, bool]:
    """The target's logit of one token after ``ids`` less that of the other, and whether that is a tie.

    None where a token is missing.
    """
    if expected is None or got is None:
        return None, False
    logits = model(torch.tensor([ids], device=model.device)).logits[0, -1]
    margin = float(logits[expected].float() - logits[got].float())
    spread = float((logits.float() - logits.float().mean()).abs().max())
    return margin, model.dtype in LOW_PRECISION and abs(margin) <= TIE * torch.finfo(model.dtype).eps * spread
