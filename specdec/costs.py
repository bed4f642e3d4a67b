"""What a pass of the target costs: measured once, kept fresh by every step, saved for the next process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float

from specdec import storage

LARGEST = 1024  # tokens fed in one pass, over all rows; what larger ones cost is not told apart
FRESH = 0.1  # weight of the newest pass
SHARED = 0.3  # how much of it is taken to say something about the machine, and so about passes of all sizes
SURPRISE = 0.4  # log ratio beyond which a pass is taken to have been disturbed
KIND, VERSION = "costs", 1
SAVED_FOR = 60.0  # seconds that a saved state is fresh enough


class Costs:
    """T(nodes, context, rows): the seconds of a pass over a batch of trees behind texts of some length.

        T = curve[rows * nodes] + rows * context * (read + attend * nodes)

    A linear layer does not know which row a token is of, so their product is what counts there; attention reads each
    row's keys and values, and computes with them for every node. No pass is taken to cost more than a larger one: a
    size that was disturbed when it was timed would else never be chosen, and so never be known better.

    Args:
        seconds: of passes over a short text by tokens fed; straight lines are drawn between and beyond them.
        read: seconds to read one token's keys and values.
        attend: seconds for one node to attend to one token.

    Attributes:
        curve: seconds by tokens fed, from 1 to ``LARGEST``; moved by ``learn``.
        path: where it is kept for later processes; None for nowhere.
    """

    path: Path | None = None
    saved = 0.0

    def __init__(self, seconds: Mapping[int, float], read: float = 0.0, attend: float = 0.0) -> None:
        sizes = np.array(sorted(seconds))
        times = np.minimum.accumulate([seconds[n] for n in sorted(seconds, reverse=True)])[::-1]
        fed = np.arange(1, LARGEST + 1)
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        self.curve = np.interp(fed, sizes, times) + max(0.0, slope) * np.maximum(0, fed - sizes[-1])
        self.read, self.attend = read, attend

    def times(self, nodes: int, context: int, rows: int = 1) -> Float[np.ndarray, " sizes"]:
        """Seconds of passes over 1, 2, ... ``nodes`` nodes per row, roots included; none larger than ``LARGEST``."""
        sizes = np.arange(1, max(1, min(nodes, LARGEST // rows)) + 1)
        fed = np.minimum(rows * sizes, LARGEST)
        times: np.ndarray = self.curve[fed - 1] + rows * context * (self.read + self.attend * sizes)
        return times

    def learn(self, nodes: int, context: int, rows: int, seconds: float) -> None:
        """Move the curve towards what a pass took, most where passes are about as large.

        A pass that took far longer or shorter than expected was disturbed: it counts as a smaller surprise.
        """
        if seconds <= 0 or rows * nodes > LARGEST:
            return
        surprise = np.clip(np.log(seconds / self.times(nodes, context, rows)[-1]), -SURPRISE, SURPRISE)
        fed = np.arange(1.0, LARGEST + 1)
        likeness = np.minimum(fed, rows * nodes) / np.maximum(fed, rows * nodes)
        for _ in range(4):
            likeness *= likeness  # to the power of 16: a step of the curve at some size does not blur much
        self.curve *= np.exp(FRESH * surprise * (SHARED + (1 - SHARED) * likeness))
        smaller = self.curve[: rows * nodes]
        np.minimum(smaller, smaller[-1], out=smaller)

    def save(self, path: Path) -> None:
        """Write it to ``path``, and from now on ``keep`` it there. Raises OSError where that cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"read": self.read, "attend": self.attend}
        storage.write(path, KIND, VERSION, {"curve": self.curve}, facts)
        self.path, self.saved = path, time.monotonic()

    def keep(self) -> None:
        """Save it again where it was saved or loaded, if that was a while ago; a disk that is full is let be."""
        if self.path is not None and time.monotonic() - self.saved > SAVED_FOR:
            with suppress(OSError):
                self.save(self.path)

    @classmethod
    def load(cls, path: Path) -> Costs:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError where the file is not that or damaged."""
        arrays, facts = storage.read(path, KIND, VERSION)
        try:
            costs = cls({1: 1.0}, float(facts["read"]), float(facts["attend"]))
            costs.curve = arrays["curve"].astype(np.float64)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not say what passes cost: {error!r}") from error
        if costs.curve.shape != (LARGEST,) or not (costs.times(LARGEST, LARGEST) > 0).all() or costs.read < 0:
            raise ValueError(f"{path} says that passes cost nothing")
        costs.path, costs.saved = path, time.monotonic()
        return costs
