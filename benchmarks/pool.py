"""Sessions in a pool, beside the same work one request after another, and transformers' continuous batching.

    python benchmarks/pool.py [--model PATH] [--sessions 1,4] [--repeats N] [--json OUT]

Sixteen prompts of different kinds of work are answered by 1, 2, 4, 8 or 16 sessions, each of which asks for the next
prompt as soon as it has an answer. "pool" drafts and "pool, nothing drafted" does not; "one after another" is a wrapped
``generate`` and "plain, one after another" the model's own, all of them with the same CPU kernels; "generate_batch" is
transformers' own, with as many requests at a time and as much cache as it needs. Each starts with nothing learnt. They
take turns, in another order each time; the median over repeats counts. Where an answer is not plain's, no speed is
given. What a model costs once in a process, self-test and timing, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
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
PROMPTS = 16
MAX_NEW_TOKENS = 48
LONGEST = 300  # tokens of a prompt
PAGE = 256  # tokens of a block of generate_batch's cache


class Run(NamedTuple):
    """What one method did: seconds, what it answered to each prompt, and passes per session's row, if known."""

    seconds: float
    answers: list[list[int]]
    steps: int | None = None


Arguments = dict[str, Any]
Method = Callable[[Any, list[list[int]], Arguments, int], Run]  # of a model, prompts, arguments and sessions


def in_pool(model: Any, prompts: list[list[int]], arguments: Arguments, sessions: int, policy: Any = "auto") -> Run:
    """So many sessions at a time."""
    with specdec.SessionPool(model, policy=policy, max_rows=sessions) as pool:
        pool.generate(prompts[0][:5], max_new_tokens=1)  # the self-test
        pool.stats.reset()
        start = time.perf_counter()
        requests = [pool.submit(ids, **arguments) for ids in prompts]
        outputs = [request.result()[0].tolist() for request in requests]
        seconds = time.perf_counter() - start
        return Run(seconds, [out[len(ids) :] for out, ids in zip(outputs, prompts, strict=True)], pool.stats.steps)


def nothing_drafted(model: Any, prompts: list[list[int]], arguments: Arguments, sessions: int) -> Run:
    """In a pool, a token a pass."""
    return in_pool(model, prompts, arguments, sessions, FixedPolicy(0))


def in_turn(model: Any, prompts: list[list[int]], arguments: Arguments, sessions: int) -> Run:
    """One after another."""
    model.generate(torch.tensor([prompts[0][:5]]), max_new_tokens=1)  # the self-test
    start = time.perf_counter()
    answers = [model.generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist() for ids in prompts]
    return Run(time.perf_counter() - start, answers)


def wrapped(model: Any, prompts: list[list[int]], arguments: Arguments, sessions: int) -> Run:
    """One after another, with speculation."""
    with specdec.speculating(model):
        run = in_turn(model, prompts, arguments, sessions)
        return run._replace(steps=specdec.stats(model).steps - 1)


def batched(model: Any, prompts: list[list[int]], arguments: Arguments, sessions: int) -> Run:
    """Transformers' continuous batching."""
    end = model.generation_config.eos_token_id
    config = GenerationConfig(**arguments, eos_token_id=end, pad_token_id=end)
    blocks = 1 + sum(-(-(len(ids) + arguments["max_new_tokens"]) // PAGE) for ids in prompts)
    cache = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=512, max_requests_per_batch=sessions)
    start = time.perf_counter()
    made = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=cache, warmup=False, progress_bar=False
    )
    answers = {tuple(each.prompt_ids): each.generated_tokens for each in made.values()}
    return Run(time.perf_counter() - start, [answers[tuple(ids)] for ids in prompts])


