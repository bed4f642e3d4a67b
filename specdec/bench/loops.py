"""Whether a text has fallen into a loop, as small models' texts do: such text is easy to guess and worth little."""

from __future__ import annotations

from collections.abc import Sequence

TAIL = 64  # tokens at the end that are looked at
TIMES, LEAST = 3, 24  # a period is a loop once it has come that often, over so many tokens
GRAM, DISTINCT = 4, 0.5  # of the tail's 4-grams, fewer than this share are different ones


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last tokens repeat one period, or, in a tail of 64, most 4-grams have come before."""
    return _periodic(tokens[-TAIL:]) or _repetitive(tokens[-TAIL:])


def _periodic(tail: Sequence[int]) -> bool:
    for period in range(1, len(tail) // TIMES + 1):
        due = max(TIMES * period, LEAST)
        end = tail[-due:]
        if len(end) == due and all(a == b for a, b in zip(end, end[period:], strict=False)):
            return True
    return False


def _repetitive(tail: Sequence[int]) -> bool:
    """A list that counts up and says the same of every number has no period, but few different 4-grams."""
    grams = [tuple(tail[i : i + GRAM]) for i in range(len(tail) - GRAM + 1)]
    return len(tail) == TAIL and len(set(grams)) < DISTINCT * len(grams)
