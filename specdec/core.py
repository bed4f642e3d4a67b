"""The nouns: what is guessed, how much may be guessed, what is known, what was judged, and who does each.

A decoding step reads them in this order::

    budgets  = policy.budget(contexts)
    trees    = policy.trim(contexts, drafter.draft(contexts, budgets))
    verdicts = verifier.verify(contexts, trees)
    for context, verdict in zip(contexts, verdicts): context.extend(verdict)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

from specdec import trees

Law = Literal["iid", "swor"]


@dataclass(frozen=True, slots=True, eq=False)
class DraftTree:
    """Guessed continuations of one sequence, flattened parents-first.

    Node 0 is the root: the last committed token, known and not guessed. Every other node guesses the token that
    follows its parent's path, so two children of one parent never carry the same token, but for independent draws.

    Attributes:
        tokens: token id of each node; ``tokens[0]`` is the last committed token.
        parents: index of each node's parent, smaller than the node's own; -1 for the root.
        probability: the drafter's estimate that the whole path down to the node is accepted; 1 for the root.
        q: the drafter's own distribution at each inner node, for trees whose siblings were sampled; rows of
            leaves are not read.
        law: how siblings were drawn: ``None`` chosen deterministically, ``"iid"`` independently from ``q``,
            ``"swor"`` from ``q`` without replacement, in node order.
        source: name of the drafter that guessed each node.
    """

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    probability: Float32[np.ndarray, " nodes"]
    source: tuple[str, ...]
    q: Float[torch.Tensor, "nodes vocab"] | None = None
    law: Law | None = None

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """The empty guess: the last committed token alone, which makes the next pass a plain step."""
        return cls(np.array([token]), np.array([-1]), np.ones(1, np.float32), ("",))

    @classmethod
    def chain(cls, token: int, guesses: Iterable[int], probability: Iterable[float], source: str) -> DraftTree:
        """One path: the last committed ``token``, then ``guesses`` with their path probabilities."""
        tokens = np.array([token, *guesses], np.int64)
        paths = np.array([1.0, *probability], np.float32)
        return cls(tokens, np.arange(-1, len(tokens) - 1), paths, (source,) * len(tokens))

    def take(self, kept: Int[np.ndarray, " kept"]) -> DraftTree:
        """The tree of the ``kept`` nodes only: ascending, the root first, every node's parent among them."""
        if len(kept) == len(self):
            return self
        tokens, parents, probability = trees.select(self.tokens, self.parents, self.probability, kept)
        source = tuple(map(self.source.__getitem__, kept.tolist()))
        return DraftTree(tokens, parents, probability, source, None if self.q is None else self.q[kept], self.law)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Budget:
    """How large the next tree may be.

    Attributes:
        nodes: guessed nodes at most; the root does not count. 0 asks for no guess.
        depth: guessed tokens on one path at most.
        width: children of one node at most.
        least: path probability below which a node is not worth verifying, 0 to 1.
    """

    nodes: int
    depth: int
    width: int
    least: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What one pass of the target said about one tree.

    Attributes:
        tree: what was fed, the root included. For the prompt's own pass: the chain of the prompt's last tokens.
        path: the accepted nodes, root first.
        tokens: what was committed: the tokens of ``path[1:]`` and one more, chosen by the target after the last
            accepted node; as many as ``path`` has nodes. For the prompt's own pass: the first new token alone.
        candidates: the target's most likely next tokens after *every* node, accepted or not, best first, from raw
            logits; ``None`` where no drafter asked for them.
        likelihood: the target's probability of each candidate, by raw logits; ``None`` unless a trace asked for it.
        hidden: the target's last hidden state at every node; ``None`` where no drafter asked.
        seconds: wall time of the pass that judged it, shared by all rows of its batch.
        prompt: whether this is the prompt's own pass, in which nothing was guessed.
    """

    tree: DraftTree
    path: Int[np.ndarray, " accepted"]
    tokens: Int[np.ndarray, " committed"]
    candidates: Int[np.ndarray, "nodes k"] | None = None
    hidden: Float[torch.Tensor, "nodes width"] | None = None
    seconds: float = 0.0
    prompt: bool = False
    likelihood: Float32[np.ndarray, "nodes k"] | None = None


class Unsupported(Exception):  # noqa: N818
    """What was asked cannot be done speculatively; the message says why. Plain ``generate`` can do it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How the target's next token is chosen, for drafters that would choose alike.

    Attributes:
        vocab: how many token ids the target knows.
        sample: whether to sample trees: tokens are drawn, and trees judged by the law that they were drawn from.
        processors: those of ``generate``'s processors and warpers that may be shown what is only guessed: of ids
            [rows, length] and logits [rows, vocab] they make logits; None where there are none.
    """

    vocab: int
    sample: bool = False
    processors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Context:
    """One sequence's committed state: all that a drafter or policy may look at, and nothing it may change.

    Attributes:
        prompt_length: how many of the tokens came with the prompt.
        verdict: the last verdict; None before the prompt's own pass.
        namespace: whose memory drafters may use for it (a tenant, an agent, an adapter).
        finished: whether a stopping rule has ended it. A drafter sees a finished context once, with an empty
            budget, so that it may learn the end.
        scratch: what each drafter keeps for this sequence; dies with the context.
        steps: verdicts so far, the prompt's own among them.
        choice: how its tokens are chosen; None where nobody said.
    """

    def __init__(self, prompt: Sequence[int] | np.ndarray, namespace: str = "") -> None:
        self._hold(np.array(prompt, dtype=np.int64))
        self._length = self.prompt_length = len(self._tokens)
        self.namespace = namespace
        self.verdict: Verdict | None = None
        self.finished = False
        self.steps = 0
        self.choice: Choice | None = None
        self.scratch: dict[Any, Any] = {}

    @property
    def tokens(self) -> Int[np.ndarray, " length"]:
        """All committed tokens, the prompt's first; a read-only view that later steps do not change."""
        return self._shown[: self._length]

    def extend(self, verdict: Verdict) -> None:
        """Commit what a verdict says; amortised constant time per token."""
        end = self._length + len(verdict.tokens)
        if end > len(self._tokens):
            grown = np.empty(2 * end, np.int64)
            grown[: self._length] = self.tokens
            self._hold(grown)
        self._tokens[self._length : end] = verdict.tokens
        self._length = end
        self.verdict = verdict
        self.steps += 1

    def _hold(self, tokens: Int[np.ndarray, " room"]) -> None:
        self._tokens, self._shown = tokens, tokens.view()
        self._shown.flags.writeable = False


