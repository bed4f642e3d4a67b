"""How deep a draft may go before it passes a limit that plain decoding would respect token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specdec.core import Context

UNLIMITED = 1 << 30


def room(
    config: Any, max_length: int | None, padding: Sequence[int], contexts: Sequence[Context]
) -> Callable[[Context], int]:
    """A function from a context to the tokens that may be guessed on one of its paths.

    Args:
        config: the target's text configuration.
        max_length: total length, padding included, at which ``generate`` stops; None for no such rule.
        padding: left padding of each context.
    """
    pad = {id(context): n for context, n in zip(contexts, padding, strict=True)}

    def left(context: Context) -> int:
        length = len(context.tokens)
        to_the_end = UNLIMITED if max_length is None else max_length - length - pad[id(context)] - 1
        return min(to_the_end, positions_left(config, length))

    return left


def positions_left(config: Any, length: int) -> int:
    """Guesses that still fall on the same side of every change in how positions are encoded.

    Learnt positions end at ``max_position_embeddings``. Rotary embeddings of type "dynamic" and "longrope" change
    their frequencies for a whole pass when its last position passes the trained length, "dynamic" ones at every
    token from there on.
    """
    trained = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        trained = _original(config, rope) or trained
    if not isinstance(trained, int):
        return UNLIMITED
    if length <= trained:
        return trained - length
    return 0 if "dynamic" in kinds else UNLIMITED


def _original(config: Any, rope: dict[str, Any]) -> int | None:
    name = "original_max_position_embeddings"
    nested = [part.get(name) for part in rope.values() if isinstance(part, dict)]
    found = [rope.get(name), getattr(config, name, None), *nested]
    return next((value for value in found if isinstance(value, int)), None)
