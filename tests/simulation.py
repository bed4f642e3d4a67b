"""The decoding loop without a model: recorded texts, a table of pass times, and a clock that only the loop moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec import trees
from specdec.core import Budget, Context, Drafter, DraftTree, Policy, Verdict
from specdec.decoder import Decoder

# Seconds of SmolLM2-135M's passes in float32 on two cores by tokens fed: as torch runs them, with linear layers that
# read each weight once, and with the layers between them made quick too.
PLAIN = {1: 0.060, 2: 0.103, 4: 0.094, 8: 0.097, 16: 0.111, 32: 0.130}
KERNELS = {1: 0.041, 2: 0.047, 4: 0.053, 8: 0.060, 16: 0.082, 32: 0.115}
QUICK = {1: 0.024, 2: 0.025, 4: 0.026, 8: 0.029, 16: 0.038, 32: 0.060}
DRAFT = 0.0003  # seconds of a call that drafts

Text = tuple[Sequence[int], Sequence[int]]  # a prompt, and what followed it
Candidates = Callable[[np.ndarray], np.ndarray]  # the target's candidates after each of some tokens


def random_text(seed: int, length: int, vocab: int = 200) -> list[int]:
    """Tokens without any pattern."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


def repetitive_text(seed: int, length: int, novel: float = 0.1) -> list[int]:
    """Phrases of 5 to 30 tokens out of a stock of eight, each token replaced by a new one now and then."""
    rng = np.random.default_rng(seed)
    stock = [rng.integers(0, 200, rng.integers(5, 31)) for _ in range(8)]
    text = np.concatenate([stock[rng.integers(8)] for _ in range(length // 5 + 1)])[:length]
    return [int(token) for token in np.where(rng.random(length) < novel, rng.integers(0, 200, length), text)]


class Markov:
    """A language in which one of three tokens mostly follows each: drawn with ``probability``, else from all alike."""

    def __init__(self, probability: Sequence[float], vocab: int = 200) -> None:
        rng = np.random.default_rng(0)
        self.successors = np.array([rng.permutation(vocab)[:8] for _ in range(vocab)])
        self.probability = [*probability, 1 - sum(probability)]

    def text(self, seed: int, length: int) -> list[int]:
        """A text to start from any token."""
        rng, text = np.random.default_rng(seed), [0]
        for choice in rng.choice(4, length, p=self.probability):
            text.append(int(self.successors[text[-1]][choice] if choice < 3 else rng.integers(len(self.successors))))
        return text[1:]

    def candidates(self, tokens: np.ndarray) -> np.ndarray:
        """What a target that knows the language ranks high after each token."""
        after: np.ndarray = self.successors[tokens % len(self.successors)]
        return after


class Clock:
    """Shows simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def table(seconds: dict[int, float]) -> Callable[[int], float]:
    """Pass times between and beyond the sizes of a table, on straight lines."""
    sizes, times = np.array(sorted(seconds)), np.array([seconds[n] for n in sorted(seconds)])
    slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
    return lambda fed: float(np.interp(fed, sizes, times) + slope * max(0, fed - sizes[-1]))


class Paced:
    """A drafter that takes ``seconds`` of a clock's time at each call that asks it for guesses."""

    def __init__(self, drafter: Drafter, clock: Clock, seconds: float = DRAFT) -> None:
        self.drafter, self.clock, self.seconds = drafter, clock, seconds
        self.name, self.topk, self.hidden = drafter.name, drafter.topk, drafter.hidden
        self.asked = 0

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        if any(budget.nodes for budget in budgets):
            self.asked += 1
            self.clock.now += self.seconds
        return self.drafter.draft(contexts, budgets)


class Recorded:
    """A verifier whose target writes recorded texts; each pass takes the table's time for rows x widest tree."""

    def __init__(
        self, texts: Sequence[Text], clock: Clock, seconds: Callable[[int], float], candidates: Candidates | None = None
    ) -> None:
        self.texts = [np.array([*prompt, *answer]) for prompt, answer in texts]
        self.clock, self.seconds, self.candidates = clock, seconds, candidates

    def verify(self, contexts: Sequence[Context], batch: Sequence[DraftTree]) -> list[Verdict]:
        seconds = self.seconds(len(batch) * max(map(len, batch)))
        self.clock.now += seconds
        return [self._judge(*each, seconds) for each in zip(self.texts, contexts, batch, strict=True)]

    def _judge(self, text: np.ndarray, context: Context, tree: DraftTree, seconds: float) -> Verdict:
        coming = text[len(context.tokens) :]
        path = trees.follow(tree.tokens, tree.parents, coming[:-1])
        candidates = None if self.candidates is None else self.candidates(tree.tokens)
        return Verdict(tree, path, coming[: len(path)], candidates, seconds=seconds)


@dataclass
class Played:
    """What happened: per step, the seconds it took, the tokens it committed per living row and the tokens it fed."""

    plain: float
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)

    def speed(self, tokens: float = np.inf) -> float:
        """Tokens per second as a multiple of plain decoding's, over the first ``tokens`` of each row."""
        steps = int(np.searchsorted(np.cumsum(self.tokens), tokens)) + 1
        return self.plain * sum(self.tokens[:steps]) / sum(self.seconds[:steps])

    def __add__(self, other: Played) -> Played:
        assert self.plain == other.plain
        return Played(self.plain, self.seconds + other.seconds, self.tokens + other.tokens, self.fed + other.fed)


def play(
    texts: Sequence[Text],
    drafter: Drafter,
    policy: Policy,
    clock: Clock,
    seconds: Callable[[int], float],
    candidates: Candidates | None = None,
) -> Played:
    """Decode the texts as one batch."""
    contexts = [Context(prompt) for prompt, _ in texts]
    ends = [len(prompt) + len(answer) for prompt, answer in texts]
    verifier, played = Recorded(texts, clock, seconds, candidates), Played(seconds(len(texts)))
    decoder = Decoder(drafter, verifier, policy, Silent(), lambda context: len(verifier.texts[0]))

    def finished() -> list[bool]:
        return [len(context.tokens) >= end for context, end in zip(contexts, ends, strict=True)]

    while not all(over := finished()):
        live = [context for context, done in zip(contexts, over, strict=True) if not done]
        start, before = clock.now, sum(len(context.tokens) for context in live)
        decoder.step(contexts, live)
        played.seconds.append(clock.now - start)
        played.tokens.append((sum(len(context.tokens) for context in live) - before) / len(live))
        played.fed.append(max(len(context.verdict.tree) for context in live if context.verdict))
    for context in contexts:
        context.finished = True
    drafter.draft(contexts, [Budget(0, 0, 0)] * len(contexts))
    return played


class Silent:
    """An observer that is shown everything and says nothing."""

    def observe(self, verdict: Verdict) -> None:
        """See one row's verdict."""
