"""Kernels of the n-gram drafter: an index of one text's n-grams, and trees copied from earlier occurrences.

The index keeps, for each length n, an open-addressing hash table from an n-gram to the position where it last ended,
and for each position a link to where its n-gram ended before. A slot holds only a position: the n-gram itself is read
from the text and compared, so a collision of hashes costs a probe and nothing else.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.calibration import MOST, learn, magnitude
from specdec.drafters.likeliest_numba import Limits, likeliest

EMPTY = -1
LONGEST = 64  # matches are measured up to here: longer ones are no surer
VISITS = 16  # occurrences of one n-gram looked at, at most
_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, as int64

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def advance(
    tokens: np.ndarray,
    indexed: int,
    table: np.ndarray,
    previous: np.ndarray,
    guess: Arrays,
    guessed_at: int,
    accepted: np.ndarray,
    offered: np.ndarray,
    shortest: int,
    branches: int,
    limits: Limits,
) -> tuple[Arrays, Arrays]:
    """Enter what is new of a text, but for its last token, and guess what follows that.

    First what became of the last ``guess``, after ``guessed_at`` tokens, is counted.

    Returns all that is guessed (tokens, parents and kinds), which is the root alone where nothing matches, and what
    of it is within ``limits`` (tokens, parents and probability).
    """
    learn(guess[0], guess[1], guess[2], tokens[guessed_at:], accepted, offered, MOST)
    index_text(tokens, indexed, len(tokens) - 1, table, previous)
    depth = max(0, min(limits[0], limits[1]))
    ends, lengths = find_matches(tokens, table, previous, shortest, branches if depth > 0 else 0)
    new = copy_continuations(tokens, ends, lengths, depth)
    return new, likeliest(new[0], new[1], new[2], accepted, offered, limits)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _mix(h: int, token: int) -> int:
    h = (h ^ (token + 1)) * _MULTIPLIER
    return h ^ (h >> 29)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _common_suffix(tokens: np.ndarray, a: int, b: int, most: int) -> int:
    """How many tokens up to position ``a`` equal those up to the later position ``b``, ``most`` at most."""
    most = min(most, a + 1)
    for n in range(most):
        if tokens[a - n] != tokens[b - n]:
            return n
    return most


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find(slots: np.ndarray, h: int, tokens: np.ndarray, end: int, n: int) -> int:
    """The slot of the n-gram that ends at ``end``, or the empty slot where it belongs."""
    mask = len(slots) - 1
    slot = h & mask
    while slots[slot] != EMPTY and _common_suffix(tokens, slots[slot], end, n) < n:
        slot = (slot + 1) & mask
    return slot


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def index_text(tokens: np.ndarray, start: int, stop: int, table: np.ndarray, previous: np.ndarray) -> None:
    """Enter the n-grams that end at ``start`` to ``stop - 1``; earlier ones are in.

    ``table`` int32 [lengths, slots], slots a power of two above ``stop``, and ``previous`` int32 [lengths, positions]
    are changed. Row n - 1 is for n-grams of n tokens.
    """
    for end in range(start, stop):
        h = 0
        for n in range(1, min(len(table), end + 1) + 1):
            h = _mix(h, tokens[end - n + 1])
            slot = _find(table[n - 1], h, tokens, end, n)
            previous[n - 1, end] = table[n - 1, slot]
            table[n - 1, slot] = end


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def rehash(tokens: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """Enter every n-gram of the table ``old`` in the larger, empty table ``new``."""
    mask = new.shape[1] - 1
    for row in range(len(old)):
        for end in old[row]:
            if end == EMPTY:
                continue
            h = 0
            for n in range(1, row + 2):
                h = _mix(h, tokens[end - n + 1])
            slot = h & mask
            while new[row, slot] != EMPTY:  # the table's n-grams are distinct: nothing to compare
                slot = (slot + 1) & mask
            new[row, slot] = end


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find_matches(
    tokens: np.ndarray, table: np.ndarray, previous: np.ndarray, shortest: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where earlier occurrences of the text's last tokens end, and how long each match is.

    Longest match first, then the most recent; none shorter than ``shortest`` tokens, and ``most`` at most.
    """
    last, found, h = len(tokens) - 1, 0, 0
    longest = min(len(table), len(tokens))
    ends, lengths = np.empty(longest * VISITS, np.int64), np.empty(longest * VISITS, np.int64)
    newest = np.empty(longest, np.int64)
    for n in range(1, longest + 1):
        h = _mix(h, tokens[last - n + 1])
        newest[n - 1] = table[n - 1, _find(table[n - 1], h, tokens, last, n)]
    for n in range(longest, shortest - 1, -1):
        end = newest[n - 1]
        for _ in range(VISITS):
            if end == EMPTY or (found >= most and n < len(table)):
                break
            length = _common_suffix(tokens, end, last, LONGEST)
            if length == n or n == len(table):  # a longer match was met among the longer n-grams
                _insert(ends, lengths, found, end, length)
                found += 1
            end = previous[n - 1, end]
    return ends[: min(found, most)], lengths[: min(found, most)]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _insert(ends: np.ndarray, lengths: np.ndarray, found: int, end: int, length: int) -> None:
    """Put a match behind those at least as long."""
    i = found
    while i > 0 and lengths[i - 1] < length:
        ends[i], lengths[i] = ends[i - 1], lengths[i - 1]
        i -= 1
    ends[i], lengths[i] = end, length


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _kind(match: int, votes: int, against: int, older: bool) -> int:
    """What tells how sure a copied token is, as one number: an index of [8, 4, 4, 2], flattened.

    The length of the match at its parent (each accepted token lengthens it by one), how many of the occurrences that
    reach the parent go on with this token and how many with others, and whether a better occurrence did the latter.
    """
    kind: int = (magnitude(match, 7) * 4 + magnitude(votes, 3)) * 8 + magnitude(against, 3) * 2 + older
    return kind


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def copy_continuations(
    tokens: np.ndarray, ends: np.ndarray, lengths: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What followed each match, ``depth`` tokens of it, as one tree: tokens, parents and kind of each node.

    A copy that reaches the end of the text goes on with its own tokens, as if it had been committed: a text that
    loops is copied to any depth.
    """
    most = len(ends) * depth + 1
    out, parents, votes = np.empty(most, np.int64), np.full(most, -1, np.int64), np.zeros(most, np.int64)
    match, older, path = np.empty(most, np.int64), np.zeros(most, np.bool_), np.empty(depth, np.int64)
    out[0], nodes = tokens[-1], 1
    votes[0] = len(ends)
    for end, length in zip(ends, lengths):  # noqa: B905 - numba has no strict zip
        node = 0
        for level in range(depth):
            source = end + 1 + level
            path[level] = tokens[source] if source < len(tokens) else path[source - len(tokens)]
            child, siblings = _child(out, parents, nodes, node, path[level])
            if child == nodes:
                out[child], parents[child] = path[level], node
                match[child], older[child] = length + level, siblings
                nodes += 1
            votes[child] += 1
            node = child
    kinds = np.zeros(nodes, np.int64)
    for node in range(1, nodes):
        against = votes[parents[node]] - votes[node]
        kinds[node] = _kind(match[node], votes[node], against, older[node])
    return out[:nodes], parents[:nodes], kinds


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _child(out: np.ndarray, parents: np.ndarray, nodes: int, node: int, token: int) -> tuple[int, bool]:
    """The child of ``node`` with ``token``, or ``nodes`` if there is none, and whether siblings stand before it."""
    siblings = False
    for other in range(node + 1, nodes):
        if parents[other] == node:
            if out[other] == token:
                return other, siblings
            siblings = True
    return nodes, siblings
