"""Kernels of the retrieval drafter: search in a suffix array, and trees of what followed the matches.

Positions that lie outside the token store, which only a damaged index has, read as the end of a document.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numba import njit

from specdec.drafters.votes import vote_kind


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _token(tokens: np.ndarray, position: int) -> int:
    return tokens[position] if 0 <= position < len(tokens) else -1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _bound(tokens: np.ndarray, suffixes: np.ndarray, query: np.ndarray, past: bool, low: int) -> int:
    """The first suffix from ``low`` on that does not sort before the query's own, or ``past`` all that begin so."""
    high = len(suffixes)
    while low < high:
        middle = (low + high) // 2
        before = past  # as it is if the suffix begins with the whole query
        for i, wanted in enumerate(query):
            token = _token(tokens, suffixes[middle] + i)
            if token != wanted:
                before = token < wanted
                break
        if before:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find_longest(
    tokens: np.ndarray, suffixes: np.ndarray, text: np.ndarray, shortest: int, longest: int
) -> tuple[int, int, int]:
    """The longest end of ``text`` that the corpus has: the range of its suffixes, and its length, 0 if none.

    What occurs occurs without its first token too, so the length is found by bisection.
    """
    low = high = match = 0
    least, most = shortest, min(longest, len(text))
    while least <= most:
        length = (least + most + 1) // 2
        query = text[len(text) - length :]
        first = _bound(tokens, suffixes, query, False, 0)
        last = _bound(tokens, suffixes, query, True, first)
        if last > first:
            low, high, match, least = first, last, length, length + 1
        else:
            most = length - 1
    return low, high, match


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def grow_continuations(
    tokens: np.ndarray,
    suffixes: np.ndarray,
    found: tuple[int, int, int],
    samples: int,
    accepted: np.ndarray,
    offered: np.ndarray,
    root: int,
    budget: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The most probable tree of what followed a match: tokens, parents, path probability and kind of each node.

    ``samples`` occurrences at most are looked at, evenly spaced in the sorted range, so that each continuation has its
    share. They are sorted by continuation: a node is a range of them, and its children are the runs of equal tokens in
    it. ``budget`` is nodes, depth and width.
    """
    low, high, match = found
    nodes, depth, width = budget
    rows = min(samples, high - low)
    starts = np.empty(rows, np.int64)
    for row in range(rows):
        starts[row] = suffixes[low + row * (high - low) // rows] + match
    size = max(nodes, 0) + 1
    out, parents, kinds = np.empty(size, np.int64), np.empty(size, np.int64), np.zeros(size, np.int64)
    probability, children, level = np.ones(size, np.float32), np.zeros(size, np.int64), np.zeros(size, np.int64)
    out[0], parents[0] = root, -1
    offers = [(-1.0, 0, 0, 0, 0)]  # negated path probability, parent, first row, row past the last, kind
    offers.pop()
    node, first, last, used = 0, 0, rows, 1
    while used < size:
        if node >= 0 and level[node] < depth:
            begin = first
            for row in range(first + 1, last + 1):
                token = _token(tokens, starts[begin] + level[node])
                if row < last and _token(tokens, starts[row] + level[node]) == token:
                    continue
                kind = vote_kind(match + level[node], row - begin, last - first)
                if token >= 0:
                    path = float(probability[node]) * accepted[kind] / offered[kind]
                    heappush(offers, (-path, node, begin, row, kind))
                begin = row
        if len(offers) == 0:
            break
        negative, parent, first, last, kind = heappop(offers)
        node = -1
        if children[parent] < width:
            node, used = used, used + 1
            children[parent] += 1
            out[node], parents[node] = _token(tokens, starts[first] + level[parent]), parent
            probability[node], kinds[node], level[node] = -negative, kind, level[parent] + 1
    return out[:used], parents[:used], probability[:used], kinds[:used]
