"""Drafters: cheap guesses at how a text goes on. Each is loaded when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.drafters.early_exit import EarlyExitDrafter
    from specdec.drafters.feature import FeatureDrafter
    from specdec.drafters.grammar import GrammarDrafter
    from specdec.drafters.longspec import LongSpecDrafter
    from specdec.drafters.lookahead import LookaheadDrafter
    from specdec.drafters.merged import MergedDrafter
    from specdec.drafters.ngram import NgramDrafter
    from specdec.drafters.predicted import PredictedOutput
    from specdec.drafters.rapid import RapidDrafter
    from specdec.drafters.recycling import RecyclingDrafter
    from specdec.drafters.retrieval import RetrievalDrafter
    from specdec.drafters.small_model import SmallModelDrafter
    from specdec.drafters.suffix import SuffixDrafter
    from specdec.drafters.triforce import TriForceDrafter

_MODULES = {
    "EarlyExitDrafter": "early_exit",
    "FeatureDrafter": "feature",
    "GrammarDrafter": "grammar",
    "LongSpecDrafter": "longspec",
    "LookaheadDrafter": "lookahead",
    "MergedDrafter": "merged",
    "NgramDrafter": "ngram",
    "PredictedOutput": "predicted",
    "RapidDrafter": "rapid",
    "RecyclingDrafter": "recycling",
    "RetrievalDrafter": "retrieval",
    "SmallModelDrafter": "small_model",
    "SuffixDrafter": "suffix",
    "TriForceDrafter": "triforce",
}
__all__ = [
    "EarlyExitDrafter",
    "FeatureDrafter",
    "GrammarDrafter",
    "LongSpecDrafter",
    "LookaheadDrafter",
    "MergedDrafter",
    "NgramDrafter",
    "PredictedOutput",
    "RapidDrafter",
    "RecyclingDrafter",
    "RetrievalDrafter",
    "SmallModelDrafter",
    "SuffixDrafter",
    "TriForceDrafter",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = part
    return part
