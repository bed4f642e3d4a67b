"""A head that says only some of a vocabulary's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Float, Int
from torch import Tensor, nn

OUTSIDE = -1e4  # the logit of a token that is not kept: of probability 0, and finite, for those who compare logits
KEPT_ONLY: ContextVar[bool] = ContextVar("KEPT_ONLY", default=False)


class TrimmedHead(nn.Module):
    """A target's head for some of its tokens; what is left out has no probability.

    It costs what those tokens cost. Output is as exact as ever: the law that a draft was drawn from is just another.

    Args:
        weight: the target's, of all its tokens.
        kept: ids of those that stay.
    """

    def __init__(self, weight: Float[Tensor, "vocab width"], kept: Int[Tensor, " kept"]) -> None:
        super().__init__()
        self.vocab = len(weight)
        self.few = nn.Linear(weight.shape[1], len(kept), bias=False, device=weight.device, dtype=weight.dtype)
        self.few.weight = nn.Parameter(weight[kept.to(weight.device)].detach(), requires_grad=False)
        self.kept: Tensor
        self.register_buffer("kept", kept.to(weight.device), persistent=False)

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        """Logits of all the target's tokens; inside ``kept_only``, of those that are kept."""
        few: Tensor = self.few(hidden)
        return few if KEPT_ONLY.get() else self.widened(few)

    def widened(self, few: Float[Tensor, "... kept"]) -> Float[Tensor, "... vocab"]:
        """Logits of all the target's tokens, given those of the kept ones."""
        return few.new_full((*few.shape[:-1], self.vocab), OUTSIDE).index_copy(-1, self.kept, few)


@contextmanager
def kept_only() -> Iterator[None]:
    """Have trimmed heads say nothing of other tokens, inside the ``with`` block and in this thread.

    To fill a row of all the tokens, and to search it, takes longer than a small head's product.
    """
    token = KEPT_ONLY.set(True)
    try:
        yield
    finally:
        KEPT_ONLY.reset(token)
