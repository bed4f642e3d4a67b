"""A model's own greedy answers to a file of questions, as rows that ``specdec replay`` and suffix_cache.py play.

    python benchmarks/record.py QUESTIONS.jsonl ANSWERS.jsonl --max-new-tokens 64 --seconds 600

Kinds of work take turns, so that the answers of an interrupted run are spread over all of them. Run again, it goes on
where it stopped. Rows are ``{"session", "prompt", "response"}``, both of token ids; a conversation's turns are rows of
one session, each asked after the model's own answers to those before.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import specdec
from specdec.bench import workloads
from specdec.commands import console


def main(
    questions: Path,
    answers: Path,
    model: str = "demo",
    max_new_tokens: int = 64,
    seconds: Annotated[float, typer.Option(help="Begin no further conversation after so long.")] = float("inf"),
) -> None:
    """Append what is missing to the answers."""
    began, done = time.monotonic(), recorded(answers)
    asked = [(name, prompt) for name, prompt in named(workloads.read(questions)) if name not in done]
    target, tokenizer = console.load(model)
    specdec.wrap(target)
    with answers.open("a") as file:
        for name, prompt in track(asked, "recording", disable=not console.output.is_terminal):
            if time.monotonic() - began > seconds:
                break
            rows = [{"session": name, **row} for row in conversation(target, tokenizer, prompt, max_new_tokens)]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
    console.output.print(f"{len(recorded(answers))} of {len(done) + len(asked)} conversations are in {answers}")


def recorded(answers: Path) -> set[str]:
    """The sessions of a file of answers. A last line that was cut short is taken out of it."""
    text = answers.read_text() if answers.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        answers.write_text(whole)
    return {json.loads(line)["session"] for line in whole.splitlines()}


def named(prompts: list[workloads.Prompt]) -> list[tuple[str, workloads.Prompt]]:
    """A name for each prompt, and kinds of work in turn."""
    kinds: dict[str, list[tuple[str, workloads.Prompt]]] = {}
    for prompt in prompts:
        kind = kinds.setdefault(prompt.workload, [])
        kind.append((f"{prompt.workload}/{len(kind)}", prompt))
    return [each for turn in itertools.zip_longest(*kinds.values()) for each in turn if each is not None]


def conversation(
    model: Any, tokenizer: Any, prompt: workloads.Prompt, max_new_tokens: int
) -> Iterator[dict[str, list[int]]]:
    """What was asked and answered in each turn of one conversation, without the token that ends an answer."""
    messages = list(prompt.messages)
    for turn in (None, *prompt.turns):
        if turn is not None:
            messages.append({"role": "user", "content": turn})
        ids = workloads.encode(tokenizer, workloads.Prompt(prompt.workload, tuple(messages)))
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens)
        answer = output[0, len(ids) :].tolist()
        if answer[-1] == tokenizer.eos_token_id:
            answer.pop()
        yield {"prompt": ids, "response": answer}
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})


if __name__ == "__main__":
    typer.run(main)
