"""Invented data for the page's tests: a report of every kind of outcome, and traces of any length."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from specdec.trace import Trace, read_trace

HOSTILE = '</script><img src=x onerror="document.title=1">'
TEXT = "The tide follows the moon , and twice a day the sea comes back over the sand . \n Boats wait for it ."
DRAFTERS = ("suffix", "lookahead", "ngram", "recycling")
FACTORS = {
    "plain": 1.0, "plain+kernels": 2.4, "suffix": 1.2, "auto": 1.3, "auto+kernels": 3.6, "prompt-lookup": 1.05,
    "prompt-lookup+kernels": 3.0,
}  # fmt: skip


def report() -> dict[str, Any]:
    """A benchmark: two kinds of work, a method that failed, one without figures, one slower than plain."""
    kinds = {"chat": 0.9, "code_edit": 1.6, "all": 1.2}
    results = [record(method, kind, factor) for kind, factor in kinds.items() for method in [*FACTORS, "drops-one"]]
    return {
        "version": 2,
        "machine": {
            "model": "sample", "parameters": 134_515_008, "dtype": "float32", "attention": "sdpa", "device": "a sample",
            "cores": 2, "threads": 2, "system": "none", "python": "3", "torch": "2", "transformers": "5",
            "specdec": "0",
        },
        "max_new_tokens": 64,
        "repeats": 3,
        "results": results,
        "against": [record("auto+kernels", kind, factor / 2, "plain+kernels") for kind, factor in kinds.items()],
        "parts": [part(method, kind) for method in ("suffix", "auto", "auto+kernels") for kind in kinds],
        "pass_cost": [
            {"kernels": kernels, "context": 256, "seconds": {str(n): base + 0.001 * n for n in (1, 2, 4, 8, 16, 32)}}
            for kernels, base in ((False, 0.05), (True, 0.03))
        ],
        "differences": [
            {"method": "drops-one", "workload": "chat", "prompt": 1, "position": 17, "expected": 5,
             "got": None, "margin": 1.25, "tie": False, "text": "drops-one differs"},
        ],
        "disturbance": disturbance(),
        "unavailable": {"flashspec": f"not installed {HOSTILE}"},
        "overhead": {"drafter": "recycling", "nodes": 64, "pass_ms": 80.5, "outside_ms": 2.5},
        "questions": [{"workload": "chat", "prompt": f"Why are there tides? {HOSTILE}"}],
        "outputs": ["The moon pulls the sea."],
    }  # fmt: skip


def record(method: str, workload: str, factor: float, baseline: str = "plain") -> dict[str, Any]:
    """One line of results; "drops-one" has no figures, as its tokens differ."""
    speed = FACTORS.get(method, 0.0) if method == baseline else FACTORS.get(method, 0.0) * factor
    equal = method in FACTORS
    figures = {
        "tokens_per_step": 1.0 if method.startswith("plain") else 1.4 * factor,
        "tokens_per_second": 16 * speed, "speedup": speed, "speedup_low": 0.8 * speed, "speedup_high": 1.3 * speed,
        "speedup_with_prefill": 0.95 * speed, "prefill_seconds": 0.15, "speedup_without_loops": 0.9 * speed,
    }  # fmt: skip
    return {
        "method": method, "workload": workload, "prompts": 8, "tokens": 512, "equal": equal, "baseline": baseline,
        "loops": 1, **{key: value if equal else None for key, value in figures.items()},
    }  # fmt: skip


def disturbance(disturbed: bool = False, refused: bool = False) -> dict[str, Any]:
    """What other load did to the run."""
    return {
        "spread": 0.4 if disturbed else 0.02, "allowed": 0.1, "disturbed": disturbed, "refused": refused,
        "text": "timings spread by 40%",
    }  # fmt: skip


def part(method: str, workload: str) -> dict[str, Any]:
    """What one method's steps were like."""
    return {
        "method": method, "workload": workload, "steps": 340, "tokens": 512, "drafted": 1900, "accepted": 172,
        "seconds": {"prefill": 1.2, "draft": 0.7, "verify": 9.0, "walk": 0.4, "cache": 0.2, "other": 0.5},
        "accepted_lengths": {"0": 230, "1": 70, "2": 25, "3": 10, "7": 5},
        "conditional_acceptance": [0.32, 0.5, 0.6, 0.62, 0.7],
        "sizes": {"1": 120, "5": 60, "9": 100, "17": 60},
        "by_drafter": {"suffix": {"drafted": 1900, "accepted": 172}},
    }  # fmt: skip


