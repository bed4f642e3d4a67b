"""The same budget at every step."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.core import Budget, Context, DraftTree


class FixedPolicy:
    """Always asks for trees of at most ``nodes`` guesses, ``depth`` deep and ``width`` wide at each node.

    Raises:
        ValueError: for a negative number, or nodes without depth or width.
    """

    def __init__(self, nodes: int, depth: int = 8, width: int = 8, least: float = 0.0) -> None:
        if min(nodes, depth, width) < 0 or (nodes and not (depth and width)):
            raise ValueError(
                f"FixedPolicy(nodes={nodes}, depth={depth}, width={width}): give positive numbers, or nodes=0"
            )
        self.fixed = Budget(nodes, depth, width, least)

    def budget(self, contexts: Sequence[Context]) -> list[Budget]:
        """The fixed budget for each context."""
        return [self.fixed] * len(contexts)

    def trim(self, contexts: Sequence[Context], trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Everything that was drafted."""
        return list(trees)
