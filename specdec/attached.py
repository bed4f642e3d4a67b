"""What the self-test found of models that several sessions use: each is tried once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from specdec import cpu
from specdec.attach import Attachment, attach
from specdec.model import compiled

# The only state of this package beside its objects: a fact about a model, that costs a second and dies with it.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, Attachment]] = WeakKeyDictionary()


def attach_once(module: Any) -> Attachment:
    """As ``attach``; of a model that was tried as it is now, what was found then, its costs as learnt since."""
    attention = getattr(module.config.get_text_config(decoder=True), "_attn_implementation", None)
    state = attention, module.dtype, module.device, cpu.installed(module), compiled(module)
    known = _KNOWN.get(module)
    if known is None or known[0] != state:
        known = _KNOWN[module] = state, attach(module)
    return known[1]
