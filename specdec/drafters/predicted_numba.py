"""Kernels of predicted output: where in the prediction a text has got to, and what it may do next."""

from __future__ import annotations

import numpy as np
from numba import njit

LONGEST = 64  # matches are measured up to here: longer ones are no surer
NEAR = 64  # tokens that an edit is expected to delete, at most
SHIFTS = 3  # tokens that a replacement or an insertion is guessed to have, at most
RESUME = 3  # tokens that must agree before a place is taken for the right one

# Places where the text may go on: at the cursor; soon after it, later or earlier, where the last tokens occur; past as
# many tokens as were written since the texts parted, as if those had been replaced; at the cursor, as if inserted.
COURSE, AHEAD, ELSEWHERE, REPLACED, INSERTED = range(5)
PLACES, MATCHES = 5, 8
KINDS = MATCHES * PLACES * 2


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def kind_of(match: int, place: int, disputed: bool) -> int:
    """An index of [MATCHES, PLACES, 2], flattened; the match is told apart by powers of two, from 0 to 64."""
    bits = 0
    while match > 0 and bits < MATCHES - 1:
        match >>= 1
        bits += 1
    return (bits * PLACES + place) * 2 + disputed


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def advance(prediction: np.ndarray, committed: np.ndarray, cursor: int, gap: int) -> tuple[int, int]:
    """The cursor, and the number of tokens since the texts parted there, after some more were committed."""
    for token in committed:
        if gap == 0 and cursor < len(prediction) and prediction[cursor] == token:
            cursor += 1
        else:
            gap += 1
    return cursor, gap


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _match(prediction: np.ndarray, tokens: np.ndarray, position: int) -> int:
    """How many tokens before ``position`` agree with the last ones of the text."""
    most = min(position, len(tokens), LONGEST)
    for n in range(most):
        if prediction[position - 1 - n] != tokens[len(tokens) - 1 - n]:
            return n
    return most


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find_places(
    prediction: np.ndarray, tokens: np.ndarray, cursor: int, gap: int, most: int, rate: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the text may go on: position, match and place of the ``most`` likeliest, best first.

    Of candidates of one kind the nearest after the cursor stands for all, or else the nearest before it.
    """
    best, length, match = np.full(KINDS, -1, np.int64), np.zeros(KINDS, np.int64), 0
    if gap == 0:
        match = _match(prediction, tokens, cursor)
        kind = kind_of(match, COURSE, False)
        best[kind], length[kind] = cursor, match
    elif gap <= SHIFTS:
        best[kind_of(0, REPLACED, False)] = cursor + gap
        best[kind_of(0, INSERTED, False)] = cursor
    if gap > 0 or match < LONGEST // 4:
        _scan(prediction, tokens, cursor, gap, best, length)
    order = np.argsort(-np.where(best >= 0, rate, -1.0), kind="mergesort")[:most]
    order = order[(best[order] >= 0) & (best[order] < len(prediction))]
    return best[order], length[order], order // 2 % PLACES


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _scan(
    prediction: np.ndarray, tokens: np.ndarray, cursor: int, gap: int, best: np.ndarray, length: np.ndarray
) -> None:
    """Enter the places where the last tokens occur."""
    last = tokens[-1]
    for position in range(1, len(prediction)):
        if prediction[position - 1] != last or (gap == 0 and position == cursor):
            continue
        match = _match(prediction, tokens, position)
        place = AHEAD if 0 <= position - cursor <= NEAR else ELSEWHERE
        if match == 1 and place == ELSEWHERE:
            continue  # a single token occurs anywhere
        kind = kind_of(match, place, False)
        if best[kind] < cursor:
            best[kind], length[kind] = position, match


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def copy_places(
    prediction: np.ndarray, root: int, positions: np.ndarray, matches: np.ndarray, places: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prediction from each position on, ``depth`` tokens of it, as one tree: tokens, parents and kinds."""
    most = len(positions) * depth + 1
    out, parents, kinds = np.empty(most, np.int64), np.full(most, -1, np.int64), np.zeros(most, np.int64)
    out[0], nodes = root, 1
    for position, match, place in zip(positions, matches, places):  # noqa: B905 - numba has no strict zip
        node, disputed = 0, False
        for level in range(min(depth, len(prediction) - position)):
            token, child = prediction[position + level], node + 1
            while child < nodes and (parents[child] != node or out[child] != token):
                disputed |= parents[child] == node
                child += 1
            if child == nodes:
                out[nodes], parents[nodes] = token, node
                kinds[nodes] = kind_of(match + level, place, disputed)
                nodes += 1
            node, disputed = child, False
    return out[:nodes], parents[:nodes], kinds[:nodes]
