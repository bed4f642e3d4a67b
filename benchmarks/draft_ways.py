"""The ways to generate with a draft that ``drafts.py`` compares: how much is drafted, in which shape, judged how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdec.core import Policy
from specdec.policies import FixedPolicy, ThresholdPolicy

PLAIN, RIVAL = "plain", "assisted"
AUTO = "auto"
FIVE = (("num_assistant_tokens", 5), ("assistant_confidence_threshold", 0.0))
# What is compared unless all is asked for; of them, those that there are at a temperature.
USUAL = (
    PLAIN,
    RIVAL,
    f"{RIVAL}, 5 guesses",
    f"{RIVAL}, own layers",
    "chain, 4 nodes",
    "threshold 0.6",
    "threshold 0.6, head",
    "auto policy, best-first",
    "best-first, 6 nodes",
    "best-first, 12 nodes",
    "chain, 6 nodes",
    "rsd-s 3 x 2, swor, 6 nodes",
    "rsd-s 3 x 2, traversal, 6 nodes",
)
SHAPES = ((3, 2, (3, 1)), (4, 3, (4, 1, 1)))  # of trees: paths, depth, and branching of as many nodes


@dataclass(frozen=True)
class Way:
    """One way to generate with a draft.

    Attributes:
        tree: what is drafted, see ``SmallModelDrafter``; "" where transformers does it.
        policy: how much of it; "auto" for what pays, as measured, and then the drafter is thrifty too.
        rule: of ``RejectionVerifier``; "" to sample and match.
        width: paths of a tree.
        branching: children at each depth.
        head: whether an acceptance head judges the guesses.
        assisted: settings of transformers' assisted generation; None where that has no part in it.
        kernels: whether our CPU kernels are in target and draft.
        together: whether its speed is taken with several prompts at once too.
    """

    tree: Any = ""
    policy: Policy | str | None = None
    rule: Any = ""
    width: int = 4
    branching: tuple[int, ...] = (1,)
    head: bool = False
    assisted: tuple[tuple[str, Any], ...] | None = None
    kernels: bool = True
    together: bool = False


def ways(temperature: float, every: bool = True) -> dict[str, Way]:
    """The ways at a temperature, all or the usual; those whose names end alike in "nodes" verify as many nodes.

    Where tokens are sampled, "best-first" trees are judged by sample and match.
    """
    found = _ways(temperature)
    return {name: way for name, way in found.items() if every or name in USUAL}


def _ways(temperature: float) -> dict[str, Way]:
    found = {PLAIN: Way(together=True), RIVAL: Way(assisted=()), f"{RIVAL}, 5 guesses": Way(assisted=FIVE)}
    found[f"{RIVAL}, own layers"] = Way(assisted=(), kernels=False)
    rule = "block" if temperature else ""
    for guesses in (2, 4, 6, 12):
        found[f"chain, {guesses} nodes"] = Way("chain", FixedPolicy(guesses, guesses, 1), rule, together=guesses == 4)
    if temperature:
        found["chain, chain rule, 6 nodes"] = Way("chain", FixedPolicy(6, 6, 1), "chain")
    for threshold in (0.6, 0.9):
        found[f"threshold {threshold}"] = Way("chain", ThresholdPolicy(threshold, longest=12), rule)
        found[f"threshold {threshold}, head"] = Way(
            "chain", ThresholdPolicy(threshold, longest=12, lag=1), rule, head=True
        )
    found["auto policy, chain"] = Way("chain", AUTO, rule)
    found["auto policy, best-first"] = Way("best-first", AUTO)
    if temperature:
        found["auto policy, rsd-s, traversal"] = Way("rsd-s", AUTO, "traversal", 3)
    return found | (_sampled() if temperature else _likeliest())


def _likeliest() -> dict[str, Way]:
    found = {}
    for width, depth, _ in SHAPES:
        nodes = width * depth
        found[f"beam {width} x {depth}, {nodes} nodes"] = Way("beam", FixedPolicy(nodes, depth, width), width=width)
        best = FixedPolicy(nodes, depth + 1, nodes)
        found[f"best-first, {nodes} nodes"] = Way("best-first", best, width=width, together=nodes == 6)
    return found


def _sampled() -> dict[str, Way]:
    found = {}
    for width, depth, branching in SHAPES:
        nodes = width * depth
        policy = FixedPolicy(nodes, depth, width)
        for rule in ("swor", "traversal"):
            together = (rule, nodes) == ("traversal", 6)
            found[f"rsd-s {width} x {depth}, {rule}, {nodes} nodes"] = Way(
                "rsd-s", policy, rule, width, (1,), together=together
            )
        for tree in ("rsd-c", "iid"):
            found[f"{tree}, traversal, {nodes} nodes"] = Way(tree, policy, "traversal", branching=branching)
    return found
