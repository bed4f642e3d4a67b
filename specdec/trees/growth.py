"""Trees grown best first: always the most probable path that is not in the tree yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import cast

import numpy as np
from jaxtyping import Float32, Int
from numba import njit

Successors = Callable[[list[int]], tuple[Iterable[int], Iterable[float]]]


def grow(
    root: int, successors: Successors, nodes: int, depth: int, width: int, least: float
) -> tuple[Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"], Float32[np.ndarray, " nodes"]]:
    """The best tree within a budget of a drafter that can be asked what may follow a path.

    Args:
        root: the last committed token.
        successors: given a path's tokens, the root's first, the tokens that may follow and the probability of each
            given the path. Asked once for each node that may have children, best first. Of a token given twice the
            first counts; a NaN is no guess.
        nodes: guessed nodes at most; the root does not count.
        depth: guessed tokens on one path at most.
        width: children of one node at most.
        least: path probability, compared as float32, below which a node is left out.

    Returns:
        tokens, parents and path probability, in the order of growth. Of equal paths the one offered first comes first.
    """
    paths, parents, probability, children = [[root]], [-1], [np.float32(1)], [0]
    offers: list[tuple[np.float32, int, int, int]] = []
    floor = np.float32(least)

    def offer(node: int) -> None:
        seen = set()
        for rank, (token, conditional) in enumerate(zip(*successors(paths[node]), strict=True)):
            path = probability[node] * np.float32(conditional)
            if path >= floor and token not in seen:
                heappush(offers, (-path, node, rank, int(token)))
            seen.add(token)

    if nodes > 0 and depth > 0:
        offer(0)
    while offers and len(paths) <= nodes:
        negative, parent, _, token = heappop(offers)
        if children[parent] >= width:
            continue
        children[parent] += 1
        paths.append([*paths[parent], token])
        parents.append(parent)
        probability.append(-negative)
        children.append(0)
        if len(paths) <= nodes and len(paths[-1]) <= depth:
            offer(len(paths) - 1)
    tokens = np.array([path[-1] for path in paths], np.int64)
    return tokens, np.array(parents, np.int64), np.array(probability, np.float32)


def grow_adjacency(
    matrix: Int[np.ndarray, "vocab k"],
    rank_probability: Float32[np.ndarray, "levels k"],
    root: int,
    nodes: int,
    depth: int,
    width: int,
    least: float,
) -> tuple[Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"], Float32[np.ndarray, " nodes"]]:
    """``grow`` where what may follow a token is its row of a matrix, as in Token Recycling.

    Args:
        matrix: int32; the tokens that may follow each token, by rank. A negative entry is empty, a repeated one counts
            at its first rank.
        rank_probability: of the entry of each rank given that its parent is accepted: row 0 for the root's children,
            row 1 for theirs; the last row serves every deeper level.
        root: the last committed token. A token without a row has no children.
        nodes, depth, width, least: as for ``grow``.
    """
    budget = nodes, depth, width, np.float32(least)
    return cast(tuple[np.ndarray, np.ndarray, np.ndarray], _grow(matrix, rank_probability, root, *budget))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow(
    matrix: np.ndarray,
    rank_probability: np.ndarray,
    root: int,
    nodes: int,
    depth: int,
    width: int,
    least: np.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = max(nodes, 0) + 1
    tokens, parents, probability = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.float32)
    children, level = np.zeros(n, np.int64), np.zeros(n, np.int64)
    tokens[0], parents[0], probability[0] = root, -1, 1.0
    offers = [(np.float32(0), 0, 0)]  # negated path probability, parent, rank
    offers.pop()
    size, newest = 1, 0
    while size < n:
        if newest >= 0 and level[newest] < depth and 0 <= tokens[newest] < len(matrix):
            row = matrix[tokens[newest]]
            conditional = rank_probability[min(level[newest], len(rank_probability) - 1)]
            for rank, token in enumerate(row):
                path = probability[newest] * conditional[rank]
                if token >= 0 and path >= least and token not in row[:rank]:
                    heappush(offers, (-path, newest, rank))
        if len(offers) == 0:
            break
        negative, parent, rank = heappop(offers)
        newest = -1
        if children[parent] < width:
            newest, size = size, size + 1
            children[parent] += 1
            tokens[newest] = matrix[tokens[parent], rank]
            parents[newest], probability[newest], level[newest] = parent, -negative, level[parent] + 1
    return tokens[:size], parents[:size], probability[:size]
