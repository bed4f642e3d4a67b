"""Whether other load disturbed a comparison: a tiny fixed load timed between measurements, and what others ran."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

SPREAD = 0.25  # by which the slowest tenth of calibrations may exceed their median
SHARE = 0.15  # of the threads' cores that other processes may have taken, on average
SIZE, TIMES = 384, 3  # rows of the square matrices, and how often they are multiplied: a few milliseconds


def calibration() -> float:
    """Seconds of a few products of fixed matrices, by as many threads as torch uses; the quickest of three tries."""
    matrix = torch.ones(SIZE, SIZE)
    return min(_products(matrix) for _ in range(3))


def _products(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(TIMES):
        matrix @ matrix
    return time.perf_counter() - start


def busy_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float] | None:
    """Core-seconds used so far by all processes, and by this one and its ended children. None but on Linux."""
    try:
        ticks = _ticks(stat.read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    mine = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), mine.user + mine.system + mine.children_user + mine.children_system


def _ticks(columns: Sequence[str]) -> float:
    """All but idle (the fourth) and waiting for a disk (the fifth); guests' time is counted in user time."""
    numbers = list(map(int, columns[:8]))
    if len(numbers) < 8:
        raise ValueError("not the columns of Linux")
    return float(sum(numbers) - numbers[3] - numbers[4])


class Probe(NamedTuple):
    """What was seen of the machine around one prompt's measurements.

    Attributes:
        seconds: of the fixed load, right after them.
        others: cores that other processes kept busy meanwhile, on average; nan where that cannot be read.
    """

    seconds: float
    others: float


@dataclass(slots=True)
class Disturbance:
    """Probes of the machine, and what they say.

    Args:
        load: runs the fixed load and returns its seconds.
        busy: core-seconds that all processes and that this one have used so far; None where that cannot be read.
        clock: seconds.
        threads, cores: that a measurement uses, and that there are.

    Attributes:
        probes: one per prompt and repeat.
    """

    load: Callable[[], float] = calibration
    busy: Callable[[], tuple[float, float] | None] = busy_seconds
    clock: Callable[[], float] = time.perf_counter
    threads: int = field(default_factory=torch.get_num_threads)
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    probes: list[Probe] = field(default_factory=list)
    _start: tuple[float, tuple[float, float] | None] = (0.0, None)

    def begin(self) -> None:
        """Just before something is measured."""
        self._start = self.clock(), self.busy()

    def end(self) -> Probe:
        """Just after it."""
        (start, before), now, after = self._start, self.clock(), self.busy()
        others = float("nan")
        if before is not None and after is not None and now > start:
            others = max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / (now - start)
        self.probes.append(Probe(self.load(), others))
        return self.probes[-1]

    @property
    def spread(self) -> float:
        """By how much the slowest tenth of calibrations exceeds their median, at least; 0 for fewer than two."""
        seconds = [probe.seconds for probe in self.probes]
        return float(np.quantile(seconds, 0.9) / np.median(seconds)) - 1 if len(seconds) > 1 else 0.0

    @property
    def taken(self) -> float:
        """The share of the threads' cores that others had: those they kept busy beyond the cores left to them."""
        others = [probe.others for probe in self.probes if probe.others == probe.others]
        return max(0.0, (fmean(others) if others else 0.0) - (self.cores - self.threads)) / self.threads

    @property
    def disturbed(self) -> bool:
        """Whether either is beyond its bound."""
        return self.spread > SPREAD or self.taken > SHARE

    def report(self, allowed: bool = False) -> dict[str, Any]:
        """For the JSON: ``refused`` where speeds are withheld, as they are unless disturbance is ``allowed``."""
        text = (
            f"the slowest tenth of {len(self.probes)} calibrations took {self.spread:.0%} longer than their median "
            f"({SPREAD:.0%} allowed), other processes had {self.taken:.0%} of the cores in use ({SHARE:.0%} allowed)"
        )
        return {
            "spread": round(self.spread, 4),
            "allowed": SPREAD,
            "others": round(self.taken, 4),
            "others_allowed": SHARE,
            "disturbed": self.disturbed,
            "refused": self.disturbed and not allowed,
            "text": text,
        }
