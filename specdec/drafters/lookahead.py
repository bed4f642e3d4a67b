"""Lookahead: branches that followed the last tokens before, here or in what was written for others."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from weakref import WeakSet

import numpy as np
from jaxtyping import Float

from specdec import storage
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import lookahead_numba as kernels
from specdec.drafters import votes
from specdec.drafters.likeliest_numba import NO_GUESS, Guess, Limits
from specdec.drafters.namespaces import Namespaces
from specdec.drafters.trie import Trie

KIND, VERSION = "lookahead", 1
LARGEST_OWN, LARGEST_SHARED = 65536, 512  # nodes of one tree, as in the paper's code
NOTHING: Limits = 0, 0, 0, 0.0


class LookaheadDrafter:
    """Keeps every n-gram in tries, and guesses all the branches that followed the text's last tokens.

    There are two levels of frequency. A sequence has a trie of its own, of prompt and output, that goes with its
    context. What all sequences of a namespace wrote is in a shared trie that outlives them. A tree is drawn from both:
    frequencies of the sequence itself come first, but half of the tree, by default, is for the shared ones. How likely
    each token is, given the counts, is learnt on line.

    It needs nothing of the target and its guesses are chosen, not sampled. Threads may share a drafter.

    Zhao et al., "Lookahead: An Inference Acceleration Framework for Large Language Model with Lossless Generation
    Accuracy" (arXiv 2312.12728). Unlike there, the newest tokens are found at once, a sequence sees no other's prompt,
    and a squeeze of what is shared takes nothing from a running sequence.

    Args:
        branch: longest branch after the first token of an n-gram.
        max_query: longest n-gram that is looked up; a shorter one if too little followed it.
        shared_share: part of a tree's nodes that the most frequent shared branches are sure of, 0 to 1.
        max_bytes: bytes of all shared tries at most, and of each sequence's own. A full trie is squeezed; of several,
            the least recently used namespace's is forgotten.

    Raises:
        ValueError: branch or max_query below 1, max_query above branch, a share outside 0 to 1, or few bytes.
    """

    name = "lookahead"
    topk = 0
    hidden = False
    ahead = True

    def __init__(self, branch: int = 12, max_query: int = 4, shared_share: float = 0.5, max_bytes: int = 1 << 26):
        if not 1 <= max_query <= branch:
            raise ValueError(f"need 1 <= max_query <= branch, got max_query={max_query}, branch={branch}")
        if not 0 <= shared_share <= 1:
            raise ValueError(f"shared_share must be from 0 to 1, got {shared_share}")
        self.branch, self.max_query, self.shared_share, self.max_bytes = branch, max_query, shared_share, max_bytes
        self._own: WeakSet[Trie] = WeakSet()
        self._shared = Namespaces(lambda: Trie(branch + 1, LARGEST_SHARED, max_bytes), max_bytes=max_bytes)
        self._acceptance = Acceptance(prior(), weight=4.0)
        self._lock = threading.Lock()
        self._own_trie()  # too few bytes are refused here, not in the middle of a text

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where the last token is new."""
        return [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def reset(self, namespace: str | None = None) -> None:
        """Forget what one namespace wrote, or everything that was learnt."""
        self._shared.forget(namespace)
        if namespace is None:
            self._acceptance = Acceptance(prior(), weight=4.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was learnt to ``path``, which changes at once or, on OSError, not at all."""
        shared, arrays = self._shared.items(), self._acceptance.counts()
        for i, trie in enumerate(shared.values()):
            with trie.lock:
                arrays[f"trie.{i}"] = trie.rows()
        storage.write(path, KIND, VERSION, arrays, {"branch": self.branch, "namespaces": list(shared)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace everything that was learnt by what ``save`` wrote; on an error nothing changes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was not written by ``save``, with this branch, or it is damaged.
        """
        arrays, facts = storage.read(path, KIND, VERSION)
        names = facts.get("namespaces", [])
        if set(arrays) != {"accepted", "offered", *(f"trie.{i}" for i in range(len(names)))}:
            raise ValueError(
                f"{path} holds {sorted(arrays)}, not a trie for each of {len(names)} namespaces and counts"
            )
        if facts.get("branch") != self.branch:
            raise ValueError(f"{path} has branches of {facts.get('branch')} tokens, this drafter of {self.branch}")
        shared = {name: self._shared.make() for name in names}
        for i, trie in enumerate(shared.values()):
            trie.fill(arrays[f"trie.{i}"])
        self._acceptance = restored(arrays["accepted"], arrays["offered"])
        self._shared.replace(shared)

    @property
    def bytes_used(self) -> int:
        """Bytes held for all namespaces, for living contexts and for what was learnt."""
        with self._lock:
            own = sum(trie.bytes_used for trie in self._own)
        return own + self._shared.bytes_used + self._acceptance.bytes_used

    def _draft(self, context: Context, budget: Budget) -> DraftTree:
        tokens = context.tokens
        own, known, guess = self._sequence(context)
        shared, output = self._shared[context.namespace], tokens[context.prompt_length :]
        limits = budget.nodes, min(budget.depth, budget.nodes), budget.width, float(budget.least)
        if context.finished or min(limits[:3]) <= 0:
            limits = NOTHING
        with shared.lock:
            before = shared.arrays
            counted = own.prepare(tokens, known), shared.prepare(output, max(0, known - context.prompt_length))
            guess, (guesses, parents, probability) = kernels.advance(
                own.arrays,
                shared.arrays,
                tokens,
                context.prompt_length,
                counted,
                self.branch + 1,
                (LARGEST_OWN, LARGEST_SHARED),
                guess,
                known,
                self._acceptance.accepted,
                self._acceptance.offered,
                self.max_query,
                (0, round(self.shared_share * limits[0])),
                limits,
            )
        if shared.arrays is not before:
            self._shared.trim()  # it has grown
        if not context.finished:
            context.scratch[self] = own, len(tokens), guess
        if limits[0] == 0:
            return DraftTree.root(int(tokens[-1]))
        return DraftTree(guesses, parents, probability, (self.name,) * len(guesses))

    def _sequence(self, context: Context) -> tuple[Trie, int, Guess]:
        """A context's own trie, how many tokens are in it, and the last guess."""
        state: tuple[Trie, int, Guess] | None = context.scratch.pop(self, None)
        if state is None:
            state = self._own_trie(), 0, NO_GUESS
            with self._lock:
                self._own.add(state[0])
        return state

    def _own_trie(self) -> Trie:
        return Trie(self.branch + 1, LARGEST_OWN, self.max_bytes)


def prior() -> Float[np.ndarray, " kinds"]:
    """How likely each kind is before anything is learnt, those of the sequence itself first."""
    return np.concatenate([votes.prior(), votes.prior()])


def restored(accepted: Float[np.ndarray, " kinds"], offered: Float[np.ndarray, " kinds"]) -> Acceptance:
    """Counts as ``save`` wrote them. Raises ValueError where they are none."""
    acceptance = Acceptance(prior(), weight=4.0)
    if accepted.shape != acceptance.accepted.shape or offered.shape != acceptance.offered.shape:
        raise ValueError(f"a lookahead file counts {2 * votes.KINDS} kinds, got {accepted.shape} and {offered.shape}")
    if not np.all((accepted >= 0) & (accepted <= offered) & (offered > 0) & np.isfinite(offered)):
        raise ValueError("a lookahead file has counts that cannot be: more accepted than offered, or none offered")
    acceptance.accepted[:], acceptance.offered[:] = accepted, offered
    return acceptance
