"""Trees grown from a model's logits, level by level: the likeliest ones, and what to expect of sampled ones.

As in ``trees.sampling``, a growth is a generator: it yields a ``Level``, the nodes that have been fed or are to be, is
sent what was ``Read`` there, and goes on; its value is the ``Draft``. So one pass serves many trees.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from specdec.core import Law
from specdec.kernels.topk import topk
from specdec.trees.sampling import Growth, Level


class Draft(NamedTuple):
    """A grown tree; of the attributes of a ``DraftTree``, those that its growth knows."""

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    probability: Float32[np.ndarray, " nodes"]
    q: Float[Tensor, "nodes vocab"] | None = None
    law: Law | None = None


class Read(NamedTuple):
    """What a pass over a tree's newest nodes says.

    Attributes:
        logits: after each of them.
        chance: that the last of them is accepted if its parent is, by an acceptance head; 1 where there is none.
    """

    logits: Float[Tensor, "level vocab"]
    chance: float = 1.0


Candidate = tuple[float, int, int]  # path probability, parent, token
Drafting = Generator[Level, Read, Draft]


def advance(growth: Drafting, logits: Float[Tensor, "level vocab"] | None = None, chance: float = 1.0) -> Level | Draft:
    """The next level of a growth, or what has grown."""
    try:
        # A growth that begins is sent nothing.
        return growth.send(None if logits is None else Read(logits, chance))  # type: ignore[arg-type]
    except StopIteration as end:
        draft: Draft = end.value
        return draft


def likeliest(root: int, branching: Sequence[int], width: int, least: float = 0.0) -> Drafting:
    """Every node at depth d gets its ``branching[d]`` likeliest children, of which a level keeps the ``width`` best.

    Paths less likely than ``least`` are left out. A branching of ones is a greedy chain, one as wide as the levels a
    beam search.
    """
    tokens, parents, paths, start = [root], [-1], [1.0], 0
    for k in branching:
        logits, _ = yield Level(np.array(tokens), np.array(parents), start)
        found = _successors(logits, start, paths[start:], k, least)[:width]
        if not found:
            break
        start = len(tokens)
        _add(found, paths, parents, tokens)
    return Draft(np.array(tokens), np.array(parents), np.array(paths, np.float32))


def best_first(root: int, nodes: int, width: int, depth: int, least: float = 0.0) -> Drafting:
    """The ``nodes`` likeliest paths there are, as far as ``width`` expansions at each level find them.

    Of each level's candidates the ``width`` likeliest are fed, and ``width`` candidates of each come into the pool, as
    long as any of them is among the best; then the best of the pool are the tree. EAGLE-2 (Li et al. 2024,
    arXiv 2406.16858) drafts so.
    """
    tokens, parents, paths, start = [root], [-1], [1.0], 0  # of what is fed
    pool = list[Candidate]()
    for _ in range(depth):
        logits, _ = yield Level(np.array(tokens), np.array(parents), start)
        found = _successors(logits, start, paths[start:], width, least)
        # Of equals the first found comes first, so that no node stands before its parent.
        pool = sorted([*pool, *found], key=lambda each: (-each[0], each[1]))[:nodes]
        expanded = [each for each in pool if each[1] >= start][:width]
        if not expanded:
            break
        start = len(tokens)
        _add(expanded, paths, parents, tokens)
    fed = {pair: node for node, pair in enumerate(zip(parents, tokens, strict=True))}
    place = {0: 0} | {fed[parent, token]: i for i, (_, parent, token) in enumerate(pool, 1) if (parent, token) in fed}
    return Draft(
        np.array([root, *(token for *_, token in pool)]),
        np.array([-1, *(place[parent] for _, parent, _ in pool)]),
        np.array([1.0, *(path for path, *_ in pool)], np.float32),
    )


def _add(found: Iterable[Candidate], paths: list[float], parents: list[int], tokens: list[int]) -> None:
    """Put candidates behind the nodes there are."""
    for path, parent, token in found:
        paths.append(path)
        parents.append(parent)
        tokens.append(token)


def _successors(
    logits: Float[Tensor, "level vocab"], start: int, paths: Sequence[float], k: int, least: float
) -> list[Candidate]:
    """The ``k`` likeliest tokens after each node from ``start`` on whose paths are likely enough, best first."""
    tokens = topk(logits, min(k, logits.shape[1]))
    chance = (logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)).exp().clamp(max=1)
    chance = chance * chance.new_tensor(paths)[:, None]
    rows = zip(chance.tolist(), tokens.tolist(), strict=True)
    found = [(path, start + i, token) for i, row in enumerate(rows) for path, token in zip(*row, strict=True)]
    return sorted((each for each in found if each[0] >= least and each[0] > 0), key=lambda each: -each[0])


def sampled(growth: Growth, least: float = 0.0) -> Drafting:
    """A sampled tree with what to expect of its nodes; it ends where that falls below ``least``.

    A drafter that gives its likeliest token a probability f is taken to be right with f, and its next siblings to be
    right with f where those before them were wrong. Whether a sampled node is worth verifying must not depend on which
    token it is, or the tree is no longer distributed as its law says: so a node's estimate depends on its ancestors and
    its place among its siblings alone.
    """
    level, sure = next(growth), list[float]()
    while True:
        logits = None
        if max(_hopes(level.parents, sure)[level.start :], default=0.0) >= least:
            logits, _ = yield level
            sure += logits.softmax(-1).amax(-1).tolist()
        try:
            level = growth.send(logits)
        except StopIteration as end:
            tokens, parents, q, _ = end.value
            return Draft(tokens, parents, np.array(_hopes(parents, sure), np.float32), q, "swor")


def _hopes(parents: Int[np.ndarray, " nodes"], sure: Sequence[float]) -> list[float]:
    """The estimate of each node's path, where ``sure`` is the greatest probability after each inner node."""
    hopes, left = [1.0], list(sure)
    for parent in parents[1:].tolist():
        hopes.append(hopes[parent] * left[parent])
        left[parent] *= 1 - sure[parent]
    return hopes


