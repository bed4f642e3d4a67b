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
    """A grown tree; of the attributes of a ``DraftTree``, those that its growth knows.

    Attributes:
        ids: tokens that ``q`` is of, where it is not of all.
    """

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    probability: Float32[np.ndarray, " nodes"]
    q: Float[Tensor, "nodes vocab"] | None = None
    law: Law | None = None
    ids: Int[np.ndarray, " vocab"] | None = None


class Read(NamedTuple):
    """What a pass over a tree's newest nodes says.

    Attributes:
        logits: after each of them.
        chance: that the last of them is accepted if its parent is, by an acceptance head; 1 where there is none.
        ids: tokens that the logits are of, where they are not of all.
    """

    logits: Float[Tensor, "level vocab"]
    chance: float = 1.0
    ids: Int[np.ndarray, " vocab"] | None = None


Candidate = tuple[float, int, int]  # path probability, parent, token
Drafting = Generator[Level, Read, Draft]


def advance(
    growth: Drafting,
    logits: Float[Tensor, "level vocab"] | None = None,
    chance: float = 1.0,
    ids: Int[np.ndarray, " vocab"] | None = None,
) -> Level | Draft:
    """The next level of a growth, or what has grown."""
    try:
        # A growth that begins is sent nothing.
        return growth.send(None if logits is None else Read(logits, chance, ids))  # type: ignore[arg-type]
    except StopIteration as end:
        draft: Draft = end.value
        return draft


def pays(sums: Sequence[float], cost: float) -> bool:
    """Whether one more level promises more tokens for its time than the tree so far, with its pass of the target.

    It is taken to be less likely than the last one as that was less likely than the one before.

    Args:
        sums: path probabilities added up, of the root alone, which is 1, and of each level so far: how many of its
            tokens are likely to be accepted.
        cost: what a level takes, in passes of the target; 0 where every one pays.
    """
    if not cost or len(sums) == 1:
        return True
    return sums[-1] > 0 and sums[-1] ** 2 / sums[-2] * (1 + cost * (len(sums) - 1)) > cost * sum(sums)


def likeliest(root: int, branching: Sequence[int], width: int, least: float = 0.0, cost: float = 0.0) -> Drafting:
    """Every node at depth d gets its ``branching[d]`` likeliest children, of which a level keeps the ``width`` best.

    Paths less likely than ``least`` are left out, and levels that do not pay their ``cost``. A branching of ones is a
    greedy chain, one as wide as the levels a beam search.
    """
    tokens, parents, paths, start, sums = [root], [-1], [1.0], 0, [1.0]
    for k in branching:
        if not pays(sums, cost):
            break
        read = yield Level(np.array(tokens), np.array(parents), start)
        found = _successors(read, start, paths[start:], k, least)[:width]
        if not found:
            break
        start = len(tokens)
        _add(found, paths, parents, tokens)
        sums.append(sum(paths[start:]))
    return Draft(np.array(tokens), np.array(parents), np.array(paths, np.float32))


def best_first(root: int, nodes: int, width: int, depth: int, least: float = 0.0, cost: float = 0.0) -> Drafting:
    """The ``nodes`` likeliest paths there are, as far as ``width`` expansions at each level find them.

    Of each level's candidates the ``width`` likeliest are fed, and ``width`` candidates of each come into the pool, as
    long as any of them is among the best, and a level pays its ``cost``; then the best of the pool are the tree.
    EAGLE-2 (Li et al. 2024, arXiv 2406.16858) drafts so.
    """
    tokens, parents, paths, start, sums = [root], [-1], [1.0], 0, [1.0]  # of what is fed
    pool = list[Candidate]()
    for _ in range(depth):
        if not pays(sums, cost):
            break
        read = yield Level(np.array(tokens), np.array(parents), start)
        found = _successors(read, start, paths[start:], width, least)
        # Of equals the first found comes first, so that no node stands before its parent.
        pool = sorted([*pool, *found], key=lambda each: (-each[0], each[1]))[:nodes]
        expanded = [each for each in pool if each[1] >= start][:width]
        if not expanded:
            break
        start = len(tokens)
        _add(expanded, paths, parents, tokens)
        sums.append(sum(paths[start:]))
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


