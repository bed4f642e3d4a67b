"""What single tokens say, where a character may be spread over several of them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def spell(tokenizer: Any, ids: Iterable[int]) -> tuple[dict[int, str], dict[int, bytes]]:
    """The text of each token, as it stands within a text, and the bytes of those that are no whole characters.

    Args:
        tokenizer: of Hugging Face.
    """
    texts = {id: _text(tokenizer, id) for id in ids}
    parts = {id: _bytes(tokenizer, id) for id, text in texts.items() if INCOMPLETE in text}
    return texts, {id: part for id, part in parts.items() if part is not None}


def pieces(ids: Iterable[int], texts: Mapping[int, str], parts: Mapping[int, bytes]) -> list[str]:
    """What each token adds to a text; a character that is spread over several comes with the last of them.

    Joined they are the text. A token without text is its id in angle brackets; what never becomes a character is one
    replacement character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = [decoder.decode(parts.get(id) or texts.get(id, f"<{id}>").encode(errors="replace")) for id in ids]
    if found:
        found[-1] += decoder.decode(b"", True)
    return found


def _text(tokenizer: Any, id: int) -> str:
    """Decoded after another token: alone, or first, it would lose a space before it."""
    before = tokenizer.encode("a", add_special_tokens=False)
    alone: str = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    both: str = tokenizer.decode([*before, id], clean_up_tokenization_spaces=False)
    return both.removeprefix(alone)


def _bytes(tokenizer: Any, id: int) -> bytes | None:
    """Of a token of a byte-level tokenizer, or one that falls back to bytes; None where that is not what it is."""
    token: str = tokenizer.convert_ids_to_tokens(id)
    if match := BYTE.fullmatch(token):
        return bytes.fromhex(match[1])
    letters = _alphabet()
    found = bytes(letters[letter] for letter in token) if set(token) <= set(letters) else b""
    return found if found.decode(errors="replace") == _text(tokenizer, id) else None


def _alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level tokenizer stands for: what prints is itself, the rest follows 255."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(rest)}
