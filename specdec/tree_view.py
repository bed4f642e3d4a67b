"""A step of a trace as a tree for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from specdec.trace import Step

LEAST = 0.005  # what the target thought less likely is not worth a line


def draw(step: Step, text: Callable[[int], str], style: Callable[[str], str]) -> Tree:
    """The guesses below the last committed token, those that came true ticked, and what the target wanted instead.

    Args:
        step: of a trace.
        text: what a token says.
        style: rich's, of a drafter.
    """
    branches = [Tree(Text(printable(text(step.tokens[0]))), guide_style="dim")]
    for node, parent in enumerate(step.parents):
        if node:
            branches.append(branches[parent].add(_guess(step, node, text, style)))
    for node in step.path:
        for label in _wanted(step, node, text):
            branches[node].add(label)
    return branches[0]


def _guess(step: Step, node: int, text: Callable[[int], str], style: Callable[[str], str]) -> Text:
    accepted = node in step.path
    label = Text(printable(text(step.tokens[node])), f"{style(step.source[node])} {'bold' if accepted else ''}")
    label.append(f"  {step.probability[node]:.2f}", "not bold default")
    label.append(_target(step, step.parents[node], step.tokens[node]), "not bold default")
    return label.append(" ✓", "bold") if accepted else label


def _wanted(step: Step, node: int, text: Callable[[int], str]) -> list[Text]:
    """What the target thought of after a node, other than what had been guessed; its choice first."""
    guessed = {token for token, parent in zip(step.tokens, step.parents, strict=True) if parent == node}
    last = node == step.path[-1] and bool(step.committed)
    own = [step.committed[-1]] if last and step.committed[-1] not in guessed else []
    thought = step.wanted[node] if step.wanted else []
    others = [token for token in thought if token not in {*guessed, *own} and _likely(step, node, token) >= LEAST]
    labels = [Text(f"{printable(text(token))}{_target(step, node, token)} +", "bold") for token in own]
    return labels + [Text(f"{printable(text(token))}{_target(step, node, token)} ○", "dim") for token in others]


def _target(step: Step, parent: int, token: int) -> str:
    """The target's probability of a token after a node, where it was recorded."""
    known = bool(step.wanted and step.wanted_probability) and token in step.wanted[parent]
    return f" → {_likely(step, parent, token):.2f}" if known else ""


def _likely(step: Step, parent: int, token: int) -> float:
    return step.wanted_probability[parent][step.wanted[parent].index(token)] if step.wanted_probability else 1.0


def printable(text: str) -> str:
    """A token's text with spaces that can be seen, and escapes for what does not print."""
    return harmless(text, "").replace(" ", "␣")


def harmless(text: str, kept: str = "\n\t") -> str:
    """A text with escapes for what does not print, but for what is ``kept``: a terminal would obey it."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