def _successors(read: Read, start: int, paths: Sequence[float], k: int, least: float) -> list[Candidate]:
    """The ``k`` likeliest tokens after each node from ``start`` on whose paths are likely enough, best first."""
    best = topk(read.logits, min(k, read.logits.shape[1]))
    chances = read.logits.softmax(-1).gather(1, best).tolist()
    tokens = best.tolist() if read.ids is None else read.ids[best.cpu().numpy()].tolist()
    rows = zip(paths, chances, tokens, strict=True)
    found = [
        (path * chance, start + i, token)
        for i, (path, *row) in enumerate(rows)
        for chance, token in zip(*row, strict=True)
    ]
    return sorted((each for each in found if each[0] >= least and each[0] > 0), key=lambda each: -each[0])


def sampled(growth: Growth, least: float = 0.0, cost: float = 0.0) -> Drafting:
    """A sampled tree with what to expect of its nodes; it ends where that falls below ``least``.

    A drafter that gives its likeliest token a probability f is taken to be right with f, and its next siblings to be
    right with f where those before them were wrong. Whether a sampled node is worth verifying must not depend on which
    token it is, or the tree is no longer distributed as its law says: so a node's estimate depends on its ancestors and
    its place among its siblings alone. The same holds of whether it has children, which hangs on those estimates.

    Args:
        cost: of drafting a level, see ``pays``; if that is anything, each of its nodes costs ``least`` more, as all
            nodes of a sampled tree are verified.
    """
    level, sure, sums = next(growth), list[float](), list[float]()
    ids: Int[np.ndarray, " vocab"] | None = None
    while True:
        logits, newest = None, _hopes(level.parents, sure)[level.start :]
        sums.append(sum(newest))
        if max(newest, default=0.0) >= least and pays(sums, cost and cost + least * len(newest)):
            logits, _, ids = yield level._replace(tokens=_named(level.tokens, ids))
            sure += logits.softmax(-1).amax(-1).tolist()
        try:
            level = growth.send(logits)
        except StopIteration as end:
            tokens, parents, q, _ = end.value
            return Draft(_named(tokens, ids), parents, np.array(_hopes(parents, sure), np.float32), q, "swor", ids)


def _named(tokens: Int[np.ndarray, " nodes"], ids: Int[np.ndarray, " vocab"] | None) -> Int[np.ndarray, " nodes"]:
    """Tokens of nodes that were drawn by their place among ``ids``; the root's is what it is."""
    return tokens if ids is None else np.append(tokens[:1], ids[tokens[1:]])


def _hopes(parents: Int[np.ndarray, " nodes"], sure: Sequence[float]) -> list[float]:
    """The estimate of each node's path, where ``sure`` is the greatest probability after each inner node."""
    hopes, left = [1.0], list(sure)
    for parent in parents[1:].tolist():
        hopes.append(hopes[parent] * left[parent])
        left[parent] *= 1 - sure[parent]
    return hopes


def judged(root: int, depth: int, least: float, generator: torch.Generator | None, cost: float = 0.0) -> Drafting:
    """A chain of which a head judges each node once it has been read; a path less likely than ``least`` ends it.

    The token after that one has come with the same pass, and belongs to the chain. Whether a node is there hangs on
    those before it, so that a sampled chain stays one; and so does the estimate of the last, which nobody has read.

    Args:
        generator: draws the tokens; None where the likeliest are chosen.
        cost: of drafting a level, see ``pays``.
    """
    tokens, paths, laws = [root], [1.0], list[Tensor]()
    ids: Int[np.ndarray, " vocab"] | None = None
    while len(tokens) <= depth and pays(paths, cost):
        logits, chance, ids = yield Level(np.array(tokens), np.arange(-1, len(tokens) - 1), len(tokens) - 1)
        laws.append(logits[-1].float().softmax(-1))
        if len(tokens) > 1:
            paths[-1] = paths[-2] * chance
        drawn = int(laws[-1].argmax() if generator is None else laws[-1].multinomial(1, generator=generator))
        tokens.append(drawn if ids is None else int(ids[drawn]))
        paths.append(paths[-1] * float(laws[-1].max()))
        if paths[-2] < least:
            break
    parents, probability = np.arange(-1, len(tokens) - 1), np.array(paths, np.float32)
    if generator is None:
        return Draft(np.array(tokens), parents, probability)
    q = torch.stack([*laws, laws[-1]])  # a leaf's is not read
    return Draft(np.array(tokens), parents, probability, q, "swor", ids)


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
