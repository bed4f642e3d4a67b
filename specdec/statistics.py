"""What a wrapped model has done so far: counts, time split, faults, and the level it runs at."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from typing import Any

from specdec.core import Verdict
from specdec.prometheus import exposition

SECONDS = ("prefill", "draft", "verify", "walk", "cache")
FAULTS_KEPT = 100
REPORTED = (
    "generations",
    "plain_generations",
    "steps",
    "tokens",
    "tokens_per_step",
    "drafted",
    "accepted",
    "acceptance_by_depth",
    "by_drafter",
    "by_rule",
    "drafts_ahead",
    "drafts_ahead_used",
    "reused_tokens",
    "seconds",
    "level",
    "reasons",
    "faults",
    "fault_count",
    "lossless",
)


class SpecdecWarning(UserWarning):
    """Something of ours could not be done as asked; the output is still right."""


class Stats:
    """Counts of one wrapped model over all its generations, until ``reset``.

    Attributes:
        steps: target passes that committed tokens, per sequence; the prompt's pass counts, as it commits one.
        tokens: tokens committed.
        drafted: guessed nodes verified.
        accepted: guessed nodes that became tokens.
        by_drafter: name -> {"drafted", "accepted"}.
        drafted_at_depth, accepted_at_depth: depth, from 1 -> steps that guessed, and that accepted, that deep.
        by_rule: rule of verification -> trees judged by it; "match" is sample and match. Prompts count as empty trees.
        drafts_ahead: times that the drafter was asked while the device was at a pass, for the step after it; a batch's
            rows together count once. ``drafts_ahead_used``: those of which that step's trees were taken.
        seconds: wall time by part: prefill, draft, verify (the target's passes), walk (choice and stopping rules),
            cache (moving kept KV rows). On a GPU, time not yet waited for shows where the host next waits: drafts ahead
            are taken out of verify.
        level: "tree", "chain" or "plain": what the model's self-test allows; None before it.
        reasons: why a lower level, or plain ``generate``, was used; each said once.
        faults: what drafters did wrong, the last hundred; ``fault_count`` counts all.
        lossless: whether everything used so far keeps the target's distribution.
        reused_tokens: of prompts, those whose KV rows were kept from earlier texts; ``Session`` and ``SessionPool`` do.
        sources: for the last generation, per row, the drafter that guessed each token; "" for the target alone.
        generations: calls of ``generate`` that speculated; ``plain_generations``: those passed to plain ``generate``.

    Args:
        parent: counts everything too; how one generation's counts reach the model's.
    """

    def __init__(self, parent: Stats | None = None) -> None:
        self.parent = parent
        self.level: str | None = None
        self.reasons: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Set every count to zero; the level and its reasons stay, being facts about the model."""
        self.generations = self.plain_generations = 0
        self.steps = self.tokens = self.drafted = self.accepted = 0
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        self.by_drafter: dict[str, dict[str, int]] = {}
        self.by_rule: Counter[str] = Counter()
        self.drafts_ahead = self.drafts_ahead_used = 0
        self.reused_tokens = 0
        self.faults: list[str] = []
        self.fault_count = 0
        self.lossless = True
        self.sources: list[list[str]] = []
        self._at_fault: set[str] = set()
        self.drafted_at_depth: Counter[int] = Counter()
        self.accepted_at_depth: Counter[int] = Counter()

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens per target pass and sequence; plain decoding has 1."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """For each depth, from 1: of the steps that guessed that deep, the share that accepted that deep."""
        deepest = max(self.drafted_at_depth, default=0)
        return [self.accepted_at_depth[d] / self.drafted_at_depth[d] for d in range(1, deepest + 1)]

    def clock(self, part: str) -> Clock:
        """A context that adds the time spent inside to ``seconds[part]``."""
        return Clock(self, part)

    def spend(self, part: str, seconds: float) -> None:
        """Add to the time of one part."""
        self.seconds[part] += seconds
        if self.parent is not None:
            self.parent.spend(part, seconds)

    def observe(self, verdict: Verdict) -> None:
        """Add one row's verdict to the counts."""
        guessed = not verdict.prompt and len(verdict.tree) > 1
        self.count(verdict, _depth(verdict.tree.parents.tolist()) if guessed else 0)

    def count(self, verdict: Verdict, depth: int) -> None:
        """Add a verdict on guesses that were so deep, here and at the parent; 0 where nothing was guessed."""
        if self.parent is not None:
            self.parent.count(verdict, depth)
        self.steps += 1
        self.tokens += len(verdict.tokens)
        if not depth:
            return
        accepted = len(verdict.path) - 1
        self.drafted += len(verdict.tree) - 1
        self.accepted += accepted
        for d in range(1, depth + 1):
            self.drafted_at_depth[d] += 1
        for d in range(1, accepted + 1):
            self.accepted_at_depth[d] += 1
        self._count_sources(verdict)

    def _count_sources(self, verdict: Verdict) -> None:
        source, known = verdict.tree.source, self.by_drafter
        for name in source[1:]:
            if name not in known:
                known[name] = {"drafted": 0, "accepted": 0}
            known[name]["drafted"] += 1
        for node in verdict.path[1:].tolist():
            known[source[node]]["accepted"] += 1

    def reuse(self, tokens: int) -> None:
        """Count tokens of a prompt that need not be read."""
        self.reused_tokens += tokens
        if self.parent is not None:
            self.parent.reuse(tokens)

    def ahead(self, drafted: bool = False, used: bool = False) -> None:
        """Count a draft that was made during a pass, or the use of one."""
        self.drafts_ahead += drafted
        self.drafts_ahead_used += used
        if self.parent is not None:
            self.parent.ahead(drafted, used)

    def judge(self, rule: str, trees: int = 1) -> None:
        """Count trees that a rule of verification has judged."""
        self.by_rule[rule] += trees
        if self.parent is not None:
            self.parent.judge(rule, trees)

    def reason(self, text: str) -> None:
        """Note why something is not done as asked; warn the first time it is said."""
        if self.parent is not None:
            self.parent.reason(text)
            self.reasons = self.parent.reasons
            return
        if text not in self.reasons:
            self.reasons.append(text)
            warnings.warn(f"specdec: {text}", SpecdecWarning, stacklevel=3)

    def fault(self, name: str, text: str) -> None:
        """Note what a drafter did wrong; warn the first time this drafter does something wrong."""
        known = name in self._at_fault
        self._at_fault.add(name)
        self.fault_count += 1
        self.faults = [*self.faults[1 - FAULTS_KEPT :], f"{name}: {text}"]
        if self.parent is not None:
            self.parent.fault(name, text)
        elif not known:
            warnings.warn(f"specdec: drafter {name}: {text}; going on without this guess", SpecdecWarning, stacklevel=3)

    def as_dict(self) -> dict[str, Any]:
        """Everything but ``sources``, as plain Python values, ready for JSON."""
        return {name: getattr(self, name) for name in REPORTED} | {"by_rule": dict(self.by_rule)}

    def prometheus(self) -> str:
        """The counts in Prometheus' text format, for a long-running program; docs/metrics.md names them."""
        return exposition(self)

    def __repr__(self) -> str:
        return (
            f"Stats(level={self.level!r}, tokens={self.tokens}, steps={self.steps}, "
            f"tokens_per_step={self.tokens_per_step:.2f}, accepted={self.accepted}/{self.drafted})"
        )


class Clock:
    """Adds the time between entering and leaving it to a part's, however it is left."""

    __slots__ = ("_part", "_start", "_stats")

    def __init__(self, stats: Stats, part: str) -> None:
        self._stats, self._part = stats, part

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._stats.spend(self._part, time.perf_counter() - self._start)


def _depth(parents: list[int]) -> int:
    """Of the deepest node; for trees as small as are verified, quicker than a call of compiled code."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)