def trace(path: Path, tokens: int = 60, rows: int = 1, nodes: int = 8) -> Trace:
    """A trace of at least so many tokens, written and read; its third word and its label are hostile."""
    chance, words = random.Random(0), TEXT.split(" ")
    words.insert(2, HOSTILE)
    head = {
        "type": "generation", "id": 0, "prompts": [[0, 1, 2]] * rows, "drafter": "merged", "level": "tree",
        "policy": "ThroughputPolicy", "verifier": "PathwiseVerifier", "label": f"chat/0 auto {HOSTILE}",
    }  # fmt: skip
    lines: list[dict[str, Any]] = [{"type": "trace", "version": 1, "specdec": "0", "model": "sample"}, head]
    for row in range(rows):
        lines += [
            {"type": "step", "generation": 0, "row": row, **step} for step in steps(chance, len(words), tokens, nodes)
        ]
    lines += [
        {"type": "end", "generation": 0, "seconds": 1.5},
        {"type": "texts", "texts": {str(i): word if word in ",.\n" else f" {word}" for i, word in enumerate(words)}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return read_trace(path)


def steps(chance: random.Random, vocabulary: int, tokens: int, nodes: int) -> list[dict[str, Any]]:
    """The prompt's pass, then steps whose text goes round the words; some guess nothing."""
    made = [step(chance, vocabulary, 2, 0, 0) | {"prompt": True}]
    total = 1
    while total < tokens:
        guesses = chance.choice([0, 3, nodes])
        accepted = chance.randint(0, min(3, guesses))
        made.append(step(chance, vocabulary, total + 2, guesses, accepted))
        total += accepted + 1
    return made


def step(chance: random.Random, vocabulary: int, at: int, guesses: int, accepted: int) -> dict[str, Any]:
    """A tree of ``guesses`` nodes after position ``at``: the right continuation as far as accepted, then wrong ones."""
    tokens, parents = [at % vocabulary], [-1]
    for node in range(1, guesses + 1):
        right = node <= accepted
        parents.append(node - 1 if right else chance.randrange(node))
        wrong = chance.choice(
            [t for t in range(vocabulary) if t != (at + len(path_to(parents, node)) - 1) % vocabulary]
        )
        tokens.append((at + node) % vocabulary if right else wrong)
    wanted = [[(at + len(path_to(parents, node))) % vocabulary, (at + 5) % vocabulary] for node in range(len(tokens))]
    return {
        "tokens": tokens,
        "parents": parents,
        "probability": [round(0.7 ** (len(path_to(parents, node)) - 1), 4) for node in range(len(tokens))],
        "source": ["", *(chance.choice(DRAFTERS) for _ in range(guesses))],
        "path": list(range(accepted + 1)),
        "committed": [(at + 1 + i) % vocabulary for i in range(accepted + 1)],
        "wanted": wanted,
        "wanted_probability": [[0.62, 0.13] for _ in tokens],
        "seconds": {"draft": 0.0004, "verify": 0.031, "walk": 0.0011, "cache": 0.0003},
    }


def path_to(parents: list[int], node: int) -> list[int]:
    """The nodes from the root to ``node``."""
    return [node] if parents[node] < 0 else [*path_to(parents, parents[node]), node]
