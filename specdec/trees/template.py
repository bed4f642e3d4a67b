"""Trees of a fixed form, filled with tokens."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Int
from numba import njit


def expand_template(
    matrix: Int[np.ndarray, "vocab k"],
    template_parents: Int[np.ndarray, " template"],
    template_ranks: Int[np.ndarray, " template"],
    root: int,
) -> tuple[Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]]:
    """A template unfolded from ``root``: each node takes the token that follows its parent's, at the node's rank.

    A node is left out where the matrix has no such entry, where its parent is left out, or where an earlier child of
    the same parent took the same token.

    Args:
        matrix: the tokens that may follow each token, by rank; a negative entry is empty.
        template_parents: of each node, parents first, -1 for node 0, the root.
        template_ranks: of each node among what follows its parent; the root's is not read.
        root: the last committed token.

    Returns:
        tokens and parents of the tree, and the template's node that each of its nodes fills.
    """
    filled = _expand_template(matrix, template_parents, template_ranks, root)
    return cast(tuple[np.ndarray, np.ndarray, np.ndarray], filled)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _expand_template(
    matrix: np.ndarray, template_parents: np.ndarray, template_ranks: np.ndarray, root: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(template_parents)
    tokens, parents, kept = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    place = np.full(n, -1)  # each template node's place in the tree
    tokens[0], parents[0], kept[0], place[0], size = root, -1, 0, 0, 1
    for node in range(1, n):
        parent, rank = place[template_parents[node]], template_ranks[node]
        if parent < 0 or not (0 <= tokens[parent] < len(matrix) and 0 <= rank < matrix.shape[1]):
            continue
        token = matrix[tokens[parent], rank]
        if token >= 0 and not _guessed(tokens[:size], parents[:size], parent, token):
            tokens[size], parents[size], kept[size], place[node] = token, parent, node, size
            size += 1
    return tokens[:size], parents[:size], kept[:size]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _guessed(tokens: np.ndarray, parents: np.ndarray, parent: int, token: int) -> bool:
    """Whether ``parent`` has a child with ``token`` already."""
    for node in range(parent + 1, len(tokens)):  # noqa: SIM110 - a loop compiles, a generator does not
        if parents[node] == parent and tokens[node] == token:
            return True
    return False
