"""The static tree of Token Recycling, "2.2.2": 80 nodes in 6 levels of 8, 21, 25, 15, 8 and 3."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

# "path:n" gives the node reached by that path of ranks n children, of ranks 0 to n - 1; "" is the root.
_CHILDREN = """
    :8
    0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1
    00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1
    000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1
    0000:3 0001:1 0002:1 0010:1 0100:1 1000:1
    00000:2 00010:1
"""


def paper_template() -> tuple[Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]]:
    """Parents and ranks of the template's nodes, level by level; node 0 is the root, with parent and rank -1."""
    place, parents, ranks = {"": 0}, [-1], [-1]
    for path, children in (entry.split(":") for entry in _CHILDREN.split()):
        for rank in range(int(children)):
            place[f"{path}{rank}"] = len(parents)
            parents.append(place[path])
            ranks.append(rank)
    return np.array(parents, np.int64), np.array(ranks, np.int64)
