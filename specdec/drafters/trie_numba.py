"""Kernels of the trie: a forest of counted n-grams in one table of nodes, found by hash.

A trie is three arrays. A row of ``nodes`` (int32) is one node, its columns named below; freed rows are chained by
``NEXT`` and used again. ``buckets`` (int32) heads the chains of nodes whose parent and token hash alike. ``state``
(int64) is a few numbers of the whole. Buckets are taken into use one at a time, so that no insertion is slow.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TOKEN, PARENT, COUNT, CHILD, NEXT, CHAIN, SIZE = range(7)  # SIZE: nodes of the whole tree, kept at its root
COLUMNS = 7
# state: live nodes, rows ever used, the first freed row, the next tree to squeeze, buckets in use and the mask for them
LIVE, USED, FREE, HAND, BUCKETS, MASK = range(6)
NONE = -1  # no node
EMPTY = np.array([0, 0, NONE, 0, 1, 0], np.int64)  # the state of an empty trie, whose buckets are all NONE
FOREST = -2  # parent of every root
GONE = -3  # parent of a freed row
_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, as int64

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # nodes, buckets and state


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _bucket(state: np.ndarray, parent: int, token: int) -> int:
    h = ((parent + 3) * _MULTIPLIER ^ token) * _MULTIPLIER
    bucket: int = (h ^ (h >> 32)) & state[MASK]
    if bucket >= state[BUCKETS]:  # not split off yet from the one it is in
        bucket &= state[MASK] >> 1
    return bucket


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find_child(trie: Arrays, parent: int, token: int) -> int:
    """The node of ``token`` below ``parent``, or NONE."""
    nodes, buckets, state = trie
    node: int = buckets[_bucket(state, parent, token)]
    while node != NONE and (nodes[node, TOKEN] != token or nodes[node, PARENT] != parent):
        node = nodes[node, CHAIN]
    return node


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def add_child(trie: Arrays, parent: int, token: int) -> int:
    """A new node of count 0; there is a free row."""
    nodes, buckets, state = trie
    node: int = state[FREE]
    if node != NONE:
        state[FREE] = nodes[node, NEXT]
    else:
        node = state[USED]
        state[USED] += 1
    state[LIVE] += 1
    if state[LIVE] > state[BUCKETS]:
        _split(trie)
    bucket = _bucket(state, parent, token)
    nodes[node, TOKEN], nodes[node, PARENT], nodes[node, COUNT] = token, parent, 0
    nodes[node, CHILD], nodes[node, NEXT], nodes[node, SIZE] = NONE, NONE, 0
    nodes[node, CHAIN], buckets[bucket] = buckets[bucket], node
    if parent >= 0:
        nodes[node, NEXT], nodes[parent, CHILD] = nodes[parent, CHILD], node
    return node


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _split(trie: Arrays) -> None:
    """One more bucket, by linear hashing: it takes its part of the one bucket that had it."""
    nodes, buckets, state = trie
    new = state[BUCKETS]
    if new > state[MASK]:
        state[MASK] = 2 * state[MASK] + 1
    old = new & (state[MASK] >> 1)
    state[BUCKETS] += 1
    node = buckets[old]
    buckets[old] = buckets[new] = NONE
    while node != NONE:
        following, bucket = nodes[node, CHAIN], _bucket(state, nodes[node, PARENT], nodes[node, TOKEN])
        nodes[node, CHAIN], buckets[bucket] = buckets[bucket], node
        node = following


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _free(trie: Arrays, node: int) -> None:
    """Give back the row of a node that its siblings no longer know."""
    nodes, buckets, state = trie
    bucket = _bucket(state, nodes[node, PARENT], nodes[node, TOKEN])
    other = buckets[bucket]
    if other == node:
        buckets[bucket] = nodes[node, CHAIN]
    else:
        while nodes[other, CHAIN] != node:
            other = nodes[other, CHAIN]
        nodes[other, CHAIN] = nodes[node, CHAIN]
    nodes[node, PARENT], nodes[node, NEXT] = GONE, state[FREE]
    state[FREE] = node
    state[LIVE] -= 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def squeeze(trie: Arrays, root: int) -> None:
    """Halve the counts of one tree, and remove every node counted no more than once and all below it."""
    nodes, _, _ = trie
    # Entries: a node, its parent (NONE for the root), and whether the node stays.
    stack, size = [(np.int64(root), np.int64(NONE), nodes[root, COUNT] > 1)], 0
    while len(stack):
        node, parent, stays = stack.pop()
        child = nodes[node, CHILD]
        while child != NONE:
            stack.append((np.int64(child), np.int64(node), stays and nodes[child, COUNT] > 1))
            child = nodes[child, NEXT]
        if not stays:
            _free(trie, node)
            continue
        nodes[node, COUNT] //= 2
        nodes[node, CHILD] = NONE
        size += 1
        if parent != NONE:
            nodes[node, NEXT], nodes[parent, CHILD] = nodes[parent, CHILD], node
    if nodes[root, PARENT] == FOREST:
        nodes[root, SIZE] = size


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def make_room(trie: Arrays, rows: int) -> None:
    """Squeeze trees in turn until that many rows are free; at worst that empties the forest."""
    nodes, _, state = trie
    while len(nodes) - state[LIVE] < rows:
        state[HAND] = (state[HAND] + 1) % state[USED]
        if nodes[state[HAND], PARENT] == FOREST:
            squeeze(trie, state[HAND])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def count_ngrams(
    trie: Arrays,
    tokens: np.ndarray,
    known: int,
    longest: int,
    largest: int,
) -> None:
    """Count every n-gram of at most ``longest`` tokens that ends at position ``known`` or later.

    Those that end before were counted; what of them was removed since stays so. A tree of more than ``largest`` nodes
    is squeezed. There is room for what may be new.
    """
    nodes, _, _ = trie
    for start in range(max(0, known - longest + 1), len(tokens)):
        node, root = FOREST, NONE
        for end in range(start, min(start + longest, len(tokens))):
            child = find_child(trie, node, tokens[end])
            if child == NONE:
                if end < known:
                    break
                child = add_child(trie, node, tokens[end])
                nodes[child if root == NONE else root, SIZE] += 1
            node = child
            root = node if root == NONE else root
            if end >= known:
                nodes[node, COUNT] += 1
        if root != NONE and nodes[root, SIZE] > largest:
            squeeze(trie, root)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def flatten(trie: Arrays) -> np.ndarray:
    """The live nodes, parents first: a row of token, parent's row (FOREST for a root) and count for each."""
    nodes, _, state = trie
    out, size = np.empty((state[LIVE], 3), np.int32), 0
    stack = [(np.int64(0), np.int64(FOREST))]
    stack.pop()
    for node in range(state[USED]):
        if nodes[node, PARENT] == FOREST:
            stack.append((np.int64(node), np.int64(FOREST)))
        while len(stack):
            below, parent = stack.pop()
            out[size, 0], out[size, 1], out[size, 2] = nodes[below, TOKEN], parent, nodes[below, COUNT]
            child = nodes[below, CHILD]
            while child != NONE:
                stack.append((np.int64(child), np.int64(size)))
                child = nodes[child, NEXT]
            size += 1
    return out


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def unflatten(rows: np.ndarray, trie: Arrays, longest: int) -> bool:
    """Fill an empty forest from what ``flatten`` gave; False, and half filled, if that is no forest of n-grams."""
    nodes, _, _ = trie
    depth, root = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for i, (token, parent, count) in enumerate(rows):
        if token < 0 or count < 1 or not (parent == FOREST or 0 <= parent < i):
            return False
        depth[i] = 1 if parent == FOREST else depth[parent] + 1
        root[i] = i if parent == FOREST else root[parent]
        if depth[i] > longest or find_child(trie, parent, token) != NONE:
            return False
        nodes[add_child(trie, parent, token), COUNT] = count  # row i: none was freed yet
        nodes[root[i], SIZE] += 1
    return True
