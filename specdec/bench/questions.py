"""Readers of questions: JSONL of several habits, plain text, and the TOML in which our own prompts are written."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specdec.bench.prompts import Message, Prompt

JSONL = {".jsonl", ".json", ".ndjson"}
IDS = ("id", "question_id", "custom_id", "session")  # ours; Spec-Bench's and MT-bench's; OpenAI's batches; recordings


def read(path: Path, per_session: int | None = None) -> list[Prompt]:
    """The questions of a file, or of each ``*.jsonl`` below a folder by name; the forms are in docs/workloads.md.

    Args:
        per_session: ask for that many answers of each recorded session, the first ones; by default for all.

    Raises:
        OSError: a file cannot be read.
        ValueError: nothing is asked; the message names file and line.
    """
    if path.is_dir():
        prompts = [prompt for file in sorted(path.rglob("*.jsonl")) for prompt in read(file, per_session)]
    else:
        entries = enumerate(_entries(path))
        prompts = [p for n, (where, entry) in entries for p in _asked(entry, where, path.stem, n)[:per_session]]
    if not prompts:
        raise ValueError(f"{path} holds no questions")
    return prompts


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """What the file holds, each part as an object of JSON, with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from error
    if path.suffix == ".toml":
        return _toml(text, path)
    return _lines(text, path) if path.suffix in JSONL or text.lstrip().startswith("{") else _blocks(text, path)


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a string of JSON may hold U+2028
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise _refusal(where, error) from error


def _blocks(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text)]
    return ((str(path), {"prompt": block}) for block in blocks if block)


def _toml(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    for number, entry in enumerate(content.get("prompts", ()), 1):
        where = f"{path}, prompt {number}"
        try:
            yield where, _filled(entry, content.get("texts", {}))
        except KeyError as error:
            raise _refusal(where, error) from error


def _filled(entry: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """The entry with the texts that it names written out: one before the prompt, one as the system's, a file below."""
    if "text" in entry:
        entry = {**entry, "prompt": f"{texts[entry['text']]}\n\n{entry['prompt']}"}
    if "system" in entry:
        system = {"role": "system", "content": texts[entry["system"]]}
        entry = {**entry, "messages": [system, *entry["messages"]]}
    if "file" in entry:
        fenced = f"```{entry.get('language', '')}\n{entry['file']}```"
        entry = {**entry, "prompt": f"{entry['prompt']}\n\n{fenced}", "prediction": entry["file"]}
    return entry


def _asked(entry: Any, where: str, name: str, number: int) -> list[Prompt]:
    """The prompts of one entry. By default its workload is the file's name, and its id that and the entry's number."""
    try:
        if not isinstance(entry, dict):
            raise TypeError(f"it is a {type(entry).__name__}")
        workload = str(entry.get("workload", entry.get("category", name)))
        label = str(next((entry[key] for key in IDS if key in entry), f"{name}/{number}"))
        body = entry.get("body", entry)
        if "messages" not in body:
            return [_from_turns(body, workload, label)]
        messages = tuple(_message(message) for message in body["messages"])
        if "session" in entry:
            return _from_session(messages, workload, label)
        return [_from_messages(messages, body, workload, label)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(where, error) from error


def _from_turns(entry: dict[str, Any], workload: str, label: str) -> Prompt:
    turns = _texts(entry.get("turns") or [entry["prompt"]])
    if not all(turn.strip() for turn in turns):
        raise ValueError("a turn is empty")
    return Prompt(workload, ({"role": "user", "content": turns[0]},), tuple(turns[1:]), label, *_known(entry))


def _from_messages(messages: Sequence[Message], entry: dict[str, Any], workload: str, label: str) -> Prompt:
    """An assistant's message at the end is the reference, unless one is given beside the messages."""
    prediction, reference = _known(entry)
    if messages and messages[-1]["role"] == "assistant":
        reference = reference or messages[-1]["content"]
        messages = messages[:-1]
    if not messages or messages[-1]["role"] in ("assistant", "system", "developer"):
        raise ValueError("the messages do not end in a question")
    return Prompt(workload, tuple(messages), (), label, prediction, reference)


def _from_session(messages: tuple[Message, ...], workload: str, label: str) -> list[Prompt]:
    """A prompt for each answer that is not empty: all before it, with the answer as reference."""
    prompts: list[Prompt] = []
    for i, message in enumerate(messages):
        answers = message["role"] == "assistant" and message["content"].strip()
        if answers and i > 0 and messages[i - 1]["role"] != "assistant":
            name = f"{label}/{len(prompts)}"
            prompts.append(Prompt(workload, messages[:i], id=name, reference=message["content"]))
    if not prompts:
        raise ValueError("no message of the session is answered")
    return prompts


def _known(entry: dict[str, Any]) -> tuple[str | None, str | None]:
    """The entry's prediction and reference; of a list of references, one for each turn, the first."""
    prediction, reference = entry.get("prediction"), entry.get("reference")
    if isinstance(reference, list):
        reference = next(iter(reference), None)
    _texts([text for text in (prediction, reference) if text is not None])
    return prediction, reference


def _message(message: dict[str, Any]) -> Message:
    """Role and text of a chat message: parts joined, calls of tools written after them."""
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    content = (message.get("content") or "") if calls else message["content"]
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return {"role": str(message["role"]), "content": "".join(_texts([*texts, *calls]))}


def _call(call: dict[str, Any]) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>{{"name": {json.dumps(name)}, "arguments": {written}}}</tool_call>'


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"a list of texts was due where a {type(values).__name__} stands")
    if wrong := [type(value).__name__ for value in values if not isinstance(value, str)]:
        raise TypeError(f"a text was due where a {wrong[0]} stands")
    return values


def _refusal(where: str, error: Exception) -> ValueError:
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{where}: not a JSON object with turns, messages or prompt: {reason}; see docs/workloads.md")
