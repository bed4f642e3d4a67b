"""What differs between two bench reports beyond their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

Kind = Literal[
    "faster", "slower", "within noise", "not judged", "equality lost", "equality gained", "only in A", "only in B"
]
Record = dict[str, Any]
LEVEL = 0.05  # the chance that any of the comparisons calls noise a change


@dataclass(frozen=True, slots=True)
class Change:
    """One method on one workload, in report A and in report B.

    Attributes:
        method, workload: of the records.
        kind: what became of it.
        before, after: speedup in A and in B, where there is one.
        ratio, low, high: of the speedups, B over A, with its interval; None where not judged.
        why: why not judged.
    """

    method: str
    workload: str
    kind: Kind
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""


def settings(a: Record, b: Record) -> dict[str, tuple[Any, Any]]:
    """What the two reports were made with, where it differs: machine, versions, lengths, and the baselines' pace."""
    old, new = _settings(a), _settings(b)
    pairs = {name: (old.get(name), new.get(name)) for name in [*old, *new]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _settings(report: Record) -> dict[str, Any]:
    pace = {
        f"{record['method']} tokens/s ({record['workload']})": record.get("tokens_per_second")
        for record in report["results"]
        if record["method"] == record["baseline"] and record["workload"] == _whole(report)
    }
    return {**report.get("machine", {}), "max_new_tokens": report.get("max_new_tokens"), **pace}


def _whole(report: Record) -> str:
    workloads = {record["workload"] for record in report["results"]}
    return "all" if "all" in workloads else min(workloads, default="")


def changes(a: Record, b: Record) -> list[Change]:
    """Every method and workload of either report but the baselines, in A's order, then B's.

    Speedups are compared by the ratio's interval: logarithms of bootstrapped medians are taken as normal. Their spread
    is each record's ``speedup_noise``, the width that measuring the same prompts again would give, as a share; where
    that is not recorded, the 95% interval's, which is wider, as it covers other prompts too. All are widened together
    (Bonferroni), so that of two runs of the same thing 19 in 20 show no change anywhere.
    """
    olds, news = ({(r["method"], r["workload"]): r for r in each["results"]} for each in (a, b))
    pairs = {key: (olds.get(key), news.get(key)) for key in [*olds, *news]}
    judged = sum(_why_not(old, new) == "" for old, new in pairs.values() if old and new)
    z = NormalDist().inv_cdf(1 - LEVEL / (2 * max(judged, 1)))
    found = [_change(key, old, new, z) for key, (old, new) in pairs.items()]
    return [change for change in found if change is not None]


def _change(key: tuple[str, str], old: Record | None, new: Record | None, z: float) -> Change | None:
    if old is None or new is None:
        return Change(*key, "only in B" if old is None else "only in A")
    speeds = old.get("speedup"), new.get("speedup")
    if bool(old["equal"]) != bool(new["equal"]):
        return Change(*key, "equality lost" if old["equal"] else "equality gained", *speeds)
    if key[0] == old["baseline"] == new["baseline"]:
        return None
    if why := _why_not(old, new):
        return Change(*key, "not judged", *speeds, why=why)
    ratio, spread = new["speedup"] / old["speedup"], math.exp(z * math.hypot(_deviation(old), _deviation(new)))
    low, high = ratio / spread, ratio * spread
    kind: Kind = "faster" if low > 1 else "slower" if high < 1 else "within noise"
    return Change(*key, kind, *speeds, *(round(x, 4) for x in (ratio, low, high)))


def _why_not(old: Record, new: Record) -> str:
    """Why two records' speedups cannot be compared; empty where they can."""
    for name in ("baseline", "prompts", "tokens"):
        if old.get(name) != new.get(name):
            return f"other {name}: {old.get(name)} and {new.get(name)}"
    for record in (old, new):
        if not all(record.get(name) for name in ("speedup", "speedup_low", "speedup_high")):
            return "no speed was measured" if record["equal"] else "its tokens are not equal"
        if record.get("speedup_noise") is None and not record["speedup_low"] < record["speedup_high"]:
            return "no interval: too few prompts or repeats"
    return ""


def _deviation(record: Record) -> float:
    """Of the speedup's logarithm: from what measuring alone leaves unsure, or from the interval over prompts."""
    noise = record.get("speedup_noise")
    width: float = math.log(record["speedup_high"] / record["speedup_low"]) if noise is None else noise
    return width / (2 * NormalDist().inv_cdf(0.975))
