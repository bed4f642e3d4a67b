"""Several drafters' trees as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float32, Int

from specdec.trees import union_numba as kernels

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def merge(
    trees: Sequence[Arrays],
) -> tuple[
    Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"], Float32[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]
]:
    """The union of trees with one root: every path that some tree guesses, each once.

    A path that several trees guess has the largest of their probabilities. The first tree's nodes come first and in
    their own order, then what each later tree adds.

    Args:
        trees: ``(tokens, parents, probability)`` of each.

    Returns:
        tokens, parents, probability and, for each node, the index of the first tree that has it.

    Raises:
        ValueError: there is no tree, or two have different root tokens.
    """
    roots = {int(tokens[0]) for tokens, _, _ in trees}
    if len(roots) != 1:
        raise ValueError(f"merge needs trees with one root token, got {len(trees)} trees with roots {sorted(roots)}")
    tokens, parents, probability = (np.concatenate(arrays) for arrays in zip(*trees, strict=True))
    sizes = np.array([len(tree[0]) for tree in trees])
    *union, _ = kernels.merge(tokens, parents, probability, sizes)
    return cast(tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple(union))
