"""What a wrapped model counts while it is measured, finely enough for histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from specdec.core import Verdict
from specdec.statistics import Stats

SUMS = ("steps", "tokens", "drafted", "accepted")
HISTOGRAMS = ("accepted_lengths", "depths", "refused", "sizes")
Counted = dict[str, Any]


class Counts(Stats):
    """``Stats`` with histograms of its steps, the prompt's own pass apart.

    Attributes:
        accepted_lengths: steps by guesses accepted.
        depths: steps by the tree's depth; 0 where nothing was guessed.
        refused: steps by guesses accepted, of those whose last accepted node had guesses below it, all refused.
        sizes: steps by nodes of the tree, the root included.
    """

    accepted_lengths: Counter[str]
    depths: Counter[str]
    refused: Counter[str]
    sizes: Counter[str]

    def reset(self) -> None:
        """Set every count to zero."""
        super().reset()
        for name in HISTOGRAMS:
            setattr(self, name, Counter())

    def count(self, verdict: Verdict, depth: int) -> None:
        """Add a verdict on guesses that were so deep."""
        super().count(verdict, depth)
        if verdict.prompt:
            return
        accepted, parents = len(verdict.path) - 1, verdict.tree.parents
        self.accepted_lengths[str(accepted)] += 1
        self.depths[str(depth)] += 1
        self.sizes[str(len(parents))] += 1
        if (parents == verdict.path[-1]).any():
            self.refused[str(accepted)] += 1

    def counted(self) -> Counted:
        """Everything as plain values, ready for JSON and for ``added``."""
        plain = {name: getattr(self, name) for name in (*SUMS, "seconds")}
        return {**plain, "by_drafter": self.by_drafter, **{name: dict(getattr(self, name)) for name in HISTOGRAMS}}


def added(runs: Iterable[Counted]) -> Counted:
    """The counts of several runs as one."""
    total: Counted = {"by_drafter": {}}
    for run in runs:
        for name in SUMS:
            total[name] = total.get(name, 0) + run[name]
        for name in (*HISTOGRAMS, "seconds"):
            total[name] = _sum(total.get(name, {}), run[name])
        for name, counts in run["by_drafter"].items():
            total["by_drafter"][name] = _sum(total["by_drafter"].get(name, {}), counts)
    return total


def _sum(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}


def by_depth(counted: Counted) -> list[float]:
    """For each depth, from 1: of the steps that guessed that deep, the share that accepted that deep."""
    depths, accepted = _tail(counted["depths"]), _tail(counted["accepted_lengths"])
    return [share(accepted.get(d, 0), deep) for d, deep in sorted(depths.items()) if d]


def conditional(counted: Counted) -> list[float]:
    """For each depth, from 1: the share accepted of the steps that had accepted all before and guessed once more."""
    accepted = _tail(counted["accepted_lengths"])
    refused = {int(n): steps for n, steps in counted["refused"].items()}
    tries = {d: accepted.get(d, 0) + refused.get(d - 1, 0) for d in range(1, 2 + max([*accepted, *refused], default=0))}
    return [share(accepted.get(d, 0), tried) for d, tried in tries.items() if tried]


def _tail(histogram: Mapping[str, int]) -> dict[int, int]:
    """For every n up to the largest: how many are at least n."""
    values = {int(n): count for n, count in histogram.items()}
    return {n: sum(count for m, count in values.items() if m >= n) for n in range(max(values, default=0) + 1) if values}


def share(part: float, whole: float) -> float:
    """Rounded for a report; 0 of nothing."""
    return round(part / whole, 4) if whole else 0.0
