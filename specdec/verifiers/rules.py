"""The rules of exact verification: which path of a tree to accept, and which token comes after it.

A rule is a generator: it yields a node to ask for p, the target's law after that node, is sent it, and goes on. Rules
that walk ask for accepted nodes alone, one after another from the root down, and return the token after the last of
them. ``traversal`` looks ahead: it asks for whatever node it has to weigh, and returns the last accepted node and the
token after it.

In a sampled tree, ``tree.q[node]`` is the law that the first child of ``node`` was drawn from; siblings follow in the
order of the draw. p and q are as they were drawn from, after processors and warpers. Whatever q looks like, what is
committed is distributed as the target's own tokens: ``docs/verification.md`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from specdec import trees
from specdec.core import DraftTree

Walk = Generator[int, Float[Tensor, " vocab"], int]
Search = Generator[int, Float[Tensor, " vocab"], tuple[int, int]]


class Chance(Protocol):
    """Where a rule's decisions come from; each call is independent of all before."""

    def accept(self, probability: float) -> bool:
        """True with this probability; certainly for 1, never for 0."""
        ...

    def token(self, weights: Float[Tensor, " vocab"]) -> int:
        """A token, in proportion to its weight."""
        ...


class Drawn:
    """Chance by torch's global generators, which ``torch.manual_seed`` sets."""

    def accept(self, probability: float) -> bool:
        """See ``Chance``."""
        return float(torch.rand((), dtype=torch.float64)) < probability

    def token(self, weights: Float[Tensor, " vocab"]) -> int:
        """See ``Chance``."""
        return int(torch.multinomial(weights, 1))


def match(tree: DraftTree, chance: Chance) -> Walk:
    """Draw from p at each node, and descend while a child carries the token: right for any tree."""
    node = 0
    while True:
        token = chance.token((yield node))
        node = trees.child(tree.tokens, tree.parents, node, token)
        if node < 0:
            return token


def recursive(tree: DraftTree, chance: Chance) -> Walk:
    """Try each child in turn against what the children before it have left of p; if none is accepted, draw from that.

    On a chain this is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192), on independent siblings
    SpecInfer's rule (Miao et al. 2023, arXiv 2305.09781), and on siblings drawn without replacement recursive
    rejection sampling (Jeon et al. 2024, arXiv 2402.14160).
    """
    assert tree.q is not None, "a rule of rejection needs the law that the tree was drawn from"
    tokens, children = tree.tokens.tolist(), _children(tree)
    node = 0
    while True:
        p, q = (yield node), tree.q[node]
        for child in children[node]:
            x = tokens[child]
            if not q[x] > 0:
                continue  # q cannot have drawn it, so it proves nothing
            if chance.accept(_ratio(p, q, x)):
                node = child
                break
            p, q = _residual(p, q, 1.0)[0], _next_law(tree, q, x)
        else:
            return chance.token(p)


def traversal(tree: DraftTree, chance: Chance) -> Search:
    """Try whole paths, leaves first, and give up one node after another: never worse than ``recursive``.

    Traversal verification (Weng et al. 2025, arXiv 2505.12398). On a chain this is block verification (Sun et al.
    2024, arXiv 2403.10444).
    """
    assert tree.q is not None, "a rule of rejection needs the law that the tree was drawn from"
    laws, tokens, children = tree.q, tree.tokens.tolist(), _children(tree)

    def visit(node: int, alpha: float) -> Generator[int, Tensor, tuple[int, int] | None]:
        """The outcome if it lies at ``node`` or below; ``alpha`` is the odds of p to q on the way to it, at most 1."""
        if not children[node]:
            return (node, chance.token((yield node))) if chance.accept(alpha) else None
        p, q = (yield node), laws[node]
        for child in children[node]:
            x = tokens[child]
            if not q[x] > 0:
                continue
            outcome = yield from visit(child, _ratio(p, q, x, alpha))
            if outcome is not None:
                return outcome
            p, left = _residual(p, q, alpha)
            alpha = left / (left + (1 - alpha)) if left or alpha < 1 else 1.0
            q = _next_law(tree, q, x)
        return (node, chance.token(p)) if chance.accept(alpha) else None

    outcome = yield from visit(0, 1.0)
    assert outcome is not None, "the root's odds are always 1"
    return outcome


def replay(path: Sequence[int], token: int) -> Walk:
    """Walk a path that is decided already."""
    for node in path:  # noqa: UP028 - nothing can be sent into a list
        yield node
    return token


def decide(search: Search, law: Callable[[int], Float[Tensor, " vocab"]]) -> tuple[int, int]:
    """What a rule that looks ahead decides, given the target's law after any node."""
    node = next(search)
    while True:
        try:
            node = search.send(law(node))
        except StopIteration as end:
            decided: tuple[int, int] = end.value
            return decided


def _children(tree: DraftTree) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in tree.tokens]
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            children[parent].append(node)
    return children


def _ratio(p: Tensor, q: Tensor, x: int, alpha: float = 1.0) -> float:
    return min(1.0, alpha * float(p[x]) / float(q[x]))


def _residual(p: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, float]:
    """What p has left after a rejection, and how much of it; p itself where only rounding could have rejected."""
    left = (alpha * p - q).clamp(min=0)
    total = float(left.sum())
    return (left / total if total > 0 else p), total


def _next_law(tree: DraftTree, q: Tensor, x: int) -> Tensor:
    """The law that the sibling after x was drawn from."""
    if tree.law == "iid":
        return q
    others = q.clone()
    others[x] = 0
    return others / others.sum().clamp(min=torch.finfo(q.dtype).tiny)
