"""What a pass of the target costs: measured once, kept fresh by every step, saved for the next process."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float
from numba import njit

from specdec import storage

LARGEST = 1024  # tokens fed in one pass, over all rows; what larger ones cost is not told apart
FRESH = 0.1  # weight of the newest pass, at least: the first few count for more
MEASURED = 5.0  # how many passes the first measurement counts for
SHARED = 0.3  # how much of a pass is taken to say something about the machine, and so about passes of all sizes
SURPRISE = 0.4  # log ratio beyond which a pass is taken to have been disturbed
DOUBT = 0.2  # by how much a single pass may mislead, as a share of its time
LEAST_RISE = 0.25  # of what a token adds on average, up to passes over so many: what it is taken to add at least
WIDE = 32
KIND, VERSION = "costs", 2
SAVED_FOR = 60.0  # seconds that a saved state is fresh enough


class Costs:
    """T(nodes, context, rows): the seconds of a pass over a batch of trees behind texts of some length.

        T = curve[rows * nodes] + rows * context * (read + attend * nodes)

    A linear layer does not know which row a token is of, so their product is what counts there; attention reads each
    row's keys and values, and computes with them for every node.

    No pass is taken to cost more than a larger one: a size that was disturbed when it was timed would else never be
    chosen, and so never be known better. Nor is a larger one taken to be free: where a size seemed to cost as much as a
    larger one, a line between its neighbours stands for it, and each node more is taken to cost something.

    Args:
        seconds: of passes over a short text by tokens fed; straight lines are drawn between and beyond them.
        read: seconds to read one token's keys and values, at first; moved by ``learn``, as ``attend`` is.
        attend: seconds for one node to attend to one token.
        spare: how much longer the model's own step takes in plain ``generate``, as a share of our pass over one token.

    Attributes:
        curve: seconds by tokens fed, from 1 to ``LARGEST``; moved by ``learn``.
        seen: of about how many passes that is known, by tokens fed.
        rise: what each token adds at least, as a share of a plain pass.
        path: where it is kept for later processes; None for nowhere.
    """

    path: Path | None = None
    saved = 0.0

    def __init__(
        self, seconds: Mapping[int, float], read: float = 0.0, attend: float = 0.0, spare: float = 0.0
    ) -> None:
        sizes = np.array(sorted(seconds))
        times = np.minimum.accumulate([seconds[n] for n in sorted(seconds, reverse=True)])[::-1]
        sound = np.append(times[:-1] < times[1:], True)
        sound[:2] = True  # many libraries multiply a single row in another way, so that two cost as much as more
        sizes, times, fed = sizes[sound], times[sound], np.arange(1, LARGEST + 1)
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        self.curve = np.interp(fed, sizes, times) + slope * np.maximum(0, fed - sizes[-1])
        self.rise = _least_rise(self.curve)
        self.seen = np.full(LARGEST, MEASURED)
        self.read, self.attend, self.spare = read, attend, spare

    def times(self, nodes: int, context: int, rows: int = 1) -> Float[np.ndarray, " sizes"]:
        """Seconds of passes over 1, 2, ... ``nodes`` nodes per row, roots included; none larger than ``LARGEST``."""
        sizes = max(1, min(nodes, LARGEST // rows))
        return cast(np.ndarray, _times(self.curve, self.rise, self.read, self.attend, sizes, context, rows))

    def time(self, nodes: int, context: int, rows: int = 1) -> float:
        """Seconds of a pass over so many nodes per row, the root included."""
        fed, roots = min(rows * nodes, LARGEST), min(rows, LARGEST)
        least = self.curve.item(roots - 1) * (1 + self.rise * (fed - roots))
        seconds: float = max(self.curve.item(fed - 1), least)
        return seconds + self._behind(nodes, context, rows)

    def doubt(self, nodes: int, rows: int = 1) -> float:
        """By how much the time of a pass over so many nodes per row may be misjudged, as a share of a plain one's."""
        least = min(self.seen.item(min(rows, LARGEST) - 1), self.seen.item(min(rows * nodes, LARGEST) - 1))
        return DOUBT / math.sqrt(least)

    def learn(self, nodes: int, context: int, rows: int, seconds: float) -> None:
        """Move the curve towards what a pass took, most where passes are about as large, and what the context costs.

        Each moves by its share of the time that was expected: else a curve would have to make up, for all texts, for
        what attention to a long one was misjudged by. A pass that took far longer or shorter than expected was
        disturbed: it counts as a smaller surprise.
        """
        if seconds <= 0 or rows * nodes > LARGEST:
            return
        behind = self._behind(nodes, context, rows)
        expected = self.curve.item(rows * nodes - 1) + behind
        surprise = min(max(math.log(seconds / expected), -SURPRISE), SURPRISE)
        share = behind / expected
        learn(self.curve, self.seen, rows * nodes, surprise * (1 - share))
        factor = math.exp(FRESH * surprise * share)
        self.read, self.attend = self.read * factor, self.attend * factor

    def _behind(self, nodes: int, context: int, rows: int) -> float:
        """Seconds of a pass that are attention to the context."""
        return rows * context * (self.read + self.attend * nodes)

    def save(self, path: Path) -> None:
        """Write it to ``path``, and from now on ``keep`` it there. Raises OSError where that cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"read": self.read, "attend": self.attend, "spare": self.spare}
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
            costs = cls({1: 1.0}, *(float(facts[name]) for name in ("read", "attend", "spare")))
            costs.curve = arrays["curve"].astype(np.float64)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not say what passes cost: {error!r}") from error
        if (
            costs.curve.shape != (LARGEST,)
            or not (costs.times(LARGEST, LARGEST) > 0).all()
            or costs.read < 0
            or costs.spare < 0
        ):
            raise ValueError(f"{path} says that passes cost nothing")
        costs.rise = _least_rise(costs.curve)
        costs.path, costs.saved = path, time.monotonic()
        return costs


def _least_rise(curve: Float[np.ndarray, " sizes"]) -> float:
    return LEAST_RISE * max(0.0, float(curve[WIDE - 1] / curve[0] - 1)) / (WIDE - 1)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def learn(curve: np.ndarray, seen: np.ndarray, fed: int, surprise: float) -> None:
    """What ``Costs.learn`` does: ``surprise`` is the logarithm of what a pass took over what was expected of it."""
    last, factor = 0.0, 1.0
    for n in range(1, len(curve) + 1):
        likeness = (min(n, fed) / max(n, fed)) ** 16  # a step of the curve at some size does not blur much
        moved = SHARED + (1 - SHARED) * likeness
        power = max(FRESH, 1 / (1 + seen[n - 1])) * surprise * moved
        if power != last:  # sizes far from this one mostly move alike
            last, factor = power, np.exp(power)
        curve[n - 1] *= factor
        seen[n - 1] += moved
    for n in range(1, fed):
        curve[n - 1] = min(curve[n - 1], curve[fed - 1])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _times(
    curve: np.ndarray, rise: float, read: float, attend: float, sizes: int, context: int, rows: int
) -> np.ndarray:
    times, roots = np.empty(sizes), min(rows, len(curve))
    for nodes in range(1, sizes + 1):
        fed = min(rows * nodes, len(curve))
        least = curve[roots - 1] * (1 + rise * (fed - roots))
        times[nodes - 1] = max(curve[fed - 1], least) + rows * context * (read + attend * nodes)
    return times
