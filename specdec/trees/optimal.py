"""The shape of tree that accepts most for its size, and the size that gives most tokens per second."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int


class Shape(NamedTuple):
    """The form of a tree, without tokens; nodes stand in order of their value, the root first.

    Attributes:
        parents: of each node; -1 for the root.
        ranks: which of its parent's children each node is, from 0, as in an acceptance vector; -1 for the root.
        values: the chance that each node is accepted: 1 for the root, which stands for the token that every pass adds.
            Their sum is the expected tokens per step.
    """

    parents: Int[np.ndarray, " nodes"]
    ranks: Int[np.ndarray, " nodes"]
    values: Float64[np.ndarray, " nodes"]


def optimal_shape(acceptance: Float64[np.ndarray, " ranks"], nodes: int, depth: int) -> Shape:
    """The shape with the most expected tokens of all with so many nodes, the root counted, and at most so deep.

    A node's value is the product of the acceptance on its path. No node is worth more than its parent, so the nodes
    of greatest value are a tree, and none of its size has more: what Sequoia finds by dynamic programming (Chen et
    al. 2024, arXiv 2402.12374). The shape of fewer nodes is the beginning of the shape of more.

    Args:
        acceptance: chance that a child of each rank is the accepted one, given that its parent was.

    Raises:
        ValueError: no node, or acceptance that is not from 0 to 1 or sums to more than 1.
    """
    acceptance = np.asarray(acceptance, np.float64)
    if nodes < 1 or not (acceptance >= 0).all() or acceptance.sum() > 1 + 1e-9:
        raise ValueError(f"optimal_shape: got {nodes} nodes and acceptance {acceptance}; give chances that sum to <= 1")
    ranks = [rank for rank in np.argsort(-acceptance, kind="stable").tolist() if acceptance[rank] > 0]
    parents, chosen, values = [-1], [-1], [1.0]
    # Of what may come next: value, order of arrival, parent, its depth + 1, and which of the ranks from the best on.
    heap: list[tuple[float, int, int, int, int]] = []

    def offer(parent: int, level: int, place: int) -> None:
        if level <= depth and place < len(ranks):
            value = values[parent] * float(acceptance[ranks[place]])
            heapq.heappush(heap, (-value, len(parents) + len(heap), parent, level, place))

    offer(0, 1, 0)
    while heap and len(parents) < nodes:
        value, _, parent, level, place = heapq.heappop(heap)
        parents.append(parent)
        chosen.append(ranks[place])
        values.append(-value)
        offer(parent, level, place + 1)
        offer(len(parents) - 1, level + 1, 0)
    return Shape(np.array(parents), np.array(chosen), np.array(values))


def fastest_shape(
    acceptance: Float64[np.ndarray, " ranks"],
    passes: Float64[np.ndarray, " sizes"],
    level: float,
    depth: int,
) -> tuple[Shape, float]:
    """The shape with the most tokens per second, and how many that is.

    Args:
        acceptance: as of ``optimal_shape``.
        passes: seconds that the target takes for a tree of 1, 2, ... nodes, the root counted.
        level: seconds that drafting takes for each level of a tree.
        depth: levels at most, the root not counted.
    """
    best, most = optimal_shape(acceptance, 1, 0), 1 / float(passes[0])
    for levels in range(1, depth + 1):
        shape = optimal_shape(acceptance, len(passes), levels)
        speed = shape.values.cumsum() / (levels * level + np.asarray(passes)[: len(shape.values)])
        n = int(speed.argmax()) + 1
        if speed[n - 1] > most:
            best, most = Shape(*(array[:n] for array in shape)), float(speed[n - 1])
    return best, most
