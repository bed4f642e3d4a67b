"""Trees drawn at random from a drafter's law, level by level, in ways that rejection sampling can judge exactly.

A growth is a generator. It yields a ``Level``, the tree so far and its newest nodes, is sent the drafter's logits after
those nodes, and goes on, or None, and ends; its value is the ``Sampled`` tree. So one pass of a drafter can serve many
trees' levels::

    growth = stochastic_beam(root=5, width=4, depth=3)
    level = next(growth)
    while True:
        try: level = growth.send(logits_after(level))
        except StopIteration as end: return end.value

Logits come after the drafter's processors and warpers, up to a constant per row, -inf for what it never says. A token
of probability 0 is never drawn, so a node may have fewer children than it was to have, or none.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from specdec.kernels.gumbel import gumbel_topk


class Level(NamedTuple):
    """The tree so far: tokens and parents of all nodes, of which those from index ``start`` on are new leaves."""

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    start: int


class Sampled(NamedTuple):
    """A tree drawn without replacement, siblings in the order of the draw: the law is "swor".

    Attributes:
        tokens, parents: of each node, level by level, the root first.
        q: the law of each inner node's first child; rows of leaves hold anything.
        log_q: log-probability of each node's path under the drafter.
    """

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    q: Float[Tensor, "nodes vocab"]
    log_q: Float64[np.ndarray, " nodes"]


Growth = Generator[Level, Float[Tensor, "level vocab"] | None, Sampled]


def without_replacement(root: int, branching: Sequence[int], generator: torch.Generator | None = None) -> Growth:
    """Give every node at depth d ``branching[d]`` children, by Gumbel-top-k: RSD-C; all ones make a chain.

    Recursive speculative decoding (Jeon et al. 2024, arXiv 2402.14160).
    """
    tree = _Growing(root)
    for k in branching:
        logits = yield tree.level()
        if logits is None:
            break
        drawn, perturbed = gumbel_topk(logits, _noise(logits, generator), min(k, logits.shape[1]))
        row, rank = torch.nonzero(perturbed > -torch.inf, as_tuple=True)
        if not tree.extend(logits, row, drawn[row, rank]):
            break
    return tree.sampled()


def independent(root: int, branching: Sequence[int], generator: torch.Generator | None = None) -> Growth:
    """Draw ``branching[d]`` times, independently, after every node at depth d, and keep each token once.

    What is left are draws without replacement whose number depends on chance alone: given the tokens before it, a new
    one is distributed as if drawn without replacement, and whether there is another does not depend on which it was.
    """
    tree = _Growing(root)
    for k in branching:
        logits = yield tree.level()
        if logits is None:
            break
        drawn = torch.multinomial(logits.float().softmax(-1), k, replacement=True, generator=generator)
        twins = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(-1)
        row, rank = torch.nonzero(~twins, as_tuple=True)
        tree.extend(logits, row, drawn[row, rank])
    return tree.sampled()


def stochastic_beam(root: int, width: int, depth: int, generator: torch.Generator | None = None) -> Growth:
    """Draw ``width`` paths without replacement, level by level, by stochastic beam search: RSD-S.

    Kool, van Hoof and Welling 2019, arXiv 1903.06059; Jeon et al. 2024, arXiv 2402.14160.
    """
    tree = _Growing(root)
    phi = psi = torch.zeros(1, dtype=torch.float64)
    for _ in range(depth):
        logits = yield tree.level()
        if logits is None:
            break
        row, drawn, phi, psi = beam_step(logits.log_softmax(-1), phi, psi, _noise(logits, generator), width)
        if not tree.extend(logits, row, drawn):
            break
    return tree.sampled()


def beam_step(
    log_q: Float[Tensor, "beams vocab"],
    phi: Float64[Tensor, " beams"],
    psi: Float64[Tensor, " beams"],
    noise: Float[Tensor, "beams vocab"],
    width: int,
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"], Float64[Tensor, " kept"], Float64[Tensor, " kept"]]:
    """One level of stochastic beam search: the ``width`` best continuations of all beams, best first.

    Args:
        log_q: log-probability of each token after each beam.
        phi, psi: of each beam, its log-probability and the same perturbed, on the host; both 0 for the root alone.
        noise: standard exponential draws; Gumbel noise is -log of them.

    Returns:
        the beam and the token of each continuation kept, its phi and its psi. The best continuation of a beam has the
        beam's own psi; one of probability 0 is not kept.
    """
    tokens, gumbel = gumbel_topk(log_q, noise, min(width, log_q.shape[1]))
    log_p = phi[:, None] + log_q.gather(1, tokens).double().cpu()
    g = phi[:, None] + gumbel.double().cpu()
    # Conditioned on the greatest being the beam's own psi; in terms that do not cancel.
    v = psi[:, None] - g + _log1mexp(g - g[:, :1])
    perturbed = torch.where(g > -torch.inf, psi[:, None] - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs())), g)
    flat = perturbed.flatten()
    order = flat.argsort(descending=True, stable=True)[:width]
    order = order[flat[order] > -torch.inf]
    return order // tokens.shape[1], tokens.cpu().flatten()[order], log_p.flatten()[order], flat[order]


class _Growing:
    """A tree to which levels are added."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.log_q = [root], [-1], [0.0]
        self.laws: list[Tensor] = []
        self.start = 0

    def level(self) -> Level:
        return Level(np.array(self.tokens), np.array(self.parents), self.start)

    def extend(self, logits: Tensor, row: Tensor, tokens: Tensor) -> bool:
        """Add a child with each of ``tokens`` to the newest nodes at ``row``; returns whether there is any."""
        q = logits.float().softmax(-1)
        self.laws.append(q)
        start, chances = self.start, q[row, tokens].double().log().tolist()
        self.start = len(self.tokens)
        self.log_q += [self.log_q[start + i] + chance for i, chance in zip(row.tolist(), chances, strict=True)]
        self.parents += (start + row).tolist()
        self.tokens += tokens.tolist()
        return len(row) > 0

    def sampled(self) -> Sampled:
        q = torch.cat(self.laws) if self.laws else torch.empty(0, 0)
        leaves = q.new_empty(len(self.tokens) - len(q), q.shape[1])
        return Sampled(np.array(self.tokens), np.array(self.parents), torch.cat([q, leaves]), np.array(self.log_q))


def _noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty(logits.shape, device=logits.device).exponential_(1, generator=generator)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
