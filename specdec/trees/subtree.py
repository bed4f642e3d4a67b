"""A part of a tree that is a tree again: which nodes to keep, and how they look once only they are left."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Float32, Int

from specdec.trees import subtree_numba as kernels


def prune(
    parents: Int[np.ndarray, " nodes"],
    probability: Float32[np.ndarray, " nodes"],
    nodes: int,
    depth: int,
    width: int,
    least: float,
) -> Int[np.ndarray, " kept"]:
    """The most probable part of a tree that a budget allows: ascending node indices, the root's among them.

    A path is no more probable than any part of it, so each node counts with the least probability on its path; then
    an ancestor never ranks behind its descendants and whatever is kept is a tree. Ties go to the lower index.

    Args:
        parents: of each node, parents first.
        probability: of each node's path; NaN is never kept.
        nodes: nodes kept at most, the root not counted.
        depth: guessed tokens on one path at most.
        width: children kept of one node at most.
        least: path probability, compared as float32, below which a node is dropped.
    """
    return cast(np.ndarray, kernels.prune(parents, probability, nodes, depth, width, np.float32(least)))


def select(
    tokens: Int[np.ndarray, " nodes"],
    parents: Int[np.ndarray, " nodes"],
    probability: Float32[np.ndarray, " nodes"],
    kept: Int[np.ndarray, " kept"],
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " kept"], Float32[np.ndarray, " kept"]]:
    """Tokens, parents and probability of the sub-tree of the nodes ``kept``: ascending and closed under parents."""
    return cast(tuple[np.ndarray, np.ndarray, np.ndarray], kernels.select(tokens, parents, probability, kept))


def below(parents: Int[np.ndarray, " nodes"], node: int) -> Int[np.ndarray, " kept"]:
    """A node and all its descendants: ascending node indices."""
    return cast(np.ndarray, kernels.below(parents, node))
