"""How deep a draft may go before it passes a limit that plain decoding would respect token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specdec.core import Context

UNLIMITED = 1 << 30
NEAR = 1024  # nodes of a pass at most
CHANGING = {"dynamic", "longrope"}  # rotary embeddings that hang on how long a text is


def room(
    config: Any, max_length: int | None, contexts: Sequence[Context], padding: Sequence[int], earlier: int
) -> Callable[[Context], int]:
    """A function from a context to the tokens that may be guessed on one of its paths.

    Args:
        config: the target's text configuration.
        max_length: total length, padding included, at which ``generate`` stops; None for no such rule.
        padding: left padding of each context.
        earlier: tokens that a cache handed in held before these contexts begin.
    """
    pad = {id(context): n for context, n in zip(contexts, padding, strict=True)}

    def left(context: Context) -> int:
        length = len(context.tokens)
        to_the_end = UNLIMITED if max_length is None else max_length - length - pad[id(context)] - 1
        return min(to_the_end, positions_left(config, length + earlier))

    return left


def positions_left(config: Any, length: int) -> int:
    """Guesses that still fall within the positions a model knows; learnt ones end there. No limit once past them."""
    known = getattr(config, "max_position_embeddings", None)
    return known - length if isinstance(known, int) and length <= known else UNLIMITED


def rotary_change(config: Any, length: int, max_length: int | None, earlier: int) -> int | None:
    """The text length, within this generation, at which the model rotates all positions anew; None if there is none.

    Rotary embeddings of type "longrope" change their frequencies once, "dynamic" ones with every token, from where
    the text passes the trained length; some models run the whole text again there. Only token by token is that exact.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if not kinds & CHANGING:
        return None
    known: int = getattr(config, "max_position_embeddings", UNLIMITED)
    trained = _original(config, rope) or known
    past = max_length is None or max_length + earlier > trained
    return trained if past and (length + earlier <= trained or "dynamic" in kinds) else None


def temperature_change(config: Any, length: int, max_length: int | None, earlier: int) -> int | None:
    """The text length, within this generation, at which the model scales queries anew; None if there is none.

    Llama 4's layers without rotary embeddings scale a query by how many times ``floor_scale`` its token stands behind,
    and count a pass's nodes one by one, where a tree's depth is meant. Within that many tokens all scale alike.
    """
    scale = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    if not scale:
        return None
    change = int(((length + earlier) // scale + 1) * scale)
    return change if max_length is None or max_length + earlier + NEAR >= change else None


def _original(config: Any, rope: dict[str, Any]) -> int | None:
    name = "original_max_position_embeddings"
    nested = [part.get(name) for part in rope.values() if isinstance(part, dict)]
    found = [rope.get(name), getattr(config, name, None), *nested]
    return next((value for value in found if isinstance(value, int)), None)
