"""A short pass of a Llama-shaped model on the CPU, from its numbers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import nn

from specdec.cache import SlotCache
from specdec.limits import CHANGING
from specdec.short_layer import plain

if TYPE_CHECKING:
    from specdec.short_stack import ShortStack

TRIED = (0, 1, 7, 100, 4095)  # positions at which ours is compared with the module's own


class StraightPass:
    """What a causal LM says of a pass: embedding, layers, norm and head, one after the other.

    In Python and in small tensors, a model spends a millisecond and a half of each pass around its layers; this, a
    fifth of it. It takes the model to be as it was when this was made, for as long as a generation: who listens to one
    of its parts, or changes it, is noticed by the next one. Weights stay alive as long as this does.

    Args:
        stack: runs the layers; nobody listens to them.
        embed, rotary, norm: what comes before and after. Where they are of the usual kinds their numbers are used, else
            they are called.
        head: is called.
    """

    def __init__(self, stack: ShortStack, embed: Any, rotary: Any, norm: Any, head: Any) -> None:
        self.stack, self.embed, self.rotary, self.norm, self.head = stack, embed, rotary, norm, head
        self.tables = stack.tables
        self.held = [parameters[name].detach() for parameters, name in stack.held]
        self.table = embed.weight.detach().numpy() if _usual(embed) and plain(embed.weight) else None
        self.frequencies = rotary.inv_freq.float().numpy() if turns_as_ours(rotary) else None
        self.scaling = np.float32(getattr(rotary, "attention_scaling", 1.0))
        self.weight = norm.weight.detach().numpy() if stack.layers[0].norms_as(norm) else None

    def logits(
        self,
        tokens: Int[np.ndarray, "rows nodes"],
        positions: Int[np.ndarray, "rows nodes"],
        seen: Bool[np.ndarray, "rows nodes slots"],
        cache: Any,
    ) -> Float[torch.Tensor, "rows nodes vocab"] | None:
        """What follows each node, whose keys and values are written to the cache; None where the model must say it.

        Args:
            seen: the cache's slots, up to the longest row's last node, that a node may look at; of no rows where all
                may look at all.
        """
        rows, nodes = tokens.shape
        alike = type(cache) is SlotCache and len(cache.layers) == len(self.stack.layers)
        slots = cache.open(rows, nodes) if alike and self.stack.runs(rows * nodes) else None
        if slots is None:
            return None
        cos, sin = self._turns(positions)
        x = self._embedded(tokens).reshape(rows * nodes, -1)
        y = self.stack.through(self.tables, x, cos, sin, seen, slots, self.weight)
        hidden = torch.from_numpy(y).view(rows, nodes, -1)
        said: torch.Tensor = self.head(hidden if self.weight is not None else self.norm(hidden))
        return said

    def _embedded(self, tokens: Int[np.ndarray, "rows nodes"]) -> Float32[np.ndarray, "rows nodes width"]:
        embedded: np.ndarray
        if self.table is not None:
            embedded = self.table[tokens]
        else:
            embedded = self.embed(torch.from_numpy(tokens)).contiguous().numpy()
        return embedded

    def _turns(self, positions: Int[np.ndarray, "rows nodes"]) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [rows * nodes, rotated]."""
        if self.frequencies is not None:
            from specdec.kernels.layer_numba import turns  # compiles or loads: on first use

            return cast(tuple[np.ndarray, np.ndarray], turns(positions.ravel(), self.frequencies, self.scaling))
        cos, sin = self.rotary(torch.empty(0), position_ids=torch.from_numpy(positions))
        return _flat(cos, positions), _flat(sin, positions)


def turns_as_ours(rotary: Any) -> bool:
    """Whether cos and sin hang on a rotary embedding's frequencies and the position alone, each of them twice."""
    kind, frequencies = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    fixed = isinstance(kind, str) and not any(name in kind for name in CHANGING)
    if not fixed or type(frequencies) is not torch.Tensor or "forward" in vars(rotary):
        return False
    places = torch.tensor([TRIED])
    angles = places[..., None] * frequencies.float()
    own = rotary(torch.empty(0), position_ids=places)
    ours = (getattr(rotary, "attention_scaling", 1.0) * torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(own, ours, strict=True))


def _flat(turns: torch.Tensor, positions: np.ndarray) -> np.ndarray:
    flat: np.ndarray = turns.expand(*positions.shape, -1).reshape(positions.size, -1).contiguous().numpy()
    return flat


def _usual(embed: Any) -> bool:
    """Whether an embedding only looks numbers up."""
    return type(embed) is nn.Embedding and embed.max_norm is None and "forward" not in vars(embed)
