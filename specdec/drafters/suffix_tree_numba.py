"""Kernels of the suffix tree: entering tokens, forgetting the oldest, and finding continuations.

Every suffix of every sequence, cut to ``max_depth`` tokens, is a path from the root, and a node's count says how many
of them reach its end. A node's label, the tokens between its parent's end and its own, is not stored but read from the
token store, where the newest suffix through the node has it. Hence the oldest tokens can be dropped without looking
for labels that refer to them: once their suffixes are forgotten, whatever is left has been passed by a newer one.

A suffix that is alone from some depth on is a leaf there. Its label goes on to ``max_depth`` whatever is appended, so
leaves are not touched again; where the sequence ended before, the label runs into ``END``. A suffix that is not alone
ends at a node of its own, and each token appended moves it on: these are ``active``, by length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

Index = Any  # int64; what an array holds is no int to a type checker

END = -1  # stands behind every sequence in the token store
ROOT = NONE = 0  # the root is nobody's child or sibling

# A node's columns. Siblings are linked in order of count; those of equal count are a run, the last to recur first.
COUNT, PARENT, TOKEN, START, LENGTH, HEAD, TAIL, PREVIOUS, NEXT, RUN = range(10)
COLUMNS = 10
# A run's columns. A free run's first is the next free one; so is a free node's next.
FIRST, LAST = 0, 1
# Entries of the state: nodes in use and ever used, free lists, the store's first and last token, how many tokens the
# newest sequence has, and its longest match.
LIVE, NODES, FREE_NODE, RUNS, FREE_RUN, OLDEST, SIZE, GROWING, MATCHED = range(9)


class Arrays(NamedTuple):
    """A suffix tree.

    Attributes:
        nodes: int32 [nodes, COLUMNS].
        runs: int32 [nodes, 2], the first and the last sibling of each run.
        table: int32 [2 * nodes], children by parent and first token, by open addressing. An only child is neither here
            nor in a run.
        tokens: int32, the token store; ``tokens[state[OLDEST] : state[SIZE]]`` is in the tree, and END follows.
        active: int32 [max_depth + 1], the node where the last n tokens end, for n up to ``state[MATCHED]``.
        state: int64 [9].
    """

    nodes: np.ndarray
    runs: np.ndarray
    table: np.ndarray
    tokens: np.ndarray
    active: np.ndarray
    state: np.ndarray


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def extend(tree: Arrays, new: np.ndarray) -> int:
    """Append tokens to the newest sequence; how many there was room for."""
    active, state = tree.active, tree.state
    max_depth = len(active) - 1
    for i, token in enumerate(new):
        at = state[SIZE]
        if state[LIVE] + max_depth + 2 > len(tree.nodes) or at + 2 > len(tree.tokens):
            return i
        tree.tokens[at], tree.tokens[at + 1] = token, END
        state[SIZE] = at + 1
        state[GROWING] += 1
        longest = 0
        for depth in range(min(state[MATCHED], max_depth - 1), -1, -1):
            active[depth + 1] = _advance(tree, active[depth], depth, at)
            if longest == 0 and active[depth + 1] != NONE:
                longest = depth + 1
        state[MATCHED] = longest
    return len(new)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def forget(tree: Arrays, stop: int) -> int:
    """Take out the suffixes that start before ``stop`` in the store; how many sequences this ends.

    Of a sequence that still grows the last ``max_depth`` suffixes must stay.
    """
    ended = 0
    for start in range(tree.state[OLDEST], stop):
        if tree.tokens[start] == END:
            ended += 1
        else:
            _remove(tree, start)
    tree.state[OLDEST] = stop
    return ended


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def rehash(tree: Arrays, table: np.ndarray) -> None:
    """Enter every child of the tree's table in a larger, empty one."""
    for child in tree.table:
        if child != NONE:
            slot = _home(tree.nodes, child, len(table))
            while table[slot] != NONE:
                slot = slot + 1 if slot + 1 < len(table) else 0
            table[slot] = child


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find(nodes: np.ndarray, table: np.ndarray, tokens: np.ndarray, pattern: np.ndarray) -> tuple[Index, Index]:
    """Where a pattern ends: a node, and how many tokens of its label are in; (NONE, 0) if it is not in the tree."""
    node, inside = ROOT, 0
    for token in pattern:
        if inside == nodes[node, LENGTH]:
            node, inside = _child(nodes, table, node, token), 1
            if node == NONE:
                return NONE, 0
        elif tokens[nodes[node, START] + inside] == token:
            inside += 1
        else:
            return NONE, 0
    return node, inside


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _advance(tree: Arrays, node: int, depth: int, at: int) -> Index:
    """Move the end of the suffix of ``depth`` tokens on from ``node`` by the token at ``at``; NONE once it is alone."""
    nodes, room = tree.nodes, len(tree.active) - 1 - depth
    if node != ROOT and nodes[node, COUNT] == 1:  # the others were forgotten
        nodes[node, LENGTH] += room
        return NONE
    child = _child(tree.nodes, tree.table, node, tree.tokens[at])
    if child == NONE:
        _add_leaf(tree, node, at, room)
        return NONE
    if node != ROOT and nodes[node, COUNT] == nodes[child, COUNT] + 1:  # all others that reach the node go on, too
        if nodes[child, LENGTH] > 1:
            nodes[node, LENGTH] += 1
            _shorten(tree, child)
            return node
        nodes[child, LENGTH] += nodes[node, LENGTH]
        nodes[child, START] = nodes[node, START]
        _replace(tree, node, child)
        _free_node(tree, node)
        return child
    if nodes[child, LENGTH] > 1:
        child = _split(tree, child)
    nodes[child, START] = at
    _recount(tree, child, 1)
    return child


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _remove(tree: Arrays, start: int) -> None:
    """Take out the suffix that starts at ``start``, the oldest."""
    nodes, max_depth = tree.nodes, len(tree.active) - 1
    node, depth = ROOT, 0
    while depth < max_depth:
        child = _child(tree.nodes, tree.table, node, tree.tokens[start + depth])
        if child == NONE:  # it ends here
            break
        if nodes[child, COUNT] == 1:
            _remove_leaf(tree, child)
            break
        _recount(tree, child, -1)
        node, depth = child, depth + nodes[child, LENGTH]
    only = nodes[node, HEAD]
    if node != ROOT and only != NONE and nodes[only, COUNT] == nodes[node, COUNT]:
        nodes[only, START] -= nodes[node, LENGTH]
        nodes[only, LENGTH] += nodes[node, LENGTH]
        _replace(tree, node, only)
        _free_node(tree, node)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _split(tree: Arrays, node: int) -> Index:
    """Cut off the first token of a label as a node of its own, above the rest."""
    nodes, upper = tree.nodes, _new_node(tree)
    _replace(tree, node, upper)
    nodes[upper, LENGTH] = 1
    nodes[upper, HEAD] = nodes[upper, TAIL] = node
    nodes[node, PARENT] = upper
    nodes[node, PREVIOUS] = nodes[node, NEXT] = NONE
    _shorten(tree, node)
    return upper


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _shorten(tree: Arrays, only: int) -> None:
    """Take the first token from the label of an only child."""
    tree.nodes[only, START] += 1
    tree.nodes[only, LENGTH] -= 1
    tree.nodes[only, TOKEN] = tree.tokens[tree.nodes[only, START]]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _replace(tree: Arrays, old: int, new: int) -> None:
    """Put ``new`` in the place of ``old``: its parent, its siblings, its count and first token."""
    nodes = tree.nodes
    parent, previous, following = nodes[old, PARENT], nodes[old, PREVIOUS], nodes[old, NEXT]
    if previous != NONE or following != NONE:
        tree.table[_slot(tree.nodes, tree.table, parent, nodes[old, TOKEN])] = new
        for end in (FIRST, LAST):
            if tree.runs[nodes[old, RUN], end] == old:
                tree.runs[nodes[old, RUN], end] = new
    for column in (COUNT, PARENT, TOKEN, RUN):
        nodes[new, column] = nodes[old, column]
    _link(nodes, parent, previous, new)
    _link(nodes, parent, new, following)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_leaf(tree: Arrays, parent: int, at: int, length: int) -> None:
    nodes, leaf, only = tree.nodes, _new_node(tree), tree.nodes[parent, HEAD]
    nodes[leaf, COUNT], nodes[leaf, PARENT], nodes[leaf, TOKEN] = 1, parent, tree.tokens[at]
    nodes[leaf, START], nodes[leaf, LENGTH] = at, length
    nodes[leaf, HEAD] = nodes[leaf, TAIL] = NONE
    if only == NONE:
        _link(nodes, parent, NONE, leaf)
        _link(nodes, parent, leaf, NONE)
        return
    if only == nodes[parent, TAIL]:
        tree.table[_slot(tree.nodes, tree.table, parent, nodes[only, TOKEN])] = only
        nodes[only, RUN] = _new_run(tree, only)
    tree.table[_slot(tree.nodes, tree.table, parent, nodes[leaf, TOKEN])] = leaf
    _place(tree, leaf, NONE)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _remove_leaf(tree: Arrays, leaf: int) -> None:
    nodes, parent = tree.nodes, tree.nodes[leaf, PARENT]
    if nodes[parent, HEAD] == nodes[parent, TAIL]:
        nodes[parent, HEAD] = nodes[parent, TAIL] = NONE
    else:
        _clear(tree, _slot(tree.nodes, tree.table, parent, nodes[leaf, TOKEN]))
        _take_out(tree, leaf)
        only = nodes[parent, HEAD]
        if only == nodes[parent, TAIL]:
            _clear(tree, _slot(tree.nodes, tree.table, parent, nodes[only, TOKEN]))
            _free_run(tree, nodes[only, RUN])
    _free_node(tree, leaf)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _recount(tree: Arrays, node: int, change: int) -> None:
    """Add 1 to a count or -1, and move the node past the siblings it was equal to.

    One that was counted up is the last of its new run to recur. One that was counted down may be out of order there.
    """
    nodes, runs = tree.nodes, tree.runs
    nodes[node, COUNT] += change
    if nodes[node, PREVIOUS] == NONE and nodes[node, NEXT] == NONE:
        return
    first, last = runs[nodes[node, RUN], FIRST], runs[nodes[node, RUN], LAST]
    neighbour = nodes[first, PREVIOUS] if change > 0 else nodes[last, NEXT]
    joins = neighbour != NONE and nodes[neighbour, COUNT] == nodes[node, COUNT]
    if first == last and not joins:
        return
    if change < 0:
        before = neighbour
    elif joins:
        before = runs[nodes[neighbour, RUN], FIRST]
    else:
        before = first if first != node else nodes[node, NEXT]
    _take_out(tree, node)
    _place(tree, node, before)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _place(tree: Arrays, node: int, before: int) -> None:
    """Link a node in front of its sibling ``before``, NONE for behind all, in the run of a neighbour or its own."""
    nodes, parent = tree.nodes, tree.nodes[node, PARENT]
    previous = nodes[parent, TAIL] if before == NONE else nodes[before, PREVIOUS]
    if previous != NONE and nodes[previous, COUNT] == nodes[node, COUNT]:
        run = nodes[previous, RUN]
        tree.runs[run, LAST] = node
    elif before != NONE and nodes[before, COUNT] == nodes[node, COUNT]:
        run = nodes[before, RUN]
        tree.runs[run, FIRST] = node
    else:
        run = _new_run(tree, node)
    nodes[node, RUN] = run
    _link(nodes, parent, previous, node)
    _link(nodes, parent, node, before)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _take_out(tree: Arrays, node: int) -> None:
    """Unlink a node from its siblings and its run."""
    nodes, runs, run = tree.nodes, tree.runs, tree.nodes[node, RUN]
    if runs[run, FIRST] == runs[run, LAST]:
        _free_run(tree, run)
    elif runs[run, FIRST] == node:
        runs[run, FIRST] = nodes[node, NEXT]
    elif runs[run, LAST] == node:
        runs[run, LAST] = nodes[node, PREVIOUS]
    _link(nodes, nodes[node, PARENT], nodes[node, PREVIOUS], nodes[node, NEXT])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _link(nodes: np.ndarray, parent: int, previous: int, following: int) -> None:
    """Make two children neighbours; NONE is an end of the list."""
    if previous == NONE:
        nodes[parent, HEAD] = following
    else:
        nodes[previous, NEXT] = following
    if following == NONE:
        nodes[parent, TAIL] = previous
    else:
        nodes[following, PREVIOUS] = previous


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _new_node(tree: Arrays) -> Index:
    state, node = tree.state, tree.state[FREE_NODE]
    state[LIVE] += 1
    if node == NONE:
        node = state[NODES]
        state[NODES] += 1
    else:
        state[FREE_NODE] = tree.nodes[node, NEXT]
    return node


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _free_node(tree: Arrays, node: int) -> None:
    tree.nodes[node, NEXT] = tree.state[FREE_NODE]
    tree.state[FREE_NODE] = node
    tree.state[LIVE] -= 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _new_run(tree: Arrays, node: int) -> Index:
    state, run = tree.state, tree.state[FREE_RUN]
    if run == NONE:
        run = state[RUNS]
        state[RUNS] += 1
    else:
        state[FREE_RUN] = tree.runs[run, FIRST]
    tree.runs[run, FIRST] = tree.runs[run, LAST] = node
    return run


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _free_run(tree: Arrays, run: int) -> None:
    tree.runs[run, FIRST] = tree.state[FREE_RUN]
    tree.state[FREE_RUN] = run


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _child(nodes: np.ndarray, table: np.ndarray, parent: int, token: int) -> Index:
    """The child whose label begins with ``token``, or NONE."""
    head = nodes[parent, HEAD]
    if head == NONE or nodes[head, TOKEN] == token:
        return head
    if nodes[head, NEXT] == NONE:
        return NONE
    return table[_slot(nodes, table, parent, token)]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _slot(nodes: np.ndarray, table: np.ndarray, parent: int, token: int) -> Index:
    """The slot of a child, or the empty one where it belongs."""
    slot = _spread(parent, token, len(table))
    while table[slot] != NONE and (nodes[table[slot], PARENT] != parent or nodes[table[slot], TOKEN] != token):
        slot = slot + 1 if slot + 1 < len(table) else 0
    return slot


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _clear(tree: Arrays, slot: int) -> None:
    """Empty a slot, and move up what was pushed behind it."""
    table = tree.table
    size, other = len(table), slot
    while True:
        other = other + 1 if other + 1 < size else 0
        if table[other] == NONE:
            break
        home = _home(tree.nodes, table[other], size)
        if (other - home) % size >= (other - slot) % size:
            table[slot] = table[other]
            slot = other
    table[slot] = NONE


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _home(nodes: np.ndarray, child: int, slots: int) -> Index:
    return _spread(nodes[child, PARENT], nodes[child, TOKEN], slots)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _spread(parent: int, token: int, slots: int) -> Index:
    h = (np.int64(parent) << 32) ^ np.int64(token)
    h *= -7046029254386353131  # 2**64 / golden ratio, as int64
    h ^= h >> 29
    h *= -4658895280553007687  # a multiplier of splitmix64
    return (((h >> 30) & 0x7FFFFFFF) * slots) >> 31
