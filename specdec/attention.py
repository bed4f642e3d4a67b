"""Our attention as transformers knows it, and a model switched to it for the time of one tree pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from specdec.core import Unsupported
from specdec.kernels import shared_prefix_torch
from specdec.kernels.shared_prefix import shared_prefix_attention
from specdec.kernels.tree_attention import tree_attention
from specdec.kernels.tree_attention_torch import attend
from specdec.shared_prefix import SharedCache, SharedLayer

Attention = Literal["own", "mask", "bits"]
NAME = "specdec"
# What layers tell their attention that changes nothing, or that the mask says already.
HARMLESS = {
    "cache_position",
    "is_causal",
    "num_items_in_batch",
    "output_attentions",  # those of tree passes are not returned
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",
    "token_type_ids",
    "use_cache",
}
# The cache of this thread's pass, where its rows' common beginning is held once.
SHARED: ContextVar[SharedCache | None] = ContextVar("specdec_shared", default=None)
TURN = threading.RLock()  # the implementation is named in a model's config, which all its threads read


def attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads nodes dim"],
    key: Float[Tensor, "rows kv_heads slots dim"],
    value: Float[Tensor, "rows kv_heads slots dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "rows nodes heads dim"], None]:
    """Attention as transformers' layers call it, by a mask that says True where to attend, or by ``masks.tree_bits``.

    Raises:
        Unsupported: asked for what it does not do.
    """
    unknown = [name for name, it in others.items() if name not in HARMLESS and it is not None and it is not False]
    if unknown or dropout:
        raise Unsupported(f"our attention does not know {', '.join(unknown) or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = _shared(module)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        mask = _as_bool(attention_mask, query.shape[2], key)
        if shared is None:
            out = attend(query, key, value, mask, scale, softcap, s_aux)
        else:
            out = shared_prefix_torch.attend(query, key, value, shared[0], shared[1], mask, scale, softcap, s_aux)
    else:
        bits = attention_mask.to(query.device)[:, 0]
        ancestors, lengths, starts = bits[:, :, :-2], bits[:, 0, -2], bits[:, :, -1]
        if shared is None:
            out = tree_attention(
                query, key, value, ancestors, lengths, scale, starts=starts, softcap=softcap, sinks=s_aux
            )
        else:
            out = shared_prefix_attention(
                query, key, value, shared[0], shared[1], ancestors, lengths, scale, softcap=softcap, sinks=s_aux
            )
    return out.transpose(1, 2).contiguous(), None


def _shared(module: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values of what all rows of this thread's pass begin with; None where they are not held apart."""
    cache = SHARED.get()
    if cache is None:
        return None
    layer = cache.layers[module.layer_idx]
    assert isinstance(layer, SharedLayer), "all of them are"
    return layer.shared


def _as_bool(mask: Tensor | None, nodes: int, key: Tensor) -> Bool[Tensor, "#rows 1 nodes slots"]:
    """A tree's mask, or what a plain pass that another thread runs on the model may come with at the switch."""
    if mask is None:  # as transformers leaves out the causal one
        return torch.ones(1, 1, nodes, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - nodes)
    if mask.shape[1] != 1:
        raise Unsupported(f"our attention takes one mask for all heads, got {[*mask.shape]}")
    return mask if mask.dtype == torch.bool else mask >= 0


@contextmanager
def switched(config: Any, cache: Any = None) -> Iterator[None]:
    """The model of a text ``config`` with our attention, inside the ``with`` block. Threads take turns.

    Args:
        cache: that of the pass; one that holds a common beginning apart must be said here.
    """
    with TURN:
        shared = SHARED.set(cache if isinstance(cache, SharedCache) else None)
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, eager_mask)  # which sdpa takes too, should a pass end there
        before = config._attn_implementation_internal
        config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            config._attn_implementation_internal = before
            SHARED.reset(shared)


def likely(module: Any, config: Any) -> Attention:
    """What a model's tree passes should go through, were they to work.

    "bits" on a GPU; "mask" on the CPU where transformers would copy keys and values that heads share (measured with
    9 heads on 3: 1.1 to 1.8 times as fast at contexts of 256 and 2k, 1.5 to 3.5 times at 8k); else the model's "own".
    """
    can = getattr(module, "_can_set_attn_implementation", bool)()
    if not can or not hasattr(config, "_attn_implementation_internal"):
        return "own"
    if module.device.type == "cuda" and find_spec("triton"):
        return "bits"
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) not in (None, heads)
    return "mask" if module.device.type == "cpu" and shared and config._attn_implementation == "sdpa" else "own"
