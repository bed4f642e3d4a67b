"""Drafters: cheap guesses at how a text goes on. Each is loaded when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.drafters.merged import MergedDrafter
    from specdec.drafters.ngram import NgramDrafter
    from specdec.drafters.recycling import RecyclingDrafter

__all__ = ["MergedDrafter", "NgramDrafter", "RecyclingDrafter"]

_MODULES = {"MergedDrafter": "merged", "NgramDrafter": "ngram", "RecyclingDrafter": "recycling"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = part
    return part
