"""A trace made small for the page: each sequence's steps as one deflated JSON, opened only when it is looked at."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.trace import Generation, Trace

SCALE = 10_000  # probabilities are whole numbers of this
PARTS = ("draft", "verify", "walk", "cache")


def sequences(trace: Trace) -> list[dict[str, Any]]:
    """What the viewer can show: each row of each generation that has steps, these packed by ``pack``."""
    return [
        {
            "label": _short(generation.label) or f"generation {generation.id}",
            "row": row,
            "rows": len(generation.prompts),
            "made": f"{generation.drafter} · {generation.policy} · {generation.verifier} · {generation.level}",
            "prompt": "".join(trace.pieces(prompt)),
            "data": pack(trace, generation, row),
        }
        for generation in trace.generations
        for row, prompt in enumerate(generation.prompts)
        if generation.of_row(row)
    ]


def pack(trace: Trace, generation: Generation, row: int) -> str:
    """One sequence's steps in base64 of deflate of JSON: ``{"sources", "texts", "steps"}``.

    A step is a list: tokens, parents, probability, source, path, committed, who guessed each committed token, wanted,
    wanted probability, microseconds by part, whether it is the prompt's own pass. Tokens are positions in ``texts``,
    drafters in ``sources``.
    """
    texts, sources = _Numbers(), _Numbers([""])
    pieces = iter(trace.pieces(generation.output(row)))
    steps = [
        [
            texts(map(trace.text, step.tokens)),
            step.parents,
            _whole(step.probability),
            sources(step.source),
            step.path,
            texts(next(pieces) for _ in step.committed),
            sources(step.guessed_by),
            [texts(map(trace.text, node)) for node in step.wanted],
            [_whole(node) for node in step.wanted_probability],
            [round(1e6 * step.seconds.get(part, 0)) for part in PARTS],
            int(step.prompt),
        ]
        for step in generation.of_row(row)
    ]
    plain = json.dumps({"sources": list(sources.of), "texts": list(texts.of), "steps": steps}, separators=(",", ":"))
    return base64.b64encode(zlib.compress(plain.encode(), 9)).decode()


class _Numbers:
    """Strings numbered in the order in which they first appear."""

    def __init__(self, first: Iterable[str] = ()) -> None:
        self.of = {text: number for number, text in enumerate(first)}

    def __call__(self, texts: Iterable[str]) -> list[int]:
        return [self.of.setdefault(text, len(self.of)) for text in texts]


def _whole(probability: Iterable[float]) -> list[int]:
    return [round(SCALE * p) for p in probability]


def _short(label: str, length: int = 60) -> str:
    return label if len(label) <= length else f"{label[: length - 1]}…"
