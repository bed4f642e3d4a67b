"""Every draft there can be and every way a rule can judge it, with their probabilities: what a rule's output law is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from specdec.core import DraftTree
from specdec.verifiers import rules

Laws = Callable[[tuple[int, ...]], torch.Tensor]


class Branches:
    """A ``Chance`` that follows a script of choices, then takes the first of each, and notes what else there was.

    Attributes:
        weight: how probable the choices were.
        others: scripts of the choices not taken.
    """

    def __init__(self, script: tuple[int, ...]) -> None:
        self.script, self.taken, self.weight = script, (), 1.0
        self.others: list[tuple[int, ...]] = []

    def accept(self, probability: float) -> bool:
        return self._choose([1 - probability, probability]) == 1

    def token(self, weights: torch.Tensor) -> int:
        return self._choose((weights / weights.sum()).tolist())

    def _choose(self, weights: Sequence[float]) -> int:
        if len(self.taken) < len(self.script):
            choice = self.script[len(self.taken)]
        else:
            choice, *others = (i for i, weight in enumerate(weights) if weight > 0)
            self.others += [(*self.taken, other) for other in others]
        self.taken += (choice,)
        self.weight *= weights[choice]
        return choice


def outcomes(run: Callable[[Branches], Any]) -> Iterator[tuple[float, Any]]:
    """What ``run`` may return, and how probably."""
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        chance = Branches(scripts.pop())
        result = run(chance)
        scripts += chance.others
        yield chance.weight, result


def random_laws(seed: int, vocab: int) -> Laws:
    """A law for every context, random and the same at every call; some have tokens of probability 0."""
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def law(context: tuple[int, ...]) -> torch.Tensor:
        if context not in known:
            rng = np.random.default_rng([seed, *context])
            weights = rng.dirichlet(np.full(vocab, 0.7)) * (rng.random(vocab) < 0.85)
            known[context] = torch.tensor(weights / weights.sum() if weights.sum() else np.eye(vocab)[0])
        return known[context]

    return law


def draws(q: torch.Tensor, k: int, law: str) -> Iterator[tuple[float, tuple[int, ...]]]:
    """All ordered draws of ``k`` tokens, fewer where q has not as many; "merged": independent, each token once."""
    if law == "merged":
        yield from ((weight, tuple(dict.fromkeys(tokens))) for weight, tokens in draws(q, k, "iid"))
        return
    q = q.tolist()
    if law == "iid":
        for tokens in itertools.product(range(len(q)), repeat=k):
            yield math.prod(q[x] for x in tokens), tokens
        return
    for tokens in itertools.permutations([x for x, mass in enumerate(q) if mass], min(k, int(np.count_nonzero(q)))):
        left, weight = 1.0, 1.0
        for x in tokens:
            weight, left = weight * q[x] / left, left - q[x]
        yield weight, tokens


def drafts(shape: Sequence[int], laws: Laws, law: str) -> Iterator[tuple[float, DraftTree]]:
    """All trees of which a node at depth d has ``shape[d]`` children, and how probably each is drawn."""

    def grow(tokens, parents, paths, node, end, depth):
        if depth == len(shape):
            yield 1.0, tokens, parents, paths
        elif node == end:
            yield from grow(tokens, parents, paths, node, len(tokens), depth + 1)
        else:
            for weight, children in draws(laws(paths[node]), shape[depth], law):
                if weight:
                    more = [*parents, *[node] * len(children)], [*paths, *((*paths[node], x) for x in children)]
                    for rest, *grown in grow([*tokens, *children], *more, node + 1, end, depth):
                        yield weight * rest, *grown

    for weight, tokens, parents, paths in grow([0], [-1], [()], 0, 1, 0):
        q = torch.stack([laws(path) for path in paths])
        n, said = len(tokens), "iid" if law == "iid" else "swor"
        yield weight, DraftTree(np.array(tokens), np.array(parents), np.ones(n, np.float32), ("",) * n, q, said)


def spelled(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The tokens after the root down to ``node``."""
    return () if node == 0 else (*spelled(tree, int(tree.parents[node])), int(tree.tokens[node]))


def judge(rule: Callable[..., Any], tree: DraftTree, target: Laws, chance: Any) -> tuple[int, tuple[int, ...]]:
    """How many guesses a rule accepts, and what is committed."""
    asked = [0]

    def law(node: int) -> torch.Tensor:
        asked.append(node)
        return target(spelled(tree, node))

    outcome = rules.decide(rule(tree, chance), law)
    node, token = outcome if isinstance(outcome, tuple) else (asked[-1], outcome)
    path = spelled(tree, node)
    return len(path), (*path, token)


def joint(target: Laws, vocab: int, length: int) -> np.ndarray:
    """The target's law of the next ``length`` tokens."""
    law = np.ones((vocab,) * length)
    for tokens in itertools.product(range(vocab), repeat=length):
        law[tokens] = math.prod(float(target(tokens[:i])[x]) for i, x in enumerate(tokens))
    return law


def output(
    rule: Callable[..., Any], trees: Iterable[tuple[float, DraftTree]], target: Laws, wanted: np.ndarray
) -> tuple[np.ndarray, float]:
    """The law of the tokens after the root, the target going on where a step ends; and how many guesses are accepted
    on average. ``wanted`` is what the law should be."""
    got, accepted = np.zeros_like(wanted), 0.0
    for drawn, tree in trees:
        for weight, (length, tokens) in outcomes(lambda chance, tree=tree: judge(rule, tree, target, chance)):
            mass = drawn * weight
            accepted += mass * length
            rest = wanted[tokens]
            got[tokens] += mass * (rest / rest.sum() if rest.sum() else np.full(rest.shape, np.nan))
    return got, accepted
