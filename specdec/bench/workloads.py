"""What is asked: our own prompts by kind of work, or a caller's questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specdec.bench.prompts import Message, Prompt, encode, first_of_each, unroll
from specdec.bench.questions import read

__all__ = ["KINDS", "Message", "Prompt", "encode", "first_of_each", "own", "read", "unroll"]

KINDS = (
    "chat",
    "code",
    "code_edit",
    "summary",
    "extraction",
    "translation",
    "mathematics",
    "sql",
    "retrieval",
    "agent",
    "refine",
    "long_document",
)


def own(names: Sequence[str] = ()) -> list[Prompt]:
    """Our prompts of the named kinds, of every kind when none is named. Raises ValueError for an unknown kind."""
    if unknown := set(names) - set(KINDS):
        raise ValueError(f"no workload named {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    folder = Path(__file__).with_name("workloads")
    return [prompt for kind in names or KINDS for prompt in read(folder / f"{kind}.toml")]
