"""How often guesses of each kind come true: counts that fade, read as probabilities."""

from __future__ import annotations

import os
from typing import cast

import numpy as np
from jaxtyping import Float, Float32, Int
from numba import njit

from specdec import storage

MOST = 1024.0  # a kind's counts are halved here: bounded, and never too sure to change
ODDS = 8  # conditional probabilities are told apart by odds, from 2**-8 to 2**8, a bucket for each factor of 2
DEPTHS = 4  # 1, 2, 3-4, 5 and more
KINDS = (2 * ODDS + 1) * DEPTHS


class Acceptance:
    """How often nodes of each kind were accepted once their parents were.

    It learns from what was committed after a tree was drafted, so it does not matter whether that very tree was
    verified, or a part of it, or a union with others. Threads may share one: counts lost to a race do no harm, for no
    rate is ever read as more than 1.

    Args:
        prior: the rate of each kind before anything is learnt.
        weight: for how many guesses the prior counts.
        most: guesses of a kind that are remembered, at most: the fewer, the sooner it follows a change.

    Attributes:
        accepted, offered: per kind, the prior's weight included; changed by ``learn``.
    """

    def __init__(self, prior: Float[np.ndarray, " kinds"], weight: float, most: float = MOST):
        self.most = most
        self.offered = np.full(len(prior), weight, np.float64)
        self.accepted = np.asarray(prior, np.float64) * weight

    @property
    def rate(self) -> Float32[np.ndarray, " kinds"]:
        """The probability that a node of each kind is accepted once its parent is."""
        return np.minimum(1.0, self.accepted / self.offered).astype(np.float32)

    def paths(
        self, parents: Int[np.ndarray, " nodes"], kinds: Int[np.ndarray, " nodes"]
    ) -> Float32[np.ndarray, " nodes"]:
        """The probability that each node's whole path is accepted; the root's kind is not read."""
        return cast(np.ndarray, _paths(parents, kinds, self.accepted, self.offered))

    def learn(
        self,
        tokens: Int[np.ndarray, " nodes"],
        parents: Int[np.ndarray, " nodes"],
        kinds: Int[np.ndarray, " nodes"],
        committed: Int[np.ndarray, " length"],
    ) -> None:
        """Count the children of every node on the path that ``committed``, the tokens after the root, took."""
        if len(tokens) > 1 and len(committed):
            learn(tokens, parents, kinds, committed, self.accepted, self.offered, self.most)

    def counts(self) -> dict[str, Float[np.ndarray, " kinds"]]:
        """A copy of both counts that no other thread changes, and of which none is accepted more than offered."""
        offered = self.offered.copy()
        return {"accepted": np.minimum(self.accepted, offered), "offered": offered}

    def save(self, path: str | os.PathLike[str], kind: str) -> None:
        """Write the counts to a file of some ``kind``, which changes at once or, on OSError, not at all."""
        storage.write(path, kind, 1, self.counts(), {})

    def load(self, path: str | os.PathLike[str], kind: str) -> None:
        """Replace the counts by what ``save`` wrote; on an error nothing changes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another kind, or holds no counts of as many kinds of guesses.
        """
        arrays, _ = storage.read(path, kind, 1)
        accepted, offered = (arrays.get(name, np.empty(0)) for name in ("accepted", "offered"))
        fits = all(each.shape == self.offered.shape and each.dtype == np.float64 for each in (accepted, offered))
        if not (fits and (accepted >= 0).all() and (offered > 0).all() and (accepted <= offered).all()):
            raise ValueError(f"{path} does not hold how often guesses of {len(self.offered)} kinds come true")
        self.offered = np.maximum(self.offered, offered)  # so that who reads meanwhile sees no more accepted than these
        self.accepted, self.offered = accepted, offered

    @property
    def bytes_used(self) -> int:
        return self.accepted.nbytes + self.offered.nbytes


def estimate_kinds(
    parents: Int[np.ndarray, " nodes"], probability: Float32[np.ndarray, " nodes"]
) -> Int[np.ndarray, " nodes"]:
    """Each node's estimated odds once its parent is accepted, and its depth, as one of ``KINDS``; 0 for the root."""
    return cast(np.ndarray, _estimate_kinds(parents, probability))


def believed() -> Float[np.ndarray, " kinds"]:
    """The prior under which estimates are as good as they say: what each of ``KINDS`` estimates."""
    odds = np.exp2(np.arange(-ODDS, ODDS + 1))
    return np.repeat(odds / (1 + odds), DEPTHS)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def magnitude(x: int, most: int) -> int:
    """0, 1, 2-3, 4-7, ... as 0, 1, 2, 3, ..., ``most`` at most."""
    bits = 0
    while x > 0 and bits < most:
        x >>= 1
        bits += 1
    return bits


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def count(accepted: np.ndarray, offered: np.ndarray, kind: int, hit: bool, most: float = MOST) -> None:
    """One more guess of a kind, and whether it came true; counts are halved when there are ``most``."""
    if offered[kind] >= most:
        accepted[kind] *= 0.5
        offered[kind] *= 0.5
    offered[kind] += 1.0
    if hit:
        accepted[kind] = min(accepted[kind] + 1.0, offered[kind])  # another thread's count of offers may be lost


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def learn(
    tokens: np.ndarray,
    parents: np.ndarray,
    kinds: np.ndarray,
    committed: np.ndarray,
    accepted: np.ndarray,
    offered: np.ndarray,
    most: float,
) -> None:
    """What ``Acceptance.learn`` does."""
    # matched[node]: how many committed tokens the path down to the node spells, or -1 off that path.
    matched = np.full(len(tokens), -1, np.int64)
    matched[0] = 0
    for node in range(1, len(tokens)):
        before = matched[parents[node]]
        if before < 0 or before == len(committed):
            continue
        hit = tokens[node] == committed[before]
        count(accepted, offered, kinds[node], hit, most)
        if hit:
            matched[node] = before + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _paths(parents: np.ndarray, kinds: np.ndarray, accepted: np.ndarray, offered: np.ndarray) -> np.ndarray:
    probability = np.ones(len(parents), np.float32)
    for node in range(1, len(parents)):
        kind = kinds[node]
        probability[node] = probability[parents[node]] * min(1.0, accepted[kind] / offered[kind])
    return probability


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _estimate_kinds(parents: np.ndarray, probability: np.ndarray) -> np.ndarray:
    level, kinds = np.zeros(len(parents), np.int64), np.zeros(len(parents), np.int64)
    for node in range(1, len(parents)):
        parent = parents[node]
        level[node] = level[parent] + 1
        hit = max(probability[node], np.float32(1e-9))
        miss = max(probability[parent] - probability[node], np.float32(1e-9))
        bucket = np.int64(np.rint(min(max(np.log2(hit / miss), -ODDS), ODDS))) + ODDS
        depth = 3 if level[node] > 4 else 2 if level[node] > 2 else level[node] - 1
        kinds[node] = bucket * DEPTHS + depth
    return kinds