@runtime_checkable
class Drafter(Protocol):
    """Guesses continuations, cheaply, without changing a context.

    It is never told of a rejection: at each call it catches up from ``context.tokens`` and ``context.verdict``.
    A call with an empty budget asks only for that; a call may also skip steps (when nothing was drafted).

    One that reads the target itself has ``bind(target, contexts)`` too, called before a generation's first draft, which
    says why it cannot, or ""; see ``TriForceDrafter``.

    One that guesses from texts and verdicts alone, on the host, and draws no guess by chance, may say ``ahead = True``:
    then on a GPU it may be asked during a pass, for more than the next step verifies; see ``Ahead``.

    Attributes:
        name: what ``stats`` calls it.
        topk: how many of the target's candidates per node it wants in each verdict, 0 for none.
        hidden: whether it wants the target's hidden states.
    """

    name: str
    topk: int
    hidden: bool

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget, rooted at the context's last token."""
        ...


def learns(drafter: Drafter) -> bool:
    """Whether a drafter must see each verdict; the others catch up from the text at any later call."""
    return bool(getattr(drafter, "topk", 0) or getattr(drafter, "hidden", False))


@runtime_checkable
class Verifier(Protocol):
    """Judges trees by one pass of the target over all of them, and keeps one root path of each."""

    def verify(self, contexts: Sequence[Context], trees: Sequence[DraftTree]) -> list[Verdict]:
        """One verdict per tree. Raises ValueError for a tree whose law it cannot judge exactly."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Chooses how large the next trees may be from what has happened so far."""

    def budget(self, contexts: Sequence[Context]) -> list[Budget]:
        """One budget per context: how much to draft."""
        ...

    def trim(self, contexts: Sequence[Context], trees: Sequence[DraftTree]) -> list[DraftTree]:
        """What of the drafted trees to verify. Drafting is cheap and verifying is not, so the choice is made twice.

        Of a tree whose siblings were sampled, what is kept may depend only on what came before, never on what was
        drawn: else its law is another.
        """
        ...
