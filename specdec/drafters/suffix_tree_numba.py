"""Kernels of the suffix tree: entering tokens, forgetting the oldest, and finding continuations.

Every suffix of every sequence, cut to ``max_depth`` tokens, is a path from the root, and a node's count says how many
of them reach its end. A node's label, the tokens between its parent's end and its own, is not stored but read from the
token store, where the newest suffix through the node has it. Hence the oldest tokens can be dropped without looking
for labels that refer to them: once their suffixes are forgotten, whatever is left has been passed by a newer one.

A suffix that is alone from some depth on is a leaf there. Its label goes on to ``max_depth`` whatever is appended, so
leaves are not touched again; where the sequence ended before, the label runs into ``END``. A suffix that is not alone
ends at a node of its own, and each token appended moves it on: these are ``active``, by length.

A tree is one block of int32, for a call of a kernel takes 0.2 us per array: the state, the active nodes, and the rest
of what ``Arrays`` names, which is where the kernels see it.
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
# A slot's columns. The mark is 31 bits that parent and first token are scattered to: where it differs, so does the key.
CHILD, MARK = 0, 1
# Entries of the state: nodes in use and ever used, free lists, the store's first and last token, how many tokens the
# newest sequence has, and its longest match; then what there is room for.
LIVE, NODES, FREE_NODE, RUNS, FREE_RUN, OLDEST, SIZE, GROWING, MATCHED = range(9)
MAX_DEPTH, NODE_ROOM, RUN_ROOM, TOKEN_ROOM = range(9, 13)
STATE = 13


class Arrays(NamedTuple):
    """A suffix tree; all int32.

    Attributes:
        nodes: [nodes, COLUMNS].
        runs: [runs, 2], the first and the last sibling of each run.
        table: [3 / 2 * nodes, 2], children by parent and first token, by open addressing. An only child is neither here
            nor in a run.
        tokens: the token store; ``tokens[state[OLDEST] : state[SIZE]]`` is in the tree, and END follows.
        active: [max_depth + 1], the node where the last n tokens end, for n up to ``state[MATCHED]``.
        state: [STATE].
    """

    nodes: np.ndarray
    runs: np.ndarray
    table: np.ndarray
    tokens: np.ndarray
    active: np.ndarray
    state: np.ndarray


def size(max_depth: int, nodes: int, runs: int, tokens: int) -> int:
    """How many int32 a tree takes that has room for so much."""
    return STATE + max_depth + 1 + COLUMNS * nodes + 2 * runs + 2 * (nodes * 3 // 2) + tokens


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def unpack(block: np.ndarray) -> Arrays:
    """The parts of a tree."""
    nodes, runs = np.int64(block[NODE_ROOM]), np.int64(block[RUN_ROOM])
    a = STATE + block[MAX_DEPTH] + 1
    b = a + COLUMNS * nodes
    c = b + 2 * runs
    d = c + 2 * (nodes * 3 // 2)
    return Arrays(
        block[a:b].reshape((nodes, COLUMNS)),
        block[b:c].reshape((runs, 2)),
        block[c:d].reshape((nodes * 3 // 2, 2)),
        block[d:],
        block[STATE:a],
        block[:STATE],
    )


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _is_full(state: np.ndarray) -> bool:
    """Whether there may be no room for one more token's nodes, runs, or itself."""
    depth = state[MAX_DEPTH]
    nodes_full = state[LIVE] + depth + 2 > state[NODE_ROOM]
    runs_full = state[RUNS] + 2 * depth + 2 > state[RUN_ROOM]
    return nodes_full or runs_full or state[SIZE] + 2 > state[TOKEN_ROOM]  # type: ignore[no-any-return]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def extend(block: np.ndarray, new: np.ndarray) -> int:
    """Append tokens to the newest sequence; how many there was room for."""
    tree = unpack(block)
    active, state = tree.active, tree.state
    max_depth = len(active) - 1
    children = np.empty(max_depth, np.int32)
    for i, token in enumerate(new):
        at = state[SIZE]
        if _is_full(state):
            return i
        tree.tokens[at], tree.tokens[at + 1] = token, END
        state[SIZE] = at + 1
        state[GROWING] += 1
        most, longest = min(state[MATCHED], max_depth - 1), 0
        for depth in range(most + 1):  # first, so that memory is waited for at once and not for each in turn
            children[depth] = _child(tree.nodes, tree.table, active[depth], token)
        for depth in range(most, -1, -1):
            active[depth + 1] = _advance(tree, active[depth], children[depth], depth, at)
            if longest == 0 and active[depth + 1] != NONE:
                longest = depth + 1
        state[MATCHED] = longest
    return len(new)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def forget(block: np.ndarray, stop: int) -> int:
    """Take out the suffixes that start before ``stop`` in the store; how many sequences this ends.

    Of a sequence that still grows the last ``max_depth`` suffixes must stay.
    """
    tree, ended = unpack(block), 0
    for start in range(tree.state[OLDEST], stop):
        if tree.tokens[start] == END:
            ended += 1
        else:
            _remove(tree, start)
    tree.state[OLDEST] = stop
    return ended


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def move(block: np.ndarray, larger: np.ndarray) -> None:
    """Copy a tree to where there is more room, what is left of the store to its beginning.

    A mark's place in a table grows with the mark, so both tables are passed from one end to the other.
    """
    old, new = unpack(block), unpack(larger)
    oldest, end = old.state[OLDEST], old.state[SIZE]
    new.state[:MAX_DEPTH] = old.state[:MAX_DEPTH]
    new.state[OLDEST], new.state[SIZE] = 0, end - oldest
    used = old.state[NODES]
    new.nodes[:used] = old.nodes[:used]
    new.nodes[ROOT + 1 : used, START] -= oldest
    new.runs[: old.state[RUNS]] = old.runs[: old.state[RUNS]]
    new.active[:] = old.active
    kept = old.tokens[oldest : end + 1]
    new.tokens[: len(kept)] = kept
    for i in range(len(old.table)):
        if old.table[i, CHILD] != NONE:
            slot = old.table[i, MARK] * len(new.table) >> 31
            while new.table[slot, CHILD] != NONE:
                slot = slot + 1 if slot + 1 < len(new.table) else 0
            new.table[slot, CHILD], new.table[slot, MARK] = old.table[i, CHILD], old.table[i, MARK]


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
def _advance(tree: Arrays, node: int, child: int, depth: int, at: int) -> Index:
    """Move the end of the suffix of ``depth`` tokens on from ``node`` by the token at ``at``; NONE once it is alone.

    ``child`` is where that token led to when it was appended. A longer suffix may since have put another in its place.
    """
    nodes, room = tree.nodes, len(tree.active) - 1 - depth
    if node != ROOT and nodes[node, COUNT] == 1:  # the others were forgotten
        nodes[node, LENGTH] += room
        return NONE
    if child != NONE and (
        nodes[child, COUNT] == 0 or nodes[child, PARENT] != node or nodes[child, TOKEN] != tree.tokens[at]
    ):
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
        tree.table[_slot(tree.nodes, tree.table, parent, nodes[old, TOKEN]), CHILD] = new
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
        _enter(tree, only)
        nodes[only, RUN] = _new_run(tree, only)
    _enter(tree, leaf)
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
    tree.nodes[node, COUNT], tree.nodes[node, NEXT] = 0, tree.state[FREE_NODE]
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
    return table[_slot(nodes, table, parent, token), CHILD]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _slot(nodes: np.ndarray, table: np.ndarray, parent: int, token: int) -> Index:
    """The slot of a child, or the empty one where it belongs."""
    mark = _mark(parent, token)
    slot = mark * len(table) >> 31
    while True:
        child = table[slot, CHILD]
        if child == NONE or (
            table[slot, MARK] == mark and nodes[child, PARENT] == parent and nodes[child, TOKEN] == token
        ):
            return slot
        slot = slot + 1 if slot + 1 < len(table) else 0


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _enter(tree: Arrays, child: int) -> None:
    """Put a child into the table."""
    parent, token = tree.nodes[child, PARENT], tree.nodes[child, TOKEN]
    slot = _slot(tree.nodes, tree.table, parent, token)
    tree.table[slot, CHILD], tree.table[slot, MARK] = child, _mark(parent, token)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _clear(tree: Arrays, slot: int) -> None:
    """Empty a slot, and move up what was pushed behind it."""
    table = tree.table
    slots, other = len(table), slot
    while True:
        other = other + 1 if other + 1 < slots else 0
        if table[other, CHILD] == NONE:
            break
        home = table[other, MARK] * slots >> 31
        if (other - home) % slots >= (other - slot) % slots:
            table[slot, CHILD], table[slot, MARK] = table[other, CHILD], table[other, MARK]
            slot = other
    table[slot, CHILD] = NONE


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _mark(parent: int, token: int) -> Index:
    h = (np.int64(parent) << 32) ^ np.int64(token)
    h *= -7046029254386353131  # 2**64 / golden ratio, as int64
    h ^= h >> 29
    h *= -4658895280553007687  # a multiplier of splitmix64
    return (h >> 30) & 0x7FFFFFFF