METHODS: dict[str, Method] = {
    "plain, one after another": in_turn,
    "one after another": wrapped,
    "pool": in_pool,
    "pool, nothing drafted": nothing_drafted,
    "generate_batch": batched,
}
PLAIN, TURNS = [*METHODS][:2]


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """As many short prompts of ours as are needed, of as many kinds as there are."""
    encoded = [(prompt.workload, encode(tokenizer, prompt)) for prompt in own()]
    short = [(kind, ids) for kind, ids in encoded if len(ids) <= LONGEST]
    rank = {id(ids): sum(kind == other for other, _ in short[:i]) for i, (kind, ids) in enumerate(short)}
    return [ids for _, ids in sorted(short, key=lambda each: rank[id(each[1])])][:PROMPTS]


class Bench:
    """All methods on the same prompts.

    Attributes:
        runs: by method and number of sessions, one of each repeat.
        unavailable: why a method did not run.
    """

    def __init__(self, model: Any, prompts: list[list[int]], sessions: Sequence[int], max_new_tokens: int) -> None:
        self.model, self.prompts, self.sessions = model, prompts, sessions
        self.arguments: Arguments = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.runs: dict[tuple[str, int], list[Run]] = {}
        self.unavailable: dict[str, str] = {}

    def repeat(self, number: int) -> None:
        """Every method once, at each number of sessions if that makes a difference."""
        names = [*METHODS]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for sessions in (1,) if name in (PLAIN, TURNS) else self.sessions:
                if name not in self.unavailable:
                    self._run(name, sessions)

    def _run(self, name: str, sessions: int) -> None:
        try:
            run = METHODS[name](self.model, self.prompts, self.arguments, sessions)
        except Exception as error:  # another library's: it is said, and the others go on
            if name != "generate_batch":
                raise
            self.unavailable[name] = f"{type(error).__name__}: {error}"
            return
        self.runs.setdefault((name, sessions), []).append(run)
        print(f"{name}, {sessions} at a time: {run.seconds:.1f} s", flush=True)

    def results(self) -> list[dict[str, Any]]:
        """A record for each method and number of sessions."""
        return [self._record(name, sessions) for name, sessions in self.runs if name not in self.unavailable]

    def _record(self, name: str, sessions: int) -> dict[str, Any]:
        runs, expected = self.runs[name, sessions], self.runs[PLAIN, 1][0].answers
        differ = [at for at, answer in enumerate(expected) if any(run.answers[at] != answer for run in runs)]
        seconds, turns = (statistics.median(run.seconds for run in some) for some in (runs, self.runs[TURNS, 1]))
        tokens, steps = sum(map(len, expected)), runs[0].steps
        return {
            "method": name,
            "sessions": sessions,
            "tokens": tokens,
            "equal": not differ,
            "differ": differ,
            "seconds": seconds,
            "tokens_per_second": None if differ else tokens / seconds,
            "speedup": None if differ else turns / seconds,
            "tokens_per_step": tokens / steps if steps else None,
        }


def main() -> None:
    """Measure, print, and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sessions", default=",".join(map(str, SESSIONS)), help="numbers of sessions, by commas")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="how many of them")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    model, tokenizer = console.load(given.model)
    cpu.install(model)
    prompts, sessions = prompts_of(tokenizer)[: given.prompts], [int(n) for n in given.sessions.split(",")]
    bench = Bench(model, prompts, sessions, given.max_new_tokens)
    for number in range(given.repeats):
        bench.repeat(number)
    results = bench.results()
    for row in results:
        figures = (row["tokens_per_second"], row["speedup"], row["tokens_per_step"])
        print(f"{row['method']:26} {row['sessions']:8} " + " ".join(f"{x:9.2f}" if x else f"{'-':>9}" for x in figures))
    print(*(f"{name}: {why}" for name, why in bench.unavailable.items()), sep="\n")
    if given.json:
        facts = {"machine": machine(model, given.model), "prompts": len(prompts), "repeats": given.repeats}
        facts |= {"max_new_tokens": given.max_new_tokens, "pool": results, "unavailable": bench.unavailable}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
