"""The KV rows of the last turn, kept for a next one that begins alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from specdec.cache import DummyLayer
from specdec.limits import rotary_change
from specdec.masks import hides

CROPPED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # layers whose rows can be cut back to a prefix
ALONE = ("num_beams", "num_return_sequences", "num_beam_groups")  # of which there must be one
# Ways of decoding that start anew or keep rows of their own.
OTHERS = (
    "assistant_early_exit",
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "dola_layers",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "token_healing",
    "use_mtp",
)


class Prefix:
    """KV rows of a text that a model has read, for the next text that begins alike.

    Args:
        max_bytes: more than this is not kept from one turn to the next; None for no limit.

    Attributes:
        tokens: what the rows are of.
        cache: the rows; None where there are none.
        reader: who computed them: another adapter, dtype or device has other rows.

    Raises:
        ValueError: negative bytes.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_cache_bytes must be None or at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.drop()

    def drop(self) -> None:
        """Keep nothing."""
        self.tokens: Int[np.ndarray, " length"] = np.empty(0, np.int64)
        self.cache: DynamicCache | None = None
        self.reader = ""

    def take(self, config: Any, tokens: Sequence[int], reader: str) -> DynamicCache:
        """A cache for ``generate`` to read on from, cut to what ``tokens`` have in common with the kept text.

        All but the last token at most, which must be read for its logits. Empty where nothing is in common, or the rows
        cannot be cut so far: a window that has moved on no longer holds what came before it.

        Args:
            config: the model's text configuration.
        """
        length = min(common(self.tokens, tokens), len(tokens) - 1)
        changes = rotary_change(config, 0, max(len(tokens), len(self.tokens)), 0) is not None
        if self.cache is None or length <= 0 or reader != self.reader or changes or not _crop(self.cache, length):
            self.drop()
            self.cache, length = DynamicCache(config=config), 0
        self.tokens, self.reader = self.tokens[:length], reader
        return self.cache

    def keep(self, sequence: Sequence[int] | None) -> None:
        """Keep the cache as it came back from ``generate``, which wrote ``sequence``; None if that failed.

        After a failure the rows stay if they are still what they were.
        """
        lengths = {layer.get_seq_length() for layer in _filled(self.cache)}
        tokens = self.tokens if sequence is None else np.array(sequence[:-1], np.int64)
        sound = lengths == {len(tokens)}
        if not sound or (self.max_bytes is not None and self.bytes_used > self.max_bytes):
            self.drop()
        else:
            self.tokens = tokens

    @property
    def bytes_used(self) -> int:
        """Bytes held, spare room included."""
        tensors = [tensor for layer in _filled(self.cache) for tensor in (layer.keys, layer.values)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def why_not(model: Any) -> str:
    """Why no rows of a model can be kept, whatever it is asked; "" where they can."""
    config, peft = model.config, getattr(model, "active_peft_config", None)
    if config.is_encoder_decoder:
        return "encoder-decoder models read every prompt anew"
    text = config.get_text_config(decoder=True)
    if text is not config:
        return "a multimodal model keeps state beside its KV rows"
    if peft is not None and peft.is_prompt_learning:
        return "prompt tuning puts rows of its own before the text"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_is_stateful", False) or not base._supports_default_dynamic_cache():
        return "recurrent states cannot be cut back to a prefix"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=text).layers if type(layer) not in CROPPED}
    return f"rows of {', '.join(sorted(kinds))} cannot be cut back to a prefix" if kinds else ""


def why_not_now(model: Any, ids: Int[torch.Tensor, "rows prompt"], arguments: dict[str, Any]) -> str:
    """Why one call of ``generate`` must read its whole prompt; "" where it need not."""
    if ids.shape[0] != 1 or ids.shape[1] == 0 or any((_asked(model, arguments, name) or 1) != 1 for name in ALONE):
        return "only one row at a time is kept"
    if arguments.get("past_key_values") is not None or _asked(model, arguments, "use_cache") is False:
        return "the call brings its own cache, or wants none"
    if other := next((name for name in OTHERS if _asked(model, arguments, name)), None):
        return f"{other}= asks for another way of decoding"
    mask = arguments.get("attention_mask")
    if hides(mask) if mask is not None else _looks_padded(model, ids, arguments):
        return "some of the prompt is hidden"
    inputs = (name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "attention_mask")
    more = next((name for name in (*inputs, "adapter_names") if arguments.get(name) is not None), None)
    return f"{more}= may change what the prompt means" if more else ""


def _asked(model: Any, arguments: dict[str, Any], name: str) -> Any:
    """What a call says of ``name``, itself or by a configuration."""
    said = (
        arguments.get(name),
        getattr(arguments.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    )
    return next((value for value in said if value is not None), None)


def _looks_padded(model: Any, ids: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Whether ``generate``, given no mask, would take some of the tokens for padding."""
    pad, ends = (_asked(model, arguments, f"{name}_token_id") for name in ("pad", "eos"))
    return pad is not None and pad not in np.atleast_1d(ends) and bool((ids == pad).any())


def common(a: Int[np.ndarray, " a"], b: Sequence[int] | Int[np.ndarray, " b"]) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != np.asarray(b[:n], np.int64))
    return int(differ[0]) if len(differ) else n


def _filled(cache: DynamicCache | None) -> list[Any]:
    layers = [] if cache is None else cache.layers
    return [layer for layer in layers if type(layer) is not DummyLayer and layer.is_initialized]


def first_needed(layer: Any, length: int) -> int:
    """The first token whose rows a layer must hold, to read on behind ``length`` tokens."""
    return max(0, length + 1 - layer.sliding_window) if layer.is_sliding else 0


def _crop(cache: DynamicCache, length: int) -> bool:
    """Cut a cache to its first tokens; whether that could be done, for if not it is as it was."""
    layers = _filled(cache)
    first = [layer.get_seq_length() - layer.keys.shape[2] for layer in layers]
    if any(held > first_needed(layer, length) for layer, held in zip(layers, first, strict=True)):
        return False
    for layer, held in zip(layers, first, strict=True):
        layer.keys, layer.values = layer.keys[:, :, : length - held], layer.values[:, :, : length - held]
        if layer.is_sliding:
            layer.cumulative_length = length
    return True
