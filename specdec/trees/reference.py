"""What each compiled function of this package means, in plain Python: what they are tested against."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt64

from specdec.trees.growth import grow

Ints = Int[np.ndarray, " n"]
Floats = Float32[np.ndarray, " n"]


def lineage(parents: Ints, node: int) -> Iterator[int]:
    """The node, its parent, its parent's parent, up to the root."""
    while node >= 0:
        yield node
        node = int(parents[node])


def depths(parents: Ints) -> Ints:
    return np.array([len(list(lineage(parents, node))) - 1 for node in range(len(parents))], np.int64)


def positions(parents: Ints, start: int) -> Ints:
    return depths(parents) + start


def ancestor_matrix(parents: Ints) -> Bool[np.ndarray, "n n"]:
    out = np.zeros((len(parents), len(parents)), np.bool_)
    for node in range(len(parents)):
        out[node, list(lineage(parents, node))] = True
    return out


def ancestor_words(parents: Ints) -> UInt64[np.ndarray, "n words"]:
    out = np.zeros((len(parents), -(-len(parents) // 64)), np.uint64)
    for node in range(len(parents)):
        for ancestor in lineage(parents, node):
            out[node, ancestor // 64] |= np.uint64(1 << ancestor % 64)
    return out


def is_chain(parents: Ints) -> bool:
    return bool(np.array_equal(parents, np.arange(-1, len(parents) - 1)))


def child(tokens: Ints, parents: Ints, node: int, token: int) -> int:
    return next((i for i in range(1, len(tokens)) if parents[i] == node and tokens[i] == token), -1)


def follow(tokens: Ints, parents: Ints, continuation: Ints) -> Ints:
    path = [0]
    for token in continuation:
        node = child(tokens, parents, path[-1], token)
        if node < 0:
            break
        path.append(node)
    return np.array(path, np.int64)


def greedy_path(tokens: Ints, parents: Ints, choices: Ints) -> Ints:
    path = [0]
    while (node := child(tokens, parents, path[-1], choices[path[-1]])) > 0:
        path.append(node)
    return np.array(path, np.int64)


def prune(parents: Ints, probability: Floats, nodes: int, depth: int, width: int, least: float) -> Ints:
    n, level = len(parents), depths(parents)
    path = np.array([min(probability[list(lineage(parents, node))]) for node in range(n)])
    allowed = {0}
    for parent in range(n):
        children = [
            i for i in range(1, n) if parents[i] == parent and level[i] <= depth and path[i] >= np.float32(least)
        ]
        allowed.update(heapq.nsmallest(width, children, key=lambda i: (-path[i], i)) if parent in allowed else ())
    best = heapq.nsmallest(nodes, allowed - {0}, key=lambda i: (-path[i], i))
    return np.array(sorted([0, *best]), np.int64)


def below(parents: Ints, node: int) -> Ints:
    return np.array([other for other in range(len(parents)) if node in lineage(parents, other)], np.int64)


def select(tokens: Ints, parents: Ints, probability: Floats, kept: Ints) -> tuple[Ints, Ints, Floats]:
    place = {-1: -1} | {old: new for new, old in enumerate(kept.tolist())}
    return tokens[kept], np.array([place[parent] for parent in parents[kept].tolist()], np.int64), probability[kept]


def merge(trees: Sequence[tuple[Ints, Ints, Floats]]) -> tuple[Ints, Ints, Floats, Ints]:
    best: dict[tuple[int, ...], np.float32] = {}
    first: dict[tuple[int, ...], int] = {}
    for tree, (tokens, parents, probability) in enumerate(trees):
        for node, value in enumerate(probability):
            path = tuple(tokens[list(lineage(parents, node))[::-1]].tolist())
            best[path] = max(best.get(path, value), value)
            first.setdefault(path, tree)
    place = {path: node for node, path in enumerate(best)} | {(): -1}
    return (
        np.array([path[-1] for path in best], np.int64),
        np.array([place[path[:-1]] for path in best], np.int64),
        np.array(list(best.values()), np.float32),
        np.array(list(first.values()), np.int64),
    )


def sound(
    tokens: Ints, parents: Ints, probability: Floats, root_token: int, vocab: int, nodes: int, depth: int, width: int
) -> bool:
    """Whether ``fault`` finds none, for flat arrays of the right kinds and one length."""
    n = len(tokens)
    if n == 0 or n > nodes + 1 or tokens[0] != root_token or parents[0] != -1:
        return False
    if not all(0 <= parents[i] < i for i in range(1, n)) or not np.all((probability >= 0) & (probability <= 1)):
        return False
    families = [[int(tokens[i]) for i in range(1, n) if parents[i] == parent] for parent in range(n)]
    distinct = all(len(family) == len(set(family)) <= width for family in families)
    return distinct and bool(np.all((tokens >= 0) & (tokens < vocab))) and max(depths(parents)) <= depth


def grow_adjacency(
    matrix: Int[np.ndarray, "vocab k"],
    rank_probability: Float32[np.ndarray, "levels k"],
    root: int,
    nodes: int,
    depth: int,
    width: int,
    least: float,
) -> tuple[Ints, Ints, Floats]:
    def successors(path: list[int]) -> tuple[list[int], list[float]]:
        if not 0 <= path[-1] < len(matrix):
            return [], []
        row = matrix[path[-1]]
        conditional = rank_probability[min(len(path), len(rank_probability)) - 1]
        return row[row >= 0].tolist(), conditional[row >= 0].tolist()

    return grow(root, successors, nodes, depth, width, least)


def expand_template(
    matrix: Int[np.ndarray, "vocab k"], template_parents: Ints, template_ranks: Ints, root: int
) -> tuple[Ints, Ints, Ints]:
    tokens, parents, kept = [root], [-1], [0]
    for node in range(1, len(template_parents)):
        if template_parents[node] not in kept:
            continue
        parent, rank = kept.index(template_parents[node]), template_ranks[node]
        inside = 0 <= tokens[parent] < matrix.shape[0] and 0 <= rank < matrix.shape[1]
        token = int(matrix[tokens[parent], rank]) if inside else -1
        if token >= 0 and (parent, token) not in zip(parents, tokens, strict=True):
            tokens, parents, kept = [*tokens, token], [*parents, parent], [*kept, node]
    return np.array(tokens, np.int64), np.array(parents, np.int64), np.array(kept, np.int64)
