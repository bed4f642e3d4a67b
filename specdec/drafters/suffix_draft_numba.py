"""Kernels of the suffix drafter: the likeliest continuations after the match of every length, and the best of them."""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.calibration import MOST, learn, magnitude
from specdec.drafters.suffix_tree_numba import (
    COUNT,
    END,
    GROWING,
    HEAD,
    LENGTH,
    MATCHED,
    NEXT,
    NONE,
    ROOT,
    START,
    TOKEN,
    Arrays,
    Index,
    extend,
    find,
    unpack,
)

TIE = 1e-9  # scores that differ by less are equal: the order of summation must not decide
SHAPE = 2, 8, 4, 4  # see ``_kind``
KINDS = 256

Limits = tuple[int, int, int, float, float, float]  # nodes, depth, width, factor, offset, least
Buffers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # places and paths of a draft, and of offers to it

# What a node of a draft refers to: the tree's node, the place in its label, the draft's parent, and its depth.
NODE, INSIDE, PARENT, LEVEL = range(4)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def advance(
    own: np.ndarray,
    young: np.ndarray,
    old: np.ndarray,
    accepted: np.ndarray,
    offered: np.ndarray,
    guess: np.ndarray,
    guessed: int,
    text: np.ndarray,
    said: int,
    newest: bool,
    found: np.ndarray,
    paths: np.ndarray,
    depth: int,
    width: int,
    factor: float,
    offset: float,
    least: float,
) -> tuple[int, float, int, int, int]:
    """Enter what is new of a text in its ``own`` tree, its last ``said`` tokens in the ``young`` one, and ``draft``.

    First what became of the last ``guess``, of so many nodes, after what the own tree has is counted. The probabilities
    are those that guesses of their kind have come true with, ``accepted / offered``.

    Returns also how many tokens of each there was no room for. Then nothing is drafted.
    """
    new = len(text) - own[GROWING]
    if guessed > 1 and new > 0:
        tokens, parents, kinds = guess[0, :guessed], guess[1, :guessed], guess[2, :guessed]
        learn(tokens, parents, kinds, text[len(text) - new :], accepted, offered, MOST)
    new -= extend(own, text[len(text) - new :])
    said -= extend(young, text[len(text) - said :])
    if new > 0 or said > 0:
        return 0, 0.0, 0, new, said
    local, shared, elder = unpack(own), unpack(young), unpack(old)
    context = text[max(0, len(text) - len(local.active) + 1) :]
    length = shared.state[GROWING] if newest else 0
    size, score, match = draft(local, shared, elder, context, length, found, paths, depth, width, factor, offset, least)
    for i in range(1, size):
        kind = found[2, i]
        paths[i] = paths[found[1, i]] * accepted[kind] / offered[kind]
    return size, score, match, new, said


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def draft(
    local: Arrays,
    shared: Arrays,
    elder: Arrays,
    context: np.ndarray,
    newest: int,
    found: np.ndarray,
    paths: np.ndarray,
    depth: int,
    width: int,
    factor: float,
    offset: float,
    least: float,
) -> tuple[int, float, int]:
    """The best draft of three trees. ``context`` is the newest sequence of the first, and the first wins of equals.

    The context's last ``newest`` tokens are the newest sequence of the shared tree.

    Each node's token, parent and kind is written to ``found``, int64 [3, nodes], and the path's probability to
    ``paths``, float32 [nodes]; the context's last token is node 0. It is cheaper to fill arrays than to return them.

    Returns how many nodes there are, the root among them; the score, which is the sum of the guesses' probabilities;
    and how long the match is.
    """
    most = len(paths) - 1
    width = max(0, min(width, most))
    places, odds_of = np.empty((most + 1, 4), np.int64), np.empty(most + 1, np.float64)
    offers, odds = np.empty((width * (most + 1), 4), np.int64), np.empty(width * (most + 1), np.float64)
    limits = most, depth, width, factor, offset, least
    buffers = places, odds_of, offers, odds
    score, match = _best(local, True, context, limits, 0.0, buffers)
    tree, is_shared = local, False
    better, longer = _best(shared, shared.state[MATCHED] < newest, context, limits, score, buffers)
    if longer > 0:
        tree, is_shared, score, match = shared, True, better, longer
    better, longer = _best(elder, False, context, limits, score, buffers)
    if longer > 0:
        tree, is_shared, score, match = elder, True, better, longer
    size = 1
    if match > 0:  # once more: remembering each best draft would cost more
        node, inside = _end(tree, not is_shared, context, match)
        size, score = _continue(tree.nodes, tree.tokens, node, inside, match, limits, buffers)
    found[0, 0], found[1, 0], found[2, 0], paths[0], odds_of[0] = context[-1], -1, 0, 1.0, 1.0
    for i in range(1, size):
        node, parent = places[i, NODE], places[i, PARENT]
        kind = _kind(match + places[i, LEVEL] - 1, tree.nodes[node, COUNT], odds_of[i] / odds_of[parent], is_shared)
        found[0, i], found[1, i], found[2, i] = tree.tokens[tree.nodes[node, START] + places[i, INSIDE]], parent, kind
        paths[i] = odds_of[i]
    return size, score, match


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _best(
    tree: Arrays,
    own: bool,
    context: np.ndarray,
    limits: Limits,
    score: float,
    buffers: Buffers,
) -> tuple[float, int]:
    """Which match has the draft that beats ``score`` most: the draft's score and the match's length, 0 if none does.

    A match that can hold no better draft is not looked at, and the likeliest to hold a good one comes first. Of its
    ``own`` text the tree knows where the last tokens end, and one of the occurrences is the end itself.
    """
    nodes, depth, _, factor, offset, _ = limits
    max_depth, longest = len(tree.active) - 1, _longest(tree, own, context)
    match = max_depth  # whoever is as good as the score to beat has no longer match
    first = min(longest, max(1, int((max_depth - offset) / (1 + factor))))
    for i in range(longest + 1 if longest else 0):
        n = first if i == 0 else longest + 1 - i
        # The probabilities of one level sum to 1 at most, or to the share of the occurrences that go on.
        bound = float(min(nodes, int(n * factor + offset + 1e-6), depth, max_depth - n))
        if own:
            bound *= 1.0 - 1.0 / tree.nodes[tree.active[n], COUNT]
        if bound < score - TIE or (bound <= score + TIE and n < match) or (n == first and i > 0):
            continue
        node, inside = _end(tree, own, context, n)
        _, new = _continue(tree.nodes, tree.tokens, node, inside, n, limits, buffers)
        if new > score + TIE or (new > score - TIE and n > match):
            score, match = new, n
    return score, match if match < max_depth else 0


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _longest(tree: Arrays, own: bool, context: np.ndarray) -> Index:
    """How many of the context's last tokens are in the tree, less than all, and leaving some depth for a guess."""
    if own:
        return min(tree.state[MATCHED], len(tree.active) - 2)
    if tree.nodes[ROOT, HEAD] == NONE:
        return 0
    low, high = 0, min(len(context) - 1, len(tree.active) - 2)
    while low < high:
        n = min(2 * low + 1, (low + high + 1) // 2)  # most matches are short
        node, _ = find(tree.nodes, tree.table, tree.tokens, context[len(context) - n :])
        if node == NONE:
            high = n - 1
        else:
            low = n
    return low


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _end(tree: Arrays, own: bool, context: np.ndarray, n: int) -> tuple[Index, Index]:
    """Where the context's last n tokens end: a node, and how many tokens of its label are in."""
    if own:
        return tree.active[n], tree.nodes[tree.active[n], LENGTH]
    node, inside = find(tree.nodes, tree.table, tree.tokens, context[len(context) - n :])
    return node, inside


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _continue(
    nodes: np.ndarray, tokens: np.ndarray, node: int, inside: int, match: int, limits: Limits, buffers: Buffers
) -> tuple[int, float]:
    """The likeliest continuations of a match, best first: how many nodes, with the root, and their score.

    They are left in the buffers. Of equal paths the one met first comes first.
    """
    most, depth, width, factor, offset, least = limits
    places, paths, offers, odds = buffers
    most = min(most, int(match * factor + offset + 1e-6))
    size, score = 1, 0.0
    waiting = _offer(nodes, tokens, node, inside, 0, 1, 1.0, width, least, offers, odds, 0)
    while waiting > 0 and size <= most:
        waiting -= 1
        node, inside, level, path = (
            offers[waiting, NODE],
            offers[waiting, INSIDE],
            offers[waiting, LEVEL],
            odds[waiting],
        )
        places[size, NODE], places[size, INSIDE], places[size, LEVEL], paths[size] = node, inside, level, path
        places[size, PARENT] = offers[waiting, PARENT]
        if level < depth:
            waiting = _offer(
                nodes, tokens, node, inside + 1, size, level + 1, path, width, least, offers, odds, waiting
            )
        score += path
        size += 1
    return size, score


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _offer(
    nodes: np.ndarray,
    tokens: np.ndarray,
    node: int,
    inside: int,
    parent: int,
    level: int,
    path: float,
    width: int,
    least: float,
    offers: np.ndarray,
    odds: np.ndarray,
    waiting: int,
) -> int:
    """Offer what follows a place in the tree; how many offers are waiting now, the best last."""
    if inside < nodes[node, LENGTH]:
        if tokens[nodes[node, START] + inside] != END:
            waiting = _insert(offers, odds, waiting, node, inside, parent, level, path)
        return waiting
    child, left = nodes[node, HEAD], width
    while child != NONE and left > 0:
        odd = path * nodes[child, COUNT] / nodes[node, COUNT]
        if odd < least:
            break
        if nodes[child, TOKEN] != END:
            waiting = _insert(offers, odds, waiting, child, 0, parent, level, odd)
            left -= 1
        child = nodes[child, NEXT]
    return waiting


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _insert(
    offers: np.ndarray, odds: np.ndarray, waiting: int, node: int, inside: int, parent: int, level: int, odd: float
) -> int:
    i = waiting
    while i > 0 and odds[i - 1] >= odd:
        odds[i] = odds[i - 1]
        for column in range(4):
            offers[i, column] = offers[i - 1, column]
        i -= 1
    odds[i] = odd
    offers[i, NODE], offers[i, INSIDE], offers[i, PARENT], offers[i, LEVEL] = node, inside, parent, level
    return waiting + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _kind(match: int, count: int, share: float, is_shared: bool) -> int:
    """What tells how sure a guess is, as one number: an index of ``SHAPE``, flattened.

    Which tree it is from, the length of the match at its parent (each accepted token lengthens it by one), how often
    the tree has seen it, and its share of what it has seen there.
    """
    bucket = 0 if share < 0.3 else 1 if share < 0.6 else 2 if share < 0.95 else 3
    kind: int = ((is_shared * 8 + magnitude(match, 7)) * 4 + magnitude(count, 4) - 1) * 4 + bucket
    return kind