def judged(root: int, depth: int, least: float, generator: torch.Generator | None) -> Drafting:
    """A chain of which a head judges each node once it has been read; a path less likely than ``least`` ends it.

    The token after that one has come with the same pass, and belongs to the chain. Whether a node is there hangs on
    those before it, so that a sampled chain stays one; and so does the estimate of the last, which nobody has read.

    Args:
        generator: draws the tokens; None where the likeliest are chosen.
    """
    tokens, paths, laws = [root], [1.0], list[Tensor]()
    while len(tokens) <= depth:
        logits, chance = yield Level(np.array(tokens), np.arange(-1, len(tokens) - 1), len(tokens) - 1)
        laws.append(logits[-1].float().softmax(-1))
        if len(tokens) > 1:
            paths[-1] = paths[-2] * chance
        tokens.append(int(laws[-1].argmax() if generator is None else laws[-1].multinomial(1, generator=generator)))
        paths.append(paths[-1] * float(laws[-1].max()))
        if paths[-2] < least:
            break
    parents, probability = np.arange(-1, len(tokens) - 1), np.array(paths, np.float32)
    if generator is None:
        return Draft(np.array(tokens), parents, probability)
    return Draft(np.array(tokens), parents, probability, torch.stack([*laws, laws[-1]]), "swor")  # a leaf's is not read


def fitted(branching: Sequence[int], nodes: int, depth: int, width: int) -> list[int]:
    """As many levels of a branching as a budget has room for, the last of them narrower if need be."""
    fits, level = list[int](), 1
    for k in branching[:depth]:
        k = min(k, width, nodes // level)
        if k < 1:
            break
        level *= k
        nodes -= level
        fits.append(k)
    return fits


def newest(level: Level) -> Int[np.ndarray, "level depth"]:
    """The paths to a level's newest nodes, all equally deep: their tokens after the root's."""
    paths = []
    for node in range(level.start, len(level.tokens)):
        path = list[int]()
        while node > 0:
            path.insert(0, int(level.tokens[node]))
            node = int(level.parents[node])
        paths.append(path)
    return np.array(paths, np.int64)
