"""Trees as flat arrays: ``tokens``, ``parents`` (parents first, -1 for the root, node 0) and path ``probability``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.trees.draw import draw_svg, draw_text
    from specdec.trees.graph import to_networkx
    from specdec.trees.growth import grow, grow_adjacency
    from specdec.trees.path import child, follow, greedy_path
    from specdec.trees.shape import ancestor_matrix, ancestor_words, depths, is_chain, lay_out, positions
    from specdec.trees.soundness import fault
    from specdec.trees.subtree import below, prune, select
    from specdec.trees.template import expand_template
    from specdec.trees.union import merge

__all__ = [
    "ancestor_matrix",
    "ancestor_words",
    "below",
    "child",
    "depths",
    "draw_svg",
    "draw_text",
    "expand_template",
    "fault",
    "follow",
    "greedy_path",
    "grow",
    "grow_adjacency",
    "is_chain",
    "lay_out",
    "merge",
    "positions",
    "prune",
    "select",
    "to_networkx",
]

# A function is loaded when it is first asked for: most are compiled by numba, which is slow to import.
_MODULES = {
    "draw": ("draw_svg", "draw_text"),
    "graph": ("to_networkx",),
    "growth": ("grow", "grow_adjacency"),
    "path": ("child", "follow", "greedy_path"),
    "shape": ("ancestor_matrix", "ancestor_words", "depths", "is_chain", "lay_out", "positions"),
    "soundness": ("fault",),
    "subtree": ("below", "prune", "select"),
    "template": ("expand_template",),
    "union": ("merge",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            function = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = function
            return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
