"""Speculative sampling by a law between the target's and the drafter's: not exact, and not meant to be."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from specdec.core import DraftTree
from specdec.model import Model
from specdec.sampling import Sampler
from specdec.statistics import Stats
from specdec.verifiers.rejection import WALKING, RejectionVerifier
from specdec.verifiers.rules import Chance, Walk


class TransferVerifier(RejectionVerifier):
    """Judges sampled chains by the target's law moved towards the drafter's, where that may know better.

    With ``eta`` above 0 **the output does not have the target's distribution**, and ``stats(model).lossless`` says so;
    docs/long_context.md shows how far it is off. With ``eta=0`` it is speculative sampling, which is exact. Greedy
    decoding, trees of several paths, and trees that were not sampled are judged as ``RejectionVerifier`` judges them.

    RAPID's retrieval-augmented target (Chen et al. 2025, arXiv 2502.20330), masked as in its published code.

    Args:
        eta: how far the target's logits are moved, by ``eta`` times what the drafter's law has more than the target's.
        alpha: only tokens are moved that the drafter finds at least ``alpha`` times as likely as its likeliest.
        chance: where decisions come from.

    Raises:
        ValueError: a negative ``eta``, or an ``alpha`` that is no share.
    """

    def __init__(self, eta: float = 0.0, alpha: float = 0.1, chance: Chance | None = None) -> None:
        if not eta >= 0 or not 0 <= alpha <= 1:
            raise ValueError(f"TransferVerifier(eta={eta}, alpha={alpha}): give eta from 0 on and alpha from 0 to 1")
        super().__init__("auto", chance)
        self.eta, self.alpha, self.lossless = eta, alpha, eta == 0
        self.walking = {**WALKING, "transfer": partial(transfer, eta=eta, alpha=alpha)}

    def begin(
        self,
        model: Model,
        sampler: Sampler,
        stats: Stats,
        topk: int = 0,
        hidden: bool = False,
        likelihood: bool = False,
    ) -> TransferVerifier:
        """As ``PathwiseVerifier``'s; says in the counts that the output is not the target's."""
        bound = super().begin(model, sampler, stats, topk, hidden, likelihood)
        assert isinstance(bound, TransferVerifier), "a copy of this one"
        each: Stats | None = stats
        while each is not None:
            each.lossless, each = each.lossless and self.lossless, each.parent
        return bound

    def _rule(self, tree: DraftTree, vocab: int) -> str:
        rule = super()._rule(tree, vocab)
        return "transfer" if rule in ("chain", "block") else rule


def transfer(tree: DraftTree, chance: Chance, eta: float, alpha: float) -> Walk:
    """Accept each guess of a chain by the moved law; after a rejection, draw from what the target has more of."""
    assert tree.q is not None, "sampled chains say their law"
    last = len(tree) - 1
    for node in range(last):
        p, q, x = (yield node), tree.q[node], int(tree.tokens[node + 1])
        moved = moved_law(p, q, eta, alpha)
        if not chance.accept(min(1.0, float(moved[x]) / float(q[x])) if q[x] > 0 else 0.0):
            left = torch.maximum(p - q, p - moved).clamp(min=0)
            return chance.token(left if float(left.sum()) > 0 else p)  # only rounding rejects where all laws agree
    return chance.token((yield last))


def moved_law(
    p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], eta: float, alpha: float
) -> Float[Tensor, " vocab"]:
    """The target's law ``p`` moved towards the drafter's ``q``, among the tokens that ``q`` finds likely."""
    likely = q >= alpha * q.max()
    return torch.softmax(p.log() + eta * (q - p) * likely, -1)
