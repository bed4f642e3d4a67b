"""Many generations of one conversation or agent: KV rows and memory stay from turn to turn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import nn

from specdec import adapters, cpu
from specdec.attached import attach_once
from specdec.core import Drafter, Policy
from specdec.generate import Generate
from specdec.memory import Memory
from specdec.pieces import pieces
from specdec.prefix import Prefix, why_not, why_not_now
from specdec.recorder import Recorder
from specdec.speculate import Speculate, make_drafter
from specdec.statistics import Stats
from specdec.verifiers import PathwiseVerifier

TURNS_KEPT = 100
Message = Mapping[str, Any]


class TurnStats(Stats):
    """Counts of one turn, or of all turns of a session.

    Attributes:
        turns: 1, or how many have ended.
        prompt_tokens: tokens of the prompts.
        new_tokens: tokens that were written, plainly or not.
        wall: seconds from call to result.
        why_anew: why no rows could be reused in this turn; "" where they could.
    """

    def reset(self) -> None:
        """Set every count to zero; the level and its reasons stay."""
        super().reset()
        self.turns = self.prompt_tokens = self.new_tokens = 0
        self.wall = 0.0
        self.why_anew = ""

    def add(self, turn: TurnStats) -> None:
        """Add what a turn does not report while it runs."""
        for name in ("generations", "plain_generations", "prompt_tokens", "new_tokens", "wall"):
            setattr(self, name, getattr(self, name) + getattr(turn, name))
        self.turns += 1
        self.level, self.sources, self.why_anew = turn.level, turn.sources, turn.why_anew

    def as_dict(self) -> dict[str, Any]:
        """Everything but ``sources``, as plain Python values, ready for JSON."""
        names = ("turns", "prompt_tokens", "new_tokens", "wall", "why_anew")
        return {**super().as_dict(), **{name: getattr(self, name) for name in names}}


class Session:
    """One conversation, or one agent's loop, with a model: each turn starts from what the last one has read.

    The tokens are those of plain ``generate`` on the whole prompt. KV rows of the longest prefix that a prompt has in
    common with the last turn's text are reused; text that was edited, shortened or written anew is read again from the
    first difference on. The model is not wrapped: sessions on one model do not see each other, wrapped or not, and may
    run in threads, each session in one at a time.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        tokenizer: for text and conversations; not needed for token ids.
        drafter: see ``Speculate``. With a memory, a drafter that guesses beside it; "auto" for the memory alone.
        memory: what was learnt before, or is learnt by several sessions; None to learn for this session only.
        namespace: whose part of the memory this is: a tenant, an agent. Each adapter of the model has its own in it.
        policy, verifier, trace: see ``Speculate``.
        max_cache_bytes: KV rows larger than this are not kept between turns; None for no limit.
        cpu_kernels: see ``wrap``. They are put into the model itself and stay when the session is closed, since others
            may use them by then; ``specdec.cpu.remove(model)`` takes them out.

    Attributes:
        stats: ``TurnStats`` of all turns; ``turns``: of each of the last hundred.

    Raises:
        TypeError, ValueError: for what is no model, drafter, policy or namespace.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        drafter: Drafter | str = "auto",
        memory: Memory | None = None,
        namespace: str = "",
        policy: Policy | str = "auto",
        verifier: PathwiseVerifier | str = "pathwise",
        max_cache_bytes: int | None = None,
        trace: str | Path | Recorder | None = None,
        cpu_kernels: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
            raise TypeError(f"Session: got {type(model).__name__}; give a transformers model with a generate method")
        if adapters.INSIDE in namespace:
            raise ValueError(f"a namespace is a name without NUL characters, got {namespace!r}")
        self.model: Any = getattr(model, "_orig_mod", model)
        self.tokenizer, self.memory, self.namespace = tokenizer, memory, namespace
        self.stats, self.turns = TurnStats(), deque[TurnStats](maxlen=TURNS_KEPT)
        self.closed = False
        self._prefix, self._turn_lock = Prefix(max_cache_bytes), threading.Lock()
        speculate = Speculate(_joined(drafter, memory), policy, verifier, trace=trace)
        wrapped = vars(self.model).get("generate")
        self._generate = Generate(self.model, speculate, getattr(wrapped, "shadowed", wrapped))
        speculate.trial = attach_once
        self._drafter = speculate.drafter
        reason = "" if cpu_kernels is False else cpu.install(self.model)
        if reason and cpu_kernels:
            self.stats.reason(reason)
        if why := why_not(self.model):
            self.stats.reason(f"sessions read every prompt anew: {why}")

    def generate(self, prompt: Any, prediction: Any = None, **arguments: Any) -> Any:
        """One turn: the model's continuation of a text or of token ids.

        Args:
            prompt: a text, or ids as a tensor [1, length] or a list. Any batch that ``generate`` takes will do, but
                only rows of one sequence are reused.
            prediction: a text, or ids, that the answer will resemble: a file to be edited, say.
            arguments: whatever ``generate`` takes.

        Returns:
            For a text, the text that was written; for ids, what ``generate`` returns.

        Raises:
            ValueError: the session is closed, or has no tokenizer for a text.
            RuntimeError: the session is in the middle of another turn.
        """
        if not isinstance(prompt, str):
            ids = prompt if isinstance(prompt, torch.Tensor) else torch.tensor(prompt, dtype=torch.long)
            return self._turn(ids if ids.ndim > 1 else ids[None], prediction, arguments)
        return self._say(self._encoded(prompt), prediction, arguments)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        prediction: Any = None,
        **arguments: Any,
    ) -> str:
        """One turn: the assistant's answer to a conversation, by the tokenizer's chat template.

        Args:
            messages: the conversation so far; it is not changed.
            tools: functions or schemas that the template shows to the model.
            prediction, arguments: as in ``generate``.
        """
        return self._say(self._rendered(messages, tools), prediction, arguments)

    def stream(self, prompt: str, prediction: Any = None, **arguments: Any) -> Iterator[str]:
        """``generate`` for a text, in pieces as they are written.

        The model runs in a thread of its own. Closing the iterator, or leaving its loop, ends the turn.
        """
        return self._stream(self._encoded(prompt), prediction, arguments)

    def stream_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        prediction: Any = None,
        **arguments: Any,
    ) -> Iterator[str]:
        """``chat``, in pieces as they are written; see ``stream``."""
        return self._stream(self._rendered(messages, tools), prediction, arguments)

    def reset(self) -> None:
        """Forget the rows of the last turn: for when the model's weights have changed. Memory and counts stay."""
        with self._alone():
            self._prefix.drop()

    def close(self) -> None:
        """Give up the KV rows and take no more turns. A memory stays as it is, for others. May be called again."""
        self.closed = True
        if self._turn_lock.acquire(blocking=False):  # else the turn that runs drops them at its end
            self._prefix.drop()
            self._turn_lock.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV rows kept since the last turn."""
        return self._prefix.bytes_used

    def _stream(self, ids: torch.Tensor, prediction: Any, arguments: dict[str, Any]) -> Iterator[str]:
        if arguments.get("streamer") is not None:
            raise ValueError("a stream has its own streamer; give yours to generate or chat")
        return pieces(self.tokenizer, lambda streamer: self._read(ids, prediction, {**arguments, "streamer": streamer}))

    def _say(self, ids: torch.Tensor, prediction: Any, arguments: dict[str, Any]) -> str:
        sequences = _sequences(self._read(ids, prediction, arguments))
        text: str = self.tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def _read(self, ids: torch.Tensor, prediction: Any, arguments: dict[str, Any]) -> Any:
        """A turn on a text, of which nothing is padding."""
        return self._turn(ids, prediction, {"attention_mask": torch.ones_like(ids), **arguments})

    def _turn(self, ids: Int[torch.Tensor, "rows prompt"], prediction: Any, arguments: dict[str, Any]) -> Any:
        with self._alone():
            start, stats = time.perf_counter(), self._begin(prediction)
            ids = ids.to(self.model.device)
            stats.why_anew = why_not(self.model) or why_not_now(self.model, ids, arguments)
            if self.tokenizer is not None:
                arguments = {"tokenizer": self.tokenizer, **arguments}
            try:
                output = self._generate(ids, **arguments) if stats.why_anew else self._read_on(ids, stats, arguments)
                stats.new_tokens = (_sequences(output).shape[1] - ids.shape[1]) * _sequences(output).shape[0]
                return output
            finally:
                stats.turns, stats.prompt_tokens, stats.wall = 1, ids.numel(), time.perf_counter() - start
                self.turns.append(stats)
                self.stats.add(stats)

    def _begin(self, prediction: Any) -> TurnStats:
        """Set the parts up for one turn."""
        speculate = self._generate.speculate
        stats = speculate.stats = TurnStats(self.stats)
        stats.level = self.stats.level
        speculate.namespace = adapters.within(self.namespace, adapters.active(self.model))
        speculate.drafter = self._drafter
        if prediction is not None:
            speculate.drafter = _predicting(prediction, self.tokenizer, self._drafter)
        return stats

    def _read_on(self, ids: Int[torch.Tensor, "1 prompt"], stats: TurnStats, arguments: dict[str, Any]) -> Any:
        """One turn behind the rows of the last."""
        model, sequence = self.model, None
        reader = f"{adapters.active(model)} {model.dtype} {model.device}"
        cache = self._prefix.take(model.config.get_text_config(decoder=True), ids[0].tolist(), reader)
        stats.reuse(cache.get_seq_length())
        try:
            output = self._generate(ids, **{**arguments, "past_key_values": cache})
            sequence = _sequences(output)[0].tolist()
            return output
        finally:
            self._prefix.keep(sequence)
            if self.closed:
                self._prefix.drop()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.closed:
            raise ValueError("this session is closed; make another one")
        if not self._turn_lock.acquire(blocking=False):
            raise RuntimeError("this session is in the middle of a turn: read its stream to the end, or close that")
        try:
            yield
        finally:
            self._turn_lock.release()

    def _encoded(self, text: str) -> Int[torch.Tensor, "1 prompt"]:
        ids: torch.Tensor = self._needed()(text, return_tensors="pt")["input_ids"]
        return ids

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Int[torch.Tensor, "1 prompt"]:
        render = self._needed().apply_chat_template
        ids: torch.Tensor = render(
            list(messages), tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        return ids

    def _needed(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("this session has no tokenizer: give one to Session, or pass token ids to generate")
        return self.tokenizer


def _joined(drafter: Drafter | str, memory: Memory | None) -> Drafter:
    from specdec.drafters import MergedDrafter

    if memory is None:
        return make_drafter(drafter)
    return memory if drafter == "auto" else MergedDrafter([make_drafter(drafter), memory])


def _predicting(prediction: Any, tokenizer: Any, drafter: Drafter) -> Drafter:
    from specdec.drafters import MergedDrafter, PredictedOutput

    ids = prediction.flatten().tolist() if isinstance(prediction, torch.Tensor) else prediction
    return MergedDrafter([PredictedOutput(ids, tokenizer), drafter])


def _sequences(output: Any) -> Int[torch.Tensor, "rows length"]:
    sequences: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences
