"""What is asked: our own prompts by kind of work, or a caller's file of questions."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

Message = dict[str, str]


class _OfWorkload(Protocol):
    @property
    def workload(self) -> str: ...


T = TypeVar("T", bound=_OfWorkload)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to ask.

    Attributes:
        workload: the kind of work it belongs to.
        messages: the conversation so far, the last message the user's.
        turns: what the user says later, each after the model's own answer to all before.
    """

    workload: str
    messages: tuple[Message, ...]
    turns: tuple[str, ...] = ()


def own(names: Sequence[str] = ()) -> list[Prompt]:
    """Our prompts of the named kinds, of every kind when none is named. Raises ValueError for an unknown kind."""
    kinds = tomllib.loads(Path(__file__).with_name("workloads.toml").read_text(encoding="utf-8"))
    if unknown := set(names) - set(kinds):
        raise ValueError(f"no workload named {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    return [_prompt(kind, [entry["prompt"].strip()]) for kind in names or kinds for entry in kinds[kind]]


def read(path: Path) -> list[Prompt]:
    """The questions of a JSONL file: each line has ``turns`` (the user's, in order), ``messages`` or ``prompt``, and
    perhaps ``workload``, by default the file's name.

    Raises OSError for a file that cannot be read, ValueError for a line that asks nothing.
    """
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    prompts = [_parse(line, path.stem, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no questions")
    return prompts


def _parse(line: str, workload: str, where: str) -> Prompt:
    try:
        entry: dict[str, Any] = json.loads(line)
        workload = str(entry.get("workload", workload))
        if messages := entry.get("messages"):
            return Prompt(workload, tuple({"role": m["role"], "content": m["content"]} for m in messages))
        return _prompt(workload, entry.get("turns") or [entry["prompt"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a JSON object with turns, messages or prompt ({error!r})") from error


def _prompt(workload: str, turns: Sequence[str]) -> Prompt:
    return Prompt(workload, ({"role": "user", "content": turns[0]},), tuple(turns[1:]))


def first_of_each(prompts: Iterable[T], count: int) -> list[T]:
    """The first ``count`` prompts of each workload, in the order given."""
    kept: dict[str, list[T]] = {}
    for prompt in prompts:
        group = kept.setdefault(prompt.workload, [])
        if len(group) < count:
            group.append(prompt)
    return [prompt for group in kept.values() for prompt in group]


def unroll(prompts: Iterable[Prompt], answer: Callable[[Prompt], str]) -> list[Prompt]:
    """One prompt per user turn, the turns before it answered by ``answer``."""
    flat = []
    for prompt in prompts:
        messages = prompt.messages
        flat.append(Prompt(prompt.workload, messages))
        for turn in prompt.turns:
            said = {"role": "assistant", "content": answer(flat[-1])}
            messages = (*messages, said, {"role": "user", "content": turn})
            flat.append(Prompt(prompt.workload, messages))
    return flat


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of the prompt: by the tokenizer's chat template where it has one, else the messages' text in lines."""
    if tokenizer.chat_template:
        messages = list(prompt.messages)
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    text = "\n".join(message["content"] for message in prompt.messages) + "\n"
    return list(tokenizer(text)["input_ids"])
