"""Another verifier, each of whose verdicts is written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from specdec.core import Context, Drafter, DraftTree, Verdict
from specdec.model import Model
from specdec.recorder import Recorder
from specdec.sampling import Sampler
from specdec.statistics import Stats
from specdec.verifiers.pathwise import PathwiseVerifier

WANTED = 4  # candidates of the target's, at every node
BLOCK = 16  # lines at least in one write, but for the last
PARTS = ("draft", "verify", "walk", "cache")


class TracedVerifier:
    """Judges as the verifier it is given does, and records every generation.

    Args:
        verifier: whose verdicts are recorded; it is asked for the target's candidates too.
        recorder: of the file.
        drafter, policy: the file names the one, and the other's type.
    """

    def __init__(self, verifier: PathwiseVerifier, recorder: Recorder, drafter: Drafter, policy: type) -> None:
        self.verifier, self.recorder = verifier, recorder
        drafted_by = getattr(drafter, "name", type(drafter).__name__)
        self.names = {"drafter": drafted_by, "policy": policy.__name__, "verifier": type(verifier).__name__}

    @property
    def lossless(self) -> bool:
        """As the verifier it is given."""
        return self.verifier.lossless

    def begin(self, model: Model, sampler: Sampler, stats: Stats, topk: int = 0, hidden: bool = False) -> Recording:
        """A verifier for one generation; arguments as those of ``PathwiseVerifier``."""
        topk = min(max(topk, WANTED), model.config.vocab_size)
        verifier = self.verifier.begin(model, sampler, stats, topk, hidden, likelihood=True)
        facts = {**self.names, "level": stats.level}
        return Recording(verifier, self.recorder, sampler, stats, model.config._name_or_path, facts)


class Recording:
    """The verifier of one generation that is recorded.

    A file that can no longer be written ends the recording, never the generation: ``stats.reasons`` says so.
    """

    def __init__(
        self,
        verifier: PathwiseVerifier,
        recorder: Recorder,
        sampler: Sampler,
        stats: Stats,
        model: str,
        facts: dict[str, Any],
    ) -> None:
        self.verifier, self.sampler, self.stats = verifier, sampler, stats
        self.recorder: Recorder | None = recorder
        self.model, self.facts = model, facts
        self.start = time.perf_counter() - stats.seconds["prefill"]
        self.before = dict.fromkeys(stats.seconds, 0.0)
        self.lines: list[dict[str, Any]] = []
        self.ids: set[int] = set()

    @property
    def meanwhile(self) -> Callable[[], None]:
        """What the host does while a pass is under way: the verifier's."""
        return self.verifier.meanwhile

    @meanwhile.setter
    def meanwhile(self, meanwhile: Callable[[], None]) -> None:
        self.verifier.meanwhile = meanwhile

    def first(self, contexts: Sequence[Context], logits: Float[Tensor, "rows last vocab"]) -> list[Verdict]:
        """The first tokens, as the verifier chooses them."""
        verdicts = self.verifier.first(contexts, logits)
        prompts = [context.tokens.tolist() for context in contexts]
        self._record(enumerate(verdicts), prompts)
        return verdicts

    def verify(self, contexts: Sequence[Context], batch: Sequence[DraftTree]) -> list[Verdict]:
        """The verifier's verdicts."""
        live = [row for row, context in enumerate(contexts) if not context.finished]
        verdicts = self.verifier.verify(contexts, batch)
        self._record((row, verdicts[row]) for row in live)
        return verdicts

    def _record(self, verdicts: Iterable[tuple[int, Verdict]], prompts: list[list[int]] | None = None) -> None:
        if self.recorder is None:
            return
        try:
            if prompts is not None:
                self.number = self.recorder.begin(self.model, {"prompts": prompts, **self.facts})
                self.ids.update(*prompts)
            self._write(self.recorder, verdicts, all(self.sampler.finished))
        except OSError as error:
            self.recorder = None
            self.stats.reason(f"a trace is cut, as it could not be written: {error}")

    def _write(self, recorder: Recorder, verdicts: Iterable[tuple[int, Verdict]], last: bool) -> None:
        seconds = self._seconds()
        for row, verdict in verdicts:
            self.lines.append(step(self.number, row, verdict, seconds))
            self.ids.update(*(self.lines[-1][name] for name in ("tokens", "committed")), *self.lines[-1]["wanted"])
        if last:
            total = round(time.perf_counter() - self.start, 6)
            self.lines.append({"type": "end", "generation": self.number, "seconds": total})
        if last or len(self.lines) >= BLOCK:
            recorder.write(self.lines)
            self.lines = []
        if last:
            recorder.texts(self.ids)

    def _seconds(self) -> dict[str, float]:
        """What each part has taken since the last step; the prompt's own pass is a pass to verify."""
        spent = {part: seconds - self.before[part] for part, seconds in self.stats.seconds.items()}
        self.before = dict(self.stats.seconds)
        spent["verify"] += spent["prefill"]
        return {part: round(spent[part], 6) for part in PARTS}


def step(generation: int, row: int, verdict: Verdict, seconds: dict[str, float]) -> dict[str, Any]:
    """A verdict's line. Of the prompt's own pass only the last token is told: the rest is known."""
    first = len(verdict.tree) - 1 if verdict.prompt else 0
    tree = DraftTree.root(int(verdict.tree.tokens[-1])) if verdict.prompt else verdict.tree
    line = {
        "type": "step",
        "generation": generation,
        "row": row,
        "tokens": tree.tokens.tolist(),
        "parents": tree.parents.tolist(),
        "probability": _rounded(tree.probability),
        "source": list(tree.source),
        "path": [0] if verdict.prompt else verdict.path.tolist(),
        "committed": verdict.tokens.tolist(),
        "wanted": [] if verdict.candidates is None else verdict.candidates[first:, :WANTED].tolist(),
        "wanted_probability": [] if verdict.likelihood is None else _rounded(verdict.likelihood[first:, :WANTED]),
        "seconds": seconds,
    }
    return {**line, "prompt": True} if verdict.prompt else line


def _rounded(probability: np.ndarray) -> list[Any]:
    rounded: list[Any] = probability.astype(float).round(4).tolist()
    return rounded
