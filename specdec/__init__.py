"""Speculative decoding that makes ``model.generate`` of any Hugging Face causal LM faster and changes nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.core import Budget, Context, Drafter, DraftTree, Policy, Verdict, Verifier
    from specdec.generate import speculating, stats, unwrap, wrap
    from specdec.memory import Memory
    from specdec.pool import PoolFull, SessionPool
    from specdec.session import Session
    from specdec.speculate import Speculate
    from specdec.statistics import SpecdecWarning, Stats

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Context",
    "DraftTree",
    "Drafter",
    "Memory",
    "Policy",
    "PoolFull",
    "Session",
    "SessionPool",
    "SpecdecWarning",
    "Speculate",
    "Stats",
    "Verdict",
    "Verifier",
    "__version__",
    "speculating",
    "stats",
    "unwrap",
    "wrap",
]

_MODULES = {
    "core": ("Budget", "Context", "DraftTree", "Drafter", "Policy", "Verdict", "Verifier"),
    "generate": ("speculating", "stats", "unwrap", "wrap"),
    "memory": ("Memory",),
    "pool": ("PoolFull", "SessionPool"),
    "session": ("Session",),
    "speculate": ("Speculate",),
    "statistics": ("SpecdecWarning", "Stats"),
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use: transformers and numba are slow to import."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"specdec.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
