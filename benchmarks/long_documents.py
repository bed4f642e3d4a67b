"""A real model at the length it was trained for: TriForce, n-grams and "auto" behind long documents.

    python benchmarks/long_documents.py --json benchmarks/results/long_documents.json

The documents are our own workload's, one after another, with a sentence among them that the first question asks for.
Every prompt is read once; what is timed comes after it, with our CPU kernels throughout.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import long_context
import numpy as np
import torch
import typer
from transformers import DynamicCache

from specdec import cpu
from specdec.attach import attach
from specdec.bench.machine import machine
from specdec.bench.workloads import encode, own
from specdec.commands import console
from specdec.drafters import MergedDrafter, NgramDrafter, TriForceDrafter
from specdec.policies import FixedPolicy, ThroughputPolicy
from specdec.speculate import auto_drafter

SAID, CODE = "The code of the north gate is 4719.", "4719"
QUESTIONS = (
    "What is the code of the north gate? Answer with the sentence that says it.",
    "Summarise the last of these documents in five sentences.",
)


def main(
    model: str = "demo",
    context: int = 7680,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/long_documents.json"),
) -> None:
    """Measure, print and write all."""
    target, tokenizer = console.load(model)
    cpu.install(target)
    costs = attach(target).costs
    both = MergedDrafter([NgramDrafter(), TriForceDrafter(NgramDrafter(), long_context.BUDGET)])
    methods: dict[str, Any] = {
        "plain": lambda: (NgramDrafter(), FixedPolicy(0, 0, 0)),
        "ngram": lambda: (NgramDrafter(), FixedPolicy(4, 4, 1)),
        "triforce": lambda: (TriForceDrafter(NgramDrafter(), long_context.BUDGET), FixedPolicy(4, 4, 1)),
        "both, by cost": lambda: (both, ThroughputPolicy(costs)),
        "auto": lambda: (auto_drafter(), ThroughputPolicy(costs)),
    }
    counts: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for question in QUESTIONS:
        ids = torch.tensor([asked(tokenizer, context, question)])
        cache = long_context.fed(target, ids[:, :-1], DynamicCache(config=target.config), 1024)
        for name, made in methods.items():
            counts[name].append(long_context.counted(target, ids, deepcopy(cache), *made()))
            text = counts[name][-1]["text"]
            counts[name][-1]["equal"] = bool(np.array_equal(text, counts["plain"][-1]["text"]))
            counts[name][-1]["right"] = float(CODE in tokenizer.decode(text))
            console.output.print(name, {key: value for key, value in counts[name][-1].items() if key != "text"})
    plain = sum(each["seconds"] for each in counts["plain"])
    rows = [{"method": name, **long_context.summary(each, plain)} for name, each in counts.items()]
    told = bool(counts["plain"][0]["right"])
    report = {"machine": machine(target, model), "context": context, "told": told, "long_documents": rows}
    json_path.write_text(json.dumps(report, indent=1) + "\n")


def asked(tokenizer: Any, context: int, question: str) -> list[int]:
    """So many tokens: documents, ``SAID`` two fifths into them, and a question in the model's chat template."""
    documents = [token for prompt in own(["long_document"]) for token in encode(tokenizer, prompt)]
    said = tokenizer.encode(f"\n\n{SAID}\n\n", add_special_tokens=False)
    end = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    room = context - len(said) - len(end)
    filler = (documents * (room // len(documents) + 1))[:room]
    return [*filler[: 2 * room // 5], *said, *filler[2 * room // 5 :], *end]


if __name__ == "__main__":
    typer.run(main)
