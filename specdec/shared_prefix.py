"""Rows that begin alike: the KV rows of their common beginning are held, and read, once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from specdec.cache import GROWTH, SlotCache, SlotLayer
from specdec.core import Context
from specdec.masks import Reach
from specdec.prefix import common
from specdec.short_layer import RECORDING

if TYPE_CHECKING:
    from specdec.model import Model

LEAST = 256  # tokens: a shorter beginning is read as quickly by each row for itself
PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")  # inputs of [rows, prompt]

Tokens = Int[np.ndarray, " length"]


class SharedLayer(SlotLayer):
    """One layer's rows, whose first ``offset`` tokens are the same and held once.

    ``keys`` and ``values`` are the rows' own, as of any ``SlotLayer``; attention must read ``shared`` before them.

    Args:
        layer: with rows that begin alike behind their padding. It is not changed.
        common: tokens that all rows begin with.
        padding: slots before each row's first token, which are not taken over.
    """

    def __init__(self, layer: SlotLayer, common: int, padding: Sequence[int]) -> None:
        super().__init__(None)
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.lengths = [length - pad for length, pad in zip(layer.lengths, padding, strict=True)]
        self.offset, held, ends = common, max(self.lengths) - common, list(zip(padding, layer.lengths, strict=True))
        first = slice(padding[0], padding[0] + common)
        keys, values = layer.buffers
        self.shared: tuple[torch.Tensor, torch.Tensor] = keys[:1, :, first].clone(), values[:1, :, first].clone()
        self._keys, self._values = (self._slots(slots, len(ends), held + GROWTH) for slots in (keys, values))
        for row, (pad, end) in enumerate(ends):
            self._keys[row, :, : end - pad - common] = keys[row, :, pad + common : end]
            self._values[row, :, : end - pad - common] = values[row, :, pad + common : end]
        self._show()

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, those of the common beginning among them."""
        return super().bytes + sum(slots.nbytes for slots in self.shared)


class SharedCache(SlotCache):
    """A ``SlotCache`` of ``SharedLayer``s, which no plain attention can read."""


def share(model: Model, contexts: Sequence[Context], padding: Sequence[int]) -> int:
    """Hold what a model's rows have in common once, from now on, if that can be done and is worth it.

    The rows lose their padding. They cannot be handed back as another cache's rows then.

    Args:
        model: one that has started; its cache is replaced.
        contexts: what its rows hold.
        padding: before each row's first token.

    Returns:
        How many tokens are shared; 0 where nothing has changed.
    """
    common = beginning([context.tokens for context in contexts])
    ends = [len(context.tokens) + pad for context, pad in zip(contexts, padding, strict=True)]
    if len(contexts) < 2 or common < LEAST or ends != model.lengths or not _able(model, padding):
        return 0
    assert isinstance(model.cache, SlotCache), "only such rows can be shared"
    cache = SharedCache(layer_class_to_replicate=SlotLayer)
    for i, layer in enumerate(model.cache.slots):
        cache.layers.append(SharedLayer(layer, common, padding))
        model.cache.layers[i] = None  # its memory goes before the next layer's is taken
    model.cache, model.lengths = cache, cache.lengths
    if model.shift is not None:
        model.shift = model.shift + torch.tensor(padding, device=model.device)[:, None]
    model.visible, model.takes_bits = None, model.form.attention == "bits"
    return common


def beginning(texts: Sequence[Tokens]) -> int:
    """How many tokens all texts begin with."""
    return min(common(texts[0], text) for text in texts)


def _able(model: Model, padding: Sequence[int]) -> bool:
    """Whether attention is ours, all layers look back without limit, and what is hidden is padding on the left."""
    from specdec.model import reaches

    cache, visible = model.cache, model.visible
    if model.form.level != "tree" or model.form.attention == "own" or model.users_cache is not None:
        return False
    if type(cache) is not SlotCache or set((reaches(model.config) or {}).values()) != {Reach()}:
        return False
    if not all(type(layer) is SlotLayer and layer.is_initialized and not layer.offset for layer in cache.layers):
        return False
    hidden = torch.zeros(len(padding)) if visible is None else (~visible).sum(1).cpu()
    return hidden.tolist() == list(padding)


def copies(input_ids: Int[torch.Tensor, "rows prompt"], inputs: dict[str, Any]) -> bool:
    """Whether all rows of a prompt are the same, and so is all else that a model is to read with them."""
    per_token = [value for name, value in inputs.items() if name in PER_TOKEN and value is not None]
    others = [value for name, value in inputs.items() if name not in PER_TOKEN]
    return (
        len(input_ids) > 1
        and all(value is None or isinstance(value, (bool, int, float, str)) for value in others)
        and all(value.ndim == 2 and len(value) == len(input_ids) for value in per_token)
        and all(bool((value == value[:1]).all()) for value in (input_ids, *per_token))
    )


def hooked(module: nn.Module) -> bool:
    """Whether anybody listens to a model's parts, who may reckon with all rows; transformers' recording does not."""
    hooks = [
        hook for part in module.modules() for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    ]
    return any(getattr(hook, "__module__", "") != RECORDING for hook in hooks)


def one_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first of rows that are copies."""
    return {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def spread(logits: Float[torch.Tensor, "1 last vocab"], cache: SlotCache, rows: int) -> Float[torch.Tensor, "..."]:
    """Let one row's cache stand for so many, in place, and its logits too."""
    for layer in cache.slots:
        if layer.is_initialized:
            layer.repeat(rows)
    return logits.expand(rows, -1, -1)
