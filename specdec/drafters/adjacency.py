"""What may follow each token: the matrix of Token Recycling."""

from __future__ import annotations

import threading

import numpy as np
from jaxtyping import Int32
from numba import njit

from specdec.calibration import count
from specdec.core import Verdict

EMPTY = -1
_FEWEST_ROWS = 1024


class Adjacency:
    """For each token, the candidates that the target ranked highest after it when it was last fed.

    Args:
        matrix: what is known already.
        most: rows at most. Of tokens beyond them nothing is learnt, neither what follows them nor where they follow.

    Attributes:
        matrix: candidates by token and rank, -1 where nothing is known; grows with the token ids seen.
        lock: held while rows are written or copied, a few microseconds; also to be held while a tree is read off, or
            rows that change on the way may put one token twice beside itself.
    """

    def __init__(self, matrix: Int32[np.ndarray, "vocab k"], most: int = 1 << 31):
        inside = matrix[:most]
        self.matrix = inside if len(matrix) <= most else np.where(inside < most, inside, EMPTY)
        self.most = most
        self.lock = threading.Lock()

    @classmethod
    def empty(cls, rows: int, k: int, most: int = 1 << 31) -> Adjacency:
        """Nothing known, of any of the first ``rows`` tokens or another."""
        return cls(np.full((min(rows, most), k), EMPTY, np.int32), most)

    def learn(self, verdict: Verdict) -> None:
        """Take the candidates at every node, accepted or not, as their tokens' rows.

        Of nodes with one token the last on the accepted path wins, else the one of least depth, else of least index.
        All of the prompt's own pass counts as accepted. Nothing happens without candidates.

        Raises:
            ValueError: the candidates are not one row per node.
        """
        if verdict.candidates is None:
            return
        tokens, parents = verdict.tree.tokens, verdict.tree.parents
        candidates = np.ascontiguousarray(verdict.candidates, np.int64)
        if candidates.ndim != 2 or len(candidates) != len(tokens):
            raise ValueError(f"need one row of candidates per node, got {candidates.shape} for {len(tokens)} nodes")
        path = np.arange(len(tokens)) if verdict.prompt else verdict.path
        with self.lock:
            beyond = _write_rows(self.matrix, tokens, parents, path, candidates, self.most)
            if beyond != EMPTY:
                self._reserve(beyond)
                _write_rows(self.matrix, tokens, parents, path, candidates, self.most)

    def copy(self) -> Int32[np.ndarray, "vocab k"]:
        """The matrix as it is now, apart from what is learnt later."""
        with self.lock:
            return self.matrix.copy()

    @property
    def bytes_used(self) -> int:
        return self.matrix.nbytes

    def _reserve(self, token: int) -> None:
        """More rows: enough for a token beyond them, or as many as there may be."""
        rows, k = self.matrix.shape
        grown = np.full((min(self.most, max(token + 1, rows + rows // 4, _FEWEST_ROWS)), k), EMPTY, np.int32)
        grown[:rows] = self.matrix
        self.matrix = grown


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_rows(
    matrix: np.ndarray, tokens: np.ndarray, parents: np.ndarray, path: np.ndarray, candidates: np.ndarray, most: int
) -> int:
    """Write each node's row. Where the matrix must grow for it, up to ``most`` rows, nothing is written.

    Returns the largest token then, else EMPTY.
    """
    largest: int = tokens.max()
    for candidate in candidates.flat:
        largest = max(largest, candidate)
    if len(matrix) <= largest and len(matrix) < most:
        return largest
    level, deepest = np.zeros(len(tokens), np.int64), 0
    for node in range(1, len(tokens)):
        level[node] = level[parents[node]] + 1
    for node in path:
        level[node] = EMPTY  # written last, and in one scan: a prompt is all path, and deep
    for node in range(len(tokens)):
        deepest = max(deepest, level[node])
    for depth in range(deepest, -1, -1):
        for node in range(len(tokens) - 1, -1, -1):
            if level[node] == depth:
                _write_row(matrix, tokens[node], candidates[node])
    for node in path:
        _write_row(matrix, tokens[node], candidates[node])
    return EMPTY


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_row(matrix: np.ndarray, token: int, candidates: np.ndarray) -> None:
    if not 0 <= token < len(matrix) or len(candidates) == 0 or candidates[0] < 0:
        return
    for rank in range(matrix.shape[1]):
        inside = rank < len(candidates) and candidates[rank] < len(matrix)
        matrix[token, rank] = candidates[rank] if inside else EMPTY


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def count_ranks(
    matrix: np.ndarray, root: int, committed: np.ndarray, accepted: np.ndarray, offered: np.ndarray
) -> None:
    """Count, by depth and rank, which entries of the rows along ``committed`` came true.

    It walks as a tree of all entries would be walked: from the root, to the first token that no entry foretold.
    ``accepted`` and ``offered`` are [levels * k], the last level for all that are deeper; both are changed.
    """
    k = matrix.shape[1]
    levels = len(offered) // k
    token = root
    for depth, truth in enumerate(committed):
        if not 0 <= token < len(matrix):
            return
        foretold = False
        for rank, entry in enumerate(matrix[token]):
            if entry >= 0:
                count(accepted, offered, min(depth, levels - 1) * k + rank, entry == truth)
                foretold |= entry == truth
        if not foretold:
            return
        token = truth
