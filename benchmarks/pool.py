"""Sessions in a pool, beside the same sessions one after another, and beside transformers' continuous batching.

    python benchmarks/pool.py [--model PATH] [--repeats N] [--json OUT]

Each session asks once, all at the same time, of another kind of work. "pool" drafts and "pool, nothing drafted" does
not; "one after another" is a wrapped ``generate`` and "plain, one after another" the model's own, all of them with the
same CPU kernels; "generate_batch" is transformers' own, with as much cache as it needs. Each starts with nothing
learnt. They take turns, in another order each time; the median over repeats counts. Where an answer is not plain's, no
speed is given. What a model costs once in a process, self-test and timing, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import specdec
from specdec import cpu
from specdec.bench.machine import machine
from specdec.bench.workloads import encode, own
from specdec.commands import console
from specdec.policies import FixedPolicy

SESSIONS = (1, 2, 4, 8, 16)
MAX_NEW_TOKENS = 48
LONGEST = 300  # tokens of a prompt
PAGE = 256  # tokens of a block of generate_batch's cache


class Run(NamedTuple):
    """What one method did for some sessions: seconds, what each answered, and target passes per session, if known."""

    seconds: float
    answers: list[list[int]]
    steps: int | None = None


Runs = dict[int, Run]  # by number of sessions


def in_pool(model: Any, prompts: list[list[int]], arguments: dict[str, Any], policy: Any) -> Runs:
    """All sessions at once, a new pool for each number of them."""
    runs = {}
    for n in SESSIONS:
        with specdec.SessionPool(model, policy=policy, max_rows=n) as pool:
            pool.generate(prompts[0][:5], max_new_tokens=1)  # the self-test
            pool.stats.reset()
            start = time.perf_counter()
            requests = [pool.submit(ids, **arguments) for ids in prompts[:n]]
            answers = [
                request.result()[0, len(ids) :].tolist() for request, ids in zip(requests, prompts, strict=False)
            ]
            runs[n] = Run(time.perf_counter() - start, answers, pool.stats.steps)
    return runs


def in_turn(model: Any, prompts: list[list[int]], arguments: dict[str, Any]) -> Runs:
    """One after another: sixteen sessions are the first eight and then eight more, so each is run once."""
    seconds, answers, steps = [], [], []
    model.generate(torch.tensor([prompts[0][:5]]), max_new_tokens=1)  # the self-test
    for ids in prompts:
        start = time.perf_counter()
        answers.append(model.generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist())
        seconds.append(time.perf_counter() - start)
        steps.append(specdec.stats(model).steps - 1 if hasattr(model.generate, "speculate") else None)
    total = [*accumulate(seconds)]
    return {n: Run(total[n - 1], answers[:n], steps[n - 1]) for n in SESSIONS}


def wrapped(model: Any, prompts: list[list[int]], arguments: dict[str, Any]) -> Runs:
    """One after another, with speculation."""
    with specdec.speculating(model):
        return in_turn(model, prompts, arguments)


def batched(model: Any, prompts: list[list[int]], arguments: dict[str, Any]) -> Runs:
    """Transformers' continuous batching of all sessions at once."""
    config = GenerationConfig(
        **arguments,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.eos_token_id,
    )
    runs = {}
    for n in SESSIONS:
        blocks = sum(-(-(len(ids) + MAX_NEW_TOKENS) // PAGE) for ids in prompts[:n])
        cache = ContinuousBatchingConfig(num_blocks=blocks + 1, max_batch_tokens=512)
        start = time.perf_counter()
        made = model.generate_batch(
            prompts[:n], generation_config=config, continuous_batching_config=cache, warmup=False, progress_bar=False
        )
        answers = {tuple(each.prompt_ids): each.generated_tokens for each in made.values()}
        runs[n] = Run(time.perf_counter() - start, [answers[tuple(ids)] for ids in prompts[:n]])
    return runs


METHODS: dict[str, Callable[[Any, list[list[int]], dict[str, Any]], Runs]] = {
    "plain, one after another": in_turn,
    "one after another": wrapped,
    "pool": lambda *given: in_pool(*given, "auto"),
    "pool, nothing drafted": lambda *given: in_pool(*given, FixedPolicy(0)),
    "generate_batch": batched,
}
PLAIN, TURNS = [*METHODS][:2]


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """As many short prompts of ours as there are sessions, of as many kinds as there are."""
    encoded = [(prompt.workload, encode(tokenizer, prompt)) for prompt in own()]
    short = [(kind, ids) for kind, ids in encoded if len(ids) <= LONGEST]
    rank = {id(ids): sum(kind == other for other, _ in short[:i]) for i, (kind, ids) in enumerate(short)}
    return [ids for _, ids in sorted(short, key=lambda each: rank[id(each[1])])][: max(SESSIONS)]


def measure(model: Any, prompts: list[list[int]], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """All methods in turn, ``repeats`` times."""
    arguments = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    runs: dict[str, list[Runs]] = {name: [] for name in METHODS}
    unavailable: dict[str, str] = {}
    for repeat in range(repeats):
        names = [*METHODS][repeat % len(METHODS) :] + [*METHODS][: repeat % len(METHODS)]
        for name in names:
            if name in unavailable:
                continue
            try:
                runs[name].append(METHODS[name](model, prompts, arguments))
                tell(f"{name}: " + ", ".join(f"{n}: {run.seconds:.1f} s" for n, run in runs[name][-1].items()))
            except Exception as error:  # another library's: it is said, and the others go on
                if name != "generate_batch":
                    raise
                unavailable[name] = f"{type(error).__name__}: {error}"
    rows = [row for name in METHODS if runs[name] for row in rows_of(name, runs)]
    return {"pool": rows, "unavailable": unavailable}


def rows_of(name: str, runs: dict[str, list[Runs]]) -> list[dict[str, Any]]:
    """One method's figures for each number of sessions."""
    rows = []
    for n in SESSIONS:
        expected, turns = runs[PLAIN][0][n].answers, statistics.median(each[n].seconds for each in runs[TURNS])
        differ = [at for at in range(n) if any(each[n].answers[at] != expected[at] for each in runs[name])]
        seconds = statistics.median(each[n].seconds for each in runs[name])
        tokens, steps = sum(map(len, expected)), runs[name][0][n].steps
        rows.append(
            {
                "method": name,
                "sessions": n,
                "tokens": tokens,
                "equal": not differ,
                "differ": differ,
                "seconds": seconds,
                "tokens_per_second": None if differ else tokens / seconds,
                "speedup": None if differ else turns / seconds,
                "tokens_per_step": tokens / steps if steps else None,
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pool.json"))
    given = parser.parse_args()
    model, tokenizer = console.load(given.model)
    cpu.install(model)
    found = measure(model, prompts_of(tokenizer), given.repeats, lambda text: print(text, flush=True))
    report = {
        "machine": machine(model, given.model),
        "max_new_tokens": MAX_NEW_TOKENS,
        "repeats": given.repeats,
        **found,
    }
    given.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'method':26} {'sessions':>8} {'tokens/s':>9} {'speed':>6} {'tokens/step':>11}")
    for row in found["pool"]:
        figures = (row["tokens_per_second"], row["speedup"], row["tokens_per_step"])
        print(f"{row['method']:26} {row['sessions']:8} " + " ".join(f"{x:9.2f}" if x else f"{'-':>9}" for x in figures))
    print(*(f"{name}: {why}" for name, why in found["unavailable"].items()), sep="\n")


if __name__ == "__main__":
    main()
