"""What came of drafts: counts, times, and the speed they promise where a pass's cost is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specdec.core import Verdict

COUNTS = ("tokens", "steps", "drafted", "accepted")
Session = tuple[str, str]  # namespace and session


@dataclass(slots=True)
class Tally:
    """What a drafter did over some responses.

    Attributes:
        tokens: of the responses.
        steps: passes that a target would have made, each response's prompt among them.
        drafted: guessed tokens verified.
        accepted: those that came true.
        draft_seconds: spent drafting.
        update_seconds: spent catching up with what was committed, prompts among it.
        most_bytes: that the drafter held at the end of one of the responses; None if it does not say.
        replayed: tokens of all responses that the drafter had met by the end of these.
        passes: how many trees of each size, the root included, were verified.
    """

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    update_seconds: float = 0.0
    most_bytes: int | None = None
    replayed: int = 0
    passes: Counter[int] = field(default_factory=Counter)

    def observe(self, verdict: Verdict) -> None:
        """Count one step."""
        self.tokens += len(verdict.tokens)
        self.steps += 1
        self.drafted += len(verdict.tree) - 1
        self.accepted += len(verdict.path) - 1
        if not verdict.prompt:
            self.passes[len(verdict.tree)] += 1

    def add(self, later: Tally) -> None:
        """Count what ``later`` responses did too."""
        for name in (*COUNTS, "draft_seconds", "update_seconds"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        held = [each.most_bytes for each in (self, later) if each.most_bytes is not None]
        self.most_bytes = max(held, default=None)
        self.replayed = max(self.replayed, later.replayed)
        self.passes += later.passes

    def figures(self, cost: Mapping[int, float] | None = None) -> dict[str, Any]:
        """Everything as docs/replay.md names it; with the ``cost`` of a pass in seconds by tokens, the speed too."""
        tokens = max(self.tokens, 1)
        row: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        row["tokens_per_step"] = round(self.tokens / max(self.steps, 1), 4)
        row["draft_us_per_token"] = round(1e6 * self.draft_seconds / tokens, 3)
        row["update_us_per_token"] = round(1e6 * self.update_seconds / tokens, 3)
        row["bytes_per_token"] = None if self.most_bytes is None else round(self.most_bytes / max(self.replayed, 1), 1)
        if cost is not None:
            row["projected_speed"] = self.projected_speed(cost)
        return row

    def projected_speed(self, cost: Mapping[int, float]) -> float | None:
        """Plain decoding's time over the verified trees'; sizes between measured ones are interpolated.

        The prompt's pass is left out of both, drafting out of the second. None if there was nothing but prompts.
        """
        measured = sorted(cost)
        seconds = np.interp([*self.passes], measured, [cost[size] for size in measured])
        verified = float(seconds @ [*self.passes.values()])
        prompts = self.steps - self.passes.total()
        return round((self.tokens - prompts) * cost[1] / verified, 4) if verified else None


def read_cost(path: Path, largest: int) -> dict[int, float]:
    """The seconds of a pass by its tokens, of a JSON file with ``{"seconds": {"1": ..., "2": ...}}``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such times, not for 1 token, or not up to the ``largest`` pass.
    """
    try:
        cost = {int(size): float(seconds) for size, seconds in json.loads(path.read_text())["seconds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: not a JSON object with "seconds" by number of tokens ({error!r})') from error
    if 1 not in cost or max(cost) < largest or min(cost.values()) <= 0:
        raise ValueError(f"{path}: needs positive seconds for passes of 1 to {largest} tokens, has {sorted(cost)}")
    return cost


def result(drafter: str, sessions: Mapping[Session, Tally], cost: Mapping[int, float] | None = None) -> dict[str, Any]:
    """One drafter's row of the report: the total, and each session under ``by_session``."""
    total = Tally()
    for counts in sessions.values():
        total.add(counts)
    by_session = [
        {"namespace": namespace, "session": session, **counts.figures(cost)}
        for (namespace, session), counts in sessions.items()
    ]
    return {"drafter": drafter, "sessions": len(sessions), **total.figures(cost), "by_session": by_session}
