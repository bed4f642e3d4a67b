"""Kernels of the lookahead drafter: one tree of branches out of two tries."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numba import njit

from specdec.calibration import MOST, learn
from specdec.drafters.likeliest_numba import Limits, likeliest
from specdec.drafters.trie_numba import CHILD, COUNT, FOREST, NEXT, NONE, TOKEN, Arrays, count_ngrams, find_child
from specdec.drafters.votes import KINDS, vote_kind

SHARED_WEIGHT = 1e-4  # of an occurrence elsewhere, against one in the sequence itself
OUT, PARENT, LEVEL, CHILDREN, OWN, SHARED = range(6)  # columns of a growing tree; the last two: its node in each trie

Offer = tuple[float, np.int64, np.int64, np.int64]  # negated weight, parent, node in each trie


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def advance(
    own: Arrays,
    shared: Arrays,
    text: np.ndarray,
    prompt: int,
    counted: tuple[int, int],
    longest: int,
    largest: tuple[int, int],
    guess: Arrays,
    guessed_at: int,
    accepted: np.ndarray,
    offered: np.ndarray,
    max_query: int,
    quotas: tuple[int, int],
    limits: Limits,
) -> tuple[Arrays, Arrays]:
    """Count what is new of a text in its ``own`` trie, behind the prompt in the ``shared`` one, and ``branch_out``.

    First what became of the last ``guess``, after ``guessed_at`` tokens, is counted. How many tokens are in each trie
    is ``counted``, of the answer alone in the shared one; ``longest`` and ``largest`` are for ``count_ngrams``.

    Returns all that is guessed (tokens, parents and kinds), and what of it is within ``limits`` (tokens, parents and
    probability).
    """
    learn(guess[0], guess[1], guess[2], text[guessed_at:], accepted, offered, MOST)
    count_ngrams(own, text, counted[0], longest, largest[0])
    count_ngrams(shared, text[prompt:], counted[1], longest, largest[1])
    nodes, depth, width, _ = limits
    query = text[max(0, len(text) - max_query) :]
    new = branch_out(own, shared, query, longest - 1, quotas, (nodes, depth, width))
    return new, likeliest(new[0], new[1], new[2], accepted, offered, limits)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def branch_out(
    own: Arrays,
    shared: Arrays,
    query: np.ndarray,
    enough: int,
    quotas: tuple[int, int],
    budget: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What followed the longest end of ``query`` that ``enough`` nodes followed: tokens, parents, kind of each node.

    If none has so many below it, then what followed the shortest. Of more nodes than the ``budget`` (nodes, depth and
    width) allows, the most frequent in each trie have their ``quotas``, and the most frequent by both fill the rest.
    Kinds of what is in ``own`` come first, ``KINDS`` of them.
    """
    nodes, depth, width = budget
    tree, size, match = np.zeros((nodes + 1, 6), np.int64), 1, 0
    tree[0, OUT], tree[0, PARENT] = query[-1], -1
    for length in range(len(query) if nodes > 0 else 0, 0, -1):
        end = query[len(query) - length :]
        trial, grown = np.zeros((nodes + 1, 6), np.int64), 1
        trial[0, OUT], trial[0, PARENT], trial[0, OWN], trial[0, SHARED] = (
            query[-1],
            -1,
            _walk(own, end),
            _walk(shared, end),
        )
        grown = _grow(own, shared, trial, grown, quotas[0], (depth, width), (1.0, 0.0))
        grown = _grow(own, shared, trial, grown, quotas[1], (depth, width), (0.0, 1.0))
        grown = _grow(own, shared, trial, grown, nodes, (depth, width), (1.0 - SHARED_WEIGHT, SHARED_WEIGHT))
        if grown > 1:
            tree, size, match = trial, grown, length
        if grown >= min(enough, nodes + 1):
            break
    return tree[:size, OUT].copy(), tree[:size, PARENT].copy(), _kinds(own[0], shared[0], tree[:size], match)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _walk(trie: Arrays, query: np.ndarray) -> int:
    """The node of an n-gram, or NONE."""
    node = FOREST
    for token in query:
        node = find_child(trie, node, token)
        if node == NONE:
            break
    return node


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow(
    own: Arrays,
    shared: Arrays,
    tree: np.ndarray,
    size: int,
    quota: int,
    limits: tuple[int, int],
    weights: tuple[float, float],
) -> int:
    """See that the tree has the ``quota`` heaviest nodes, as far as it has rows; its new size.

    No node outweighs its parent, so the heaviest offer is always the next, and parents come first.
    """
    depth, width = limits
    offers = [(0.0, np.int64(0), np.int64(0), np.int64(0))]
    offers.pop()
    if quota > 0:
        _offer(offers, own, shared, tree, 0, weights)
    while quota > 0 and len(offers):
        _, parent, here, there = heappop(offers)
        node = parent + 1
        while node < size and (tree[node, PARENT] != parent or tree[node, OWN] != here or tree[node, SHARED] != there):
            node += 1
        if node == size:
            if size == len(tree) or tree[parent, CHILDREN] >= width:
                continue
            tree[node, OUT] = own[0][here, TOKEN] if here != NONE else shared[0][there, TOKEN]
            tree[node, PARENT], tree[node, LEVEL] = parent, tree[parent, LEVEL] + 1
            tree[node, OWN], tree[node, SHARED] = here, there
            tree[parent, CHILDREN] += 1
            size += 1
        quota -= 1
        if tree[node, LEVEL] < depth:
            _offer(offers, own, shared, tree, node, weights)
    return size


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _offer(
    offers: list[Offer],
    own: Arrays,
    shared: Arrays,
    tree: np.ndarray,
    parent: int,
    weights: tuple[float, float],
) -> None:
    """Offer every child of a node, in either trie, that has weight."""
    here, there = tree[parent, OWN], tree[parent, SHARED]
    child = own[0][here, CHILD] if here != NONE else NONE
    while child != NONE:
        twin = find_child(shared, there, own[0][child, TOKEN]) if there != NONE else NONE
        count = shared[0][twin, COUNT] if twin != NONE else 0
        weight = weights[0] * own[0][child, COUNT] + weights[1] * count
        if weight > 0:
            heappush(offers, (-weight, np.int64(parent), np.int64(child), np.int64(twin)))
        child = own[0][child, NEXT]
    child = shared[0][there, CHILD] if there != NONE else NONE
    while child != NONE:
        weight = weights[1] * shared[0][child, COUNT]
        if weight > 0 and (here == NONE or find_child(own, here, shared[0][child, TOKEN]) == NONE):
            heappush(offers, (-weight, np.int64(parent), np.int64(NONE), np.int64(child)))
        child = shared[0][child, NEXT]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _kinds(own: np.ndarray, shared: np.ndarray, tree: np.ndarray, match: int) -> np.ndarray:
    kinds = np.zeros(len(tree), np.int64)
    for node in range(1, len(tree)):
        parent, length = tree[node, PARENT], match + tree[node, LEVEL] - 1
        if tree[node, OWN] != NONE:
            kinds[node] = vote_kind(length, own[tree[node, OWN], COUNT], _total(own, tree[parent, OWN]))
        else:
            votes, total = shared[tree[node, SHARED], COUNT], _total(shared, tree[parent, SHARED])
            kinds[node] = KINDS + vote_kind(length, votes, total)
    return kinds


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _total(nodes: np.ndarray, node: int) -> int:
    """How often anything followed a node."""
    total, child = 0, nodes[node, CHILD]
    while child != NONE:
        total += nodes[child, COUNT]
        child = nodes[child, NEXT]
    return total
