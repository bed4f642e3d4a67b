"""One thing to ask, turn by turn and as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from jinja2 import TemplateError

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
        messages: the conversation so far, the last message a user's or a tool's.
        turns: what the user says later, each after the model's own answer to all before.
        id: its name where it came from, such as ``"chat/0"``.
        prediction: a text that the answer will resemble, such as the file to be edited.
        reference: a known good answer.
    """

    workload: str
    messages: tuple[Message, ...]
    turns: tuple[str, ...] = ()
    id: str = ""
    prediction: str | None = None
    reference: str | None = None


def first_of_each(prompts: Iterable[T], count: int) -> list[T]:
    """The first ``count`` prompts of each workload, in the order given."""
    kept: dict[str, list[T]] = {}
    for prompt in prompts:
        group = kept.setdefault(prompt.workload, [])
        if len(group) < count:
            group.append(prompt)
    return [prompt for group in kept.values() for prompt in group]


def unroll(prompts: Iterable[Prompt], answer: Callable[[Prompt], str]) -> list[Prompt]:
    """One prompt per user turn, the turns before it answered by ``answer``.

    Prediction and reference stay with the first turn; a later one has "/1", "/2", ... after its id.
    """
    flat = []
    for prompt in prompts:
        messages = prompt.messages
        flat.append(replace(prompt, turns=()))
        for number, turn in enumerate(prompt.turns, 1):
            said = {"role": "assistant", "content": answer(flat[-1])}
            messages = (*messages, said, {"role": "user", "content": turn})
            flat.append(Prompt(prompt.workload, messages, id=f"{prompt.id}/{number}"))
    return flat


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of the prompt: by the tokenizer's chat template where it has one, else the messages' text in lines.

    For a template that refuses the roles, what system and tools say becomes the user's.
    """
    if not tokenizer.chat_template:
        text = "\n".join(message["content"] for message in prompt.messages) + "\n"
        return list(tokenizer(text)["input_ids"])
    try:
        return _by_template(tokenizer, prompt.messages)
    except TemplateError:
        return _by_template(tokenizer, _alternating(prompt.messages))


def _by_template(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def _alternating(messages: Iterable[Message]) -> list[Message]:
    """The same conversation with no roles but user and assistant, in turn."""
    merged: list[Message] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append({"role": role, "content": message["content"]})
    return merged
