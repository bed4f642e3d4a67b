"""What a target lends to a small layer that drafts for it: embedding, rotary embedding and head, as they are."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdec import cpu


class Lent:
    """The parts of a model that its drafting layer does not have itself; they stay the model's and are not trained.

    Args:
        model: a transformers causal LM.
        kept: token ids that the head is to say; None for all. Their rows are copied.
        cpu_kernels: whether to make the head quicker for short passes, as ``wrap`` does.

    Raises:
        ValueError: the model has no rotary embedding, or no head.
    """

    def __init__(self, model: Any, kept: Int[Tensor, " kept"] | None = None, cpu_kernels: bool = False) -> None:
        rotary, head = getattr(model.get_decoder(), "rotary_emb", None), model.get_output_embeddings()
        if rotary is None or head is None:
            raise ValueError(f"{type(model).__name__} has no rotary embedding and head to share")
        self.rotary = copy.deepcopy(rotary)  # some kinds change with the positions they meet
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        self._which = {"layer_type": "full_attention"} if by_type else {}
        self.embedding = model.get_input_embeddings()
        self.vocab, self.kept = len(head.weight), kept
        self.head = _head(head, kept)
        if cpu_kernels:
            cpu.install(self.head)

    @torch.no_grad()
    def embed(self, tokens: Int[Tensor, " nodes"]) -> Float[Tensor, "nodes hidden"]:
        """Tokens as the target's first layer meets them."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def rotation(
        self, positions: Int[Tensor, " nodes"]
    ) -> tuple[Float[Tensor, "nodes rotated"], Float[Tensor, "nodes rotated"]]:
        """Cosines and sines of positions."""
        cosine, sine = self.rotary(self.head.weight, positions[None], **self._which)
        return cosine[0], sine[0]

    def said(self, x: Float[Tensor, "nodes hidden"]) -> Float[Tensor, "nodes kept"]:
        """Logits of the tokens that are kept, in float32."""
        logits: Tensor = self.head(x.to(self.head.weight.dtype)).float()
        return logits

    def logits(self, x: Float[Tensor, "nodes hidden"]) -> Float[Tensor, "nodes vocab"]:
        """Those of all tokens; -inf for what is not kept."""
        said = self.said(x)
        if self.kept is None:
            return said
        return said.new_full((len(x), self.vocab), -torch.inf).index_copy(1, self.kept, said)


def _head(head: nn.Linear, kept: Tensor | None) -> nn.Linear:
    """A head of the same weights, or of some of their rows, that takes no gradient."""
    rows = slice(None) if kept is None else kept
    own = nn.Linear(head.in_features, 1, bias=head.bias is not None, device="meta")
    own.weight = nn.Parameter(head.weight.detach()[rows], requires_grad=False)
    if head.bias is not None:
        own.bias = nn.Parameter(head.bias.detach()[rows], requires_grad=False)
    own.out_features = len(own.weight)
    return own
