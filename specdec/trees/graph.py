"""Trees for networkx."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    import networkx


def to_networkx(
    tokens: Int[np.ndarray, " nodes"],
    parents: Int[np.ndarray, " nodes"],
    probability: Float[np.ndarray, " nodes"] | None = None,
) -> networkx.DiGraph:
    """The tree as a directed graph from the root down, over the node indices.

    Each node has the attribute ``token`` and, where it is given, ``probability``.
    """
    import networkx

    graph = networkx.DiGraph()
    for node, token in enumerate(tokens.tolist()):
        graph.add_node(node, token=token)
    graph.add_edges_from((parent, node) for node, parent in enumerate(parents.tolist()) if parent >= 0)
    if probability is not None:
        networkx.set_node_attributes(graph, dict(enumerate(probability.tolist())), "probability")
    return graph
